"""The grid on which all gradients at once are checked on CUDA: the pass for activations and biases, repeated backwards.

Without a GPU in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.ops.cuda.backward_cases`.
"""

import gc
import itertools
import weakref
from functools import partial

import torch
import torch.nn.functional as F

from tests.ops.cuda import triton_cases  # makes older interpreters loop
from tests.reference import EXTREMES, TOLERANCE, random_bsr, relative_error
from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.cuda import backend, backward
from torchao_superblock.ops.plan import build_plan, parts_of

DEVICE = triton_cases.DEVICE
DTYPES = triton_cases.DTYPES


def derivative(activation: str, z: torch.Tensor) -> torch.Tensor:
    """In float64."""
    z = z.double().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[activation](z).sum(), z)[0]


def check(grad: torch.Tensor, activation: str, needs_sums: bool) -> None:
    z = None if activation == "none" else torch.randn(grad.shape, device=DEVICE).to(grad.dtype) * 2
    before = grad.clone()
    out, sums = backward.activation_gradient(grad, z, activation, needs_sums)
    expected = before.double()
    if z is None:
        assert out is grad
    else:
        expected = expected * derivative(activation, z)
        assert out.is_contiguous() and out.shape == grad.shape
    where = (activation, grad.dtype, tuple(grad.shape), grad.stride())
    tolerance = TOLERANCE[grad.dtype]
    assert out.dtype == grad.dtype and relative_error(out, expected) <= tolerance, where
    assert (sums is not None) is needs_sums
    if sums is not None:
        flat = expected.reshape(-1, grad.shape[-1])
        error = (sums.double() - flat.sum(0)).norm() / flat.abs().sum(0).norm()  # sums may cancel
        assert sums.dtype == grad.dtype and error <= tolerance, where
    assert torch.equal(grad, before)


def activations() -> None:
    for activation, dtype in itertools.product(ACTIVATIONS, DTYPES):
        for needs_sums in (True, False):
            if activation != "none" or needs_sums:
                check(torch.randn(70, 160, device=DEVICE).to(dtype), activation, needs_sums)


def shapes_and_strides() -> None:
    for shape in ((1, 1), (1, 130), (5,), (3, 1), (2, 3, 20), (600, 3), (1030, 33)):
        check(torch.randn(shape, device=DEVICE), "gelu", True)
        check(torch.randn(shape, device=DEVICE), "none", True)
    wide = torch.randn(300, 99, device=DEVICE)
    ones = torch.ones((), device=DEVICE)
    for grad in (
        wide[::2, 5:45],
        wide.T,
        ones.expand(40, 24),
        wide[:, :1].expand(300, 24),
        wide[:1].expand(300, 99),
        wide.view(3, 100, 99).transpose(0, 1),
    ):
        for activation in ("none", "relu"):
            check(grad, activation, True)


def extremes() -> None:
    for activation, dtype in itertools.product(ACTIVATIONS, (torch.float32, torch.float16)):
        if activation == "none":
            continue
        largest = torch.finfo(dtype).max
        z = torch.tensor([[*EXTREMES, largest, -largest]], device=DEVICE).to(dtype)
        out, _ = backward.activation_gradient(torch.ones_like(z), z, activation, False)
        finite = z.isfinite()
        expected = derivative(activation, z[finite]).to(dtype)
        torch.testing.assert_close(out[finite], expected, rtol=1e-3, atol=1e-6)
        assert out[z.isnan()].isnan().all() or activation == "relu"


def determinism() -> None:
    grad, z = (torch.randn(3000, 160, device=DEVICE) for _ in range(2))
    first = backward.activation_gradient(grad, z, "silu", True)
    for _ in range(3):
        assert all(map(torch.equal, first, backward.activation_gradient(grad, z, "silu", True)))


def repeated() -> None:
    """The third backward of a kind asks nothing, and gives what the first one gave."""
    for N, K in ((64, 96), (60, 90)):
        check_repeated(N, K)


