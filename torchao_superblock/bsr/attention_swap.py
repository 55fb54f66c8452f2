"""Which projections of an attention a swap stores as blocks: each by its own zeros, and all by what the module gains.

An `nn.MultiheadAttention` in inference has a fused path in C++ that a swapped one cannot take. So what its projections
gain must outweigh that, which the table of break-even points, made for single layers, does not say.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from torchao_superblock.bsr.attention import (
    BSRMultiheadAttention,
    attention_obstacle,
    projection_obstacle,
    projections,
)
from torchao_superblock.bsr.format import infer_blocksize, nonzero_blocks
from torchao_superblock.bsr.linear import BSRLinear, conversion_obstacle
from torchao_superblock.ops.break_even import break_even

if TYPE_CHECKING:
    from torchao_superblock.bsr.swap import SwapEntry

# What dense attention loses with its fused path, in units of the time of its dense out_proj (768 features, 197 tokens).
# cpu: ours with dense weights takes 0.97x to 1.33x of the fused path's speed (one thread, AVX-512).
# cuda: on an H200 (bfloat16, 256 x 197 tokens) the fused path takes 0.496 ms and both projections at 90 % around SDPA
# 0.298, where the layers alone save 0.21 to 0.23 of which out_proj has 0.096: 0.1 to 0.3, and a margin.
_FUSED_ATTENTION = {"cpu": 0.1, "cuda": 0.5}
# What an nn.TransformerEncoderLayer loses besides, where its MLP is dense: on CUDA its activation is part of the first
# product in the fused path. Writing and reading 4 * E features again takes an H200 0.145 ms, 1.5 times its out_proj.
_FUSED_ACTIVATION = {"cuda": 1.5}
# A projection of which next to nothing is stored still reads x and writes y: of the dense one's time.
_LEAST_TIME = 0.4

_ALONE = (
    "swapped alone it keeps its {kind} from torch's fused path, which makes that slower than dense (0.47x on an H200); "
    "pass min_sparsity to swap it all the same"
)


def judge_attention(
    attention: nn.MultiheadAttention,
    fqn: str,
    judge: Callable[..., "SwapEntry"],
    *,
    blocksize: tuple[int, int] | None,
    decide: bool,
    is_shared: bool,
    parent: nn.Module | None,
) -> dict[str, "SwapEntry"]:
    """Decide about the dense projections of an attention without touching it: an entry for each, by its name.

    Args:
        attention: what is judged.
        fqn: its name.
        judge: `judge(linear, fqn, tensor_fqn, obstacle)` decides about one linear layer.
        blocksize: what the caller asked for.
        decide: whether what is slower than dense is to be left alone.
        is_shared: whether its out_proj has another place in the model.
        parent: the module that it is a part of.
    """
    whole = attention_obstacle(attention)
    entries = {}
    for projection in projections(attention, fqn):
        name, obstacle = projection.name, whole
        if whole is None and name == "out_proj" and is_shared:
            obstacle = "tied_weight", "it is a part of several modules"
        elif whole is None:
            obstacle = projection_obstacle(attention, projection, blocksize)
        elif name == "out_proj":  # a linear layer of its own, as far as this attention is concerned
            obstacle = None
        entry = judge(projection.linear, projection.fqn, projection.tensor_fqn, obstacle)
        if whole is not None and decide and entry.code == "swapped":
            reason = _ALONE.format(kind=type(attention).__name__)
            entry = replace(entry, code="slower_than_dense", reason=reason)
        elif name == "in_proj" and entry.code in ("slower_than_dense", "too_few_zero_blocks"):
            entry = replace(entry, reason=entry.reason + _by_third(projection.linear, entry))
        entries[name] = entry
    return _as_a_module(attention, entries, parent) if whole is None and decide else entries


def _by_third(in_proj: nn.Linear, entry: "SwapEntry") -> str:
    """Which of query, key and value has the blocks of zeros, where that differs: half of a fused weight masked."""
    if not entry.sparsity or entry.blocksize is None or in_proj.in_features % entry.blocksize[0]:
        return ""
    third = nonzero_blocks(in_proj.weight, entry.blocksize).float().view(3, -1).mean(1)
    query, key, value = (1 - third).tolist()
    if min(query, key, value) > 0:
        return ""
    return f" (query {query:.1%}, key {key:.1%}, value {value:.1%})"


def _as_a_module(
    attention: nn.MultiheadAttention, entries: Mapping[str, "SwapEntry"], parent: nn.Module | None
) -> dict[str, "SwapEntry"]:
    """The entries, none of them swapped if the module would be slower."""
    swapped = {name: entry for name, entry in entries.items() if entry.code == "swapped"}
    device = attention.out_proj.weight.device.type
    gain = sum(
        _gain(attention, projection.linear, entries[projection.name])
        for projection in projections(attention)
        if projection.name in swapped
    )
    loss = lost_time(attention, parent, device)
    if not swapped or gain > loss:
        return dict(entries)
    reason = (
        f"{'it gains' if len(swapped) == 1 else 'they gain'} {gain:.1f} times the time of a dense out_proj, and the "
        f"fused path of {'the encoder layer' if _is_fused(parent) else 'the attention'}, which is lost, {loss:.1f}"
    )
    return {
        name: replace(
            entry,
            code="slower_than_dense",
            reason=f"{entry.reason}, but the module would be slower: {reason}",
        )
        if name in swapped
        else entry
        for name, entry in entries.items()
    }


def _gain(attention: nn.MultiheadAttention, linear: nn.Linear, entry: "SwapEntry") -> float:
    """What a swapped projection saves, in units of the time of a dense out_proj."""
    weight = linear.weight
    even = break_even(weight.device.type, entry.blocksize, weight.dtype).sparsity
    # As long as dense at its break-even, and shorter in proportion to what is stored.
    time = max(_LEAST_TIME, (1.0 - entry.sparsity) / (1.0 - even))
    return weight.numel() / attention.embed_dim**2 * (1.0 - time)


def lost_time(attention: nn.MultiheadAttention, parent: nn.Module | None, device: str) -> float:
    """What an attention loses with the fused path, in the same units; nothing where it has none, or none any more."""
    if (
        not attention.batch_first
        or attention.num_heads % 2
        or attention.in_proj_bias is None
        or attention.bias_k is not None
        or attention.add_zero_attn
        or not attention._qkv_same_embed_dim
        or type(attention) is BSRMultiheadAttention
        or isinstance(attention.out_proj, BSRLinear)
    ):
        return 0.0
    loss = _FUSED_ATTENTION.get(device, max(_FUSED_ATTENTION.values()))
    if _is_fused(parent):
        width = parent.linear1.out_features / (4 * attention.embed_dim)
        loss += _FUSED_ACTIVATION.get(device, 0.0) * width
    return loss


def _is_fused(parent: nn.Module | None) -> bool:
    """Whether this is an encoder layer that only its attention keeps from its fused path."""
    if type(parent) is not nn.TransformerEncoderLayer or not parent.activation_relu_or_gelu:
        return False
    return not any(_has_zero_block(linear) for linear in (parent.linear1, parent.linear2))


def _has_zero_block(linear: nn.Module) -> bool:
    """Whether a swap may take this layer, or has taken it."""
    if type(linear) is not nn.Linear or conversion_obstacle(linear) is not None:
        return isinstance(linear, BSRLinear)
    size = infer_blocksize(linear.weight)
    return size is not None and not bool(nonzero_blocks(linear.weight, size).all())
