"""From which block sparsity on the op is faster than a dense linear layer: the table behind ``min_sparsity=None``.

The numbers come from ``benchmarks/bsr_linear.py``, which sweeps the sparsity for each block size and reports the point
at which dense and block-sparse take the same time; each entry here is that point for the slower of the two MLP shapes
of ViT-B/16, rounded up to a multiple of 0.05.
"""

import torch

# What holds where nothing was measured: an unknown device, dtype or block size.
CAUTIOUS = 0.9

# (device type, dtype) -> {smallest side of the block: break-even sparsity}; a block between two entries takes the one
# of the smaller block, a block below the first entry CAUTIOUS. The CUDA entries hold for Hopper (measured on an H200);
# 0.3 is the lowest sparsity that was tried.
_HALF = {16: 0.9, 32: 0.6, 64: 0.4, 128: 0.3}
_BREAK_EVEN: dict[tuple[str, torch.dtype], dict[int, float]] = {
    ("cuda", torch.bfloat16): _HALF,
    ("cuda", torch.float16): _HALF,
    ("cuda", torch.float32): {16: 0.3},
}
# The same for float32 where torch may use TF32, which makes dense layers several times faster.
_HOPPER_TF32 = {16: 0.9, 32: 0.75, 64: 0.5, 128: 0.3}
_MEASURED_CAPABILITY = (9, 0)


def _table(
    device_type: str, dtype: torch.dtype, capability: tuple[int, int] | None
) -> dict[int, float]:
    if device_type == "cuda":
        if capability is None and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability()
        if capability != _MEASURED_CAPABILITY:
            return {}
        if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
            return _HOPPER_TF32
    return _BREAK_EVEN.get((device_type, dtype), {})


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
    table = _table(device_type, dtype, capability)
    fitting = [sparsity for side, sparsity in table.items() if side <= min(blocksize)]
    return min(fitting, default=CAUTIOUS)
