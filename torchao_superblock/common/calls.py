"""Calling a model on an example, with progress where it takes long."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")
_WARM_UP, _ROUNDS = 3, 7


def call_model(model: nn.Module, batch: object) -> object:
    """One forward: a tensor is the argument, a tuple the arguments, a dict the keyword arguments."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise TypeError(
        f"a batch is a {type(batch).__name__}; it must be a tensor, a tuple of positional arguments "
        "or a dict of keyword arguments of the model"
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def shown(steps: Sequence[T], title: str, progress: bool) -> Iterable[T]:
    """The steps, with a bar where it is wanted and tqdm is there."""
    if not progress:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, desc=title)


def median_seconds(*calls: Callable[[], object], at_least: float) -> tuple[float, ...]:
    """Median time of each of some calls, in rows of calls: what the host or the device takes, whichever is more.

    They take turns, so that what else the machine does meanwhile befalls all of them.

    Args:
        calls: what to time. A call that takes `at_least` or more is made three times, the first one not timed.
        at_least: seconds for each of them.
    """
    from torch.utils.benchmark import timer  # looks for a CUDA toolkit and talks about it on stderr

    def seconds(call: Callable[[], object], number: int = 1) -> float:
        start = timer()  # waits for the device
        for _ in range(number):
            call()
        return max(timer() - start, 1e-9) / number

    for _ in range(_WARM_UP):  # compiles kernels, settles on one
        once = [seconds(call) for call in calls]
        if max(once) > at_least:
            break
    once = [seconds(call) for call in calls]
    samples = [[second] for second in once]
    rounds = min(_ROUNDS, max(1, int(at_least / max(once))))
    for _ in range(rounds):
        for call, found, single in zip(calls, samples, once, strict=True):
            found.append(seconds(call, max(1, int(at_least / rounds / single))))
    return tuple(statistics.median(found) for found in samples)
