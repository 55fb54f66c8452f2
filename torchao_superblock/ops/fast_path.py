"""Calls of the op that repeat an earlier one: straight to the kernel, on the word of one comparison.

At small M the op takes a GPU, or a CPU, a few microseconds. Finding out what to do with a call takes the host several
times as long: every question about a tensor is a call into C++, and a trip through the dispatcher costs more than all
of them. So a call that went the long way leaves an entry: what its arguments looked like, and a closure that launches
the kernel for arguments that look the same.

What they look like is recorded and compared by the class with which `torch.compile` guards a compiled graph: one call
into C++ compares, for all tensors at once, Python type, dtype, device, sizes, strides, `requires_grad` and dispatch
keys. The keys are those of the tensor *and* of the thread's state, as the dispatcher would combine them, so inference
mode, autocast, functorch's transforms, `torch.jit` tracing and tensor subclasses change them, and no entry is made
where any of these has a say. What it leaves out is asked apart: here, whether a `__torch_dispatch__` mode is active
(it overlooks those that tracers use); by the caller, whether a profiler, a `__torch_function__` mode or forward-mode
AD is; by the closure, what its kernel rests on beyond that (addresses, torch's switches). Addresses are read at each
call, and no entry holds a tensor.

`torch.compile` would run a wrong graph if that class missed a difference, so it is a safe thing to rest on. Where it
does not do what is said here, no entry is made and every call goes the long way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# x, crow_indices, col_indices, values, bias, out_features, activation, plan -> y; None: not this call.
Run = Callable[..., Tensor | None]


def _guards(*tensors: Tensor) -> Any:
    """What recognises tensors like these, in this thread's state. Where a size is 1, the stride means nothing."""
    strides = [
        [None if n == 1 else stride for n, stride in zip(t.shape, t.stride(), strict=True)]
        for t in tensors
    ]
    return torch._C._dynamo.guards.TensorGuards(
        *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=strides
    )


