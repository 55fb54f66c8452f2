"""Candidates take turns, and one that fails does not stop the others. Nothing here asserts how long something takes."""

from benchmarks.measure.interleaved import measure


def test_measure_times_every_candidate_in_every_round():
    calls: list[str] = []
    measured = measure(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.02, max_rounds=8
    )
    assert len(measured.timing("a").samples) == len(measured.timing("b").samples) >= 7
    last = "".join(calls).rstrip("a").rstrip("b")
    assert "ab" in last and "ba" in last  # neither always comes first


def test_measure_reports_a_candidate_that_fails_and_times_the_others():
    def broken() -> None:
        raise RuntimeError("no kernel\nfor this")

    measured = measure({"good": lambda: None, "bad": broken}, seconds=0.01)
    assert measured.failure("bad") == "RuntimeError: no kernel"
    assert measured.timing("bad") is None and measured.speedup("good", "bad") is None
    assert measured.timing("good") is not None


def test_measure_takes_turns_through_a_list():
    seen = []
    functions = [lambda i=i: seen.append(i) for i in range(3)]
    measure({"list": functions}, seconds=0.01, max_rounds=7)
    assert seen.count(0) > 3 and seen.count(1) > 3 and seen.count(2) > 3
