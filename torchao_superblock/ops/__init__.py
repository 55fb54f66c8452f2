"""The ground floor: devices and kernels. Imports nothing of the package above it."""

from typing import TYPE_CHECKING, Any

from torch import nn

from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.backends import backends
from torchao_superblock.ops.bsr_linear import bsr_linear
from torchao_superblock.ops.gated import Operands, bsr_gated_linear
from torchao_superblock.ops.plan import Plan, build_plan, split_plan

if TYPE_CHECKING:
    from torchao_superblock.ops.tuning import TuneReport

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
    """Find faster tile sizes for a swapped model on this GPU; see :func:`torchao_superblock.ops.tuning.tune`.

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
        from torchao_superblock.ops import tuning
    except ImportError as error:
        raise RuntimeError(
            f"tune: it searches tile sizes of the Triton kernels, which cannot be used here ({error}); install Triton"
        ) from error
    return tuning.tune(model, example_input)
