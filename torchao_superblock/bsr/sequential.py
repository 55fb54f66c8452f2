"""What neighbours in an `nn.Sequential` save each other once they are swapped: activations, and dead features.

An `nn.Sequential` is the one container that says what follows what. Those with a `forward` of their own are left
alone, and so are modules that hooks watch or that have another place in the model.
"""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchao_superblock.bsr.folded_activation import FoldedActivation, activation_name
from torchao_superblock.bsr.linear import BSRLinear, has_own_forward
from torchao_superblock.common.modules import has_hooks, parameter_owners, storage_address
from torchao_superblock.common.names import without_compile_prefix
from torchao_superblock.ops import ACTIVATIONS
from torchao_superblock.ops.plan import STRIP

# Each makes a feature from that feature alone and keeps its place.
DETERMINISTIC = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
    FoldedActivation,
)
_DROPOUTS = (nn.AlphaDropout, nn.Dropout)


class LinearPair(NamedTuple):
    """Two swapped layers of an `nn.Sequential` with nothing but elementwise modules between them."""

    sequential: nn.Sequential
    first: str
    second: str
    between: list[nn.Module]
    fqns: tuple[str, str]


def fold_activations(model: nn.Module) -> list[str]:
    """Let each BSRLinear apply the activation that directly follows it, where that gives the same result.

    Args:
        model: changed in place; an identity keeps the activation's place.

    Returns:
        A sentence about each.
    """
    notes = []
    for prefix, sequential, places in _sequentials(model):
        for (first, layer), (second, module) in pairwise(list(sequential._modules.items())):
            if (
                _is_free(layer, places)
                and layer.activation == "none"
                and activation_name(module) is not None
                and _is_plain(module)
            ):
                setattr(sequential, second, FoldedActivation(module))
                layer.activation = activation_name(module)
                notes.append(
                    f"{prefix}{first}: applies the {type(module).__name__} behind it itself"
                )
    return notes


def drop_dead_features(model: nn.Module) -> list[str]:
    """Drop the features between two swapped layers that need not be computed; the result stays the same.

    Such a feature is *unread*, when the second layer stores no block for it, or *constant*, when the first layer stores
    none: it is the activation of a bias then, and what the second layer makes of it goes into that layer's bias. At
    90 % random sparsity a ViT's MLP with blocks of 64 has use for about half of its hidden features.

    Args:
        model: changed in place; pairs of layers are replaced by narrower ones.

    Returns:
        A sentence about each pair that became narrower.
    """
    dropped: dict[tuple[str, str], Counter[str]] = {}
    changed = True
    while changed:  # in a chain, what one pair drops may be the last use of a feature before it
        changed = False
        for pair in list(linear_pairs(model)):
            with torch.inference_mode(False), torch.no_grad():
                counts = _narrow(pair)
            if counts is not None:
                dropped.setdefault(pair.fqns, Counter()).update(counts)
                changed = True
    return [
        f"{first}: {counts.total()} of its features are dropped: {counts['unread']} that {second} does not read, "
        f"{counts['constant']} that are the same for every input"
        for (first, second), counts in dropped.items()
    ]


def _sequentials(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Sequential, Counter[nn.Module]]]:
    """Each `nn.Sequential` that runs its modules in order: `(prefix of their FQNs, itself, places of modules)`."""
    places = Counter(
        child
        for module in model.modules()
        for child in module._modules.values()
        if child is not None
    )
    for fqn, module in model.named_modules():
        if (
            isinstance(module, nn.Sequential)
            and type(module).forward is nn.Sequential.forward
            and not has_own_forward(module)
        ):
            prefix = without_compile_prefix(fqn)
            yield f"{prefix}." if prefix else "", module, places


def _is_plain(module: nn.Module) -> bool:
    """Whether a module does what its class says, unwatched."""
    return not has_hooks(module) and not has_own_forward(module)


def _is_free(module: nn.Module, places: Counter[nn.Module]) -> bool:
    """Whether nobody but its neighbours can tell what goes into and comes out of a BSRLinear."""
    return isinstance(module, BSRLinear) and places[module] == 1 and _is_plain(module)


def linear_pairs(model: nn.Module) -> Iterator[LinearPair]:
    """Each two swapped layers that only see each other, and may be replaced together."""
    owners = parameter_owners(model)

    def is_replaceable(layer: nn.Module) -> bool:
        tensors = layer._parameters.keys() | layer._buffers.keys()
        return (
            type(layer) is BSRLinear
            and not layer._modules
            and tensors <= {"values", "bias", "crow_indices", "col_indices", "plan"}
            # Sharded ones are of another type.
            and all(
                type(p) is nn.Parameter and len(owners[storage_address(p)]) == 1 and not p.is_meta
                for p in layer.parameters()
            )
        )

    for prefix, sequential, places in _sequentials(model):
        first: str | None = None
        between: list[nn.Module] = []
        for name, module in sequential._modules.items():
            if _is_free(module, places) and is_replaceable(module):
                if first is not None:
                    yield LinearPair(
                        sequential, first, name, between, (f"{prefix}{first}", f"{prefix}{name}")
                    )
                first, between = name, []
            elif type(module) in (*DETERMINISTIC, *_DROPOUTS) and _is_plain(module):
                between.append(module)
            else:
                first = None


