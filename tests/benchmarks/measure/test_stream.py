"""A stream of calls: all candidates equally often, and one that fails does not end the others."""

import pytest
import torch

from benchmarks.measure.stream import measure_stream


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_candidates_take_turns_and_failures_are_named(device, monkeypatch):
    # What is timed needs no GPU; only the wait for one is left out.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    def fails():
        raise ArithmeticError("no\nmore")

    candidates = {"a": lambda: count("a"), "b": lambda: count("b"), "c": fails}
    measured = measure_stream(candidates, torch.device(device), seconds=0.01)
    assert measured.failure("c") == "ArithmeticError: no"
    assert len(measured.timing("a").samples) == len(measured.timing("b").samples) >= 5
    assert min(calls.values()) >= 10


def test_when_everything_fails_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    measured = measure_stream({"a": lambda: 1 / 0}, torch.device("cuda"), seconds=0.01)
    assert measured.failure("a").startswith("ZeroDivisionError")