def check_repeated(N: int, K: int) -> None:
    """For a weight of 4 x 6 blocks of 16, whose last ones are padded if N and K are smaller; and what a run needs."""
    dense, crow, col, values = random_bsr(64, 96, 16, 0.5, torch.float32, DEVICE)
    dense = dense[:N, :K].double()
    bias, plan = torch.randn(N, device=DEVICE), build_plan(crow, col, 6)
    stored = partial(triton_cases.stored_blocks, crow=crow, col=col, blocksize=(16, 16))

    def prime(x, grad) -> None:
        flat_x, flat = x.reshape(-1, K), grad.reshape(-1, N)
        for bias_or_none in (bias, None):
            backend.forward(flat_x, crow, col, values, bias_or_none, "none", plan, N)
        for one in (flat, flat.clone(memory_format=torch.contiguous_format)):
            backend.grad_x(one, crow, col, values, plan, K)
            backend.grad_values(one, flat_x, crow, col, plan, 16, 16)

    everything = (True, True, True)
    for shape, activation in itertools.product(((5,), (2, 3), ()), ("none", "gelu")):
        x, grad = torch.randn(*shape, K, device=DEVICE), torch.randn(*shape, N, device=DEVICE)
        prime(x, grad)
        z = x.double() @ dense.T + bias.double()
        dz = grad.double() * (1 if activation == "none" else derivative(activation, z))
        flat = dz.reshape(-1, N)
        product = F.pad(flat.T @ x.double().reshape(-1, K), (0, 96 - K, 0, 64 - N))
        references = (dz @ dense, stored(product), flat.sum(0))
        kept = [None] if activation == "none" else [None, z.float()]
        needs = [everything]
        if len(shape) == 1:
            needs = list(itertools.product((True, False), repeat=3))
        for needed, before in itertools.product(needs, kept):
            args = (grad, x, crow, col, values, bias, activation, before, plan, needed)
            run = backward.repeat_backward(*args)
            assert run is not None, (shape, activation, needed)
            found = run(grad, x, crow, col, values, bias, before, plan)
            for one, reference, wanted in zip(found, references, needed, strict=True):
                assert (one is not None) is wanted
                if wanted:
                    assert one.shape == reference.shape and relative_error(one, reference) <= 1e-6
    # What a launch rests on: addresses, and the index.
    x, grad = torch.randn(5, K, device=DEVICE), torch.randn(5, N, device=DEVICE)
    prime(x, grad)
    rest = (crow, col, values, bias)
    run = backward.repeat_backward(grad, x, *rest, "none", None, plan, everything)
    shifted = torch.empty(1 + 5 * K, device=DEVICE)[1:].view(5, K).copy_(x)
    assert run(grad, shifted, *rest, None, plan) is None
    with triton_cases.tf32_allowed():
        assert run(grad, x, *rest, None, plan) is None
    stale = plan.clone()
    stale[-200:] = 0
    assert run(grad, x, *rest, None, stale)[0].isnan().any()
    assert run(grad, x, *rest, None, plan)[0].isfinite().all()
    assert backward.repeat_backward(grad, x, *rest, "none", None, None, everything) is None


def plans() -> None:
    """Parts are kept with their plan, follow what is written to it, and go with it."""
    _, crow, col, _ = random_bsr(64, 96, 16, 0.5, torch.float32, DEVICE)
    plan, nnz = build_plan(crow, col, 6), col.shape[0]
    parts = parts_of(plan, 4, 6, nnz)
    assert parts_of(plan, 4, 6, nnz) is parts
    plan[0] = 3
    assert parts.row_order[0] == 3
    plan.data = plan.clone()
    assert parts_of(plan, 4, 6, nnz) is not parts
    gone = weakref.ref(plan)
    del plan, parts
    gc.collect()
    assert gone() is None


GROUPS = [activations, shapes_and_strides, extremes, determinism, repeated, plans]

if __name__ == "__main__":
    torch.manual_seed(0)
    for group in GROUPS:
        group()
        print(f"{group.__name__} passed", flush=True)
