"""Block mask arithmetic: the Triton kernels against the PyTorch operations they stand in for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from torchao_superblock.ops.block_mask import guards

pytest.importorskip("triton", reason="needs Triton, which this platform lacks")

INTERPRETED = """
    import itertools, torch
    from torchao_superblock.ops import block_mask as plain
    from torchao_superblock.ops.block_mask import kernels
    from torchao_superblock.pruning import BlockMask

    torch.manual_seed(0)
    for n, kept in [(1, 1), (5, 2), (33, 7), (300, 60), (300, 300)]:
        inf, nan = float("inf"), float("nan")
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, inf, -inf, nan, -nan])
        scores = values[torch.randint(len(values), (n, 1))]
        held = torch.rand(n, 1) < 0.5
        for frozen in (False, True):
            args = (scores, torch.tensor(kept), held, torch.tensor(frozen))
            for a, b in zip(kernels.block_mask(*args), plain.block_mask(*args), strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b), (n, kept, frozen)

    # Averages of two states, some equal and some not, as EMA tools leave them: every way to accept and refuse.
    seen = set()
    for n, levels, freezes, masks, share, copied in [
        *itertools.product((5,), ((2, 2), (2, 3)), ((0, 0), (1, 1), (0, 1)), (1, 2), (0.5, 0.95), (False, True)),
        (150, (20, 20), (1, 1), 1, 0.95, False),
        (150, (20, 20), (1, 1), 2, 0.95, False),
        (150, (20, 20), (1, 1), 2, 0.5, False),
    ]:
        states = []
        held = torch.rand(2, n, 1) < 0.5
        for level, freeze, pattern in zip(levels, freezes, held[[0, masks - 1]]):
            mask = BlockMask(torch.empty(n, 1), 1, 0.0)
            mask.set_sparsity_level(1 - level / n)
            if freeze:
                mask.hold(pattern)
            states.append(mask)
        old, new = states
        for name, buffer in new.named_buffers():
            if name != "scores" and not (copied and not buffer.is_floating_point()):
                buffer.copy_(buffer * share + old.get_buffer(name) * (1 - share))
        args = (torch.randn(n, 1), new.n_kept, new.held_mask, new.frozen, new.guards)
        want = plain.block_mask(*args)
        order = args[0].view(-1).argsort(descending=True)
        for got in kernels.block_mask(*args), kernels.block_mask(order, *args[1:], is_sorted=True):
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b), (n, levels, freezes, masks, share, copied)
        seen.add((int(want[1]), copied))
    assert seen == {(0, False), (1, False), (2, False), (0, True), (1, True)}

    for live, dtype, block in itertools.product(
        (0, 1, plain.BROKEN), (torch.float32, torch.float16, torch.float64), ((32, 32), (8, 4))
    ):
        weight, live = torch.randn(64, 32).to(dtype), torch.tensor(live, dtype=torch.uint8)
        mask = torch.rand(plain.block_grid((64, 32), block)) < 0.5
        a, b = (m.mask_weight(weight, mask, block, live) for m in (kernels, plain))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert bool(a.isnan().all()) == (live == plain.BROKEN)

    for (shape, block), dtype in itertools.product(
        [
            ((64, 96), (32, 32)),
            ((50, 70), (16, 16)),
            ((64, 40), (24, 8)),
            ((33, 65), (64, 16)),
            ((9, 7), (2, 3)),
        ],
        [torch.float32, torch.float64, torch.float16],
    ):
        weight, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        R, C = plain.block_grid(shape, block)
        kept = torch.rand(R, C) < 0.4
        for factors, live, strided, need in itertools.product((False, True), repeat=4):
            mask = kept * (0.3 + torch.rand(R, C)) if factors else kept
            assert torch.equal(kernels.mask_weight(weight, mask, block), plain.mask_weight(weight, mask, block))
            g = grad.t().contiguous().t() if strided else grad
            args = (g, weight, mask, torch.tensor(live), block, need)
            got, want = kernels.mask_weight_backward(*args), plain.mask_weight_backward(*args)
            assert (got[0] is None) == (not need)
            if need:
                assert torch.equal(got[0], want[0])
            assert got[1].dtype == want[1].dtype
            torch.testing.assert_close(got[1], want[1])
        args = (grad, None, mask, torch.tensor(True), block, True)
        got, want = kernels.mask_weight_backward(*args), plain.mask_weight_backward(*args)
        assert torch.equal(got[0], want[0]) and got[1] is None and want[1] is None
    print("agreed")
