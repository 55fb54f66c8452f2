"""Gated MLPs that compute `activation(gate(x)) * up(x)` at once: a subclass of their own class with another forward.

The layers in them stay what and where they are, so names, files and whoever looks at them do too. The new forward first
looks whether everything is as it was when it was made, and else is the old one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchao_superblock.bsr.dataflow import Dataflow, Gate
from torchao_superblock.bsr.folded_activation import (
    Activation,
    activation_name,
    is_equal_to_rounding,
)
from torchao_superblock.bsr.linear import LINEAR_TYPES, BSRLinear, has_own_forward
from torchao_superblock.common.modules import has_hooks
from torchao_superblock.ops.gated import bsr_gated_linear, computes_both
from torchao_superblock.ops.operands import Operands


class _Fused(NamedTuple):
    """What was seen when the forward was made.

    Attributes:
        gate: the dataflow.
        name: what the op calls the activation.
        activation: itself. (In a tuple, which nn.Module does not take for a child.)
    """

    gate: Gate
    name: str
    activation: Activation


class GatedMLP(nn.Module):
    """What the classes of fused gated MLPs have in common; each is a subclass of this and of the class it was before.

    Without gradients, a forward computes the gate, the product and the activation at once. With gradients, in exported
    programs, and where hooks, adapters or other layers have come between its pieces, it is that of the class before.
    """

    dense_class: type[nn.Module]
    _fused: _Fused

    @property
    def fused_activation(self) -> str:
        """What the op calls the activation that is computed with the layers."""
        return self._fused.name

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        gate, name, activation = self._fused
        x = args[0] if len(args) == 1 else kwargs.get(gate.input)
        if (
            len(args) + len(kwargs) != 1
            or not isinstance(x, Tensor)
            or torch.is_grad_enabled()
            or torch.compiler.is_exporting()
            or _at(self, gate.activation) is not activation
            or (isinstance(activation, nn.Module) and has_hooks(activation))
        ):
            return super().forward(*args, **kwargs)
        operands = _operands(_at(self, gate.gate), _at(self, gate.up), gate)
        if operands is None or (gate.gate == gate.up and not computes_both(x, *operands)):
            # A single layer reads x once as it is; its halves are no layers for any other kernel.
            return super().forward(*args, **kwargs)
        x = bsr_gated_linear(x, *operands, name)
        for path in gate.then:
            x = _at(self, path)(x)
        return x


def _at(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _is_plain(layer: nn.Module | None) -> bool:
    return (
        type(layer) is BSRLinear
        and layer.activation == "none"
        and not has_hooks(layer)
        and not has_own_forward(layer)
    )


def _has_part_of_a_block(layer: BSRLinear, gate: Gate) -> bool:
    """Whether a factor of the product, a layer or half of one, ends within a block."""
    parts = 2 if gate.gate == gate.up else 1
    return layer.out_features % (parts * layer.blocksize[0]) != 0


def _operands(
    gate_layer: nn.Module | None, up_layer: nn.Module | None, gate: Gate
) -> tuple[Operands, Operands] | None:
    """What the op is given; None if one of the layers is not just a block-sparse layer of whole block rows any more."""
    if not _is_plain(gate_layer) or not _is_plain(up_layer):
        return None
    if _has_part_of_a_block(gate_layer, gate) or _has_part_of_a_block(up_layer, gate):
        return None
    if gate_layer is not up_layer:
        return Operands(*gate_layer.operands()), Operands(*up_layer.operands())
    crow_indices, col_indices, values, bias, _ = gate_layer.operands()
    half = crow_indices.shape[0] // 2
    N = half * values.shape[1]
    # Rows of a half start anywhere in what both share.
    first = Operands(
        crow_indices[: half + 1], col_indices, values, None if bias is None else bias[:N]
    )
    second = Operands(crow_indices[half:], col_indices, values, None if bias is None else bias[N:])
    return (first, second) if gate.gate_is_first else (second, first)


def obstacle(flow: Dataflow, gate: Gate) -> str | None:
    """Why a gated MLP is not computed at once, or None: a sentence."""
    if gate.then is None:
        return "it does more than that, or something that is no child of it"
    layers = flow.piece(gate.gate), flow.piece(gate.up)
    for path in (gate.gate, gate.up, gate.activation):
        piece = flow.piece(path)
        if isinstance(piece, nn.Module) and has_hooks(piece):
            return f"hooks watch {flow.name(path)}"
        if isinstance(piece, nn.Module) and has_own_forward(piece):
            return f"{flow.name(path)} has a forward of its own"
    sizes = {(layer.out_features, layer.in_features, layer.blocksize) for layer in layers}
    if len(sizes) > 1:
        return "the two layers differ in their shapes or block sizes"
    if not all(map(_is_plain, layers)):
        return "the two layers are not plain BSRLinear layers"
    if _has_part_of_a_block(layers[0], gate):
        if gate.gate != gate.up:
            return "their last blocks are padded"
        return "a block would lie in both halves of the layer"
    dtypes = {
        module.values.dtype if isinstance(module, BSRLinear) else module.weight.dtype
        for module in (*layers, *map(flow.piece, gate.then))
        if isinstance(module, (*LINEAR_TYPES, BSRLinear))
    }
    if len(dtypes) > 1:  # some forwards cast between them
        return "its layers are of several dtypes"
    return None


def fusable(
    flows: Sequence[Dataflow], notes: list[str] | None = None
) -> Iterator[tuple[Dataflow, Gate]]:
    """Each gated MLP of two swapped layers that can compute their product and the activation at once.

    Args:
        flows: of the model.
        notes: is given a sentence about each that cannot, with the reason.
    """
    for flow in flows:
        for gate in flow.gates.values():
            name = activation_name(flow.piece(gate.activation))
            layers = [flow.piece(path) for path in (gate.gate, gate.up)]
            if name is None or not all(isinstance(layer, BSRLinear) for layer in layers):
                continue
            reason = obstacle(flow, gate)
            if reason is None and not isinstance(flow.owner, GatedMLP):
                yield flow, gate
            elif reason is not None and notes is not None:
                notes.append(
                    f"{_names(flow, gate)}: the {name} and the product behind them run on their own, since {reason}"
                )


def _names(flow: Dataflow, gate: Gate) -> str:
    return " and ".join(dict.fromkeys(map(flow.name, (gate.gate, gate.up))))


def fuse_gates(flows: Sequence[Dataflow]) -> list[str]:
    """Let each gated MLP of two swapped layers compute their product and the activation at once.

    Args:
        flows: of the model; their owners become instances of a subclass of their class.

    Returns:
        A sentence about each that does now, and about each that does not, with the reason.
    """
    notes: list[str] = []
    for flow, gate in fusable(flows, notes):
        activation = flow.piece(gate.activation)
        fuse_gate(flow.owner, gate, activation)
        rounding = is_equal_to_rounding(activation)
        remark = ", which equals the model's own to rounding" if rounding else ""
        notes.append(
            f"{_names(flow, gate)}: computed at once with the {activation_name(activation)} and the product behind "
            f"them{remark}"
        )
    return notes


def fuse_gate(module: nn.Module, gate: Gate, activation: Activation) -> None:
    """Give a gated MLP the forward that computes the gate at once."""
    module._fused = _Fused(gate, activation_name(activation), activation)
    module.__class__ = gated_class(type(module))


def unfuse_gate(module: GatedMLP) -> None:
    """Undo :func:`fuse_gate`."""
    module.__class__ = module.dense_class
    del module._fused


@cache
def gated_class(cls: type[nn.Module]) -> type[GatedMLP]:
    """The subclass of a class of gated MLPs; pickles find it by its name, in this module."""
    path = f"{cls.__module__}:{cls.__qualname__}".replace(".", "/")
    return type(
        f"Gated{cls.__name__}",
        (GatedMLP, cls),
        {
            "__doc__": f"A `{cls.__name__}` with block-sparse layers that computes its gate at once.",
            "__module__": __name__,
            "__qualname__": f"{_PREFIX}{path}",
            "dense_class": cls,
        },
    )


_PREFIX = "Gated:"


def __getattr__(name: str) -> type[GatedMLP]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, path = name.removeprefix(_PREFIX).replace("/", ".").partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return gated_class(found)
