"""Errors are relative, in float64."""

import math

import torch

from benchmarks.measure.error import relative_error


def test_relative_error_is_that_of_float64_and_nan_stays_nan():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == 0.1
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), reference))
