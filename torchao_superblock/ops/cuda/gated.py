"""Both products of a gated MLP in one plain Triton kernel, with the activation and their product in its epilogue.

What limits it is what limits `matmul.py`: each stored block reads a tile of x from L2. A program computes the
same tile of both products, so the tokens of a group of programs are fetched from memory once for both, and neither
product is ever written: of three reads and two writes of an (M, N) tensor, one write is left.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks;
BM x BN the output tile of a program, BK how far it steps along the nonzeros of its block rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchao_superblock.ops.activations import CODES
from torchao_superblock.ops.cuda.matmul import activate
from torchao_superblock.ops.cuda.problem import NATIVE, TF32
from torchao_superblock.ops.operands import Operands
from torchao_superblock.ops.precision import allows_tf32

# Below, a call is bound by reading the weights, which the two products' own kernels spread over more programs.
_FEWEST_TOKENS = 64
# On Hopper the products' own kernels multiply faster, and this one reads x once: at 0.37e11 multiplications a product
# (Llama-2-7B, 8192 tokens) they take 0.91 and 0.97 of its time (blocks of 128 and 64), at 0.09e11 and below 1.13 to
# 1.22 (2026-12-01_gated_mlp_cuda_nvidia-h200).
_MOST_ON_HOPPER = 2e10
# Tiles of tokens that programs work on together.
_GROUP_M = 8


@triton.jit
def _product(
    x_rows,  # (BM, 1) pointers
    x_stride_k,
    start_ptr,
    block_ptr,
    values_ptr,
    bias_ptr,
    row,
    n,  # (BN,) places in the block row
    n_block_cols,
    nnz,
    r: tl.constexpr,
    c: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of x @ W.T + b, in float32."""
    # Clamped: a bad index may give wrong numbers, never a wild access.
    begin = tl.minimum(tl.maximum(tl.load(start_ptr + row), 0), nnz)
    end = tl.minimum(tl.maximum(tl.load(start_ptr + row + 1), begin), nnz)
    STEPS: tl.constexpr = c // BK
    k = tl.arange(0, BK)
    x_tile = x_rows + (k * x_stride_k)[None, :]
    w_tile = (n * c)[None, :] + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    column = tl.load(block_ptr + begin, mask=begin < end, other=0)
    for step in range(0, (end - begin) * STEPS):
        offset = (step % STEPS) * BK
        block = begin + step // STEPS
        column = tl.minimum(tl.maximum(column, 0), n_block_cols - 1)
        x = tl.load(x_tile + (column.to(tl.int64) * c + offset) * x_stride_k)
        w = tl.load(values_ptr + block.to(tl.int64) * (r * c) + offset + w_tile)
        column = tl.load(block_ptr + tl.minimum(begin + (step + 1) // STEPS, nnz - 1))
        if PRECISION == 1:
            acc = tl.dot(x, w, acc, input_precision="tf32")
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + row.to(tl.int64) * r + n).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "N", "n_block_rows", "n_block_cols", "gate_nnz", "up_nnz"])
def gated_matmul_kernel(
    x_ptr,  # (M, C * c), any strides
    gate_start_ptr,  # (R + 1,) where each block row starts in what follows; need not begin at 0
    gate_block_ptr,  # (nnz,) block column of each stored block
    gate_values_ptr,  # (nnz, r, c)
    gate_bias_ptr,  # (N,), if HAS_GATE_BIAS
    up_start_ptr,
    up_block_ptr,
    up_values_ptr,
    up_bias_ptr,
    y_ptr,  # (M, N)
    M,
    x_stride_m,
    x_stride_k,
    N,
    n_block_rows,
    n_block_cols,
    gate_nnz,
    up_nnz,
    r: tl.constexpr,
    c: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = act(x @ G.T + b) * (x @ U.T + c), both weights in BSR."""
    CHUNKS: tl.constexpr = r // BN
    pid = tl.program_id(0)
    group_size = GROUP_M * n_block_rows * CHUNKS
    first_m = (pid // group_size) * GROUP_M
    rows_in_group = tl.minimum(tl.cdiv(M, BM) - first_m, GROUP_M)
    within = pid % group_size
    m0 = (first_m + within % rows_in_group) * BM
    slot = within // rows_in_group
    row = slot // CHUNKS
    n = (slot % CHUNKS) * BN + tl.arange(0, BN)

    m = tl.arange(0, BM)
    # Rows beyond M read the last one again and are not stored: cheaper than a mask on every load.
    m_in = m0.to(tl.int64) + tl.minimum(m, M - 1 - m0)
    x_rows = x_ptr + (m_in * x_stride_m)[:, None]
    gate = _product(
        x_rows,
        x_stride_k,
        gate_start_ptr,
        gate_block_ptr,
        gate_values_ptr,
        gate_bias_ptr,
        row,
        n,
        n_block_cols,
        gate_nnz,
        r,
        c,
        HAS_GATE_BIAS,
        PRECISION,
        BM,
        BN,
        BK,
    )
    up = _product(
        x_rows,
        x_stride_k,
        up_start_ptr,
        up_block_ptr,
        up_values_ptr,
        up_bias_ptr,
        row,
        n,
        n_block_cols,
        up_nnz,
        r,
        c,
        HAS_UP_BIAS,
        PRECISION,
        BM,
        BN,
        BK,
    )
    y = activate(gate, ACTIVATION) * up
    y_tile = y_ptr + (m0.to(tl.int64) + m)[:, None] * N + (row * r + n)[None, :]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=(m < M - m0)[:, None])


def _is_power_of_two(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def can_compute(x: Tensor, gate: Operands, up: Operands) -> bool:
    """Whether the kernel takes such operands.

    Args:
        x: `(..., K)`.
        gate: of the weight in front of the activation.
        up: of the other.
    """
    _, r, c = gate.values.shape
    return (
        (x.dtype in (torch.float16, torch.bfloat16) or (x.dtype is torch.float32 and allows_tf32()))
        and gate.values.shape[1:] == up.values.shape[1:]
        and gate.values.dtype == up.values.dtype == x.dtype
        and _is_power_of_two(r)
        and _is_power_of_two(c)
        and x.dim() > 0
        and x.shape[-1] % c == 0
        and min(gate.values.shape[0], up.values.shape[0]) > 0
    )


def serves(x: Tensor, gate: Operands, up: Operands) -> bool:
    """Whether the kernel takes such operands and is expected to be faster than two products.

    Args:
        x: `(..., K)`.
        gate: of the weight in front of the activation.
        up: of the other.
    """
    if not can_compute(x, gate, up):
        return False
    tokens = x.numel() // max(1, x.shape[-1])
    hopper = torch.cuda.get_device_capability(x.device)[0] == 9
    return is_faster(tokens, max(gate.values.numel(), up.values.numel()), hopper=hopper)


def is_faster(tokens: int, stored: int, *, hopper: bool) -> bool:
    """Whether one kernel for both products is expected to be faster than one for each.

    Args:
        tokens: rows of x.
        stored: elements of the weight that has more.
        hopper: whether the products' own kernels are those for Hopper.
    """
    return tokens >= _FEWEST_TOKENS and not (hopper and tokens * stored > _MOST_ON_HOPPER)


def forward(
    x: Tensor, gate: Operands, up: Operands, activation: str, *, precision: int | None = None
) -> Tensor:
    """`activation(x @ gate.T) * (x @ up.T)`, with biases.

    Args:
        x: `(M, K)`, M >= 1; :func:`can_compute` says which.
        gate: of the weight in front of the activation.
        up: of the other.
        activation: as the op calls it.
        precision: of `problem.py`; None is what the dtype asks for.

    Returns:
        `(M, N)`.
    """
    M, K = x.shape
    _, r, c = gate.values.shape
    R = gate.crow_indices.shape[0] - 1
    y = x.new_empty((M, R * r))
    BM = min(128, max(16, triton.next_power_of_2(M)))
    BN = min(r, 128)
    operands = [
        tensor
        for one in (gate, up)
        for tensor in (
            one.crow_indices.contiguous(),
            one.col_indices.contiguous(),
            one.values.contiguous(),
            one.values if one.bias is None else one.bias.contiguous(),
        )
    ]
    if precision is None:
        precision = TF32 if x.dtype is torch.float32 else NATIVE
    gated_matmul_kernel[(triton.cdiv(M, BM) * R * (r // BN),)](
        x,
        *operands,
        y,
        M,
        x.stride(0),
        x.stride(1),
        R * r,
        R,
        K // c,
        gate.values.shape[0],
        up.values.shape[0],
        r,
        c,
        HAS_GATE_BIAS=gate.bias is not None,
        HAS_UP_BIAS=up.bias is not None,
        ACTIVATION=CODES[activation],
        PRECISION=precision,
        BM=BM,
        BN=BN,
        BK=min(c, 64),
        GROUP_M=_GROUP_M,
        num_warps=8 if BM * BN > 64 * 128 else 4,
        num_stages=3,
    )
    return y
