"""Forwards of a model that stop at a layer and, next time, go on from there.

Layer after layer is looked at, and each look needs a forward up to that layer. To begin at the
input every time would cost a square of the depth. So what a module returned is kept once nothing in
it, nor anything before it, will change any more, and given again in its place: every module is
computed about once, whatever the model looks like. What is kept is the output of each of the
outermost finished modules (of every block of a transformer, say), for every batch and stream.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchao_superblock.common.calls import call_model, eval_mode
from torchao_superblock.pruning.one_shot.capture import Call, LinearCalls, Target, plain_linear

_NOTHING = object()
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class _Stop(BaseException):
    """Ends a forward that has gone far enough; a model that catches `Exception` lets it pass."""


class _Record:
    """What is known of one call of a module: its output, or those of the modules it calls."""

    __slots__ = ("children", "output")

    def __init__(self) -> None:
        self.output: Any = _NOTHING
        self.children: dict[tuple[int, int], _Record] = {}


class Stream:
    """Forwards of all batches with certain weights in place of the model's.

    Attributes:
        replaced: weight and bias (or None) that stand in for a target's.
    """

    def __init__(self, n_batches: int) -> None:
        self.replaced: dict[Target, tuple[Tensor, Tensor | None]] = {}
        self._records = [_Record() for _ in range(n_batches)]

    def reset(self) -> None:
        """Drops all that was kept."""
        self._records = [_Record() for _ in self._records]

    def forget(self, module: nn.Module) -> None:
        """Drops what was kept of a module, whose weights change once more."""
        pending = list(self._records)
        while pending:
            record = pending.pop()
            for key, child in list(record.children.items()):
                if key[0] == id(module):
                    del record.children[key]
                else:
                    pending.append(child)


class Forwards:
    """Runs the batches through a model; a context in which the model is in eval mode.

    The parameters are never written: other weights take their place call by call.

    Args:
        model: in whatever mode; modes are put back at the end.
        targets: the weights that may be replaced.
        batches: a tensor, a tuple of arguments or a dict of them each.

    Attributes:
        done: the targets whose weights are final in every stream.
        calls: for each batch, how often each module was called in its latest whole forward.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], batches: Sequence[object]
    ) -> None:
        self.model = model
        self.batches = batches
        self.done: set[Target] = set()
        self.calls: list[Counter[nn.Module]] = [Counter() for _ in batches]
        self._mode = LinearCalls(targets, self._compute)
        self._run: _Run | None = None

    def __enter__(self) -> Forwards:
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.model))
            if "torch._dynamo" in sys.modules:  # seconds to import, and nothing is compiled without
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self.model.modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                if next(module.parameters(), None) is not None:
                    stack.enter_context(self._watched(module))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(
        self,
        stream: Stream,
        index: int,
        on_call: Callable[[Call], bool] | None = None,
        on_module: tuple[nn.Module, Callable[..., bool]] | None = None,
        replaced: Mapping[Target, tuple[Tensor, Tensor | None]] | None = None,
    ) -> object:
        """One forward of one batch, without gradients.

        Args:
            stream: with whose weights.
            index: of the batch.
            on_call: sees each call with rows of a target that is not done, before it is computed;
                True ends the forward.
            on_module: a module and a function of `(args, kwargs, compute)`, called for each of its
                calls, which returns the output or raises :meth:`stop`.
            replaced: weights for this forward only.

        Returns:
            The model's output; None if the forward was ended before.
        """
        self._run = _Run(stream, stream._records[index], self.done, on_call, on_module, replaced)
        try:
            with torch.no_grad(), self._mode:
                output = call_model(self.model, self.batches[index])
            self.calls[index] = self._run.calls
            return output
        except _Stop:
            return None
        finally:
            self._run = None

    def rerun(
        self,
        module: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        replaced: Mapping[Target, tuple[Tensor, Tensor | None]],
    ) -> object:
        """One call of a part of the model, with gradients and with weights for this call only."""
        self._run = _Run(Stream(0), _Record(), set(), None, None, replaced)
        try:
            with torch.enable_grad(), self._mode:
                return module(*args, **kwargs)
        finally:
            self._run = None

    @staticmethod
    def stop() -> BaseException:
        """What to raise in `on_module` to end the forward."""
        return _Stop()

    def _compute(self, call: Call) -> Tensor:
        assert self._run is not None
        return self._run.compute(call)

    @contextmanager
    def _watched(self, module: nn.Module) -> Iterator[None]:
        before = module.__dict__.get("forward", _NOTHING)
        inner = module.forward

        @functools.wraps(inner)  # its signature may be asked for
        def forward(*args, **kwargs):
            if self._run is None:
                return inner(*args, **kwargs)
            return self._run.enter(module, inner, args, kwargs)

        module.__dict__["forward"] = forward
        try:
            yield
        finally:
            if before is _NOTHING:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


class _Run:
    """The state of one forward."""

    def __init__(self, stream, record, done, on_call, on_module, replaced) -> None:
        self._replaced = {**stream.replaced, **(replaced or {})}
        self._record: _Record = record
        self._done = done
        self._on_call = on_call
        self._on_module = on_module
        self._counts: Counter[tuple[_Record, int]] = Counter()
        self.calls: Counter[nn.Module] = Counter()
        # Whether all that has been computed so far is final.
        self._final = not replaced

    def compute(self, call: Call) -> Tensor:
        if call.target not in self._done:
            self._final = False
            if self._on_call is not None and self._on_call(call):
                raise _Stop
        if call.target not in self._replaced:
            return plain_linear(call.x, call.weight, call.bias)
        weight, bias = self._replaced[call.target]
        bias = call.bias if bias is None else bias[call.start : call.stop]
        return plain_linear(call.x, weight[call.start : call.stop], bias)

    def enter(self, module: nn.Module, inner: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        self.calls[module] += 1
        outer = self._record
        count = (outer, id(module))
        key = (id(module), self._counts[count])
        self._counts[count] += 1
        record = outer.children.setdefault(key, _Record())
        asked = self._on_module is not None and module is self._on_module[0]
        if record.output is not _NOTHING and not asked:
            return copied(record.output)
        self._record = record
        try:
            if asked:
                return self._on_module[1](args, kwargs, lambda: inner(*args, **kwargs))
            versions = _versions((args, kwargs))
            output = inner(*args, **kwargs)
        finally:
            self._record = outer
        if self._final and versions is not None and versions == _versions((args, kwargs)):
            if is_plain(output):
                record.output = copied(output)
                record.children.clear()
        return output


def is_plain(tree: object) -> bool:
    """Whether a structure consists of nothing but tensors and constants, which can be kept."""
    return all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in pytree.tree_leaves(tree))


def _versions(tree: object) -> list[int] | None:
    """Counts that tell whether a tensor was written to; None where something else may be changed."""
    versions = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and not leaf.is_inference():
            versions.append(leaf._version)
        elif not isinstance(leaf, _CONSTANTS):
            return None
    return versions


def copied(tree: object) -> Any:
    """The same structure with tensors of its own."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
