"""The ground floor: devices and kernels. Imports nothing of the package above it."""

from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.backends import backends
from torchao_superblock.ops.bsr_linear import bsr_linear
from torchao_superblock.ops.plan import Plan, build_plan, split_plan

__all__ = ["ACTIVATIONS", "Plan", "backends", "bsr_linear", "build_plan", "split_plan"]
