"""The Gluon kernel on a Hopper GPU, against float64."""

import itertools

import pytest
import torch

from tests.ops.cuda.hopper_cases import Product, candidates, check, forward, hopper_or_skip
from tests.reference import block_mask, random_bsr, relative_error
from torchao_superblock.ops import build_plan, cuda, fast_path
from torchao_superblock.ops.cuda import backend, choose
from torchao_superblock.ops.plan import is_mixed

pytestmark = pytest.mark.gpu

BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}

SIZES = [64, 32, 16, 128, (64, 16), (64, 32), (128, 64), (128, 32), (32, 64), (16, 32), (32, 16)]


@pytest.mark.parametrize("M", [2048, 3001])
@pytest.mark.parametrize("N, K", [(768, 768), (128, 4224), (3072, 768)])
@pytest.mark.parametrize(
    ("blocksize", "dtype"),
    [(size, torch.bfloat16) for size in SIZES] + [(64, torch.float16), (16, torch.float16)],
)
def test_products_match_float64(blocksize, N, K, M, dtype):
    hopper_or_skip()
    check(M, N, K, blocksize, dtype, BOUNDS[dtype])


@pytest.mark.parametrize("blocksize", [64, 32, 128, (64, 32)])
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 3e-7), ("tf32", 2e-3)])
def test_float32_has_the_accuracy_that_torch_asks_for(set_precision, blocksize, precision, bound):
    hopper_or_skip()
    set_precision(precision)
    for N, K in ((768, 768), (128, 4224)):
        check(2100, N, K, blocksize, torch.float32, bound)


@pytest.mark.parametrize("blocksize", SIZES)
@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.bfloat16, "ieee", 4e-3),
        (torch.float32, "ieee", 3e-7),
        (torch.float32, "tf32", 2e-3),
    ],
)
def test_every_tile_that_tuning_tries_matches_float64(
    set_precision, blocksize, dtype, precision, bound
):
    hopper_or_skip()
    set_precision(precision)
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    exact = dtype == torch.float32 and precision == "ieee"
    tiles = candidates(768 // r, 768 // c, r, c, dtype, exact=exact)
    assert tiles or (dtype == torch.float32 and c == 16)
    for tile in tiles:
        check(2100, 768, 768, blocksize, dtype, bound, tile=tile)


@pytest.mark.parametrize("blocksize", SIZES)
@pytest.mark.parametrize(("N", "K"), [(1000, 768), (768, 1000), (1000, 1000), (712, 520)])
def test_the_last_blocks_may_be_padded(blocksize, N, K):
    hopper_or_skip()
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    tiles = candidates(-(-N // r), -(-K // c), r, c, torch.bfloat16)
    for tile in tiles:
        for activation in ("none", "gelu"):
            check(2100, N, K, blocksize, torch.bfloat16, 4e-3, tile=tile, activation=activation)


@pytest.mark.parametrize("blocksize", [64, 32, 128, (64, 32)])
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 3e-7), ("tf32", 2e-3)])
def test_the_last_blocks_may_be_padded_in_float32(set_precision, blocksize, precision, bound):
    hopper_or_skip()
    set_precision(precision)
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    exact = precision == "ieee"
    for N, K in ((1000, 768), (712, 524)):
        tiles = candidates(-(-N // r), -(-K // c), r, c, torch.float32, exact=exact)
        for tile in tiles:
            check(2100, N, K, blocksize, torch.float32, bound, tile=tile)


def test_gradients_of_a_padded_layer_that_it_computes_match_float64():
    hopper_or_skip()
    dense, crow, col, values = random_bsr(1024, 832, 64, 0.8, torch.bfloat16, "cuda")
    dense = dense[:1000, :776].double()
    plan = build_plan(crow, col, 13, (64, 64))
    x, grad = (torch.randn(50432, n, device="cuda").bfloat16() for n in (776, 1000))
    assert choose.choose(backend.grad_x_problem(grad, crow, values, 776)).kernel == "hopper"
    grad_x = cuda.grad_x(grad, crow, col, values, plan, 776)
    assert relative_error(grad_x, grad.double() @ dense) <= 4e-3
    asked = backend.forward_problem(x, crow, values, None, "none", plan, 1000)
    assert choose.choose(asked).kernel == "hopper"
    y = cuda.forward(x, crow, col, values, None, "none", plan, 1000)
    assert relative_error(y, x.double() @ dense.T) <= 4e-3


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1])
def test_float32_keeps_every_nan(set_precision, bits):
    """A GPU's own NaN has every bit of the mantissa set: rounding it must not carry into its sign."""
    hopper_or_skip()
    set_precision("ieee")
    nan = torch.tensor(bits, dtype=torch.int32, device="cuda").view(torch.float32)
    _dense, crow, col, values = random_bsr(128, 256, 64, 0.0, torch.float32, "cuda")
    x = torch.randn(2048, 256, device="cuda")
    x[7, 70] = nan
    y = forward(x, crow, col, values, None, "none", None)
    assert torch.isnan(y[7]).all() and torch.isnan(y).sum() == 128
    x[7, 70] = 0
    values[1, 3, 5] = nan  # block row 0, block column 1: output 3
    y = forward(x, crow, col, values, None, "none", None)
    assert torch.isnan(y[:, 3]).all() and torch.isnan(y).sum() == 2048


@pytest.mark.parametrize("blocksize", [64, 16])
def test_empty_and_full_rows(blocksize):
    hopper_or_skip()
    R, C = 768 // blocksize, 768 // blocksize
    mask = block_mask(R, C, 0.9)
    mask[::3] = False
    mask[1] = True
    mask[-1] = False
    for bias in (False, True):
        check(2048, 768, 768, blocksize, torch.bfloat16, 4e-3, mask=mask, bias=bias)


