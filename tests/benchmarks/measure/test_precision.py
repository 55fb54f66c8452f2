"""TF32 is switched on for its mode only."""

import pytest
import torch

from benchmarks.measure.precision import precision


@pytest.mark.parametrize(
    ("mode", "setting", "dtype"),
    [
        ("tf32", "high", torch.float32),
        ("float32", "highest", torch.float32),
        ("bfloat16", "highest", torch.bfloat16),
    ],
)
def test_the_mode_is_set_and_restored(mode, setting, dtype):
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), precision(mode) as given:
        assert given == dtype
        assert torch.get_float32_matmul_precision() == setting
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
