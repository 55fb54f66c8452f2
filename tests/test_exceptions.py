"""An exception at any line of a call that changes something: all of it happens, or nothing."""

import pytest
import torch
from torch import nn

from benchmarks.faults.case import attempt
from benchmarks.faults.exceptions import INTERRUPTED, Interrupted, World
from benchmarks.faults.injection import count_lines, interrupt, spread

# Some lines of each call, the same in every run; `benchmarks/reliability.py --long` tries all of them.
SAMPLES = 30


@pytest.mark.parametrize("kind", INTERRUPTED, ids=lambda kind: kind.name.partition("/")[2])
def test_a_call_is_all_or_nothing(kind: Interrupted) -> None:
    for index in range(SAMPLES):
        kind.run(index)


# ---------------------------------------------------------------------------------------------------------------------
# The check of the check, with calls that are made here.


def double_both(model: nn.Module) -> None:
    first, second = model.parameters()
    with torch.no_grad():
        first.mul_(2)
        second.mul_(2)


def double_both_or_none(model: nn.Module) -> None:
    with torch.no_grad():
        doubled = [2 * parameter for parameter in model.parameters()]
        before = [parameter.data for parameter in model.parameters()]
    try:
        for parameter, tensor in zip(model.parameters(), doubled, strict=True):
            parameter.data = tensor
    except BaseException:
        for parameter, tensor in zip(model.parameters(), before, strict=True):
            parameter.data = tensor
        raise


def swallow(model: nn.Module) -> None:
    try:
        double_both_or_none(model)
    except BaseException:
        pass


class Here(Interrupted):
    """Counts the lines of this file in place of the package's."""

    folder = __file__


def world_of(call):
    def build(directory) -> World:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        return World(model, lambda: call(model), torch.ones(1, 2))

    return build


def faults_of(call) -> set[str]:
    kind = Here("a call", world_of(call))
    return {attempt(kind, index).fault for index in range(kind.count(long=True))}


def test_what_stops_half_way_is_found():
    assert "neither as before nor as after" in faults_of(double_both)


def test_what_is_all_or_nothing_passes():
    assert faults_of(double_both_or_none) == {""}


def test_a_swallowed_exception_is_found():
    assert "a swallowed exception" in faults_of(swallow)


def test_every_line_is_reached_once():
    seen = []

    def call() -> None:
        seen.append(1)
        seen.append(2)

    lines = count_lines(call, folder=__file__)
    assert lines == 2
    for at, left in ((1, []), (2, [1])):
        seen.clear()
        error = KeyboardInterrupt()
        assert interrupt(call, at, error, folder=__file__).raised is error
        assert seen == left
    assert interrupt(call, 3, error, folder=__file__).raised is None


def test_an_error_of_the_call_is_not_counted_away():
    def call() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        count_lines(call, folder=__file__)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 2213])
def test_all_lines_are_tried_before_any_twice(size):
    assert sorted(spread(index, size) for index in range(size)) == list(range(size))
