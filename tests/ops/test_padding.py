"""Weights whose last blocks are padded: values, gradients and memory, whatever kernel serves."""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.common import DEVICES
from tests.reference import TOLERANCE, random_bsr, relative_error
from torchao_superblock.ops import ACTIVATIONS, bsr_linear, build_plan, cpu
from torchao_superblock.ops.cpu import compiled

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# N, K, blocksize, sparsity: heads of 1000 classes, a small layer, a vocabulary, an MLP of a language model.
SHAPES = [
    (1000, 64, 32, 0.8),
    (1000, 192, 64, 0.8),
    (37, 53, 32, 0.25),
    (37, 53, 16, 0.5),
    (37, 53, (8, 64), 0.4),
    (2730, 1024, 64, 0.95),
    (1024, 2730, 64, 0.95),
]
KERNELS = ["pytorch", "baseline", "avx2", "avx512"]


@pytest.fixture(params=[*KERNELS, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each device, and each kernel of the CPU in turn."""
    if request.param == "cuda":
        yield "cuda"
        return
    info = cpu.backend_info()
    if request.param != "pytorch" and request.param not in info.get("supported_isas", ()):
        pytest.skip(f"no {request.param} here; {info['reason']}")
    with compiled.using(request.param):
        yield "cpu"


def padded_bsr(
    N: int,
    K: int,
    blocksize: int | tuple[int, int],
    sparsity: float,
    dtype: torch.dtype,
    device: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `random_bsr`; what blocks hold beyond row N and column K is not zero. The last block of all is stored."""
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    R, C = -(-N // r), -(-K // c)
    mask = torch.rand(R, C, generator=torch.Generator().manual_seed(N + K)) >= sparsity
    mask[-1, -1] = mask[0, -1] = mask[-1, 0] = True
    dense, *parts = random_bsr(R * r, C * c, blocksize, dtype=dtype, device=device, mask=mask)
    return dense[:N, :K], *parts


def among_nans(tensor: Tensor) -> Tensor:
    """The same numbers; the memory around each row of them holds NaN."""
    *lead, n = tensor.shape
    wide = tensor.new_full((*(size + 2 for size in lead), n + 2 * (n % 7 + 1)), float("nan"))
    view = wide[(*(slice(1, -1) for _ in lead), slice(n % 7 + 1, -(n % 7 + 1)))]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "blocksize", "sparsity"), SHAPES)
def test_the_last_blocks_may_be_padded(N, K, blocksize, sparsity, dtype, device):
    """Nothing beyond x, its gradient, the bias and the gradient of y counts, nor what blocks hold there."""
    dense, crow, col, values = padded_bsr(N, K, blocksize, sparsity, dtype, device)
    r, c = values.shape[1:]
    plan = build_plan(crow, col, -(-K // c), (r, c))
    tokens = (1, 4, 30) if N * K > 1e6 else (1, 3, 9, 13, 131)
    for M, is_strided in itertools.product(tokens, (False, True)):
        x, bias, grad = (
            torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (N,), (M, N))
        )
        if is_strided:
            x, grad = among_nans(x), among_nans(grad)
        bias = among_nans(bias[None])[0] if is_strided else bias
        x, weights = x.detach().requires_grad_(), values.detach().requires_grad_()
        bias = bias.detach().requires_grad_()
        for activation in ("none", "gelu"):
            y = bsr_linear(x, crow, col, weights, bias, N, activation, plan)
            expected = ACTIVATIONS[activation](F.linear(x.double(), dense.double(), bias.double()))
            assert y.shape == (M, N) and y.is_contiguous()
            assert relative_error(y, expected) <= TOLERANCE[dtype]
        y = bsr_linear(x, crow, col, weights, bias, N, "none", plan)
        grad_x, grad_values, grad_bias = torch.autograd.grad(y, (x, weights, bias), grad)
        assert grad_x.shape == x.shape and grad_x.is_contiguous()
        assert relative_error(grad_x, grad.double() @ dense.double()) <= TOLERANCE[dtype]
        assert relative_error(grad_bias, grad.double().sum(0)) <= TOLERANCE[dtype]
        full = grad.double().t() @ x.double()
        full = F.pad(full, (0, -K % c, 0, -N % r))
        rows = torch.repeat_interleave(crow.diff())
        blocks = full.unflatten(1, (-1, c)).unflatten(0, (-1, r)).transpose(1, 2)
        blocks = blocks[rows, col.long()]
        assert relative_error(grad_values, blocks) <= TOLERANCE[dtype]
        # Exactly zero, so that no optimizer ever moves it.
        inside = torch.ones(N, K, dtype=torch.bool, device=device)
        inside = F.pad(inside, (0, -K % c, 0, -N % r)).unflatten(1, (-1, c)).unflatten(0, (-1, r))
        inside = inside.transpose(1, 2)[rows, col.long()]
        assert not grad_values[~inside].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_vocabulary(device):
    """50257 outputs: rows of y start anywhere."""
    dense, crow, col, values = padded_bsr(50257, 64, 64, 0.9, torch.float32, device)
    bias = among_nans(torch.randn(1, 50257, device=device))[0]
    for M in (1, 5, 33):
        x = among_nans(torch.randn(M, 64, device=device)).requires_grad_()
        y = bsr_linear(x, crow, col, values, bias, 50257)
        assert relative_error(y, F.linear(x.double(), dense.double(), bias.double())) <= 1e-6
        grad = torch.randn_like(y)
        (grad_x,) = torch.autograd.grad(y, x, grad)
        # Sums of 5000 products each.
        assert relative_error(grad_x, grad.double() @ dense.double()) <= 3e-6


@pytest.mark.parametrize("M", [1, 40])
def test_no_operand_is_copied(M):
    """Neither in a call that is checked and decided, nor in one that repeats it."""
    if compiled.kernel is None:
        pytest.skip(str(cpu.backend_info()["reason"]))
    _, crow, col, values = padded_bsr(1000, 200, 32, 0.5, torch.float32, "cpu")
    x, bias, grad = torch.randn(M, 200), torch.randn(1000), torch.randn(M, 1000)
    ops = torch.ops.torchao_superblock
    for mode in (torch.inference_mode(), torch.no_grad(), nullcontext()):
        for _ in range(3):
            with mode, torch.profiler.profile() as profile:
                ops.bsr_linear(x, crow, col, values, bias, 1000)
                ops.bsr_linear_grad_x(grad, crow, col, values, 200)
                ops.bsr_linear_grad_values(grad, x, crow, col, 32, 32)
            names = {event.name for event in profile.events()}
            assert any("bsr_linear" in name for name in names)
            assert not names & {
                "aten::copy_",
                "aten::constant_pad_nd",
                "aten::clone",
                "aten::zeros",
            }
