"""Device type -> backend: the one place where they meet.

A device is a folder and a line at the end of this file, or a call of :func:`register_backend` from another package.
The op's kernels for the dispatcher, its autocast, the short way of repeated calls, the break-even table, the kernels of
masks and of gated MLPs and :func:`backends` follow from it. Nothing here imports a backend before it is needed;
backends import no op.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor


class BackendModule(Protocol):
    """What a backend computes: a module (or any object) with these functions.

    Operands are 2-D, of one dtype, on one device, with M >= 1; `x` and `grad` have any strides, the rest is contiguous.
    Outputs are contiguous, in the dtype of `x`; float16 and bfloat16 accumulate in float32. What the indices hold is
    never trusted for memory safety.

    N and K need not be multiples of the block size: the last blocks are stored whole then, and nothing else is. What
    they hold beyond row N or column K is finite and does not count, its gradient is zero, and nothing is read or
    written beyond `x`, `grad`, `bias` and the output.

    - `x` `(M, K)`, `grad` `(M, N)`, `bias` `(N,)` or None
    - `crow` int32 `(R + 1,)`, where each block row starts; `col` int32 `(nnz,)`, block columns; `values` `(nnz, r, c)`
    - `activation`, a key of :data:`torchao_superblock.ops.ACTIVATIONS`
    - `plan`, from :func:`torchao_superblock.ops.build_plan`, or None

    Four more are optional: `call(general, *args)`, the op with its own arguments, serves calls that need no check or
    are like an earlier one at once and hands others to `general(*args)`; `repeat(general, *args)` makes of such a call
    what serves others whose tensors look the same, where the backend leaves no closures itself; `aot_twin` has a
    `forward` as here that compilers can trace, for packages that run without Python, and `few_tokens_twin` one for
    `torch.compile` and few tokens.

    Legend: M tokens, N out features, K in features, R x C the block grid (R = ceil(N / r), C = ceil(K / c)), r x c the
    block size, nnz stored blocks, W the block-sparse weight `(N, K)`.

    Attributes:
        forward: of `x, crow, col, values, bias, activation, plan, out_features`: `activation(x @ W.T + bias)`,
            `(M, N)`; the last is N.
        grad_x: of `grad, crow, col, values, plan, in_features`: `grad @ W`, `(M, K)`; the last is K.
        grad_values: of `grad, x, crow, col, plan, block_rows, block_cols`: the stored blocks of `grad.T @ x`,
            `(nnz, r, c)`; the last two are r and c.
        backend_info: of nothing: `name` and `reason` (a sentence), for people, and what else there is to say.
    """

    forward: Callable[..., Tensor]
    grad_x: Callable[..., Tensor]
    grad_values: Callable[..., Tensor]
    backend_info: Callable[[], dict[str, object]]


class GatedKernels(Protocol):
    """What computes both products of a gated MLP at once: a module with these functions of `x, gate, up`.

    The weights are :class:`torchao_superblock.ops.Operands`; they may be rows of larger ones, so `crow_indices` need
    not start at 0. `x` is `(M, K)`, M >= 1, to `forward`, and `(..., K)` to the others.

    Attributes:
        can_compute: whether it takes such operands.
        serves: whether it is expected to be faster than two products, too.
        forward: of `x, gate, up, activation`: `activation(x @ gate.T) * (x @ up.T)`, with biases, `(M, N)`.
    """

    can_compute: Callable[..., bool]
    serves: Callable[..., bool]
    forward: Callable[..., Tensor]


@dataclass(frozen=True)
class Backend:
    """The line of a device.

    Attributes:
        device_type: as in `torch.device(device_type)`; for torch's PrivateUse1, the name it was given.
        source: the path of a module, which is imported at the first call, or an object; see :class:`BackendModule`.
        requires: a module without which plain PyTorch (`ops/pytorch.py`) takes its place.
        gradients_use_plan: both gradients want a plan, so a backward that was given none builds one for the two.
        recomputed_row: stored numbers in a row of the weight, on average, up to which a layer in 16 bits that applies
            an activation computes what comes before it again in a backward. Above that it keeps it, and the forward
            writes two outputs in two passes. 0: always kept.
        leaves_closures: its `call` leaves a closure with :func:`torchao_superblock.ops.fast_path.remember` for what
            can be repeated. Otherwise a repeated call goes past the dispatcher to `call`.
        break_even_points: a function, or its path as `"module:function"`, of a dtype and a compute capability (None:
            the current device's) that returns {smallest side of the block: sparsity from which the op is faster than
            a dense layer}. None, or no entry for a block size, leaves a swap to a cautious guess.
        mask_source: the path of a module with the functions of `ops/block_mask/kernels.py`; None, or where it cannot
            be imported, leaves masks to plain PyTorch.
        gated_source: the path of a module as :class:`GatedKernels` has it; None, or where it cannot be imported, leaves
            a gated MLP to two products.
    """

    device_type: str
    source: str | BackendModule
    requires: str | None = None
    gradients_use_plan: bool = False
    recomputed_row: int = 0
    leaves_closures: bool = False
    break_even_points: str | Callable | None = None
    mask_source: str | None = None
    gated_source: str | None = None

    @cached_property
    def dispatch_key(self) -> str:
        """`"CPU"`, `"CUDA"`, `"PrivateUse1"`: torch's name of the device, from which those of its other keys follow."""
        return torch._C._dispatch_key_for_device(self.device_type)

    @cached_property
    def module(self) -> BackendModule:
        """What computes, imported at first need; plain PyTorch where what it requires is absent."""
        if not isinstance(self.source, str):
            return self.source
        if self.requires is not None:
            try:
                importlib.import_module(self.requires)
            except ImportError:
                return importlib.import_module("torchao_superblock.ops.pytorch")
        return importlib.import_module(self.source)

    @cached_property
    def mask_kernels(self) -> ModuleType | None:
        """What `mask_source` names, imported at first need."""
        return _optional(self.mask_source)

    @cached_property
    def gated_kernels(self) -> GatedKernels | None:
        """What `gated_source` names, imported at first need."""
        return _optional(self.gated_source)

    def points(self, dtype: torch.dtype, capability: tuple[int, int] | None) -> dict[int, float]:
        """Its `break_even_points` for a dtype and a compute capability."""
        find = self.break_even_points
        if isinstance(find, str):
            find = pkgutil.resolve_name(find)
        return {} if find is None else find(dtype, capability)


