"""The GPUs at hand and what each can do."""

import ctypes
from functools import cache
from importlib import import_module

import torch
import triton
import triton.testing

from torchao_superblock.ops.cuda.problem import Device

# Read when a kernel is decorated, so it cannot change later: kernels then run on CPU tensors.
INTERPRET: bool = triton.knobs.runtime.interpret

# Gigabytes a second between a card and its memory. A card that is not here is asked for its clock and the width of its
# bus.
_MEMORY_RATES = {"NVIDIA H200": 4814.0, "NVIDIA H100 80GB HBM3": 3352.0}

# Devices by index, as far as they were asked for. Where there is none, a test or a compiler may add one.
devices: dict[int, Device] = {}


def device_at(index: int) -> Device:
    """A CUDA device; -1 is Triton's interpreter."""
    if index in devices:
        return devices[index]
    if INTERPRET:
        found = Device(index, "interpreter", 90, 132, 4800.0)
    else:
        card = torch.cuda.get_device_properties(index)
        gluon = clusters = False
        if (card.major, card.minor) == (9, 0) and gluon_problem() is None:
            from torchao_superblock.ops.cuda.hopper_kernel import CLUSTERS as clusters

            gluon = True
        found = Device(
            index,
            card.name,
            card.major * 10 + card.minor,
            card.multi_processor_count,
            _MEMORY_RATES.get(card.name) or triton.testing.get_dram_gbps(index),
            can_overlap(card.major, _driver_version()),
            gluon,
            clusters,
        )
    devices[index] = found
    return found


def _driver_version() -> int:
    """12030 for CUDA 12.3; 0 if the driver cannot be asked."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def can_overlap(major: int, driver_version: int) -> bool:
    """Whether kernels can be launched with :data:`torchao_superblock.ops.cuda.launch.OVERLAP`.

    Hopper is where that was measured; in CUDA graphs, drivers can do it from CUDA 12.3 on.
    """
    return major == 9 and driver_version >= 12030


@cache
def gluon_problem() -> str | None:
    """Why the Gluon kernel cannot be used with this Triton; None where it can."""
    if INTERPRET:
        return "kernels run in Triton's interpreter"
    try:
        import_module("torchao_superblock.ops.cuda.hopper_kernel")
        import_module("triton.experimental.gluon.nvidia.hopper")
    except Exception as error:  # experimental modules may fail in any way
        return f"not usable with triton {triton.__version__}: {error}"
    return None
