"""Fixtures of the kernels' tests."""

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def set_precision() -> Iterator[Callable[[str], None]]:
    """Sets torch's switch for float32 products; restores it afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield lambda precision: setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    torch.backends.cuda.matmul.fp32_precision = before
