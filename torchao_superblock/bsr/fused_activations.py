"""Activations that swapped layers apply themselves."""

from collections.abc import Sequence

from torch import nn

from torchao_superblock.bsr.dataflow import Dataflow, count_places
from torchao_superblock.bsr.folded_activation import (
    FoldedActivation,
    activation_name,
    fold_into,
    is_equal_to_rounding,
)
from torchao_superblock.bsr.gated_mlp import GatedMLP
from torchao_superblock.bsr.linear import BSRLinear


def fold_activations(model: nn.Module, flows: Sequence[Dataflow]) -> list[str]:
    """Let each BSRLinear apply the activation that alone reads its output, where nobody else can tell.

    Args:
        model: changed in place; an identity keeps the activation's place.
        flows: its dataflows.

    Returns:
        A sentence about each activation that a layer applies now, and about each that hooks, or other uses of the
        layer, kept from it.
    """
    notes = []
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
            name = activation_name(activation)
            if name is None:
                continue
            kind = getattr(activation, "__name__", type(activation).__name__)
            obstacle = flow.obstacle(path, places)
            if not step.path:
                obstacle = f"the code of {flow.fqn or type(flow.owner).__name__} names it"
            obstacle = obstacle or flow.obstacle(step.path, places)
            if obstacle is not None:
                notes.append(
                    f"{flow.name(path)}: the {kind} behind it runs on its own, since {obstacle}"
                )
                continue
            place = FoldedActivation(activation, flow.owner, path)
            flow.put(step.path, place)
            fold_into(layer, place)
            remark = (
                f" as {name!r}, which equals it to rounding"
                if is_equal_to_rounding(activation)
                else ""
            )
            notes.append(f"{flow.name(path)}: applies the {kind} behind it itself{remark}")
    return notes
