"""Launching Triton and Gluon kernels with little host time.

Triton's own way to a launch binds the arguments, works out a key from their types, values and alignment, and looks the
compiled kernel up by it. Where the caller knows that all of that is as at the first launch, the rest is one call into
the driver.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from torchao_superblock.ops.cuda.device import INTERPRET

# Versions whose CompiledKernel.run takes what Kernel.__call__ gives it; others go through the public, slower way.
DIRECT_LAUNCH = tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6), (3, 7), (3, 8))
# The compiler's option for programmatic dependent launch: a kernel's programs start once those of the kernel before it
# have left or said so, and wait in the kernel until all that it wrote can be seen. It saves most of the time a launch
# takes, 0.2 to 0.6 us.
OVERLAP = {"launch_pdl": True}
_address = Tensor.data_ptr
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
# Of a shape, strides and a dtype makes a tensor.
Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


def _empty_through_dispatcher(
    device: torch.device | str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _empty_at_once() -> Empty:
    """As torch.compile's code allocates: on the current device, past the dispatcher; where this torch can."""
    device = "cpu" if INTERPRET else "cuda"
    found = getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)
    return found or partial(_empty_through_dispatcher, device)


def known_divisor(stride: int) -> int:
    """A power of two that divides a stride, for kernels to be told; 1 where Triton sees for itself that 16 does."""
    if not isinstance(stride, int) or stride % 16 == 0:  # a number of a graph is not known yet
        return 1
    return stride & -stride


class Kernel:
    """A kernel with its compile-time constants; after the first launch, a launch is one call into the driver.

    One object serves launches for which Triton would choose the same compiled kernel: tensors of the same dtypes and
    alignment on the same device, numbers that it specializes alike.

    Args:
        function: the kernel. Its parameters are TMA descriptors, tensors, numbers and constants, in this order.
        constants: its constants, by name.
        numbers: its last numbers, as far as they are the same at every launch.
        options: the compiler's options.
    """

    # What its callers allocate outputs with, whether they may ask for OVERLAP, and whether sums of splits are a kernel.
    empty: Empty = staticmethod(_empty_at_once())
    overlaps = True
    adds_splits = True

    def __init__(
        self,
        function: Any,
        constants: dict[str, Any],
        numbers: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        names = tuple(filter(constants.__contains__, function.arg_names))
        assert len(names) == len(constants), (names, constants)
        self.function = function
        self.constants_by_name = constants
        self.numbers = numbers
        self.constants = tuple(map(constants.__getitem__, names))
        self.rest = (*numbers, *self.constants)
        self.options = options
        self.compiled: Any = None
        self.direct: tuple[Any, ...] | None = None  # what a launch calls, and with what first

    def __call__(
        self,
        grid: tuple[int, int, int],
        device_index: int,
        tensors: tuple[Tensor, ...],
        *numbers: int,
        descriptors: tuple[Any, ...] = (),
    ) -> None:
        """Launch it on the current stream.

        Args:
            grid: number of programs along x, y and z.
            device_index: of the CUDA device.
            tensors: the kernel's tensors.
            *numbers: its numbers, but for the last ones if they are always the same.
            descriptors: its TMA descriptors.
        """
        compiled = self.compiled
        if compiled is None:
            # Triton's interpreter returns None.
            self.compiled = compiled = self.function[grid](
                *descriptors, *tensors, *numbers, *self.rest, **self.options
            )
            if compiled is not None and DIRECT_LAUNCH:
                self.direct = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        # Somebody, a profiler for instance, may want to see launches.
        hook = triton.knobs.runtime.launch_enter_hook
        if self.direct is None or (hook is not None and getattr(hook, "calls", True)):
            compiled[grid](*descriptors, *tensors, *numbers, *self.rest)
            return
        run, function, metadata = self.direct
        # Addresses instead of tensors: for a tensor, Triton asks the driver whether its address is a GPU's.
        run(
            *grid,
            _stream(device_index),
            function,
            metadata,
            None,
            None,
            None,
            *descriptors,
            *map(_address, tensors),
            *numbers,
            *self.rest,
        )


class TracedKernel(Kernel):
    """A kernel whose launch is recorded in the graph that is being traced, for compilers to take over."""

    overlaps = False

    @classmethod
    def on(cls, device: torch.device) -> type["TracedKernel"]:
        """The same with outputs on a device, which need not be the current one when the graph runs.

        Args:
            device: of the tensors that the graph is traced with.
        """
        empty = staticmethod(partial(_empty_through_dispatcher, device))
        return type(cls.__name__, (cls,), {"empty": empty})

    def __call__(self, grid: Any, _: int, tensors: tuple[Tensor, ...], *numbers: int) -> None:
        names = [name for name in self.function.arg_names if name not in self.constants_by_name]
        arguments = dict(zip(names, (*tensors, *numbers, *self.numbers), strict=True))
        torch.library.wrap_triton(self.function)[grid](
            **arguments, **self.constants_by_name, **self.options
        )


class SummedLaterKernel(TracedKernel):
    """One whose partial sums are added by torch, so that a compiler does it in the kernel that reads them."""

    adds_splits = False
