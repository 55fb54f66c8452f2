"""Launching Triton and Gluon kernels with little host time.

Triton's own way to a launch binds the arguments, works out a key from their types, values and alignment, and looks the
compiled kernel up by it. Where the caller knows that all of that is as at the first launch, the rest is one call into
the driver.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

# Versions whose CompiledKernel.run takes what Kernel.__call__ gives it; others go through the public, slower way.
DIRECT_LAUNCH = tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6), (3, 7), (3, 8))


def _driver_version() -> int:
    """12030 for CUDA 12.3; 0 if the driver cannot be asked."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


# The compiler's option for programmatic dependent launch: a kernel's programs start once those of the kernel before it
# have left or said so, and wait in the kernel until all that it wrote can be seen. It saves most of the time a launch
# takes, 0.2 to 0.6 us.
OVERLAP = {"launch_pdl": True}


def can_overlap(index: int) -> bool:
    """Whether kernels on a CUDA device can be launched with :data:`OVERLAP`.

    Hopper is where that was measured; in CUDA graphs, drivers can do it from CUDA 12.3 on.

    Args:
        index: of the CUDA device.
    """
    return torch.cuda.get_device_capability(index)[0] == 9 and _driver_version() >= 12030


def watched() -> bool:
    """Whether somebody, a profiler for instance, wants to see launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


class Kernel:
    """A kernel with its compile-time constants; after the first launch, a launch is one call into the driver.

    One object serves launches for which Triton would choose the same compiled kernel: tensors of the same dtypes and
    alignment on the same device, numbers that it specializes alike.

    Args:
        function: the kernel. Its parameters are TMA descriptors, tensors, numbers and constants, in this order.
        constants: its constants, by name.
        options: the compiler's options.
    """

    def __init__(self, function: Any, constants: dict[str, Any], **options: Any) -> None:
        self.function = function
        names = [name for name in function.arg_names if name in constants]
        assert len(names) == len(constants), (names, constants)
        self.constants_by_name = constants
        self.constants = tuple(constants[name] for name in names)
        self.options = options
        self.compiled: Any = None

    def __call__(
        self,
        grid: tuple[int, int, int],
        index: int,
        tensors: tuple[Tensor, ...],
        *numbers: int,
        descriptors: tuple[Any, ...] = (),
    ) -> None:
        """Launch it on the current stream.

        Args:
            grid: number of programs along x, y and z.
            index: of the CUDA device.
            tensors: the kernel's tensors.
            *numbers: its numbers.
            descriptors: its TMA descriptors.
        """
        compiled = self.compiled
        if compiled is None:
            # Triton's interpreter returns None.
            self.compiled = self.function[grid](
                *descriptors, *tensors, *numbers, *self.constants, **self.options
            )
            return
        if not DIRECT_LAUNCH or watched():
            compiled[grid](*descriptors, *tensors, *numbers, *self.constants)
            return
        # Addresses instead of tensors: for a tensor, Triton asks the driver whether its address is a GPU's.
        compiled.run(
            *grid,
            torch._C._cuda_getCurrentRawStream(index),
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *descriptors,
            *[tensor.data_ptr() for tensor in tensors],
            *numbers,
            *self.constants,
        )

    def bind(
        self, grid: tuple[int, int, int], index: int, *numbers: int
    ) -> Callable[..., None] | None:
        """A launch with everything but the addresses filled in.

        Args:
            grid: number of programs along x, y and z.
            index: of the CUDA device.
            *numbers: the kernel's numbers, as at its first launch.

        Returns:
            A function of the tensors' addresses; None before the first launch, or where Triton has no direct way.
        """
        compiled = self.compiled
        if compiled is None or not DIRECT_LAUNCH:
            return None
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        current_stream = torch._C._cuda_getCurrentRawStream
        X, Y, Z = grid
        rest = (*numbers, *self.constants)

        def launch(*addresses: int) -> None:
            stream = current_stream(index)
            run(X, Y, Z, stream, function, metadata, None, None, None, *addresses, *rest)

        return launch
