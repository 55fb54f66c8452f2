"""`BSRLinear`: `nn.Linear` with its weight in BSR format."""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from torchao_superblock.bsr.casting import cast_like
from torchao_superblock.bsr.folded_activation import FoldedActivation, is_watched
from torchao_superblock.bsr.format import (
    bsr_parts,
    bsr_to_dense,
    check_bsr,
    dense_to_bsr,
    infer_blocksize,
    nonzero_blocks,
)
from torchao_superblock.bsr.index_record import IndexRecord
from torchao_superblock.bsr.weight import BSRWeight, TracedBSRWeight
from torchao_superblock.common.all_or_nothing import all_or_nothing
from torchao_superblock.common.blocks import block_grid, padded_shape, parse_blocksize
from torchao_superblock.common.kept_blocks import KeptBlocks
from torchao_superblock.common.modules import block_masks_of, copy_hooks
from torchao_superblock.common.sharding import is_dtensor
from torchao_superblock.common.swappable import own_methods, shape_obstacle, twin_of
from torchao_superblock.ops import ACTIVATIONS, bsr_linear, build_plan
from torchao_superblock.ops.checks import DTYPES
from torchao_superblock.ops.op import trainable_linear

# nn.MultiheadAttention's out_proj is an nn.Linear under another name.
LINEAR_TYPES = (nn.Linear, NonDynamicallyQuantizableLinear)


def conversion_obstacle(linear: nn.Module) -> tuple[str, str] | None:
    """Why this module cannot become its block-sparse twin whatever its zeros: `(code, reason)`, or None."""
    if parametrize.is_parametrized(linear):
        if any(True for _ in block_masks_of(linear)):
            return "not_squashed", "its block mask is not squashed yet; call squash_mask() first"
        names = ", ".join(linear.parametrizations)
        return "parametrized", f"it has another parametrization (of {names}); remove it first"
    if isinstance(linear._parameters.get("weight"), UninitializedParameter):
        return "uninitialized", "its weight has no shape yet; run the model once first"
    twin = twin_of(type(linear))
    if twin is None:
        return "linear_subclass", _of_a_subclass(linear)
    reason = None if twin.obstacle is None else twin.obstacle(linear)
    if reason is not None:
        return "no_twin", reason
    weight = linear._parameters.get("weight")
    if weight is None:
        return "parametrized", "its weight is not a Parameter (torch.nn.utils.prune?); make it one"
    if is_dtensor(weight):
        return "sharded", "its weight is sharded (DTensor); swap before distributing the model"
    if type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
        return (
            "weight_subclass",
            f"its weight is a {type(weight.data).__name__}, not a plain tensor",
        )
    is_linear = twin.bsr.DENSE == BSRLinear.DENSE
    if weight.layout not in (torch.strided, *[torch.sparse_bsr] * is_linear):
        return (
            "sparse_layout",
            f"its weight has the layout {weight.layout}; make it dense"
            + ", or weight.to_sparse_bsr(blocksize)" * is_linear,
        )
    features = torch.empty(twin.bsr.features_of(linear), device="meta")
    shape = tuple(twin.bsr.weight_of(features).shape)
    if tuple(weight.shape) != shape or weight.numel() == 0:
        return (
            "odd_shape",
            f"its weight has shape {tuple(weight.shape)} where its features say {shape}",
        )
    more = customisation(linear)
    if more is not None:
        return "customised", more
    if weight.is_meta:
        return "meta_device", "its weight is on the meta device and has no zeros to look at"
    if weight.layout is torch.sparse_bsr:
        try:
            parts = bsr_parts(weight)
            check_bsr(*parts, tuple(weight.shape), tuple(parts[2].shape[1:]), "its weight")
        except (TypeError, ValueError) as error:
            return "invalid_indices", str(error)
    if weight.dtype not in DTYPES:
        return "unsupported_dtype", f"its dtype is {weight.dtype}"
    bias = linear.bias
    if bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return (
            "unsupported_dtype",
            f"its bias ({bias.dtype}, {bias.device}) differs from its weight ({weight.dtype}, {weight.device})",
        )
    return None


