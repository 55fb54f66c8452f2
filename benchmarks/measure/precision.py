"""The dtypes that are measured, by name: those of torch, and `"tf32"`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def dtype_of(mode: str) -> torch.dtype:
    """Of the operands: `mode` as torch names it, float32 for `"tf32"`."""
    return torch.float32 if mode == "tf32" else getattr(torch, mode)


@contextlib.contextmanager
def precision(mode: str) -> Iterator[torch.dtype]:
    """Multiplies float32 on CUDA in TF32 if that is the mode, else by IEEE; yields the dtype."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    try:
        yield dtype_of(mode)
    finally:
        torch.set_float32_matmul_precision(previous)