"""


def test_triton_kernels_agree_with_pytorch() -> None:
    run(INTERPRETED, "1")


def run(code: str, interpret: str) -> None:
    # TRITON_INTERPRET is read when a kernel is decorated: it needs a process of its own.
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={
            **os.environ,
            "TRITON_INTERPRET": interpret,
            "PYTHONPATH": os.pathsep.join([".", *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.strip() == "agreed", result.stderr[-3000:]


COMPILED = """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from torchao_superblock.ops.block_mask import kernels

    def build(kernel, pointers, **constants):
        names = kernel.arg_names
        signature = {
            name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names
        }
        constants = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, constexprs=constants)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm

    state = dict(
        n_kept_ptr="*i64", held_ptr="*i8", frozen_ptr="*i8", checksums_ptr="*i64", moments_ptr="*fp64",
        held_mean_ptr="*fp32", out_ptr="*u8",
    )
    for guarded in (True, False):
        constants = dict(GUARDED=guarded, TOLERANCE=0.1, I_TILE=32, J_TILE=128, J_TILES=5)
        for ranked, by_order in (("*fp32", False), ("*i64", True)):
            build(kernels._block_mask_kernel, dict(ranked_ptr=ranked, **state), SORTED=by_order, **constants)
    for dtype, mask in (("fp32", "u8"), ("bf16", "u8"), ("fp64", "u8"), ("fp32", "fp32"), ("bf16", "fp32")):
        for tile_in_block, guarded in ((True, True), (False, True), (False, False)):
            build(
                kernels._mask_weight_kernel,
                dict(weight_ptr="*" + dtype, mask_ptr="*" + mask, live_ptr="*u8", out_ptr="*" + dtype),
                R_SIZE=64, C_SIZE=64, N_TILE=32, K_TILE=64, TILE_IN_BLOCK=tile_in_block,
                FACTORS=mask != "u8", GUARDED=guarded,
            )
        accumulator = "fp64" if dtype == "fp64" else "fp32"
        build(
            kernels._mask_weight_backward_kernel,
            dict(
                grad_ptr="*" + dtype, weight_ptr="*" + dtype, mask_ptr="*" + mask, live_ptr="*u8",
                grad_weight_ptr="*" + dtype, grad_scores_ptr="*" + accumulator,
            ),
            R_SIZE=64, C_SIZE=64, N_TILE=32, K_TILE=64,
            NEED_GRAD_WEIGHT=True, NEED_GRAD_SCORES=True,
            ACC_DTYPE=tl.float64 if dtype == "fp64" else tl.float32, FACTORS=mask != "u8",
        )
    print("agreed")
"""


def test_triton_kernels_compile_for_sm_90_without_a_gpu() -> None:
    run(COMPILED, "0")


@pytest.mark.parametrize("frozen", [0, 1])
def test_it_may_be_imported_in_inference_mode_and_where_the_default_device_is_another(frozen):
    spec = importlib.util.find_spec("torchao_superblock.ops.block_mask")
    fresh = importlib.util.module_from_spec(spec)
    with torch.inference_mode(), torch.device("meta"):
        spec.loader.exec_module(fresh)
    scores, held = torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 0]])
    mask, live = fresh.block_mask(scores, torch.tensor(1), held, torch.tensor(frozen))
    assert mask.tolist() == [[bool(frozen), not frozen]]
    assert live.tolist() == 1 - frozen and not live.is_inference()


def test_weights_of_a_checksum_survive_32_bits():
    """Inductor computes what derives from an `arange` in the narrowest type that holds its size."""
    low = 0x7FFFFFFF
    narrow = (torch.arange(64, dtype=torch.int32) * (0x9E3779B1 & low)).to(torch.int64) & low
    wide = (torch.arange(64) * 0x9E3779B1) & low
    assert torch.equal(narrow, wide)
    weights = torch.stack([guards.held_sum(row) for row in torch.eye(64, dtype=torch.int8)])
    assert torch.equal(weights, (((wide * wide) >> 20) & low) | 1)


def test_no_factor_of_an_arange_needs_more_than_32_bits():
    graph = make_fx(guards.held_sum)(torch.ones(8, dtype=torch.int8)).graph
    aranges = [node for node in graph.nodes if "arange" in str(node.target)]
    factors = [
        arg for node in aranges for user in node.users for arg in user.args if isinstance(arg, int)
    ]
    assert aranges and factors and all(factor < 2**31 for factor in factors)
