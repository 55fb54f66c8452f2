"""Devices and problems for tests of what is decided before anything is launched."""

from typing import Any

import torch

from torchao_superblock.ops.cuda.problem import NATIVE, TF32, Device, Problem

H200 = Device(0, "NVIDIA H200", 90, 132, 4814.0, overlaps=True, gluon=True, clusters=True)
H100 = H200._replace(name="NVIDIA H100 80GB HBM3", memory_rate=3352.0)
OLD_TRITON = H200._replace(gluon=False, clusters=False)
A100 = Device(0, "NVIDIA A100-SXM4-80GB", 80, 108, 2039.0)
T4 = Device(0, "Tesla T4", 75, 40, 320.0)
DEVICES = [H200, H100, H100._replace(clusters=False), OLD_TRITON, A100, T4]


def problem(
    M: int,
    N: int,
    K: int,
    blocksize: int | tuple[int, int],
    share: float,
    dtype: torch.dtype = torch.bfloat16,
    *,
    kind: str = "forward",
    precision: int | None = None,
    device: Device = H200,
    **others: Any,
) -> Problem:
    """A problem whose operands are contiguous; `share` of its blocks are stored, the last ones padded if need be."""
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    R, C = -(-N // r), -(-K // c)
    nnz = max(1, round(R * C * share))
    if precision is None:
        precision = TF32 if dtype == torch.float32 else NATIVE
    strides = (K, 1) if kind != "grad_values" else (N, 1, K, 1)
    fields = {"strides": strides, "aligned": (True, True), "device": device}
    fields |= {"row_padding": R * r - N, "col_padding": C * c - K} | others
    return Problem(kind, M, R, C, r, c, nnz, dtype, precision, **fields)
