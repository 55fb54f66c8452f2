"""Names that pickles of version 0.1 contain, wherever their objects live now. Nothing else uses them."""

from torchao_superblock.bsr import folded_activation, linear


def install() -> None:
    """Makes the old names importable."""
    linear.FoldedActivation = folded_activation.FoldedActivation
