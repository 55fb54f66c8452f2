"""The look of all pictures."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """The pyplot of matplotlib, without a display, with the look shared by all pictures here.

    Raises:
        ImportError: if matplotlib is missing, with the command that installs it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'torchao_superblock[examples]' "
            "(or run with --no-pictures)"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    return plt


BLOCK_COLORS = {16: "#8ecae6", 32: "#219ebc", 64: "#1d4e89", 128: "#0b2545"}
"""One colour a block size in every picture, darker for larger blocks."""
