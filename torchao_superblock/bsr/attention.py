"""`BSRMultiheadAttention`: `nn.MultiheadAttention` with its projections in BSR format.

Written out rather than left to `F.multi_head_attention_forward`, which transposes x, copies the packed projection into
three and asks `out_proj` for its weight only. One product serves query, key and value where they are one tensor, and
the heads are views of what it returns.

Legend: B batch, L target and S source length, E embed_dim, H heads, D = E / H.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchao_superblock.bsr.format import infer_blocksize, nonzero_blocks
from torchao_superblock.bsr.linear import BSRLinear, conversion_obstacle, has_own_forward
from torchao_superblock.bsr.packed_linear import PackedBSRLinear
from torchao_superblock.bsr.weight import BSRWeight, TracedBSRWeight
from torchao_superblock.common.blocks import parse_blocksize
from torchao_superblock.common.modules import block_masks_of
from torchao_superblock.common.swappable import shape_obstacle
from torchao_superblock.ops import bsr_linear

IN_PROJECTIONS = {
    "in_proj_weight": "in_proj",
    "q_proj_weight": "q_proj",
    "k_proj_weight": "k_proj",
    "v_proj_weight": "v_proj",
}
"""Parameters of `nn.MultiheadAttention` -> the child that stands in the place of each once it is stored as blocks."""

TENSORS = (*IN_PROJECTIONS, "out_proj.weight")
"""What a swap stores as blocks."""


@dataclass(frozen=True)
class Projection:
    """A dense projection of an attention, as the linear layer that it is.

    Attributes:
        name: of the child that is block-sparse after a swap.
        linear: that of query, key and value is made for the purpose: it shares the Parameter, and has no bias.
        fqn: what a report calls it.
        tensor_fqn: of its weight.
        values_fqn: of the stored blocks.
        bsr: what it becomes.
    """

    name: str
    linear: nn.Linear
    fqn: str
    tensor_fqn: str
    values_fqn: str
    bsr: type[BSRLinear]


def projections(attention: nn.MultiheadAttention, fqn: str = "") -> list[Projection]:
    """The projections of an attention that are dense; `fqn` is its name."""
    E, found, prefix = attention.embed_dim, [], f"{fqn}." if fqn else ""
    shapes = {"in_proj": (3 * E, E), "k_proj": (E, attention.kdim), "v_proj": (E, attention.vdim)}
    for tensor, name in IN_PROJECTIONS.items():
        if attention._qkv_same_embed_dim is not (name == "in_proj") or name in attention._modules:
            continue
        N, K = shapes.get(name, (E, E))
        linear = nn.Linear(K, N, bias=False, device="meta").train(attention.training)
        # As it is registered: a parametrized or pruned one has none, and that is to be seen.
        linear._parameters["weight"] = attention._parameters.get(tensor)
        bsr = PackedBSRLinear if name == "in_proj" else BSRLinear
        tensor_fqn, values_fqn = f"{prefix}{tensor}", f"{prefix}{name}.values"
        found.append(Projection(name, linear, tensor_fqn, tensor_fqn, values_fqn, bsr))
    if isinstance(attention.out_proj, nn.Linear):
        own = f"{prefix}out_proj"
        names = own, f"{own}.weight", f"{own}.values"
        found.append(Projection("out_proj", attention.out_proj, *names, BSRLinear))
    return found


def _weight_of(name: str) -> property:
    def weight(self: "BSRMultiheadAttention") -> Tensor | BSRWeight | TracedBSRWeight | None:
        layer = self._modules.get(IN_PROJECTIONS[name])
        return self._parameters[name] if layer is None else layer.weight

    return property(weight, doc=f"`{name}` of `nn.MultiheadAttention`, or what stands for it.")


class BSRMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with some or all of its projections in BSR format: same attributes, call and numbers.

    Made by :func:`swap_to_bsr` in the place of the dense one (the same object, so hooks and other places of it stay),
    or by :meth:`from_dense`. `in_proj` (or `q_proj`, `k_proj`, `v_proj` where `kdim` or `vdim` differ) and `out_proj`
    are the block-sparse ones among the projections. `in_proj_weight` and the like stand for the stored blocks as
    :class:`BSRWeight`; biases stay the Parameters that they were, under their names.

    Where query, key and value are one tensor, one product projects them, and neighbours that are one tensor share one
    (key and value of cross-attention). There is no fused path of torch's to fall back from: training and inference run
    the same code. Nested tensors are refused, as by `nn.MultiheadAttention` outside of its fused path.

    Example:
        >>> attention = nn.MultiheadAttention(64, 4, batch_first=True)
        >>> with torch.no_grad():
        ...     _ = attention.in_proj_weight[:, :32].zero_()
        >>> sparse = BSRMultiheadAttention.from_dense(attention)
        >>> x = torch.randn(2, 5, 64)
        >>> torch.allclose(sparse(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
        True
    """

    in_proj_weight = _weight_of("in_proj_weight")
    q_proj_weight = _weight_of("q_proj_weight")
    k_proj_weight = _weight_of("k_proj_weight")
    v_proj_weight = _weight_of("v_proj_weight")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "a BSRMultiheadAttention is made from a dense attention with zero blocks: "
            "BSRMultiheadAttention.from_dense(attention), or swap_to_bsr(model)"
        )

    @classmethod
    def from_dense(
        cls,
        attention: nn.MultiheadAttention,
        blocksize: int | tuple[int, int] | None = None,
    ) -> "BSRMultiheadAttention":
        """Convert the projections of an attention that have blocks of zeros.

        Args:
            attention: exactly an `nn.MultiheadAttention`. It is left as it is; what is not converted (biases, dense
                projections) is shared with it.
            blocksize: int, `(rows, cols)`, or None to read it off the zeros of each projection.

        Raises:
            TypeError, ValueError, RuntimeError: no projection can be converted; the message says why for each.
        """
        layers = {
            projection.name: projection.bsr.from_dense(projection.linear, size)
            for projection, size in convertible(attention, blocksize)
        }
        return with_blocks(attention, layers)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`; `need_weights=False` is the fast way.

        Args:
            query: `(L, E)`, `(L, B, E)`, or `(B, L, E)` with `batch_first`.
            key: the same with S and `kdim`.
            value: the same with S and `vdim`.
            key_padding_mask: `(S,)` or `(B, S)`; True, or a float that is added.
            need_weights: return the attention weights too.
            attn_mask: `(L, S)` or `(B * H, L, S)`; True is masked, or a float that is added.
            average_attn_weights: over the heads.
            is_causal: a promise that `attn_mask` is causal.

        Returns:
            `(output, weights)`: output as query, weights `(B, L, S)`, `(B, H, L, S)` or None; without B if query is.

        Raises:
            ValueError: a shape does not fit.
            TypeError: a mask is neither bool nor floating point.
            AssertionError: an input is a nested tensor.
        """
        if isinstance(query, torch.fx.Proxy):  # a leaf of a traced graph, as torch's own is
            tracer = query.tracer
            kwargs = {
                "key_padding_mask": key_padding_mask,
                "need_weights": need_weights,
                "attn_mask": attn_mask,
                "average_attn_weights": average_attn_weights,
                "is_causal": is_causal,
            }
            path = tracer.path_of_module(self)
            return tracer.create_proxy("call_module", path, (query, key, value), kwargs)
        if query.is_nested or key.is_nested or value.is_nested:
            raise AssertionError(
                "BSRMultiheadAttention does not support NestedTensor; pad the input and pass key_padding_mask "
                "(TransformerEncoder: enable_nested_tensor=False)"
            )
        is_batched = query.dim() == 3
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                "BSRMultiheadAttention: query, key and value must all be batched (3-D) or all unbatched (2-D), got "
                f"shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if attn_mask is None and is_causal:
            raise RuntimeError(
                "BSRMultiheadAttention: is_causal only says that attn_mask is causal, so attn_mask is needed too; make "
                "one with nn.Transformer.generate_square_subsequent_mask"
            )
        batch_first = self.batch_first or not is_batched
        q, k, v = self._project(query, key, value, batch_first)
        B, _, L, _ = q.shape
        S = k.shape[2]
        if k.shape != v.shape or k.shape[0] != B:
            raise ValueError(
                "BSRMultiheadAttention: key and value must have one length, and the batch of query, got shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        # The promise says all that the mask does, where nothing else needs the mask. Not just truth: a compiled
        # nn.Transformer that looks for causal masks gives a bool that is not known yet.
        if key_padding_mask is not None and not is_batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        is_causal = is_causal is True and key_padding_mask is None and not need_weights
        mask = None if is_causal else self._mask(attn_mask, key_padding_mask, query.dtype, B, L, S)
        k, v, n_more = self._with_more_keys(k, v)
        if n_more and mask is not None:
            mask = F.pad(mask, (0, n_more))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = torch.matmul(q * math.sqrt(1.0 / self.head_dim), k.transpose(-2, -1))
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            if dropout > 0.0:
                weights = F.dropout(weights, p=dropout)
            y = torch.matmul(weights, v)
            if average_attn_weights:
                weights = weights.mean(dim=1)
            if not is_batched:
                weights = weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        # (B, H, L, D) as batch_first or not has it, H and D together: a view of what SDPA returns for the former.
        y = y.transpose(1, 2) if batch_first else y.permute(2, 0, 1, 3)
        y = y.flatten(2)
        # Not called: hooks of out_proj do not see a dense attention's output either, which reads its weight.
        y = self.out_proj.forward(y if is_batched else y.squeeze(0))
        return y, weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool
    ) -> list[Tensor]:
        """The three projections, each `(B, H, S, D)`: one product for neighbours that are one tensor."""
        inputs, projected = (query, key, value), []
        first = 0
        while first < 3:
            last = first + 1
            while self._qkv_same_embed_dim and last < 3 and inputs[last] is inputs[first]:
                last += 1
            x = self._product(inputs[first], first, last)
            if x.dim() == 2:
                x = x.unsqueeze(0)
            # Views of all at once: one of each takes the host as long as the product does.
            x = x.view(*x.shape[:2], last - first, self.num_heads, self.head_dim)
            order = (2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)
            projected += x.permute(order).unbind()
            first = last
        return projected

    def _product(self, x: Tensor, first: int, last: int) -> Tensor:
        """`(..., (last - first) * E)`: projections `first` up to, not including, `last` of x."""
        E, bias = self.embed_dim, self.in_proj_bias
        name = "in_proj" if self._qkv_same_embed_dim else ("q_proj", "k_proj", "v_proj")[first]
        if bias is not None and last - first < 3:
            bias = bias[first * E : last * E]
        layer = self._modules.get(name)
        if layer is None:
            weight = getattr(self, f"{name}_weight")
            if name == "in_proj" and last - first < 3:
                weight = weight[first * E : last * E]
            return F.linear(x, weight, bias)
        if not isinstance(layer, BSRLinear):
            raise TypeError(
                f"BSRMultiheadAttention: {name} is a {type(layer).__name__}, but its blocks are read and it is never "
                "called, so that what was put around it would be lost; put the block-sparse layer back, or call "
                "swap_to_dense on the attention first"
            )
        blocks = layer.part(first, last) if name == "in_proj" else layer.blocks()
        crow_indices, col_indices, values, plan = blocks
        N, K = (last - first) * E, layer.in_features
        return bsr_linear(
            x, crow_indices, col_indices, values, bias, N, "none", plan, in_features=K
        )

    def _with_more_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with those of `add_bias_kv` and `add_zero_attn` behind them, and how many these are."""
        more: list[tuple[Tensor, Tensor]] = []
        B, H, _, D = k.shape
        if self.bias_k is not None:
            rows = (row.view(1, H, 1, D).expand(B, H, 1, D) for row in (self.bias_k, self.bias_v))
            more.append(tuple(rows))
        if self.add_zero_attn:
            more.append((k.new_zeros(B, H, 1, D), v.new_zeros(B, H, 1, D)))
        if more:
            k = torch.cat([k, *(pair[0] for pair in more)], dim=2)
            v = torch.cat([v, *(pair[1] for pair in more)], dim=2)
        return k, v, len(more)

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        dtype: torch.dtype,
        B: int,
        L: int,
        S: int,
    ) -> Tensor | None:
        """Both masks in one that is added to the scores, and broadcasts to `(B, H, L, S)`."""
        mask = None
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, (L, S), (B * self.num_heads, L, S))
            mask = _additive(attn_mask, dtype)
            mask = mask[None, None] if mask.dim() == 2 else mask.view(B, self.num_heads, L, S)
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, (B, S))
            padding = _additive(key_padding_mask, dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask

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
        for name, child in IN_PROJECTIONS.items():
            dense = (f"{prefix}{name}", f"{prefix}parametrizations.{name}.original")
            if child in self._modules and any(key in state_dict for key in dense):
                error_msgs.append(
                    f"{prefix.removesuffix('.') or 'BSRMultiheadAttention'}: the state dict holds a dense {name} (or "
                    f"one with a block mask), but this attention stores blocks of it in {child}; load it into the "
                    "dense model, squash that if it has masks, and swap it, or save the swapped model"
                )
                return
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _check_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"BSRMultiheadAttention: {name} must be bool (True = masked) or floating point (added), got {mask.dtype}"
        )
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"BSRMultiheadAttention: {name} must have shape {' or '.join(map(str, shapes))} for these inputs, got "
            f"{tuple(mask.shape)}"
        )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def attention_obstacle(attention: nn.MultiheadAttention) -> tuple[str, str] | None:
    """Why this attention cannot become one of ours whatever its zeros: `(code, reason)`, or None."""
    if parametrize.is_parametrized(attention):
        if any(True for _ in block_masks_of(attention)):
            return "not_squashed", "its block mask is not squashed yet; call squash_mask() first"
        names = ", ".join(attention.parametrizations)
        return "parametrized", f"its attention has a parametrization (of {names}); remove it first"
    kind = type(attention)
    if kind not in (nn.MultiheadAttention, BSRMultiheadAttention):
        return "no_twin", f"{kind.__name__} has no block-sparse twin"
    if "_hf_hook" in vars(attention):
        return "customised", (
            "accelerate's hooks move the weights of its attention (device_map, cpu_offload); call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) first, and dispatch the model afterwards"
        )
    if has_own_forward(attention):
        return "customised", "its attention has a forward of its own, which would be lost"
    if not isinstance(attention.out_proj, nn.Linear | BSRLinear):
        kind = type(attention.out_proj)
        return "customised", f"the out_proj of its attention is a {kind.__name__}, not an nn.Linear"
    return None


def projection_obstacle(
    attention: nn.MultiheadAttention, projection: Projection, blocksize: tuple[int, int] | None
) -> tuple[str, str] | None:
    """Why this projection cannot be stored as blocks of this size: `(code, reason)`, or None.

    Args:
        attention: one without :func:`attention_obstacle`.
        projection: of this attention.
        blocksize: `(rows, cols)`; None if it is to be read off the zeros.
    """
    if projection.name == "out_proj":
        return None
    E, bias, weight = attention.embed_dim, attention.in_proj_bias, projection.linear.weight
    if bias is not None and weight is not None:
        if (bias.dtype, bias.device) != (weight.dtype, weight.device):
            return "unsupported_dtype", (
                f"in_proj_bias ({bias.dtype}, {bias.device}) differs from it ({weight.dtype}, {weight.device})"
            )
    rows = 1 if blocksize is None else blocksize[0]
    if projection.name == "in_proj" and E % rows and not 3 * E % rows:
        return "shape_not_multiple", (
            f"blocks of {rows} rows lie across the borders of query, key and value (every {E} rows), where "
            "cross-attention parts them; choose a blocksize whose rows divide that"
        )
    return None


def convertible(
    attention: nn.MultiheadAttention, blocksize: int | tuple[int, int] | None
) -> list[tuple[Projection, tuple[int, int]]]:
    """The projections that have blocks of zeros, each with its block size.

    Raises:
        TypeError, ValueError, RuntimeError: there is none; the message says why for each.
    """
    if not isinstance(attention, nn.MultiheadAttention):
        raise TypeError(f"expected an nn.MultiheadAttention, got {type(attention).__name__}")
    where = "cannot convert this attention to BSRMultiheadAttention"
    obstacle = attention_obstacle(attention)
    if obstacle is not None:
        error = RuntimeError if obstacle[0] == "not_squashed" else TypeError
        raise error(f"{where}: {obstacle[1]}")
    wanted = None if blocksize is None else parse_blocksize(blocksize)
    found, reasons = [], []
    for projection in projections(attention):
        linear = projection.linear
        obstacle = projection_obstacle(attention, projection, wanted)
        obstacle = obstacle or conversion_obstacle(linear)
        reason = None if obstacle is None else obstacle[1]
        if reason is None:
            size = wanted or infer_blocksize(linear.weight)
            reason = shape_obstacle(tuple(linear.weight.shape), size)
            if reason is None and nonzero_blocks(linear.weight, size).all():
                reason = "no block of its weight is all zeros"
        if reason is None:
            found.append((projection, size))
        else:
            reasons.append(f"{projection.fqn}: {reason}")
    if not found:
        raise ValueError(f"{where}: {'; '.join(reasons)}")
    return found


def become_bsr(
    attention: nn.MultiheadAttention, layers: Mapping[str, BSRLinear]
) -> BSRMultiheadAttention:
    """Make a block-sparse attention of a dense one, in place: it stays the same object with the same hooks.

    Args:
        attention: an `nn.MultiheadAttention`, or one of ours with more dense projections.
        layers: `{name of the projection: its blocks}`, at least one.
    """
    for name, child in IN_PROJECTIONS.items():
        if child in layers:
            attention._parameters[name] = None
    attention.__class__ = BSRMultiheadAttention
    for name, layer in layers.items():
        setattr(attention, name, layer)
    return attention


def with_blocks(
    attention: nn.MultiheadAttention, layers: Mapping[str, BSRLinear]
) -> BSRMultiheadAttention:
    """A block-sparse attention that shares everything else with a dense one, which stays as it is."""
    copied = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
    for name, value in vars(attention).items():
        vars(copied)[name] = value.copy() if isinstance(value, dict | set) else value
    return become_bsr(copied, layers)


def become_dense(attention: BSRMultiheadAttention) -> nn.MultiheadAttention:
    """Make a dense attention of a block-sparse one, in place, once linear layers stand where its projections did."""
    attention.__class__ = nn.MultiheadAttention
    for tensor, name in IN_PROJECTIONS.items():
        linear = attention._modules.pop(name, None)
        if linear is not None:
            attention._parameters[tensor] = linear.weight
    return attention
