"""From which block sparsity on the op is faster than a dense linear layer: the table behind `min_sparsity=None`.

The numbers come from `benchmarks/break_even.py`, which sweeps the sparsity for each block size and reports the point
at which dense and block-sparse take the same time; each entry here is that point for the slower of the two MLP shapes
of ViT-B/16, rounded up to a multiple of 0.05.
"""

from typing import NamedTuple

import torch

from torchao_superblock.ops.bsr_linear import cpu_backend
from torchao_superblock.ops.precision import allows_tf32

# What is taken where nothing was measured: an unknown device, dtype or block size.
CAUTIOUS = 0.9


class BreakEven(NamedTuple):
    """From where on a block-sparse layer is taken to be faster than a dense one.

    Attributes:
        sparsity: a fraction in [0, 1].
        measured: whether that is a measured point; if not, it is a cautious guess.
        where: the device that it is about, for messages.
    """

    sparsity: float
    measured: bool
    where: str


# {smallest side of the block: break-even sparsity} by dtype; a block between two entries takes the one of the smaller
# block, a block below the first entry CAUTIOUS. 0.1 is the lowest sparsity that was tried, where not noted otherwise.
_HOPPER_HALF = {16: 0.65, 32: 0.2, 64: 0.1}
_HOPPER = {
    torch.bfloat16: _HOPPER_HALF,
    torch.float16: _HOPPER_HALF,
    torch.float32: {16: 0.3},  # the lowest that was tried
}
# The same for float32 where torch may use TF32, which makes dense layers several times faster.
_HOPPER_TF32 = {16: 0.9, 32: 0.75, 64: 0.5, 128: 0.3}
_MEASURED_CAPABILITY = (9, 0)  # on an H200; an H100's points in bfloat16 lie no higher

# Two cores of an x86 server, 197 tokens, the highest of Zen 3, Zen 4 and Sapphire Rapids. bfloat16 holds for processors
# without products of their own for it (AVX512_BF16, AMX): with these a dense layer is so much faster that swapped ones
# were seen to run at 0.33x to 0.98x, and nobody has measured where that ends.
_CPU_COMPILED = {
    torch.float32: {16: 0.2, 32: 0.15},
    torch.bfloat16: {16: 0.3},
    torch.float16: {16: 0.2, 32: 0.15},
}
_CPU_PYTORCH = {torch.float32: {16: 0.95, 32: 0.8, 64: 0.65}}


def _has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 itself, so that dense layers do not convert to float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _table(
    device_type: str, dtype: torch.dtype, capability: tuple[int, int] | None
) -> dict[int, float]:
    if device_type == "cpu":
        if dtype == torch.bfloat16 and _has_bfloat16_products():
            return {}
        compiled = str(cpu_backend().backend_info()["name"]).startswith("c-")
        return (_CPU_COMPILED if compiled else _CPU_PYTORCH).get(dtype, {})
    if device_type != "cuda" or capability != _MEASURED_CAPABILITY:
        return {}
    if dtype == torch.float32 and allows_tf32():
        return _HOPPER_TF32
    return _HOPPER.get(dtype, {})


def break_even(
    device_type: str,
    blocksize: tuple[int, int],
    dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
) -> BreakEven:
    """Sparsity from which `bsr_linear` is faster than `F.linear`, measured, or a cautious guess.

    Args:
        device_type: `"cpu"` or `"cuda"`.
        blocksize: `(rows, cols)`.
        dtype: dtype of the weight.
        capability: CUDA compute capability; None asks the current device.

    Returns:
        The sparsity, and whether it was measured.
    """
    where = device_type
    if device_type == "cuda" and capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        where = f"{device_type} ({torch.cuda.get_device_name()})"
    table = _table(device_type, dtype, capability)
    fitting = [sparsity for side, sparsity in table.items() if side <= min(blocksize)]
    return BreakEven(min(fitting, default=CAUTIOUS), bool(fitting), where)
