"""What compilers see of the ops.

In eager mode, in an exported program and for any compiler but Inductor an op stays whole: Python is there to run it,
and it may choose any kernel. Inductor is given what is behind it, below autograd and autocast:

- AOTInductor's packages run without Python, so the op is replaced by the AOT twin of the device's backend: plain Triton
  kernels, which then become part of the package. A backend without a twin keeps the op.
- In `torch.compile`, for few tokens, the host is what a call waits for. The same kernels are put in place of the op,
  if their number is known: compiled code launches them itself, without a way through the dispatcher. A device without
  such kernels is given the inner op (`inner.py`).
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from torchao_superblock.ops import inner
from torchao_superblock.ops.backends import backend_of

_TRACEABLE_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
# Up to here a GPU is done with a product before the host has asked for the next one. (Beyond, kernels that compiled
# code cannot launch are faster, and the choice among them may count tokens.)
FEW_TOKENS = 64


def compiles_ahead_of_time() -> bool:
    """Whether AOTInductor is compiling in this thread. Nothing is imported to find out."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and virtualized.V.aot_compilation is True


def compiles_for_this_process() -> bool:
    """Whether `torch.compile`'s Inductor is tracing in this thread; False for `torch.export` and AOTInductor."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    if virtualized is None or virtualized.V.aot_compilation is True:
        return False
    return isinstance(virtualized.V.fake_mode, FakeTensorMode)


def are_few(x: Tensor) -> bool:
    """Whether x `(..., K)` holds at most :data:`FEW_TOKENS` tokens, and a number of them that no call can change."""
    lead = x.shape[:-1]
    return all(type(size) is int for size in lead) and math.prod(lead) <= FEW_TOKENS


def _twin(x: Tensor) -> Any | None:
    """What stands for the backend in what Inductor traces now; None: the op stays."""
    backend = backend_of(x.device.type)
    if backend is None:
        return None
    if compiles_ahead_of_time():
        return getattr(backend.module, "aot_twin", None)
    if are_few(x) and hasattr(backend.module, "few_tokens_twin"):
        return backend.module.few_tokens_twin
    return inner.twin_of(backend)


def register_decomposition(
    library: torch.library.Library,
    name: str,
    forward: Callable[..., Tensor],
    twin_of: Callable[[Tensor], Any | None] = _twin,
) -> None:
    """Give Inductor the kernels behind an op.

    Args:
        library: owns the op.
        name: the op's qualified name.
        forward: called as `forward(twin, *args, **kwargs)` with the op's own arguments; `twin.forward` takes
            the simple case of them (2-D, whole blocks) and can be traced.
        twin_of: of the op's first argument, what `forward` gets; None leaves the op.

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
        twin = None
        if (compiles_ahead_of_time() or compiles_for_this_process()) and all(
            issubclass(t, _TRACEABLE_TYPES) for t in types
        ):
            twin = twin_of(args[0] if args else kwargs["x"])
        if twin is None:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return forward(twin, *args, **kwargs)

    torch.library.register_torch_dispatch(name, FunctionalTensorMode, decompose, lib=library)
