"""Features between two swapped layers that need not be computed: nobody reads them, or they are always the same."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_superblock.bsr.dataflow import Dataflow, Gate, Step, count_places
from torchao_superblock.bsr.folded_activation import FoldedActivation, activation_name
from torchao_superblock.bsr.linear import BSRLinear
from torchao_superblock.common.modules import parameter_owners, storage_address
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
_FUNCTIONS = (
    *(F.celu, F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu),
    *(F.relu6, F.selu, F.silu, F.softplus, torch.relu, torch.sigmoid, torch.tanh),
)


class LinearPair(NamedTuple):
    """Two swapped layers with nothing but elementwise steps between them, each with a single reader.

    Attributes:
        flow: the dataflow of the module that calls them.
        first, second: their paths in it.
        between: what is between, one after the other, as it is in the module's present mode.
        is_random: whether a dropout between them is active.
        gate: where the first is the gate of a gated MLP, what that is; its `up` belongs to the first then.
    """

    flow: Dataflow
    first: str
    second: str
    between: list[Callable[[Tensor], Tensor]]
    is_random: bool
    gate: Gate | None = None

    @property
    def fqns(self) -> tuple[str, str]:
        names = dict.fromkeys(map(self.flow.name, self.first_paths))
        return " and ".join(names), self.flow.name(self.second)

    @property
    def first_paths(self) -> tuple[str, ...]:
        """Of the first layer, or of both that make its output."""
        if self.gate is None or self.is_packed:
            return (self.first,)
        return self.gate.gate, self.gate.up

    @property
    def is_packed(self) -> bool:
        """Whether the halves of the first layer are multiplied."""
        return self.gate is not None and self.gate.gate == self.gate.up

    @property
    def firsts(self) -> tuple[BSRLinear, ...]:
        return tuple(map(self.flow.piece, self.first_paths))

    @property
    def last(self) -> BSRLinear:
        return self.flow.piece(self.second)


def drop_dead_features(model: nn.Module, flows: Sequence[Dataflow]) -> list[str]:
    """Drop the features between two swapped layers that need not be computed; the result stays the same.

    Such a feature is *unread*, when the second layer stores no block for it, or *constant*, when the first layer stores
    none: it is the activation of a bias then, and what the second layer makes of it goes into that layer's bias. At
    90 % random sparsity a ViT's MLP with blocks of 64 has use for about half of its hidden features.

    Args:
        model: changed in place; pairs of layers are replaced by narrower ones.
        flows: its dataflows.

    Returns:
        A sentence about each pair that became narrower, and about each that hooks, or other uses, kept from it.
    """
    notes: list[str] = []
    dropped: dict[tuple[str, str], Counter[str]] = {}
    changed = True
    while changed:  # in a chain, what one pair drops may be the last use of a feature before it
        changed = False
        for pair in list(linear_pairs(model, flows, notes)):
            with torch.inference_mode(False), torch.no_grad():
                counts = _narrow(pair)
            if counts is not None:
                dropped.setdefault(pair.fqns, Counter()).update(counts)
                changed = True
    return [*dict.fromkeys(notes)] + [
        f"{first}: {counts.total()} of its features are dropped: {counts['unread']} that {second} does not read, "
        f"{counts['constant']} that are the same for every input"
        for (first, second), counts in dropped.items()
    ]


def linear_pairs(
    model: nn.Module, flows: Sequence[Dataflow], notes: list[str] | None = None
) -> Iterator[LinearPair]:
    """Each two swapped layers that only see each other, and may be replaced together.

    Args:
        model: the whole model.
        flows: its dataflows.
        notes: is given a sentence about each two that would be a pair, if others could not tell.
    """
    owners, places = parameter_owners(model), count_places(model)

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

    for flow in flows:
        chains = [(first, steps, None) for first, steps in flow.chains.items()]
        chains += [(first, gate.chain, gate) for first, gate in flow.gates.items()]
        for first, steps, gate in chains:
            if not steps or not isinstance(_module(flow, steps[-1]), BSRLinear):
                continue
            *middle, last = steps
            between = [_elementwise(flow, step) for step in middle]
            if any(one is None for one in between):
                continue
            is_random = any(_is_random(flow, step) for step in middle)
            pair = LinearPair(flow, first, last.path, between, is_random, gate)
            if not all(isinstance(layer, BSRLinear) for layer in pair.firsts):
                continue
            paths = [*pair.first_paths, *(step.path for step in middle if step.path), last.path]
            if gate is not None:
                paths.append(gate.activation)
            obstacle = next(filter(None, (flow.obstacle(path, places) for path in paths)), None)
            if obstacle is None and all(map(is_replaceable, (*pair.firsts, pair.last))):
                yield pair
            elif obstacle is not None and notes is not None:
                notes.append(f"{pair.fqns[0]}: none of its features are dropped, since {obstacle}")


def _module(flow: Dataflow, step: Step) -> object:
    return flow.piece(step.path) if step.path else step.function


def _elementwise(flow: Dataflow, step: Step) -> Callable[[Tensor], Tensor] | None:
    """What a step does, outside of training, if it makes each feature from that feature alone and keeps its place."""
    piece = _module(flow, step)
    if piece is F.dropout or type(piece) in _DROPOUTS:
        return nn.Identity()
    if not step.path:
        is_known = any(piece is function for function in _FUNCTIONS)
        return partial(piece, *step.arguments, **dict(step.keywords)) if is_known else None
    return piece if type(piece) in DETERMINISTIC or activation_name(piece) is not None else None


def _is_random(flow: Dataflow, step: Step) -> bool:
    piece = _module(flow, step)
    if piece is F.dropout:
        return flow.owner.training and dict(step.keywords).get("p", 0.5) > 0
    return isinstance(piece, _DROPOUTS) and piece.training and piece.p > 0


def _narrow(pair: LinearPair, fold: bool = True) -> dict[str, int] | None:
    """Replace a pair by a narrower one; how many features of which kind went, or None if all are needed.

    `fold` says that the second layer's bias may take up constants.
    """
    firsts, second = pair.firsts, pair.last
    features = second.in_features
    parts = 2 if pair.is_packed else 1
    unit = math.lcm(*(first.blocksize[0] for first in firsts), second.blocksize[1])
    if any(first.out_features != parts * features for first in firsts):
        return None
    if (
        features % unit and parts > 1
    ):  # a block in both halves, or more of one half than of the other
        return None
    rows = [
        _in_units(blocks, unit // first.blocksize[0]).sum(1)
        for first in firsts
        for blocks in first.crow_indices.diff().view(parts, -1)
    ]
    column_count = -(-features // second.blocksize[1])
    columns = torch.bincount(second.col_indices, minlength=column_count)
    columns = _in_units(columns, unit // second.blocksize[1]).sum(1)
    unread, constant = columns == 0, torch.zeros_like(columns, dtype=torch.bool)
    value = None
    if not pair.is_random:
        constant, value = _constants(pair, rows, unit)
        constant &= ~unread
        if second.bias is None or not fold:
            constant &= (value == 0).all(1)
    dead = unread | constant
    # Whole strips, and at least one: the dead features with the fewest blocks stay.
    together = math.lcm(unit, STRIP) // unit if features % STRIP == 0 else 1
    used = int((~dead).sum())
    spare = max(together, -(-used // together) * together) - used
    if spare >= int(dead.sum()):
        return None
    blocks = torch.where(dead, sum(rows) + columns, torch.iinfo(torch.int64).max)
    dead[blocks.argsort(stable=True)[:spare]] = False
    unread, constant = unread & dead, constant & dead
    bias = second.bias
    if value is not None and bool((value[constant] != 0).any()):
        gone = constant.repeat_interleave(unit)[:features]
        more = _with_inputs(second, gone, None, "none").double()(value.flatten()[:features][gone])
        total = bias.double() + more
        bias = nn.Parameter(total.to(bias.dtype), bias.requires_grad)
        if not torch.equal(bias.isfinite(), total.isfinite()):  # too large for float16
            return _narrow(pair, fold=False)
    kept = (~dead).repeat_interleave(unit)[:features]
    for path, first in zip(pair.first_paths, firsts, strict=True):
        pair.flow.put(path, _with_outputs(first, kept.repeat(parts)))
    pair.flow.put(pair.second, _with_inputs(second, kept, bias, second.activation))
    unread, constant = (
        int(which.repeat_interleave(unit)[:features].sum()) for which in (unread, constant)
    )
    return {"unread": unread, "constant": constant}


def _in_units(tensor: Tensor, size: int) -> Tensor:
    """`(units, size)` of `(n,)`; the last one may be short and is filled up with zeros."""
    return F.pad(tensor, (0, -tensor.shape[0] % size)).view(-1, size)


def _constants(pair: LinearPair, rows: Sequence[Tensor], unit: int) -> tuple[Tensor, Tensor]:
    """Which features are the same for every input, and what they are: bool `(units,)`, float64 `(units, unit)`.

    `rows` has the stored blocks of each unit, for each factor that they are made of.
    """
    dtype = pair.last.values.dtype

    def biases(layer: BSRLinear) -> Tensor:
        value = torch.zeros(layer.out_features, dtype=torch.float64, device=layer.values.device)
        if layer.bias is not None:
            value += layer.bias
        # Rounded where the model rounds.
        return ACTIVATIONS[layer.activation](value).to(dtype).double()

    parts = 2 if pair.is_packed else 1
    factors = [
        _in_units(part, unit) for first in pair.firsts for part in biases(first).chunk(parts)
    ]
    if pair.gate is not None:
        active = 1 if pair.is_packed and not pair.gate.gate_is_first else 0
        activation = pair.flow.piece(pair.gate.activation)
        factors[active] = activation(factors[active]).to(dtype).double()
    fixed = [blocks == 0 for blocks in rows]
    constant, value = fixed[0], factors[0]
    if len(factors) == 2:
        zero = (fixed[0] & (factors[0] == 0).all(1)) | (fixed[1] & (factors[1] == 0).all(1))
        constant = (fixed[0] & fixed[1]) | zero
        value = torch.where(zero[:, None], 0.0, factors[0] * factors[1]).to(dtype).double()
    for step in pair.between:
        value = step(value).to(dtype).double()
    return constant, value


def _with_outputs(layer: BSRLinear, kept: Tensor) -> BSRLinear:
    """The layer without some of its outputs; `kept` is bool `(out_features,)`, the same within a block row."""
    rows = _in_units(kept, layer.blocksize[0])[:, 0]
    counts = layer.crow_indices.diff()
    blocks = rows.repeat_interleave(counts)
    bias = layer.bias
    if bias is not None:
        bias = nn.Parameter(bias[kept], bias.requires_grad)
    features = int(kept.sum()), layer.in_features
    return _part(layer, features, counts[rows], layer.col_indices, blocks, bias, layer.activation)


def _with_inputs(
    layer: BSRLinear, kept: Tensor, bias: nn.Parameter | None, activation: str
) -> BSRLinear:
    """The layer without some of its inputs; `kept` is bool `(in_features,)`, the same within a block column."""
    columns = _in_units(kept, layer.blocksize[1])[:, 0]
    new_column = columns.cumsum(0, dtype=torch.int32) - 1
    blocks = columns[layer.col_indices]
    before = torch.zeros(layer.nnz + 1, dtype=torch.int32, device=blocks.device)
    before[1:] = blocks.cumsum(0)
    counts = before[layer.crow_indices].diff()
    features = layer.out_features, int(kept.sum())
    return _part(layer, features, counts, new_column[layer.col_indices], blocks, bias, activation)


def _part(
    layer: BSRLinear,
    features: tuple[int, int],
    counts: Tensor,
    col_indices: Tensor,
    blocks: Tensor,
    bias: nn.Parameter | None,
    activation: str,
) -> BSRLinear:
    """A layer `(out, in)` of some of another one's blocks: `counts` of them in each block row."""
    crow_indices = counts.new_zeros(counts.shape[0] + 1)
    crow_indices[1:] = counts.cumsum(0)
    values = layer.values
    part = BSRLinear(
        features[1],
        features[0],
        layer.blocksize,
        crow_indices,
        col_indices[blocks],
        nn.Parameter(values[blocks], values.requires_grad),
        bias,
        activation=activation,
        dense_shape=layer.dense_shape,
    )
    part.place = layer.place
    return part.train(layer.training)
