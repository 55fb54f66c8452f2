"""Kernels of a step are counted, or said not to be."""

import pytest
import torch

from benchmarks.measure.kernels import count_kernels


@pytest.mark.gpu
def test_launches_are_counted_and_a_step_that_fails_counts_as_unknown(capsys):
    x = torch.ones(1024, device="cuda")

    def broken() -> None:
        raise RuntimeError("no step")

    counts, names = count_kernels({"three": lambda: x.sin().cos().exp(), "none": broken})
    assert counts["three"] == 3 and sum(names["three"].values()) == 3
    assert counts["none"] is None
    assert "kernels of none not counted: no step" in capsys.readouterr().err
