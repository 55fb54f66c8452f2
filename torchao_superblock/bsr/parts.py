"""The smallest parts of a model whose speed a swap decides: what is timed, dense and as a swap would leave it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchao_superblock.bsr.dataflow import dataflows
from torchao_superblock.bsr.dead_features import linear_pairs
from torchao_superblock.bsr.finish import Finish
from torchao_superblock.bsr.folded_activation import (
    Activation,
    FoldedActivation,
    activation_module,
    activation_name,
)
from torchao_superblock.bsr.fused_activations import foldable
from torchao_superblock.bsr.gated_mlp import fusable
from torchao_superblock.bsr.linear import BSRLinear
from torchao_superblock.common.modules import replace_modules
from torchao_superblock.common.names import without_compile_prefix

# Two parts whose shares of stored blocks round to the same multiple of this take the same time.
DENSITY_STEP = 0.05


def is_whole(module: nn.Module) -> bool:
    """Whether a module has a fused path of its own, which any swapped layer inside turns off."""
    if isinstance(module, nn.TransformerEncoder):
        return bool(getattr(module, "use_nested_tensor", False))  # skips what is padded
    return isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention)


@dataclass(eq=False)
class Part:
    """A part that is swapped as a whole or not at all.

    Attributes:
        fqns: of the module, or of the layers in it if it was put together to be timed.
        module: as it is. Layers that would be fused, or lose features together, are in an `nn.Sequential` with what is
            between them.
        entry: the module of the model that is called with what the part is called with.
        replacements: the modules in it that a swap replaces (itself, or some inside), and by what.
        calls: what it was called with: a description of the input, and how often.
    """

    fqns: tuple[str, ...]
    module: nn.Module
    entry: nn.Module
    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    calls: Counter[Any] = field(default_factory=Counter)

    def swapped(self, finish: Finish) -> nn.Module:
        """The part as a swap would leave it; a copy that shares everything but what is replaced."""
        if self.module in self.replacements:
            return self.replacements[self.module]
        # Layers learn what they apply, and which place keeps that: copies of them, with the same tensors.
        memo: dict[int, Any] = {id(old): copy.copy(new) for old, new in self.replacements.items()}
        memo |= {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        swapped = copy.deepcopy(self.module, memo)
        finish(swapped)
        return swapped

    def kind(self, finish: Finish) -> tuple[Any, ...]:
        """Parts of one kind, finished alike, take the same time on inputs of one kind."""
        shares = _densities if finish.drop_dead_features else _density
        names = {module: name for name, module in self.module.named_modules()}
        return (
            tuple((name, type(m), getattr(m, "num_heads", None)) for m, name in names.items()),
            tuple((name, tuple(p.shape), p.dtype) for name, p in self.module.named_parameters()),
            tuple(
                (names[old], inside, type(new), new.blocksize, *map(_step, shares(new)))
                for old, replacement in self.replacements.items()
                for inside, new in replacement.named_modules()
                if isinstance(new, BSRLinear)
            ),
        )


def _step(share: float) -> int:
    return round(share / DENSITY_STEP)


def _density(layer: BSRLinear) -> tuple[float]:
    """Share of the blocks that are stored."""
    return (1.0 - layer.sparsity,)


def _densities(layer: BSRLinear) -> tuple[float, float, float]:
    """The same, and that of the block rows and columns that have any: the others may go."""
    rows = (layer.crow_indices.diff() > 0).float().mean().item()
    n_columns = -(-layer.in_features // layer.blocksize[1])
    return 1.0 - layer.sparsity, rows, layer.col_indices.unique().numel() / n_columns


def find_parts(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module], finish: Finish | None = None
) -> list[Part]:
    """The parts to time, in the order of their layers; where they nest, the outermost.

    Args:
        model: dense. What would be fused in it is read off the model with the new layers in place, for a moment.
        replacements: the modules that a swap would replace, and by what.
        finish: what the swap does afterwards; None for nothing.
    """
    gated, chains = _fusions(model, replacements, finish or Finish())
    parts: list[Part] = []
    part_of: dict[nn.Module, Part] = {}
    for fqn, module in model.named_modules():
        if module in part_of:
            inside = part_of[module]
        elif module in chains:
            inside = chains[module]
        elif is_whole(module) or module in gated or module in replacements:
            inside = Part((without_compile_prefix(fqn),), module, module)
            part_of |= dict.fromkeys(module.modules(), inside)
        else:
            continue
        if module in replacements:
            if not inside.replacements:
                parts.append(inside)
            inside.replacements[module] = replacements[module]
    return parts


@contextmanager
def _in_place(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    try:
        replace_modules(model, replacements)
        yield
    finally:
        replace_modules(model, {new: old for old, new in replacements.items()})


def _fusions(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module], finish: Finish
) -> tuple[set[nn.Module], dict[nn.Module, Part]]:
    """Modules that a swap would compute at once, and the part of each layer that it would fuse with what follows."""
    gated: set[nn.Module] = set()
    links: dict[nn.Module, tuple[list[Activation], nn.Module | None]] = {}
    if not finish.needs_dataflows:
        return gated, {}
    layers = {old: new for old, new in replacements.items() if isinstance(new, BSRLinear)}
    with _in_place(model, layers):
        names = {m: without_compile_prefix(fqn) for fqn, m in model.named_modules()}
        flows, _ = dataflows(model)
        if finish.drop_dead_features:
            for pair in linear_pairs(model, flows):
                if pair.gate is None:
                    links[pair.firsts[0]] = pair.between, pair.last
                elif pair.gate.then is not None:
                    gated.add(pair.flow.owner)
        if finish.fuse_activations:
            gated |= {flow.owner for flow, _ in fusable(flows)}
            for flow, path, step in foldable(model, flows):
                links.setdefault(flow.piece(path), ([flow.piece(step.path)], None))
    old_of = {new: old for old, new in layers.items()}
    chains: dict[nn.Module, Part] = {}
    for layer in links.keys() - {following for _, following in links.values()}:
        between, following = links[layer]
        members, linears = [old_of.get(layer, layer)], [layer]
        while True:
            members += [_as_module(step) for step in between]
            if following is None:
                break
            linears.append(following)
            members.append(old_of.get(following, following))
            between, following = links.get(following, ([], None))
        if any(isinstance(member, FoldedActivation) for member in members):
            continue  # it looks for its layer where that was
        fqns = tuple(names[linear] for linear in linears)
        part = Part(fqns, nn.Sequential(*members), members[0])
        chains |= {old_of[linear]: part for linear in linears if linear in old_of}
    return gated, chains


class _Function(nn.Module):
    """A function between two layers, as a module between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _as_module(step: Activation) -> nn.Module:
    if isinstance(step, nn.Module):
        return step
    name = activation_name(step)
    return _Function(step) if name is None else activation_module(name)
