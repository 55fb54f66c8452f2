"""Calling a model on an example, with progress where it takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

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
