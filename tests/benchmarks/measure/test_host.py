"""Host time is counted call by call."""

from benchmarks.measure.host import measure_host


def test_measure_host_counts_calls_of_each_candidate():
    measured = measure_host({"nothing": lambda: None}, calls=3, rounds=5)
    assert len(measured.timing("nothing").samples) == 5


def test_a_call_that_fails_is_reported():
    def broken() -> None:
        raise ValueError("not here")

    measured = measure_host({"good": lambda: None, "bad": broken}, calls=3, rounds=5)
    assert measured.failure("bad") == "ValueError: not here"
    assert measured.microseconds("bad") is None and measured.microseconds("good") > 0
