"""What is known of a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from torchao_superblock.ops.cuda.device import can_overlap, device_at


@pytest.mark.parametrize(
    ("major", "driver", "overlap"),
    [(8, 13000, False), (9, 12020, False), (9, 12030, True), (10, 13000, False)],
)
def test_launches_overlap_where_that_was_measured(major: int, driver: int, overlap: bool) -> None:
    assert can_overlap(major, driver) is overlap


@pytest.mark.gpu
def test_the_table_of_memory_rates_says_what_the_driver_does() -> None:
    import triton

    known = device_at(torch.cuda.current_device())
    measured = triton.testing.get_dram_gbps(known.index)
    assert known.memory_rate == pytest.approx(measured, rel=0.01)
    for part, slow in (("H100 80GB HBM3", True), ("H200", False)):
        if known.name == f"NVIDIA {part}":
            assert (known.memory_rate < 4100) is slow
