"""What a swap does once the new layers are in place: nested tensors off, dead features dropped, activations fused."""

from dataclasses import dataclass

from torch import nn

from torchao_superblock.bsr.dataflow import dataflows
from torchao_superblock.bsr.dead_features import drop_dead_features
from torchao_superblock.bsr.fused_activations import fold_activations
from torchao_superblock.bsr.gated_mlp import fuse_gates
from torchao_superblock.bsr.linear import BSRLinear
from torchao_superblock.common.names import without_compile_prefix


@dataclass(frozen=True)
class Finish:
    """The options of :func:`swap_to_bsr` that are about more than one layer; called, it does what they say."""

    fuse_activations: bool = False
    drop_dead_features: bool = False

    @property
    def needs_dataflows(self) -> bool:
        """Whether what follows what matters."""
        return self.fuse_activations or self.drop_dead_features

    def __call__(self, model: nn.Module) -> list[str]:
        """Changes a swapped model, or a swapped part of one, in place.

        Returns:
            A sentence about each change, and about each that could not be made.
        """
        notes = [
            f"{without_compile_prefix(fqn) or 'the model'}: use_nested_tensor is False now, since a swapped layer "
            "takes no nested tensors; padding is computed and masked instead"
            for fqn in turn_off_nested_tensors(model)
        ]
        if not self.needs_dataflows:
            return notes
        flows, remarks = dataflows(model)
        notes += remarks
        if self.drop_dead_features:
            notes += drop_dead_features(model, flows)
        if self.fuse_activations:
            notes += fuse_gates(flows)
            notes += fold_activations(model, flows)
        return notes


def turn_off_nested_tensors(model: nn.Module) -> list[str]:
    """Set `use_nested_tensor = False` on each `nn.TransformerEncoder` around a BSRLinear; return their FQNs.

    An encoder decides on nested tensors from its first layer alone, and BSRLinear has no kernel for them.
    """
    changed = []
    for fqn, encoder in model.named_modules():
        if (
            isinstance(encoder, nn.TransformerEncoder)
            and getattr(encoder, "use_nested_tensor", False)
            and any(isinstance(module, BSRLinear) for module in encoder.modules())
        ):
            encoder.use_nested_tensor = False
            changed.append(fqn)
    return changed