def _optional(path: str | None) -> Any:
    try:
        return None if path is None else importlib.import_module(path)
    except ImportError:
        return None


_backends: dict[str, Backend] = {}
_listeners: list[Callable[[Backend], None]] = []


def register_backend(backend: Backend) -> None:
    """Serve the op on a type of device by a backend, for the rest of the process.

    Args:
        backend: the line of the device.

    Raises:
        ValueError: the device type has a backend, or torch does not know it.

    Example:
        >>> register_backend(Backend("xpu", "my_package.xpu"))  # doctest: +SKIP
    """
    device_type = backend.device_type
    if device_type in _backends:
        raise ValueError(
            f"register_backend: {device_type!r} has a backend already, {_backends[device_type].source}; "
            "a process keeps the first one"
        )
    try:
        _ = backend.dispatch_key
    except RuntimeError as error:
        raise ValueError(
            f"register_backend: torch knows no device type {device_type!r}; a device of your own is PrivateUse1, named "
            "by torch.utils.rename_privateuse1_backend"
        ) from error
    _backends[device_type] = backend
    for listener in _listeners:
        listener(backend)


def backend_of(device_type: str) -> Backend | None:
    """The line of a device type, or None."""
    return _backends.get(device_type)


def on_each_backend(listener: Callable[[Backend], None]) -> None:
    """Call `listener` for each backend that is registered, and for each that will be."""
    _listeners.append(listener)
    for backend in _backends.values():
        listener(backend)


class Backends(dict[str, dict[str, object]]):
    """`device type -> {"name", "reason", ...}`; prints as a list."""

    def __str__(self) -> str:
        lines = []
        for device_type, info in self.items():
            lines.append(f"{device_type}: {info['name']} ({info['reason']})")
            lines += [
                f"    {key}: {value}"
                for key, value in info.items()
                if key not in ("name", "reason")
            ]
        return "\n".join(lines)


def backends() -> Backends:
    """Say which kernels `bsr_linear` uses on this machine.

    Returns:
        A dict `device type -> info` that prints readably. Each info holds at least `name` (for example
        `"pytorch"`) and `reason` (a sentence), and what else the backend has to say of itself, such as its
        instruction set.

    Example:
        >>> print(backends())  # doctest: +SKIP
        cpu: c-avx2 (the compiled kernel is built from this very source)
        cuda: none (torch.cuda.is_available() is False)
    """
    found = Backends()
    for device_type, backend in _backends.items():
        available = getattr(getattr(torch, device_type, None), "is_available", lambda: True)
        found[device_type] = (
            backend.module.backend_info()
            if available()
            else {"name": "none", "reason": f"torch.{device_type}.is_available() is False"}
        )
    return found


register_backend(
    Backend(
        "cpu",
        "torchao_superblock.ops.cpu",
        break_even_points="torchao_superblock.ops.break_even:cpu_points",
    )
)
register_backend(
    Backend(
        "cuda",
        "torchao_superblock.ops.cuda",
        requires="triton",
        gradients_use_plan=True,
        recomputed_row=128,
        leaves_closures=True,
        break_even_points="torchao_superblock.ops.break_even:cuda_points",
        mask_source="torchao_superblock.ops.block_mask.kernels",
        gated_source="torchao_superblock.ops.cuda.gated",
    )
)