def _bits(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return bits


def _own_keys(tensor: Tensor) -> int:
    """Bits of the keys that the dispatcher would go by for this tensor, in this thread's state."""
    included = torch._C._dispatch_tls_local_include_set().raw_repr()
    excluded = torch._C._dispatch_tls_local_exclude_set().raw_repr()
    return (torch._C._dispatch_keys(tensor).raw_repr() | included) & ~excluded


# The keys of an ordinary call: those of the devices, and autograd's. (The others here let every call through.)
_backend_keys = _bits("BackendSelect", "ADInplaceOrView")
_autograd_keys = 0

try:
    _n_dispatch_modes = torch._C._len_torch_dispatch_stack
    # As torch.compile's code allocates: on the current device, past the dispatcher.
    empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda
    empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
    with torch.inference_mode(False):
        _tensor, _other = (torch.empty(shape, device="meta") for shape in ((2, 3), (3, 3)))
        _check = _guards(_tensor).check
        with torch._C._AutoDispatchBelowAutograd():
            _seen_below = _check(_tensor)
        _own_keys(_tensor)
        # Whether this torch has all that, and it does what this module rests on.
        USABLE = _check(_tensor) and not _check(_other) and not _seen_below
except Exception:
    USABLE = False
_TYPES = (Tensor, torch.nn.Parameter)
NO_BIAS, NO_PLAN, NO_Z = STAND_INS = tuple(
    torch.empty((), dtype=torch.bool, device="meta") for _ in range(3)
)
"""Compared in the place of what is absent: one for each, as no tensor may be compared twice. No call with real
arguments has a tensor like these."""

# What makes of a call what serves calls like it, by device type, where its backend leaves no closures.
_devices: dict[str, Callable[..., Run]] = {}
# A program that keeps making new shapes must not grow them for ever; making one again is cheap.
_MOST_KEYS = 4096
_MOST_ENTRIES = 16
_tables: list["Entries"] = []


class Entries(dict[tuple[torch.Size, torch.Size], tuple[tuple, ...]]):
    """What is remembered of an op, by the two shapes that differ most between layers.

    Entries of one key are tried in turn, the newest first.
    """

    def __init__(self) -> None:
        super().__init__()
        _tables.append(self)

    def noted(self, key: tuple[torch.Size, torch.Size]) -> bool:
        """Whether a call with this key was seen before; from now on it was.

        Making an entry costs as much as it saves in a few calls, and a program may never come back to these shapes.

        Args:
            key: of the call.
        """
        if key in self:
            return True
        if len(self) >= _MOST_KEYS:
            self.clear()
        self[key] = ()
        return False

    def keep(self, key: tuple[torch.Size, torch.Size], entry: tuple) -> None:
        """Add an entry.

        Args:
            key: one that was noted; another thread may have dropped it since.
            entry: tried before the others.
        """
        self[key] = (entry, *self.get(key, ())[: _MOST_ENTRIES - 1])


_entries = Entries()


def admit(dispatch_key: str) -> None:
    """From now on, calls with a device's keys can be remembered.

    Args:
        dispatch_key: torch's name of the device, such as `"CUDA"`.
    """
    global _backend_keys, _autograd_keys
    _backend_keys |= _bits(dispatch_key)
    _autograd_keys = (_autograd_keys | _bits(f"Autograd{dispatch_key}")) & ~_backend_keys


def serve(device_type: str, make: Callable[..., Run]) -> None:
    """Serve repeated calls on a device, whose backend leaves no closures, by what `make` makes of the first of them."""
    _devices[device_type] = make


def n_entries() -> list[int]:
    """How many kinds of calls are remembered, for each pair of shapes that was seen."""
    return [len(entries) for entries in _entries.values()]


def forget() -> None:
    """Drop all entries: what they launch is to be decided anew."""
    for table in _tables:
        table.clear()


def again(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int | None,
    activation: str,
    plan: Tensor | None,
) -> Tensor | None:
    """The op's output for these arguments, if a call like this one was remembered; None otherwise.

    Where x is not exactly a Tensor, nothing is asked of any of them. (They are named one by one here and where they
    are handed on: packing and unpacking them takes half a microsecond.)
    """
    if not USABLE or type(x) is not Tensor or _n_dispatch_modes():
        return None
    try:
        entries = _entries.get((x.shape, values.shape))
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one without a plain shape
        return None
    if not entries:
        return None
    b = NO_BIAS if bias is None else bias
    p = NO_PLAN if plan is None else plan
    for same, fixed_out_features, fixed_activation, differentiate, run in entries:
        if (
            activation == fixed_activation
            and out_features == fixed_out_features
            and same(x, crow_indices, col_indices, values, b, p)
        ):
            if differentiate is not None and torch.is_grad_enabled():
                return differentiate(
                    x, crow_indices, col_indices, values, bias, out_features, activation, plan, run
                )
            y = run(x, crow_indices, col_indices, values, bias, out_features, activation, plan)
            if y is not None:
                return y
    return None


def find(*args: Any) -> Run | None:
    """The closure of the newest entry for a call of the op with these eight arguments, or None."""
    x, crow_indices, col_indices, values, bias, out_features, activation, plan = args
    if type(x) is not Tensor or type(values) not in _TYPES:
        return None
    b = NO_BIAS if bias is None else bias
    p = NO_PLAN if plan is None else plan
    for same, *fixed, _, run in _entries.get((x.shape, values.shape), ()):
        if [out_features, activation] == fixed and same(x, crow_indices, col_indices, values, b, p):
            return run
    return None


def remember_above(differentiate: Callable[..., Tensor], x: Tensor, *others: Any) -> None:
    """Let calls like this one, which went the long way, go directly from the caller to the kernel.

    Args:
        differentiate: see :func:`remember`.
        x: as the op has it.
        *others: the op's other arguments.
    """
    if type(x) is not Tensor:
        return
    make, known = _devices.get(x.device.type), find(x, *others)
    if make is not None:
        run = make(x, *others) if known is None else known
    else:
        with torch._C._AutoDispatchBelowAutograd():
            run = find(x, *others)  # what the backend has remembered for calls that reach it
    if run is not None and known is not run:
        remember(run, differentiate, x, *others)


def seen(x: Tensor, values: Tensor) -> bool:
    """Whether :func:`remember` would make an entry for calls of such shapes, which are noted at first.

    Args:
        x: as the op has it.
        values: as the op has it.
    """
    return USABLE and _entries.noted((x.shape, values.shape))


def modes_are_active() -> bool:
    """Whether a `__torch_dispatch__` mode is to see the ops."""
    return _n_dispatch_modes() > 0


def _keys_of(tensors: list[Tensor]) -> tuple[int, bool] | None:
    """Bits of the keys that the dispatcher goes by, and whether a gradient is asked for; None: others have a say."""
    if any(type(tensor) not in _TYPES for tensor in tensors):
        return None
    keys, needs_grad = 0, False
    for tensor in tensors:
        own = _own_keys(tensor)
        needs_grad |= tensor.requires_grad and own & _autograd_keys != 0
        keys |= own
    return None if keys & ~(_backend_keys | _autograd_keys) else (keys, needs_grad)


def recognise(*tensors: Tensor) -> Callable[..., bool] | None:
    """What tells whether tensors look like these, in a mode of dispatch like this one.

    Args:
        *tensors: for what is absent, one of :data:`STAND_INS`.

    Returns:
        A function of as many tensors; None where somebody else has a say in calls with such tensors.
    """
    real = [tensor for tensor in tensors if not any(tensor is absent for absent in STAND_INS)]
    return None if _keys_of(real) is None else _guards(*tensors).check


def remember(run: Run, differentiate: Callable[..., Tensor] | None, *args: Any) -> None:
    """Serve calls like this one, in the same mode of dispatch, by a closure; if nobody but a backend serves it now.

    Shapes that are seen for the first time are only noted: making an entry costs as much as it saves in a few calls,
    and a program may never come back to these.

    Args:
        run: takes the op's eight arguments and returns its output, or None to have the call go the long way.
        differentiate: for calls with gradients, takes the eight arguments and `run`. None if they are not expected
            here, because autograd is through with the call.
        *args: the op's eight arguments.
    """
    x, crow_indices, col_indices, values, bias, out_features, activation, plan = args
    if not seen(x, values):
        return
    tensors = [t for t in (x, crow_indices, col_indices, values, bias, plan) if t is not None]
    found = _keys_of(tensors)
    if found is None:
        return
    keys, needs_grad = found
    if keys & _autograd_keys and differentiate is None:
        return
    b = NO_BIAS if bias is None else bias
    p = NO_PLAN if plan is None else plan
    same = _guards(x, crow_indices, col_indices, values, b, p).check
    entry = (same, out_features, activation, differentiate if needs_grad else None, run)
    _entries.keep((x.shape, values.shape), entry)
