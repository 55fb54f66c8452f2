"""Seeing every call of `F.linear` with a weight that is to be pruned, wherever it is made.

A hook on `nn.Linear` misses the projections of `nn.MultiheadAttention` and the fused paths of
encoder layers. A function mode sees the call itself and, by being there, turns the fused paths off.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# As it is before anything here replaces it for a while.
plain_linear = F.linear
_PLAIN = (torch.Tensor, nn.Parameter)


@dataclass(eq=False)
class Target:
    """A weight that is to be pruned.

    Attributes:
        fqn: its name.
        weight: the `(N, K)` parameter, dense until all is done.
        blocksize: `(rows, cols)`.
        sparsity_level: fraction of its blocks to prune.
        bias: what its outputs are shifted by: a parameter and the index of the first element of it
            that belongs to row 0; None where there is none that the weight has to itself.
        foreign_bias: whether there is a bias, but not of its own.
        cuts: the rows at which a call begins or ends: cross attention calls with slices of one
            packed weight, and each slice sees inputs of its own.
    """

    fqn: str
    weight: nn.Parameter
    blocksize: tuple[int, int]
    sparsity_level: float
    bias: tuple[nn.Parameter, int] | None = None
    foreign_bias: bool = False
    cuts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cuts = self.cuts or [0, self.weight.shape[0]]

    def parts(self) -> list[tuple[int, int]]:
        """Ranges of rows that are always called together."""
        return list(itertools.pairwise(self.cuts))


@dataclass
class Call:
    """One call of `F.linear` with rows of a target.

    Attributes:
        target: whose rows.
        start, stop: the range of rows.
        x: `(..., K)`, the input.
        weight: `(stop - start, K)`, as given.
        bias: as given.
        sequence_first: whether `x` comes from inside `F.multi_head_attention_forward`, which works
            on `(sequence, batch, features)`.
    """

    target: Target
    start: int
    stop: int
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    sequence_first: bool


class LinearCalls(TorchFunctionMode):
    """Hands each call of `F.linear` with rows of a target to a function that computes the output.

    Args:
        targets: whose calls.
        compute: takes a :class:`Call` and returns the output of the layer.
    """

    def __init__(self, targets: Sequence[Target], compute: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self._compute = compute
        self._thread = threading.get_ident()
        self._by_memory: dict[int, list[Target]] = {}
        for target in targets:
            memory = target.weight.untyped_storage().data_ptr()
            self._by_memory.setdefault(memory, []).append(target)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is plain_linear:
            return self._linear(*args, sequence_first=False, **(kwargs or {}))
        if isinstance(func, FunctionType):
            # A function that torch has written in Python: within it no mode is active.
            with self._linear_replaced(func is F.multi_head_attention_forward):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def _linear_replaced(self, sequence_first: bool) -> Iterator[None]:
        def linear(*args, **kwargs):
            if threading.get_ident() != self._thread:
                return plain_linear(*args, **kwargs)
            return self._linear(*args, sequence_first=sequence_first, **kwargs)

        before = F.linear
        F.linear = linear
        try:
            yield
        finally:
            F.linear = before

    def _linear(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, sequence_first: bool
    ) -> Tensor:
        found = self._find(weight)
        if found is None:
            return plain_linear(input, weight, bias)
        target, start = found
        stop = start + weight.shape[0]
        return self._compute(Call(target, start, stop, input, weight, bias, sequence_first))

    def _find(self, weight: Tensor) -> tuple[Target, int] | None:
        """The target that `weight` is rows of, and the first of them."""
        if type(weight) not in _PLAIN or weight.is_meta:
            return None
        for target in self._by_memory.get(weight.untyped_storage().data_ptr(), ()):
            whole = target.weight
            start, rest = divmod(weight.storage_offset() - whole.storage_offset(), whole.stride(0))
            if (
                rest == 0
                and weight.ndim == 2
                and weight.stride() == whole.stride()
                and weight.shape[1] == whole.shape[1]
                and 0 <= start <= start + weight.shape[0] <= whole.shape[0]
            ):
                return target, start
        return None


def find_bias(call: Call, model: nn.Module) -> tuple[nn.Parameter, int] | None:
    """The parameter that the bias of a call is, or is a slice of, and where row 0 is in it.

    None where there is no bias, or where it is computed or has another user, so that changing it
    would change more than this layer.
    """
    if call.bias is None or type(call.bias) not in _PLAIN or call.bias.ndim != 1:
        return None
    memory = call.bias.untyped_storage().data_ptr()
    found = None
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or type(parameter) not in _PLAIN or parameter.ndim != 1:
                continue
            if parameter.is_meta or parameter.untyped_storage().data_ptr() != memory:
                continue
            first = call.bias.storage_offset() - parameter.storage_offset()
            if not 0 <= first <= first + len(call.bias) <= len(parameter):
                continue
            if found is not None or not parameter.is_contiguous():
                return None
            found = parameter, first - call.start
    return found
