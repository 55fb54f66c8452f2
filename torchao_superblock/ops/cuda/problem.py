"""What a call asks of a GPU: shapes, dtypes and the device, but no tensor. Nothing here knows a kernel."""

from typing import NamedTuple

import torch

# How two tiles are multiplied. Integers, because kernels get them: these survive every compiler.
NATIVE = (
    0  # float16 and bfloat16 on tensor cores, accumulated in float32; float64 in its own precision
)
TF32 = 1  # float32 rounded to TF32: one product
TF32X3 = 2  # float32 as a high and a low TF32 part: three products, float32-level error
FMA = 3  # float32 without tensor cores, for GPUs that have no TF32


class Device(NamedTuple):
    """What rules and launches want to know of a GPU.

    Attributes:
        index: of the CUDA device.
        name: of the card.
        capability: 90 for sm_90.
        processors: multiprocessors.
        memory_rate: gigabytes a second between the GPU and its memory.
        overlaps: whether launches can overlap (:data:`torchao_superblock.ops.cuda.launch.OVERLAP`).
        gluon: whether the Gluon kernel for Hopper can run on it.
        clusters: whether that kernel can let two programs share what they copy.
    """

    index: int
    name: str
    capability: int
    processors: int
    memory_rate: float
    overlaps: bool = False
    gluon: bool = False
    clusters: bool = False


class Problem(NamedTuple):
    """What a call asks for: all that the choice of a kernel and its preparation rest on.

    Attributes:
        kind: `"forward"`, `"grad_x"` (the same product over the transposed block grid) or `"grad_values"`.
        M: tokens, or the bucket that they are in, where no rule counts them (:func:`bucket`).
        R: block rows.
        C: block columns.
        r: rows of a block.
        c: columns of a block.
        nnz: stored blocks.
        dtype: of x and of the values.
        precision: how float32 is multiplied, as torch's own switch says.
        strides: of x along tokens and features; for `"grad_values"` of the gradient and of x.
        aligned: whether x and the values, or the gradient and x, start at a multiple of 16 bytes.
        device: where.
        activation: name of the fused activation.
        has_bias: whether there is a bias.
        plan_entries: length of the plan, 0 where there is none.
        row_padding: rows of the last block row that only the stored blocks have.
        col_padding: the same of the last block column.
    """

    kind: str
    M: int
    R: int
    C: int
    r: int
    c: int
    nnz: int
    dtype: torch.dtype
    precision: int
    strides: tuple[int, ...]
    aligned: tuple[bool, bool]
    device: Device
    activation: str = "none"
    has_bias: bool = False
    plan_entries: int = 0
    row_padding: int = 0
    col_padding: int = 0

    @property
    def N(self) -> int:
        """Out features: columns of y, or of the gradient."""
        return self.R * self.r - self.row_padding

    @property
    def K(self) -> int:
        """In features: columns of x."""
        return self.C * self.c - self.col_padding

    def bucketed(self) -> "Problem":
        """The same for all numbers of tokens in a bucket."""
        return self._replace(M=bucket(self.M))


def bucket(M: int) -> int:
    """The power of two at or above M, between 16 and 65536: few batch sizes to decide for and to compile."""
    return min(1 << max(M - 1, 15).bit_length(), 65536)
