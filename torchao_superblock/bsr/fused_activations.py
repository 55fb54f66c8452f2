"""Activations that swapped layers apply themselves."""

from collections.abc import Iterator, Sequence

from torch import nn

from torchao_superblock.bsr.dataflow import Dataflow, Step, count_places
from torchao_superblock.bsr.folded_activation import (
    Activation,
    FoldedActivation,
    activation_name,
    fold_into,
    is_equal_to_rounding,
)
from torchao_superblock.bsr.gated_mlp import GatedMLP
from torchao_superblock.bsr.linear import BSRLinear


def foldable(
    model: nn.Module, flows: Sequence[Dataflow], notes: list[str] | None = None
) -> Iterator[tuple[Dataflow, str, Step]]:
    """Each BSRLinear that can apply the activation behind it: the dataflow, its path there, and the activation's step.

    Args:
        model: the whole model.
        flows: its dataflows.
        notes: is given a sentence about each that hooks, or other uses of the layer, keep from it.
    """
    places = count_places(model)
    for flow in flows:
        for path, steps in flow.chains.items():
            layer = flow.piece(path)
            if not isinstance(layer, BSRLinear) or layer.activation != "none" or not steps:
                continue
            if isinstance(flow.owner, GatedMLP) and path in flow.gates:
                continue
            step = steps[0]
            activation = flow.piece(step.path) if step.path else step.function
            if activation_name(activation) is None:
                continue
            obstacle = flow.obstacle(path, places)
            if not step.path:
                obstacle = f"the code of {flow.fqn or type(flow.owner).__name__} names it"
            obstacle = obstacle or flow.obstacle(step.path, places)
            if obstacle is None:
                yield flow, path, step
            elif notes is not None:
                kind = _kind_of(activation)
                notes.append(
                    f"{flow.name(path)}: the {kind} behind it runs on its own, since {obstacle}"
                )


def _kind_of(activation: Activation) -> str:
    return getattr(activation, "__name__", type(activation).__name__)


def fold_activations(model: nn.Module, flows: Sequence[Dataflow]) -> list[str]:
    """Let each BSRLinear apply the activation that alone reads its output, where nobody else can tell.

    Args:
        model: changed in place; an identity keeps the activation's place.
        flows: its dataflows.

    Returns:
        A sentence about each activation that a layer applies now, and about each that hooks, or other uses of the
        layer, kept from it.
    """
    notes: list[str] = []
    for flow, path, step in foldable(model, flows, notes):
        activation = flow.piece(step.path)
        place = FoldedActivation(activation, flow.owner, path)
        flow.put(step.path, place)
        fold_into(flow.piece(path), place)
        rounding = is_equal_to_rounding(activation)
        remark = f" as {place.activation!r}, which equals it to rounding" if rounding else ""
        notes.append(
            f"{flow.name(path)}: applies the {_kind_of(activation)} behind it itself{remark}"
        )
    return notes
