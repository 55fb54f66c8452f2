"""Calling a model on an example, with progress where it takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


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


def median_seconds(call: Callable[[], object], at_least: float) -> float:
    """Median time of a call in a row of calls: what the host or the device takes, whichever is more.

    Args:
        call: what to time; it is called a few times before.
        at_least: seconds that the row takes.
    """
    from torch.utils.benchmark import Timer  # looks for a CUDA toolkit and talks about it on stderr

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    timer.timeit(3)  # compiles kernels, settles on one
    return timer.blocked_autorange(min_run_time=at_least).median
