"""The ground floor: devices and kernels. Imports nothing of the package above it."""

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from torchao_superblock.ops import op, pytorch
from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.backends import backends
from torchao_superblock.ops.gated import bsr_gated_linear
from torchao_superblock.ops.op import bsr_linear
from torchao_superblock.ops.operands import Operands
from torchao_superblock.ops.plan import Plan, build_plan, split_plan

if TYPE_CHECKING:
    from torchao_superblock.ops.cuda.tune import TuneReport

# Under the names that a released version documented. (No files: a submodule `bsr_linear`, imported, would take the
# function's place.)
sys.modules[f"{__name__}.bsr_linear"] = op
sys.modules[f"{__name__}.gather_gemm"] = pytorch

__all__ = [
    "ACTIVATIONS",
    "Operands",
    "Plan",
    "backends",
    "bsr_gated_linear",
    "bsr_linear",
    "build_plan",
    "split_plan",
    "tune",
]


def tune(model: nn.Module, example_input: Any) -> "TuneReport":
    """Find faster tile sizes for a swapped model on this GPU; see :func:`torchao_superblock.ops.cuda.tune.tune`.

    Args:
        model: a model with :class:`BSRLinear` layers on a CUDA device.
        example_input: what it is called with: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        One entry for each distinct product; prints as a table.

    Raises:
        RuntimeError: Triton is not installed, so there is nothing to tune.
        ValueError: the model computes no block-sparse product on a CUDA device.
    """
    try:
        from torchao_superblock.ops.cuda import tune as tuning
    except ImportError as error:
        raise RuntimeError(
            f"tune: it searches tile sizes of the Triton kernels, which cannot be used here ({error}); install Triton"
        ) from error
    return tuning.tune(model, example_input)
