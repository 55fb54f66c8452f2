"""The break-even table: measured where it was measured, cautious elsewhere."""

import pytest
import torch

from torchao_superblock.ops import break_even, cpu
from torchao_superblock.ops.break_even import CAUTIOUS

HOPPER = (9, 0)


def break_even_sparsity(*args: object) -> float:
    sparsity, measured, _ = break_even.break_even(*args)
    assert measured
    return sparsity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_larger_blocks_break_even_earlier_on_hopper(dtype: torch.dtype) -> None:
    found = [break_even_sparsity("cuda", (b, b), dtype, HOPPER) for b in (16, 32, 64, 128)]
    assert found == sorted(found, reverse=True)
    assert all(0 <= sparsity <= 0.9 for sparsity in found)


def test_the_smaller_side_decides() -> None:
    square = break_even_sparsity("cuda", (32, 32), torch.bfloat16, HOPPER)
    assert break_even_sparsity("cuda", (128, 32), torch.bfloat16, HOPPER) == square
    assert break_even_sparsity("cuda", (32, 128), torch.bfloat16, HOPPER) == square


@pytest.mark.parametrize(
    ("device_type", "blocksize", "dtype", "capability"),
    [
        ("cuda", (8, 8), torch.bfloat16, HOPPER),
        ("cuda", (64, 64), torch.bfloat16, (8, 0)),
        ("cuda", (64, 64), torch.float64, HOPPER),
        ("xpu", (64, 64), torch.float32, None),
    ],
)
def test_what_was_not_measured_is_guessed_cautiously(
    device_type: str,
    blocksize: tuple[int, int],
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
) -> None:
    found = break_even.break_even(device_type, blocksize, dtype, capability)
    assert found == (CAUTIOUS, False, device_type)


def test_float32_follows_the_precision_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = break_even_sparsity("cuda", (64, 64), torch.float32, HOPPER)
    # Not the real switch: once set this way, it makes torch's older getters raise for the rest of the process.
    monkeypatch.setattr(break_even, "allows_tf32", lambda: True)
    assert break_even_sparsity("cuda", (64, 64), torch.float32, HOPPER) > exact


@pytest.mark.parametrize("products", [True, False])
def test_bfloat16_waits_for_a_measurement_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, products: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: products)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu, "backend_info", lambda: {"name": "c-avx512"})
    found = break_even.break_even("cpu", (32, 32), torch.bfloat16)
    assert found.measured is not products
    assert (found.sparsity == CAUTIOUS) is products
    assert break_even.break_even("cpu", (32, 32), torch.float32).measured
