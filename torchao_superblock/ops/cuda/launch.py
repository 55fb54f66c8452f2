"""Launching Triton and Gluon kernels with little host time.

Triton's own way to a launch binds the arguments, works out a key from their types, values and alignment, and looks the
compiled kernel up by it. Where the caller knows that all of that is as at the first launch, the rest is one call into
the driver.
"""

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from torchao_superblock.ops.cuda.device import INTERPRET

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# Versions whose CompiledKernel.run takes what Kernel.__call__ gives it; others go through the public, slower way.
DIRECT_LAUNCH = _VERSION in ((3, 6), (3, 7), (3, 8))
# Versions behind whose CompiledKernel.run is a C function that can be called as _c_function() does.
_C_LAUNCH = _VERSION == (3, 6)
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


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides: tuple[int, ...] = (1,) * min(len(shape), 1)
    for size in shape[:0:-1]:
        strides = (size * strides[0], *strides)
    return strides


class Described:
    """TMA descriptors of tensors that a kernel is given again and again.

    A descriptor is an address, and numbers that stay: what the driver is given of it is kept by the addresses.

    Args:
        describe: makes the descriptors of tensors.
    """

    most = 256  # of the addresses that are kept

    def __init__(self, describe: Callable[..., tuple[Any, ...]]) -> None:
        self.describe = describe
        self.known: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def keep(self, addresses: tuple[int, ...], expanded: tuple[Any, ...]) -> None:
        """Remember what the driver is given.

        Args:
            addresses: of the tensors.
            expanded: holds none of them.
        """
        if len(self.known) >= self.most:
            self.known.clear()
        self.known[addresses] = expanded


def _c_function(
    compiled: Any,
) -> tuple[Any, tuple[Any, ...], Callable[..., tuple[Any, ...]]] | None:
    """What Triton's launcher calls in the end.

    Args:
        compiled: a kernel that was launched.

    Returns:
        The function; what it takes between the stream and the kernel's own arguments; and what makes of descriptors
        what it takes in their place. None if the launcher does more than that.
    """
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    function, expand = launcher.launch, None
    if inspect.isfunction(function):  # which expands descriptors, and calls the C function
        within = inspect.getclosurevars(function).nonlocals
        if not {"launcher", "tensordesc_meta"} <= set(within):
            return None
        from triton.backends.nvidia.driver import make_tensordesc_arg

        function, layouts = within["launcher"], within["tensordesc_meta"]

        def expand(*descriptors: Any) -> tuple[Any, ...]:
            parts = map(make_tensordesc_arg, descriptors, layouts)
            return tuple(itertools.chain.from_iterable(parts))

    flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    nothing = (None, None)
    head = (compiled.function, *flags, *nothing, compiled.packed_metadata, None, *nothing)
    return function, head, expand


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
        # What a launch calls, what that takes behind the stream, and what makes it take descriptors.
        self.direct: tuple[Any, tuple[Any, ...], Callable[..., tuple[Any, ...]] | None] | None = (
            None
        )

    def __call__(
        self,
        grid: tuple[int, int, int],
        device_index: int,
        tensors: tuple[Tensor, ...],
        *numbers: int,
        described: Described | None = None,
        of: tuple[Tensor, ...] = (),
    ) -> None:
        """Launch it on the current stream.

        Args:
            grid: number of programs along x, y and z.
            device_index: of the CUDA device.
            tensors: the kernel's tensors.
            *numbers: its numbers, but for the last ones if they are always the same.
            described: its TMA descriptors.
            of: the tensors that they describe.
        """
        compiled = self.compiled
        # Somebody, a profiler for instance, may want to see launches.
        hook = triton.knobs.runtime.launch_enter_hook
        if self.direct is None or (hook is not None and getattr(hook, "calls", True)):
            descriptors = () if described is None else described.describe(*of)
            launch = (self.function if compiled is None else compiled)[grid]
            options = self.options if compiled is None else {}
            found = launch(*descriptors, *tensors, *numbers, *self.rest, **options)
            # Triton's interpreter returns None.
            if compiled is None and found is not None:
                self.compiled = found
                self.direct = self._direct(found)
            return
        call, head, expand = self.direct
        expanded: tuple[Any, ...] = ()
        if described is not None:
            if expand is None:
                expanded = described.describe(*of)
            else:
                addresses = tuple(map(_address, of))
                expanded = described.known.get(addresses) or ()
                if not expanded:
                    expanded = expand(*described.describe(*of))
                    described.keep(addresses, expanded)
        # Addresses instead of tensors: for a tensor, Triton asks the driver whether its address is a GPU's.
        call(
            *grid,
            _stream(device_index),
            *head,
            *expanded,
            *map(_address, tensors),
            *numbers,
            *self.rest,
        )

    @staticmethod
    def _direct(compiled: Any) -> tuple[Any, tuple[Any, ...], Any] | None:
        if not DIRECT_LAUNCH:
            return None
        found = _c_function(compiled) if _C_LAUNCH else None
        head = (compiled.function, compiled.packed_metadata, None, None, None)
        return found or (compiled.run, head, None)


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