def _narrow(pair: LinearPair, fold: bool = True) -> dict[str, int] | None:
    """Replace a pair by a narrower one; how many features of which kind went, or None if all are needed.

    `fold` says that the second layer's bias may take up constants.
    """
    first, second = pair.sequential._modules[pair.first], pair.sequential._modules[pair.second]
    features = first.out_features
    unit = math.lcm(first.blocksize[0], second.blocksize[1])
    if second.in_features != features:
        return None
    rows = first.crow_indices.diff().view(-1, unit // first.blocksize[0]).sum(1)
    columns = torch.bincount(second.col_indices, minlength=features // second.blocksize[1])
    columns = columns.view(-1, unit // second.blocksize[1]).sum(1)
    unread, constant = columns == 0, torch.zeros_like(rows, dtype=torch.bool)
    value = _constant(first, pair.between)
    if value is not None:
        value = value.view(-1, unit)
        constant = ~unread & (rows == 0)
        if second.bias is None or not fold:
            constant &= (value == 0).all(1)
    dead = unread | constant
    # Whole strips, and at least one: the dead features with the fewest blocks stay.
    together = math.lcm(unit, STRIP) // unit if features % STRIP == 0 else 1
    used = int((~dead).sum())
    spare = max(together, -(-used // together) * together) - used
    if spare >= int(dead.sum()):
        return None
    blocks = torch.where(dead, rows + columns, torch.iinfo(torch.int64).max)
    dead[blocks.argsort(stable=True)[:spare]] = False
    unread, constant = unread & dead, constant & dead
    bias = second.bias
    if value is not None and bool((value[constant] != 0).any()):
        gone = constant.repeat_interleave(unit)
        more = _with_inputs(second, gone, None, "none").double()(value.flatten()[gone])
        total = bias.double() + more
        bias = nn.Parameter(total.to(bias.dtype), bias.requires_grad)
        if not torch.equal(bias.isfinite(), total.isfinite()):  # too large for float16
            return _narrow(pair, fold=False)
    kept = (~dead).repeat_interleave(unit)
    setattr(pair.sequential, pair.first, _with_outputs(first, kept))
    setattr(pair.sequential, pair.second, _with_inputs(second, kept, bias, second.activation))
    return {"unread": int(unread.sum()) * unit, "constant": int(constant.sum()) * unit}


def _constant(layer: BSRLinear, between: list[nn.Module]) -> Tensor | None:
    """What features become that no block is stored for, `(out_features,)` float64; None if that is random."""
    if any(type(module) in _DROPOUTS and module.training and module.p > 0 for module in between):
        return None
    dtype, device = layer.values.dtype, layer.values.device
    value = torch.zeros(layer.out_features, dtype=torch.float64, device=device)
    if layer.bias is not None:
        value += layer.bias
    # Rounded where the model rounds.
    value = ACTIVATIONS[layer.activation](value).to(dtype)
    for module in between:
        value = module(value.double()).to(dtype)
    return value.double()


def _with_outputs(layer: BSRLinear, kept: Tensor) -> BSRLinear:
    """The layer without some of its outputs; `kept` is bool `(out_features,)`, the same within a block row."""
    rows = kept.view(-1, layer.blocksize[0])[:, 0]
    counts = layer.crow_indices.diff()
    blocks = rows.repeat_interleave(counts)
    bias = layer.bias
    if bias is not None:
        bias = nn.Parameter(bias[kept], bias.requires_grad)
    return _part(layer, counts[rows], layer.col_indices, blocks, bias, layer.activation)


def _with_inputs(
    layer: BSRLinear, kept: Tensor, bias: nn.Parameter | None, activation: str
) -> BSRLinear:
    """The layer without some of its inputs; `kept` is bool `(in_features,)`, the same within a block column."""
    columns = kept.view(-1, layer.blocksize[1])[:, 0]
    new_column = columns.cumsum(0, dtype=torch.int32) - 1
    blocks = columns[layer.col_indices]
    before = torch.zeros(layer.nnz + 1, dtype=torch.int32, device=blocks.device)
    before[1:] = blocks.cumsum(0)
    counts = before[layer.crow_indices].diff()
    return _part(layer, counts, new_column[layer.col_indices], blocks, bias, activation, kept)


def _part(
    layer: BSRLinear,
    counts: Tensor,
    col_indices: Tensor,
    blocks: Tensor,
    bias: nn.Parameter | None,
    activation: str,
    inputs: Tensor | None = None,
) -> BSRLinear:
    """A layer of some of another one's blocks: `counts` of them in each block row."""
    crow_indices = counts.new_zeros(counts.shape[0] + 1)
    crow_indices[1:] = counts.cumsum(0)
    values = layer.values
    part = BSRLinear(
        layer.in_features if inputs is None else int(inputs.sum()),
        counts.shape[0] * layer.blocksize[0],
        layer.blocksize,
        crow_indices,
        col_indices[blocks],
        nn.Parameter(values[blocks], values.requires_grad),
        bias,
        activation=activation,
        dense_shape=layer.dense_shape,
    )
    return part.train(layer.training)
