"""What is said of samples: medians, ratios within rounds, reasons."""

from benchmarks.measure.timings import Failure, Measurements, Timing


def test_speedup_is_the_median_of_the_ratios_within_rounds():
    measured = Measurements(dense=Timing((2.0, 4.0, 100.0)), ours=Timing((1.0, 1.0, 50.0)))
    assert measured.speedup("dense", "ours").value == 2.0
    assert str(measured.speedup("dense", "ours")) == "2.00x"


def test_timing_statistics():
    timing = Timing((3.0, 1.0, 2.0, 4.0, 5.0))
    assert (timing.median, timing.minimum, timing.spread) == (3.0, 1.0, 2.0 / 3.0)
    measured = Measurements(ours=timing)
    assert (measured.milliseconds("ours"), measured.microseconds("ours")) == (3e3, 3e6)


def test_a_failure_says_the_first_line_of_an_error():
    assert Failure.of(KeyError("a  b")).reason == "KeyError: 'a b'"
    assert Failure.of(RuntimeError("one\ntwo")).reason == "RuntimeError: one"
    assert Failure.of(RuntimeError()).reason == "RuntimeError: "
    assert len(Failure.of(RuntimeError("x" * 1000)).reason) == 160