def test_a_gradient_by_the_plan_of_another_index_is_nan():
    """Where the Gluon kernel computes it. A forward takes no more than its order of work from the plan."""
    hopper_or_skip()
    _, crow, col, values = random_bsr(768, 768, 64, 0.8, torch.bfloat16, "cuda")
    # As many blocks, in other columns: every row from right to left.
    lengths = crow.diff()
    rows = torch.repeat_interleave(torch.arange(12, device="cuda"), lengths)
    flipped = (rows * 12 + 11 - col).sort().values
    own, other = (
        build_plan(crow, index, 12, (64, 64)) for index in (col, (flipped % 12).to(torch.int32))
    )
    assert not torch.equal(own, other)
    x = torch.randn(50432, 768, device="cuda").to(torch.bfloat16)
    assert choose.choose(backend.grad_x_problem(x, crow, values, 768)).kernel == "hopper"
    right = cuda.grad_x(x, crow, col, values, own, 768)
    assert right.isfinite().all()
    assert cuda.grad_x(x, crow, col, values, other, 768).isnan().all()
    y = cuda.forward(x, crow, col, values, None, "none", own)
    assert torch.equal(y, cuda.forward(x, crow, col, values, None, "none", other))


def test_indices_outside_the_grid_read_nothing_outside():
    """Such indices break the format; the result is unspecified, but the kernel ends and touches no foreign memory."""
    hopper_or_skip()
    for blocksize in (64, 16):
        _dense, crow, col, values = random_bsr(768, 768, blocksize, 0.8, torch.bfloat16, "cuda")
        x = torch.randn(2048, 768, device="cuda", dtype=torch.bfloat16)
        for bad in (-5, 768 // blocksize, 2**30):
            broken = col.clone()
            broken[::2] = bad
            forward(x, crow, broken, values, None, "none", None)
        broken = crow.clone()
        broken[3:7] = 2**30
        broken[7] = -9
        forward(x, broken, col, values, None, "none", None)
        plan = build_plan(crow, col, 768 // blocksize)
        shape = (768 // blocksize, 768 // blocksize, blocksize, blocksize)
        tile = next(t for t in candidates(*shape, torch.bfloat16) if t.grouped)
        for bad in (-5, 2**30):
            forward(x, crow, col, values, None, "none", plan * 0 + bad, tile=tile)
    torch.cuda.synchronize()


def test_a_call_can_be_captured_in_a_cuda_graph():
    hopper_or_skip()
    dense, crow, col, values = random_bsr(768, 768, 64, 0.8, torch.bfloat16, "cuda")
    x = torch.randn(2048, 768, device="cuda", dtype=torch.bfloat16)
    forward(x, crow, col, values, None, "none", None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(x, crow, col, values, None, "none", None)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert relative_error(y, x.double() @ dense.double().t()) <= 4e-3


@pytest.mark.parametrize(("M", "N"), [(3001, 768), (50432, 320)])
def test_strips_of_neighbours_and_of_rows_that_lie_apart_match_float64(M, N):
    """By turns, because what is compiled for the one is wrong for the other."""
    hopper_or_skip()
    tiles = [t for t in candidates(N // 32, 24, 32, 32, torch.bfloat16) if t.grouped]
    assert len(tiles) > 3
    for tile, (sparsity, mixed) in itertools.product(
        tiles, ((0.5, True), (0.95, False), (0.6, True))
    ):
        mask = block_mask(N // 32, 24, sparsity)
        _dense, crow, col, _values = random_bsr(N, 768, 32, mask=mask)
        plan = build_plan(crow, col, 24, (32, 32))
        assert is_mixed(plan, *mask.shape, col.numel()) is mixed
        check(M, N, 768, 32, torch.bfloat16, 4e-3, tile=tile, mask=mask, activation="relu")


@pytest.mark.parametrize(
    ("N", "K", "blocksize", "activation", "dynamic"),
    [(768, 704, 64, "gelu", False), (1536, 768, 128, "none", True)],
)
def test_repeated_calls_launch_at_once_and_agree(N, K, blocksize, activation, dynamic):
    hopper_or_skip()
    _dense, crow, col, values = random_bsr(
        N, K, blocksize, 0.8, dtype=torch.bfloat16, device="cuda"
    )
    bias = torch.randn(N, device="cuda").bfloat16()
    plan = build_plan(crow, col, K // blocksize, (blocksize, blocksize))
    weight = (crow, col, values, bias, None, activation, plan)
    call = torch.ops.torchao_superblock.bsr_linear
    backend.forget()
    with torch.inference_mode():
        for shape in ((32768, K), (2, 16384, K)):
            for _ in range(4):
                x = torch.randn(shape, device="cuda").bfloat16()
                y = call(x, *weight)
                plain = (x.view(-1, K), crow, col, values, bias, activation, plan)
                asked = backend.forward_problem(plain[0], crow, values, bias, activation, plan)
                assert choose.choose(asked).kernel == "hopper", "another would be tested"
                expected = forward(*plain)
                assert torch.equal(y, expected.view(*shape[:-1], N))
            run = fast_path.find(x, *weight)
            assert run is not None and torch.equal(run(x, *weight), y)
            # Other tensors in the same place, and one that TMA cannot read.
            assert torch.equal(run(x + 1, *weight), call(x + 1, *weight))
            moved = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(shape)
            assert run(moved.copy_(x), *weight) is None
    backend.forget()
    problem = Product(32768, N, K, blocksize, blocksize, activation=activation)
    schedules = {problem._replace(slow_memory=s).tile().schedule for s in (False, True)}
    assert schedules == {"dynamic" if dynamic else "static"}
