"""The example swaps in the middle of a training, and goes on."""

import pytest

pytest.importorskip("sklearn", reason="the example needs scikit-learn (the `examples` extra)")

from examples.fixed_pattern import main


def test_the_swap_changes_nothing_and_the_rest_of_the_training_learns():
    result = main(["--epochs", "8"])
    assert result["masked"] == result["swapped"] > 0.5
    assert result["end"] > result["swapped"] - 0.02


def test_too_few_epochs_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--epochs", "2"])
    assert "at least 3" in capsys.readouterr().err
