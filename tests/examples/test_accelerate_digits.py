"""The example resumes where it was cut off, bit for bit."""

import pytest

pytest.importorskip("accelerate", reason="the example needs Accelerate (its extra)")
pytest.importorskip("sklearn", reason="the example needs scikit-learn")

from accelerate.state import AcceleratorState, GradientState

from examples.accelerate_digits import main


def run(*arguments):
    AcceleratorState._reset_state(True)  # a new process, as it were
    GradientState._reset_state()
    return main(list(arguments))


def test_a_resumed_run_is_the_straight_one(tmp_path):
    options = ("--epochs", "4")
    straight = run(*options, "--output-dir", str(tmp_path / "a"))
    cut = run(*options, "--stop-after", "2", "--output-dir", str(tmp_path / "b"))
    resumed = run(*options, "--resume", "--output-dir", str(tmp_path / "b"))
    assert cut["losses"] + resumed["losses"] == straight["losses"]
    assert resumed["accuracy"] == straight["accuracy"] > 0.5
