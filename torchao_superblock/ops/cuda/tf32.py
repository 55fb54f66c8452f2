"""float32 products on TF32 tensor cores with float32-level error, and the pass that prepares blocks for them.

A float32 number is a high and a low TF32 number. Three products of these parts replace one; the fourth, of two low
parts, is below what float32 holds.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from torchao_superblock.ops.cuda.launch import Kernel
from torchao_superblock.ops.cuda.problem import Problem


@triton.jit
def tf32_high(x):
    """The TF32 number nearest to x. `x - tf32_high(x)` is exact and holds the other 12 bits."""
    bits = x.to(tl.uint32, bitcast=True)
    high = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    # Rounded, a GPU's own NaN (0x7fffffff) would carry into its sign and become -0.
    return tl.where(x == x, high, x)


@triton.jit
def tf32_low(x, high):
    # An infinite x leaves no rest (not inf - inf), so that an overflow stays an overflow.
    return tl.where(x == high, 0.0, x - high)


@triton.jit
def three_products(a, b, b_low, acc, acc_low, B_IS_HIGH: tl.constexpr):
    """One step of a float32 product out of TF32 ones. The small products are summed apart (see add_low)."""
    a_high = tf32_high(a)
    a_low = tf32_low(a, a_high)
    if B_IS_HIGH:
        b_high = b
    else:
        b_high = tf32_high(b)
        b_low = tf32_low(b, b_high)
    acc_low = tl.dot(a_low, b_high, acc_low, input_precision="tf32")
    acc_low = tl.dot(a_high, b_low, acc_low, input_precision="tf32")
    # Tensor cores cut off what they add to a running sum, always towards zero: over hundreds of steps that alone is an
    # error of 1e-6. So they sum one step, and ordinary additions, which round to nearest, sum the steps.
    step = tl.dot(a_high, b_high, input_precision="tf32", max_num_imprecise_acc=1)
    return acc + step, acc_low


@triton.jit
def add_low(acc, acc_low):
    """The full sum. What an infinite input made of the small products (inf * 0) is dropped."""
    return acc + tl.where(acc_low == acc_low, acc_low, 0.0)


@triton.jit(do_not_specialize=["nnz"], do_not_specialize_on_alignment=["perm_ptr"])
def pack_blocks_kernel(
    values_ptr,  # (nnz, r, c)
    perm_ptr,  # (nnz,), if HAS_PERM
    out_ptr,  # (nnz, n, k), or with TF32_PARTS (2, nnz, n, k): the high parts, then the low parts
    nnz,
    n: tl.constexpr,  # output block: (r, c) as stored, (c, r) transposed
    k: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    HAS_PERM: tl.constexpr,
    TF32_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stored blocks, permuted and transposed if asked for, as they are or as high and low TF32 parts.

    One pass over the nonzeros, a fraction of one tile's work in the product, which then needs neither the arithmetic of
    splitting nor a transposed operand (TF32 tensor cores and the Gluon kernel take none).
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numel = nnz.to(tl.int64) * (n * k)
    inside = i < numel
    j = i // (n * k)
    within = (i % (n * k)).to(tl.int32)
    block = j
    if HAS_PERM:
        block = tl.load(perm_ptr + j, mask=inside, other=0)
        block = tl.minimum(tl.maximum(block, 0), nnz - 1).to(tl.int64)
    source = block * (n * k) + (within // k) * STRIDE_N + (within % k) * STRIDE_K
    value = tl.load(values_ptr + source, mask=inside, other=0.0)
    if TF32_PARTS:
        high = tf32_high(value)
        tl.store(out_ptr + i, high, mask=inside)
        tl.store(out_ptr + numel + i, tf32_low(value, high), mask=inside)
    else:
        tl.store(out_ptr + i, value, mask=inside)


def prepare_pack(
    problem: Problem, *, parts: bool, kernel_type: type[Kernel] = Kernel
) -> Callable[[Tensor, Tensor], Tensor]:
    """A pass that writes the blocks anew as a product wants them.

    Args:
        problem: the product. For a gradient of x, blocks are transposed, and put in the order of the transposed index.
        parts: whether float32 blocks are split.
        kernel_type: launches it.

    Returns:
        A function of the values `(nnz, ...)` and of where each block of the transposed index is stored. It returns
        `(nnz, r, c)`, or `(2, nnz, r, c)`: the high parts, then the low parts.
    """
    n, k, nnz, device_index = problem.r, problem.c, problem.nnz, problem.device.index
    transposed = problem.kind == "grad_x"
    constants = {
        "n": n,
        "k": k,
        "STRIDE_N": 1 if transposed else k,
        "STRIDE_K": n if transposed else 1,
        "HAS_PERM": transposed,
        "TF32_PARTS": parts,
        "BLOCK": 1024,
    }
    kernel = kernel_type(pack_blocks_kernel, constants, num_warps=4, num_stages=2)
    shape, strides = (nnz, n, k), (n * k, k, 1)
    if parts:
        shape, strides = (2, *shape), (nnz * n * k, *strides)

    def pack(values: Tensor, perm: Tensor) -> Tensor:
        out = kernel.empty(shape, strides, values.dtype)
        if nnz > 0:
            kernel((-(-nnz * n * k // 1024), 1, 1), device_index, (values, perm, out), nnz)
        return out

    return pack