def bsr_type(module: nn.Module) -> type["BSRLinear"] | None:
    """What would stand for a module of this type, parametrized or not; None if nothing does."""
    twin = twin_of(parametrize.type_before_parametrizations(module))
    if twin is not None:
        return twin.bsr
    return BSRLinear if isinstance(module, nn.Linear) else None


def _of_a_subclass(linear: nn.Module) -> str:
    cls = type(linear)
    if not isinstance(linear, nn.Linear):
        return f"it is a {cls.__name__}, which has no block-sparse twin"
    return (
        f"it is a {cls.__name__}, whose own methods ({', '.join(own_methods(cls))}) the layer in its place would not "
        f"have; if it computes x @ weight.T + bias, register_twin({cls.__name__}, BSRLinear, 'weight') of "
        "torchao_superblock.bsr.layers lets it be swapped"
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether one was set on the instance; that of its class, put back by who replaced it before, does not count."""
    forward = vars(module).get("forward")
    of_its_class = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not (of_its_class and forward.__self__ is module)


def customisation(linear: nn.Module) -> str | None:
    """What a linear layer, dense or block-sparse, has that one in its place would lose; None if nothing."""
    if "_hf_hook" in vars(linear):
        return (
            "accelerate's hooks move its weights to and from elsewhere (device_map, cpu_offload); call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) first, and dispatch the model afterwards"
        )
    own = {"weight", "bias"}
    if isinstance(linear, BSRLinear):
        own = {"values", "bias", "crow_indices", "col_indices", *linear.DERIVED}
    extra = [*linear._modules, *((linear._buffers | linear._parameters).keys() - own)]
    if not extra and not has_own_forward(linear):
        return None
    what = f"{', '.join(sorted(extra))} of its own" if extra else "a forward of its own"
    return f"it has {what}, which the layer in its place would lose"


@torch.fx.wrap  # one call in a traced graph: what is decided in here is decided when the graph runs
def _run(
    x: Tensor,
    in_features: int,
    out_features: int,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    plan: Tensor | None,
) -> Tensor:
    shape = x.shape
    if not shape or shape[-1] != in_features:
        raise ValueError(
            f"BSRLinear: x must have {in_features} features in its last dimension, got shape {tuple(x.shape)}"
        )
    # With gradients, keeping what the activation needs for its backward is faster than computing it again.
    call = trainable_linear if torch.is_grad_enabled() else bsr_linear
    return call(x, crow_indices, col_indices, values, bias, out_features, activation, plan)


class BSRLinear(nn.Module):
    """`y = activation(x @ weight.T + bias)` with `weight` in BSR format: only stored blocks are multiplied.

    Trainable: `values` is a Parameter, so a swapped model can be fine-tuned with its sparsity fixed. The weight is
    kept in the canonical order of :mod:`torchao_superblock.bsr.format`, which is also what `state_dict` holds.

    The indices are buffers and must not be averaged: with `torch.optim.swa_utils.AveragedModel` leave `use_buffers`
    at False. A forward raises RuntimeError if they were written in place and hold another pattern than before (only
    `load_state_dict` may change it); other index tensors in their place, as `torch.func.functional_call` puts
    there, are used as they are.

    Loading a `state_dict` is atomic for the layer: bad content raises and changes nothing of it, and so does a part
    of its tensors, with `strict=False` too. Content with another
    number of blocks replaces the `values` Parameter; build the optimizer after loading. A `state_dict` does not say
    which features were dropped: save and load a model that lost some with `save_bsr` and `load_bsr`.

    Args:
        in_features: K.
        out_features: N.
        blocksize: int, or `(rows, cols)` = (out, in). Where it does not divide `(N, K)`, the last block row or column
            is padded: what its blocks hold beyond the weight counts for nothing, as long as it is finite, and has a
            gradient of zero.
        crow_indices: `(R + 1,)` int32, R = ceil(N / rows).
        col_indices: `(nnz,)` int32, sorted and unique in each block row.
        values: `(nnz, rows, cols)`, float32, float64, float16 or bfloat16. A Parameter is taken as it is.
        bias: `(N,)` of the same dtype, or None. A Parameter is taken as it is.
        activation: `"none"`, `"relu"`, `"gelu"`, `"gelu_tanh"`, `"silu"` or `"quick_gelu"`, applied to the output.
        dense_shape: `(N, K)` of the `nn.Linear` that the layer stands for, where features of that were dropped;
            None where none were.

    Attributes:
        weight: a :class:`BSRWeight` that stands for the `(N, K)` weight.
        dense_shape: as given, or else the layer's own shape.
        place: where the activation was folded into the layer, the :class:`FoldedActivation` that keeps its place, in a
            tuple; else None. Hooks that are put on either of the two see what they saw before: the activation is
            applied in its place while they are there.

    Raises:
        ValueError, TypeError: the arguments break an invariant; the message says which.

    Example:
        >>> linear = torch.nn.Linear(128, 64)
        >>> with torch.no_grad():
        ...     _ = linear.weight[:, 32:].zero_()
        >>> layer = BSRLinear.from_dense(linear, blocksize=32)
        >>> layer
        BSRLinear(in_features=128, out_features=64, bias=True, blocksize=(32, 32), sparsity=0.7500)
        >>> torch.allclose(layer(torch.ones(128)), linear(torch.ones(128)), atol=1e-5)
        True
    """

    DERIVED: tuple[str, ...] = ("plan",)
    """Names of the buffers that are worked out from the indices."""
    DENSE: str = "nn.Linear"
    """What the layer stands for, in messages and in files."""
    LEAST_SPARSITY: float = 0.0
    """What the table of break-even points, which was made with linear layers, is raised to."""
    _dense_shape: tuple[int, int] | None = None
    _index_record: IndexRecord | None = None  # what `plan` was made from
    place: tuple[FoldedActivation] | None = (
        None  # of the activation, if it was folded into the layer
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocksize: int | tuple[int, int],
        crow_indices: Tensor,
        col_indices: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        dense_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise ValueError(
                f"BSRLinear: in_features and out_features must be at least 1, got {in_features} and {out_features}"
            )
        if dense_shape is not None:
            pair = isinstance(dense_shape, tuple | list) and len(dense_shape) == 2
            if not pair or not all(type(size) is int for size in dense_shape):
                raise TypeError(
                    f"BSRLinear: dense_shape must be a pair (out_features, in_features) of ints, got {dense_shape!r}"
                )
            if dense_shape[0] < out_features or dense_shape[1] < in_features:
                raise ValueError(
                    f"BSRLinear: dense_shape must be at least ({out_features}, {in_features}), the shape of the layer "
                    f"itself, got {dense_shape!r}"
                )
            self._dense_shape = tuple(dense_shape)
        self.in_features = in_features
        self.out_features = out_features
        self.blocksize = parse_blocksize(blocksize)
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"BSRLinear: unknown activation {activation!r}; choose one of {', '.join(map(repr, ACTIVATIONS))}"
            )
        self.activation = activation
        self._check(crow_indices, col_indices, values, bias, "BSRLinear")
        self.values = _as_parameter(values)
        self.bias = None if bias is None else _as_parameter(bias)
        self._set_indices(crow_indices, col_indices)

    def _check(
        self,
        crow_indices: Tensor,
        col_indices: Tensor,
        values: Tensor,
        bias: Tensor | None,
        name: str,
    ) -> None:
        shape = (self.out_features, self.in_features)
        check_bsr(crow_indices, col_indices, values, shape, self.blocksize, name)
        if values.dtype not in DTYPES:
            raise TypeError(
                f"{name}: values must be float32, float64, float16 or bfloat16, got {values.dtype}"
            )
        if bias is None:
            return
        if tuple(bias.shape) != (self.out_features,):
            raise ValueError(
                f"{name}: bias must have shape ({self.out_features},), got {tuple(bias.shape)}"
            )
        if bias.dtype != values.dtype or bias.device != values.device:
            raise ValueError(
                f"{name}: bias must have the dtype and device of values ({values.dtype}, {values.device}), "
                f"got {bias.dtype}, {bias.device}"
            )

    def _set_indices(self, crow_indices: Tensor, col_indices: Tensor) -> None:
        self.register_buffer("crow_indices", crow_indices.contiguous())
        self.register_buffer("col_indices", col_indices.contiguous())
        _, n_block_cols = block_grid((self.out_features, self.in_features), self.blocksize)
        plan = build_plan(crow_indices, col_indices, n_block_cols, self.blocksize)
        self.register_buffer("plan", plan, persistent=False)
        self._index_record = IndexRecord(self.crow_indices, self.col_indices)

    def _plan_for(self, crow_indices: Tensor, col_indices: Tensor, plan: Tensor) -> Tensor | None:
        """`plan` if it was made from these tensors, else None."""
        record = self._index_record
        return plan if record is not None and record.matches(crow_indices, col_indices) else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BSRLinear":
        record, crow_indices, col_indices = self._index_record, self.crow_indices, self.col_indices
        super()._apply(fn, recurse)
        if (
            record is not None
            and record.crow_indices is crow_indices
            and record.col_indices is col_indices
        ):
            # `fn` made copies of the plan and of what it was made from.
            self._index_record = record.moved(self.crow_indices, self.col_indices)
        return self

    @staticmethod
    def features_of(module: nn.Module) -> tuple[int, int]:
        """`(out_features, in_features)` of a dense module that such a layer can stand for."""
        return module.out_features, module.in_features

    @staticmethod
    def settings_of(module: nn.Module) -> dict[str, Any]:
        """What the constructor has to know of such a module besides."""
        return {}

    @staticmethod
    def matrix_of(weight: Tensor) -> Tensor:
        """The `(N, K)` matrix, a view, that the weight of such a module is; also of a tensor like it."""
        return weight

    @staticmethod
    def weight_of(matrix: Tensor) -> Tensor:
        """The weight, a view, that such a module has for a `(N, K)` matrix."""
        return matrix

    @staticmethod
    def loss_of(module: nn.Module) -> str | None:
        """Why such a module is taken to be faster as it is, however sparse: a sentence, or None."""
        return None

    def dense_module(self, matrix: Tensor, bias: nn.Parameter | None) -> nn.Module:
        """Such a module with these values.

        Args:
            matrix: `(N, K)`, not necessarily of the layer's own features.
            bias: `(N,)`, or None.
        """
        N, K = matrix.shape
        linear = nn.Linear(K, N, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(matrix, self.values.requires_grad)
        linear.bias = bias
        return linear.train(self.training)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        blocksize: int | tuple[int, int] | None = None,
        *,
        pad: bool = False,
        keep: KeptBlocks | None = None,
    ) -> "BSRLinear":
        """Convert a linear layer whose weight has blocks of zeros.

        `training`, `requires_grad`, device, dtype and hooks carry over; the `bias` Parameter is the same object.

        Args:
            linear: an `nn.Linear`. If its weight has the layout `torch.sparse_bsr`, the stored blocks are taken as
                they are.
            blocksize: int, `(rows, cols)`, or None to read it off the zeros
                (:func:`torchao_superblock.bsr.format.infer_blocksize`).
            pad: take shapes that are not a multiple of the block size: the last blocks are stored padded with zeros.
            keep: blocks to store whatever they hold, as one that is trained on may be zero now.

        Raises:
            TypeError: `linear` is not an `nn.Linear`, nor of a type that is registered as one, or its dtype is not
                supported.
            ValueError: the shape is not a multiple of the block size, without `pad`, or there is no block of zeros to
                read it off.
            RuntimeError: the block mask of `linear` is not squashed yet.
        """
        if getattr(bsr_type(linear), "DENSE", None) != cls.DENSE:
            raise TypeError(f"expected an {cls.DENSE}, got {type(linear).__name__}")
        what = "linear layer" if cls.DENSE == "nn.Linear" else cls.DENSE
        obstacle = conversion_obstacle(linear)
        if obstacle is not None:
            code, reason = obstacle
            error = {"not_squashed": RuntimeError, "meta_device": ValueError}.get(code, TypeError)
            raise error(f"cannot convert this {what} to {cls.__name__}: {reason}")
        weight = cls.matrix_of(linear.weight)
        shape = tuple(weight.shape)
        stored = bsr_parts(linear.weight) if linear.weight.layout is torch.sparse_bsr else None
        if stored is not None:
            size = tuple(stored[2].shape[1:])
            if blocksize is not None and parse_blocksize(blocksize) != size:
                raise ValueError(
                    f"cannot convert this {what} to {cls.__name__}: its weight is stored in blocks of {size}, "
                    f"not of {blocksize}; leave blocksize out"
                )
            blocksize = size
        if blocksize is None:
            blocksize = infer_blocksize(weight, pad=pad)
            if blocksize is None:
                raise ValueError(
                    f"cannot convert this {what} to {cls.__name__}: its shape {shape} is not a multiple of "
                    "8; pass a blocksize that divides it, or pad=True to pad its last blocks (swap_to_bsr takes both)"
                )
            if nonzero_blocks(weight, blocksize).all():
                raise ValueError(
                    f"cannot convert this {what} to {cls.__name__}: its weight of shape {shape} has no block of "
                    "zeros to read the block size off; pass blocksize to convert it all the same"
                )
        blocksize = parse_blocksize(blocksize)
        unfit = None if pad else shape_obstacle(shape, blocksize)
        if unfit is not None:
            raise ValueError(
                f"cannot convert this {what} to {cls.__name__}: {unfit}; pass pad=True to pad its last blocks "
                "(swap_to_bsr and to_bsr_linear take it)"
            )
        with torch.inference_mode(False):  # tensors made in inference mode could never be trained
            if stored is None:
                stored = dense_to_bsr(weight, blocksize, keep)
            crow_indices, col_indices, values = stored
            layer = cls(
                shape[1],
                shape[0],
                blocksize,
                crow_indices,
                col_indices,
                nn.Parameter(values, requires_grad=linear.weight.requires_grad),
                linear.bias,
                **cls.settings_of(linear),
            )
        layer.train(linear.training)
        copy_hooks(linear, layer)  # the caller may go on using `linear`
        return layer

    @property
    def weight(self) -> BSRWeight | TracedBSRWeight:
        """A stand-in for the `(N, K)` weight: works in `F.linear`, knows its shape, dtype and device."""
        kind = TracedBSRWeight if torch.compiler.is_compiling() else BSRWeight
        return kind((self.out_features, self.in_features), *self.blocks())

    @property
    def nnz(self) -> int:
        """Number of stored blocks."""
        return self.values.shape[0]

    @property
    def sparsity(self) -> float:
        """Fraction of blocks that are not stored."""
        R, C = block_grid((self.out_features, self.in_features), self.blocksize)
        return 1.0 - self.nnz / (R * C)

    @property
    def dense_shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the `nn.Linear` that the layer stands for."""
        return self._dense_shape or (self.out_features, self.in_features)

    @property
    def applied_activation(self) -> str:
        """`activation`, or `"none"` while hooks watch what comes between it and the rest of the layer."""
        if self.place is None or self.activation == "none":
            return self.activation
        return "none" if is_watched(self, self.place[0]) else self.activation

    @property
    def is_narrowed(self) -> bool:
        """Whether features of the `nn.Linear` that the layer stands for were dropped."""
        return self.dense_shape != (self.out_features, self.in_features)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "the weight of a BSRLinear is stored as blocks and cannot be assigned; change layer.values, or convert "
                "an nn.Linear that holds the new weight with to_bsr_linear"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` -> `(..., out_features)`, contiguous."""
        # One by one: unpacking arguments takes as long as a question about a tensor.
        crow_indices, col_indices, values, bias, plan = self.operands()
        return _run(
            x,
            self.in_features,
            self.out_features,
            crow_indices,
            col_indices,
            values,
            bias,
            self.applied_activation,
            plan,
        )

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """`(crow_indices, col_indices, values, bias, plan)`, as the op takes them."""
        if torch.compiler.is_compiling():
            return self._tensors()
        # nn.Module.__getattr__ takes longer for each than a small kernel takes for its work.
        parameters, buffers = self._parameters, self._buffers
        try:
            crow_indices, col_indices = buffers["crow_indices"], buffers["col_indices"]
            values, plan = parameters["values"], buffers["plan"]
            bias = parameters["bias"] if "bias" in parameters else self.bias
        except KeyError:  # parametrized, or kept elsewhere by what shards the model
            crow_indices, col_indices, values, bias, plan = self._tensors()
        return (
            crow_indices,
            col_indices,
            values,
            bias,
            self._plan_for(crow_indices, col_indices, plan),
        )

    def blocks(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`(crow_indices, col_indices, values, plan)` for the op; no plan if it is not of these indices."""
        crow_indices, col_indices, values, _, plan = self._tensors()
        if not torch.compiler.is_compiling():
            plan = self._plan_for(crow_indices, col_indices, plan)
        return crow_indices, col_indices, values, plan

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        return self.crow_indices, self.col_indices, self.values, self.bias, self.plan

    def to_dense(self) -> Tensor:
        """The dense `(out_features, in_features)` weight; differentiable in `values`."""
        shape = (self.out_features, self.in_features)
        return bsr_to_dense(self.crow_indices, self.col_indices, self.values, shape)

    def extra_repr(self) -> str:
        options = "" if self.activation == "none" else f", activation={self.activation!r}"
        if self.is_narrowed:
            options += f", dense_shape={self.dense_shape}"
        padded = padded_shape((self.out_features, self.in_features), self.blocksize)
        if padded is not None:
            options += f", padded={padded}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize={self.blocksize}, sparsity={self.sparsity:.4f}{options}"
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the version, where torch.save keeps it: blocks do not say where the weight ends in the last ones.
        metadata = getattr(destination, "_metadata", {}).get(prefix.removesuffix("."), {})
        metadata["shape"] = (self.out_features, self.in_features)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        state_dict = _with_values(state_dict, prefix)
        assign = local_metadata.get("assign_to_params_buffers", False)
        n_errors = len(error_msgs)
        own = [*self._parameters.values(), *self._buffers.values()]
        own = [tensor for tensor in own if tensor is not None and not tensor.is_meta]
        try:
            with torch.inference_mode(False), torch.no_grad(), all_or_nothing(self, own):
                try:
                    self._check_shape(local_metadata, prefix)
                    self._make_room_for(state_dict, prefix, assign)
                except (TypeError, ValueError) as error:
                    error_msgs.append(str(error))
                    raise _Refused from error
                # In place, a tensor made in inference mode can be written nowhere else.
                with torch.inference_mode(any(tensor.is_inference() for tensor in own)):
                    super()._load_from_state_dict(state_dict, prefix, *rest)
                if len(error_msgs) > n_errors:
                    raise _Refused
                if not self.values.is_contiguous():  # assigned
                    self.values = _as_parameter(self.values)
                if not self.crow_indices.is_meta:
                    self._set_indices(self.crow_indices, self.col_indices)
        except _Refused:  # torch raises once it has been through the whole model
            pass

    def _check_shape(self, local_metadata: dict[str, Any], prefix: str) -> None:
        shape, own = local_metadata.get("shape"), (self.out_features, self.in_features)
        if shape is not None and tuple(shape) != own:
            name = prefix.removesuffix(".") or type(self).__name__
            raise ValueError(
                f"{name}: the state dict is of a layer of shape {tuple(shape)}, this one has {own}; load it into a "
                "model of the same architecture. Dropped features make a difference too: save_bsr and load_bsr know "
                "them"
            )

    def _make_room_for(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> None:
        """Check what is about to be loaded as a whole; resize what holds another number of blocks.

        Raises:
            TypeError, ValueError: it must not be loaded; nothing has been changed.
        """
        name = prefix.removesuffix(".") or "BSRLinear"
        if f"{prefix}parametrizations.weight.original" in state_dict:
            raise ValueError(
                f"{name}: the state dict holds a weight with its parametrization (a block mask?), but this layer "
                "stores blocks; load it into the prepared model, call squash_mask() there, and swap that"
            )
        if f"{prefix}weight" in state_dict:
            raise ValueError(
                f"{name}: the state dict holds a dense weight, but this layer stores blocks; load it into the dense "
                "model and swap that, or save the swapped model"
            )
        own = {key: getattr(self, key) for key in ("crow_indices", "col_indices", "values", "bias")}
        own = {key: tensor for key, tensor in own.items() if tensor is not None}
        loaded = {key: state_dict[prefix + key] for key in own if prefix + key in state_dict}
        for key, tensor in loaded.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: {key} must be a tensor, got {type(tensor).__name__}")
            if tensor.is_meta and not own[key].is_meta and not assign:
                raise ValueError(
                    f"{name}: {key} of the state dict is on the meta device and has no content to load; load a state "
                    "dict with values, or pass assign=True to put the empty tensor in place"
                )
            if own[key].is_meta and not assign:
                raise ValueError(
                    f"{name}: this layer is on the meta device; load with load_state_dict(..., assign=True)"
                )
        missing = [key for key in own if key not in loaded]
        if missing:
            # Whether torch will raise for a missing key is not known here, so a part is not loaded even if it will not.
            if not all(_is_same(own[key], tensor) for key, tensor in loaded.items()):
                raise ValueError(
                    f"{name}: the state dict holds {', '.join(loaded)} but not {', '.join(missing)}, and a layer is "
                    "loaded as a whole; to load a part, fill in the rest: "
                    "model.load_state_dict(model.state_dict() | state_dict)"
                )
            return
        new = loaded
        if not assign:
            # The layer keeps its dtype and device; indices of another dtype are an error, not a cast.
            for key, tensor in new.items():
                if key in ("values", "bias"):
                    tensor = cast_like(tensor, own[key], f"{name}: {key}")
                new[key] = tensor.to(own[key].device)
        if new["crow_indices"].shape != self.crow_indices.shape:
            raise ValueError(
                f"{name}: crow_indices must have {len(self.crow_indices)} entries, the state dict holds "
                f"{tuple(new['crow_indices'].shape)}; a model without its dead features is saved by save_bsr and "
                "loaded by load_bsr"
            )
        self._check(new["crow_indices"], new["col_indices"], new["values"], new.get("bias"), name)
        if new["values"].shape != self.values.shape:
            values = self.values.new_empty(new["values"].shape)
            self.values = nn.Parameter(values, self.values.requires_grad)
            self.col_indices = self.col_indices.new_empty(new["col_indices"].shape)


def _with_values(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Blocks that a file has under the name `weight`, lest a dense model overlook them, are `values` here."""
    weight = state_dict.get(f"{prefix}weight")
    if not isinstance(weight, Tensor) or weight.dim() != 3 or f"{prefix}values" in state_dict:
        return state_dict
    renamed = {**state_dict, f"{prefix}values": weight}
    del renamed[f"{prefix}weight"]
    return renamed


def _is_same(own: Tensor, loaded: Tensor) -> bool:
    """Whether loading a tensor would change nothing."""
    if own.is_meta or loaded.is_meta or (own.dtype, own.shape) != (loaded.dtype, loaded.shape):
        return False
    return torch.equal(own, loaded.to(own.device))


class _Refused(Exception):
    """What was to be loaded must not be; the reason has been noted."""


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        if tensor.is_contiguous():
            return tensor
        return nn.Parameter(tensor.data.contiguous(), tensor.requires_grad)
    return nn.Parameter(tensor.contiguous())
