"""What an ahead-of-time compiler sees of the op.

In eager mode, under `torch.compile` and in an exported program the op stays whole: Python is there to run it, and it
may choose any kernel. AOTInductor's packages run without Python, so while it compiles, the op is replaced by the AOT
twin of the device's backend: plain Triton kernels, which then become part of the package. A backend without a twin
keeps the op.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from torchao_superblock.ops.backends import backend_of

_TRACEABLE_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def compiles_ahead_of_time() -> bool:
    """Whether AOTInductor is compiling in this thread. Nothing is imported to find out."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and virtualized.V.aot_compilation is True


def _twin(types: Sequence[type], x: Tensor) -> Any | None:
    """The AOT twin that stands for the op now; None: the op stays."""
    if not compiles_ahead_of_time() or not all(issubclass(t, _TRACEABLE_TYPES) for t in types):
        return None
    backend = backend_of(x.device.type)
    return None if backend is None else getattr(backend.module, "aot_twin", None)


def register_decomposition(
    library: torch.library.Library, name: str, forward: Callable[..., Tensor]
) -> None:
    """Give AOTInductor the kernels behind an op.

    Args:
        library: owns the op.
        name: the op's qualified name.
        forward: called as `forward(twin, *args, **kwargs)` with the op's own arguments; `twin.forward` takes
            the simple case of them (2-D, whole blocks) and can be traced.

    Example:
        >>> register_decomposition(library, "torchao_superblock::bsr_linear", _forward)  # doctest: +SKIP
    """

    def decompose(
        mode: FunctionalTensorMode,
        op: Any,
        types: Sequence[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        twin = _twin(types, args[0] if args else kwargs["x"])
        if twin is None:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return forward(twin, *args, **kwargs)

    torch.library.register_torch_dispatch(name, FunctionalTensorMode, decompose, lib=library)
