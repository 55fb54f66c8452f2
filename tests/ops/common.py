"""What tests of the op run over."""

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

SHAPES = [  # N, K, blocksize
    (64, 96, (16, 16)),
    (64, 128, (32, 32)),
    (128, 192, (64, 64)),
    (48, 40, (8, 8)),
    (12, 20, (4, 4)),
    (5, 7, (1, 1)),
    (9, 10, (3, 5)),
    (128, 64, (64, 16)),
    (32, 128, (16, 64)),
    (64, 64, (64, 64)),
]
