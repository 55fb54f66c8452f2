"""`BSRWeight`: the tensor that stands in for a swapped layer's `.weight`.

Much code reads a child's weight instead of calling the child: `nn.TransformerEncoderLayer` does to decide on its fast
path, `nn.MultiheadAttention` hands `out_proj.weight` to `F.multi_head_attention_forward`, torchvision's Swin
hands `qkv.weight` to `F.linear`. A dense stand-in would be silently slow and a `torch.sparse_bsr` one would crash
in some of them. This one answers what a weight is asked (shape, dtype, device), makes `F.linear` call the
block-sparse op, and refuses everything else with advice. Having a `__torch_function__` is also what turns torch's
fast paths off.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_superblock.bsr.format import bsr_to_dense
from torchao_superblock.ops import bsr_linear

_ADVICE = (
    "call the layer itself or torch.nn.functional.linear(x, layer.weight, layer.bias), train layer.values, or get a "
    "dense copy with layer.to_dense()"
)


def _without_dispatch(function: Callable) -> Callable:
    """The same function with its `has_torch_function` check answering False.

    `F.multi_head_attention_forward` hands itself to `__torch_function__` when an argument has one. Running its own
    body from there, so that the `F.linear` inside meets the BSRWeight, needs a copy that does not hand over again.
    """
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, "has_torch_function": lambda _: False},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_multi_head_attention_forward = _without_dispatch(F.multi_head_attention_forward)


class _StandIn:
    """What the two stand-ins share. Attributes: `crow_indices, col_indices, values, plan` and `shape`."""

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    plan: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return _multi_head_attention_forward(*args, **kwargs)
        return cls._other(func, args, kwargs)

    @classmethod
    def _other(cls, func: Callable, args: tuple, kwargs: dict) -> Any:
        # Not a TypeError: Python's operators would swallow it and print their own words.
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
        raise NotImplementedError(
            f"the weight of a BSRLinear is stored as blocks and does not support {name}; {_ADVICE}"
        )

    def to_dense(self) -> Tensor:
        """The dense `(N, K)` weight; differentiable in `values`."""
        return bsr_to_dense(self.crow_indices, self.col_indices, self.values, tuple(self.shape))


def _linear(input: Tensor, weight: _StandIn, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, _StandIn):
        return _StandIn._other(F.linear, (), {})
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"F.linear: x has {input.shape[-1]} features in its last dimension, but the weight is {tuple(weight.shape)}"
        )
    return bsr_linear(
        input,
        weight.crow_indices,
        weight.col_indices,
        weight.values,
        bias,
        weight.shape[0],
        "none",
        weight.plan,
    )


class BSRWeight(_StandIn, Tensor):
    """A `(N, K)` weight in BSR format that works in `F.linear`.

    Has the shape, dtype, device and `requires_grad` of the weight, and :meth:`to_dense`. `F.linear` (also inside
    `F.multi_head_attention_forward`) calls :func:`torchao_superblock.ops.bsr_linear`, with gradients reaching
    `values`. Every other function raises NotImplementedError with advice.

    Args:
        shape: `(N, K)`.
        crow_indices: `(R + 1,)` int32.
        col_indices: `(nnz,)` int32.
        values: `(nnz, r, c)`.
        plan: from :func:`torchao_superblock.ops.build_plan`, or None.

    Example:
        >>> layer = BSRLinear.from_dense(linear)  # doctest: +SKIP
        >>> torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))  # doctest: +SKIP
        True
    """

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int],
        crow_indices: Tensor,
        col_indices: Tensor,
        values: Tensor,
        plan: Tensor | None = None,
    ) -> "BSRWeight":
        self = Tensor._make_wrapper_subclass(
            cls,
            shape,
            dtype=values.dtype,
            device=values.device,
            requires_grad=values.requires_grad,
        )
        # C++ that asks no __torch_function__ (to_dlpack for one) would read the wrapper's storage, which is nowhere.
        with torch._C.DisableTorchFunctionSubclass():
            torch._C._set_storage_data_ptr_access_error_msg(
                self.untyped_storage()._cdata, _NO_STORAGE
            )
        self.crow_indices = crow_indices
        self.col_indices = col_indices
        self.values = values
        self.plan = plan
        return self

    # torch.Tensor.to_dense would be found first otherwise, and Tensor's own repr reads elements.
    to_dense = _StandIn.to_dense

    def __repr__(self, *, tensor_contents: object = None) -> str:
        nnz, r, c = self.values.shape
        return (
            f"BSRWeight(shape={tuple(self.shape)}, blocksize=({r}, {c}), nnz={nnz}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    @classmethod
    def _other(cls, func: Callable, args: tuple, kwargs: dict) -> Any:
        # Asking what a tensor is (getters and the likes of size()) is answered by the wrapper itself.
        if func in _METADATA or (
            getattr(func, "__name__", "") == "__get__" and func not in _OF_PARAMETERS
        ):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return super()._other(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _StandIn._other(func, args, kwargs or {})


_NO_STORAGE = (
    f"the weight of a BSRLinear is stored as blocks and has no memory of its own; {_ADVICE}"
)

# What optimizers and clipping ask of a parameter: an answer would let them pass it by in silence.
_OF_PARAMETERS = {
    Tensor.is_leaf.__get__,
    Tensor.retains_grad.__get__,
    Tensor.grad.__get__,
}

_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.__len__,
    Tensor.__hash__,
    Tensor.get_device,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


class TracedBSRWeight(_StandIn):
    """What `BSRLinear.weight` is while `torch.compile` or `torch.export` traces.

    Dynamo cannot trace the making of a wrapper tensor, but follows a plain object with `__torch_function__`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        crow_indices: Tensor,
        col_indices: Tensor,
        values: Tensor,
        plan: Tensor | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        self.crow_indices = crow_indices
        self.col_indices = col_indices
        self.values = values
        self.plan = plan

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    @property
    def is_cuda(self) -> bool:
        return self.values.is_cuda

    @property
    def is_meta(self) -> bool:
        return self.values.is_meta

    @property
    def ndim(self) -> int:
        return 2

    def dim(self) -> int:
        return 2

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def element_size(self) -> int:
        return self.values.element_size()

    def is_floating_point(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.shape[0]
