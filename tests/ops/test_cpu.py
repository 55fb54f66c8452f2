"""The CPU backend: every kernel it can choose, against dense float64."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchao_superblock
from tests.reference import EXTREMES, TOLERANCE, random_bsr, relative_error
from torchao_superblock.ops import cpu
from torchao_superblock.ops.activations import ACTIVATIONS, CODES
from torchao_superblock.ops.cpu import compiled
from torchao_superblock.ops.plan import build_plan
from torchao_superblock.ops.source_hash import source_hash

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BLOCKSIZES = [1, 3, 8, 16, 32, 64, 256, (16, 64), (64, 16), (5, 7), (48, 24), (1, 32), (32, 1)]
KERNELS = ["pytorch", "baseline", "avx2", "avx512"]
CSRC = Path(torchao_superblock.__file__).parent / "ops" / "csrc"
op = torch.ops.torchao_superblock


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kernel in turn, whichever this process would have chosen."""
    info = cpu.backend_info()
    if request.param != "pytorch" and request.param not in info.get("supported_isas", ()):
        pytest.skip(f"no {request.param} here; {info['reason']}")
    with compiled.using(request.param):
        yield request.param


@pytest.fixture
def has_compiled() -> None:
    if compiled.kernel is None:
        pytest.skip(str(cpu.backend_info()["reason"]))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def strided(rows: int, cols: int, dtype: torch.dtype, layout: int) -> Tensor:
    """A random matrix in one of six memory layouts."""
    if layout == 1:
        return torch.randn(cols, rows).to(dtype).t()
    if layout == 2:
        return torch.randn(rows, 2 * cols + 1).to(dtype)[:, 1::2]
    if layout == 3:
        return torch.randn(1, cols).to(dtype).expand(rows, cols)
    if layout == 4:
        return torch.randn(rows * cols + 1).to(dtype)[1:].view(rows, cols)
    if layout == 5:
        return torch.randn(rows, 1).to(dtype).expand(rows, cols)
    return torch.randn(rows, cols).to(dtype)


def stored_blocks(dense: Tensor, crow: Tensor, col: Tensor, r: int, c: int) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(crow.numel() - 1), crow.diff().long())
    return dense.unflatten(0, (-1, r)).unflatten(2, (-1, c)).transpose(1, 2)[rows, col.long()]


@pytest.mark.parametrize("blocksize", BLOCKSIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_match_float64(kernel: str, dtype: torch.dtype, blocksize) -> None:
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    R, C = (2, 3) if r * c > 10000 else (7, 6)
    tolerance = TOLERANCE[dtype]
    for case, M in enumerate([1, 2, 3, 4, 7, 12, 13, 40, 131]):
        empty = torch.zeros(R, C, dtype=torch.bool) if case == 4 else None
        dense, crow, col, values = random_bsr(
            R * r, C * c, blocksize, [0.3, 0.9][case % 2], dtype, seed=case, mask=empty
        )
        plan = build_plan(crow, col, C)
        x = strided(M, C * c, dtype, case % 6)
        grad = strided(M, R * r, dtype, (case + 3) % 6)
        bias = torch.randn(R * r).to(dtype) if case % 3 else None
        activation = list(ACTIVATIONS)[case % len(ACTIVATIONS)]

        y = cpu.forward(x, crow, col, values, bias, activation, plan)
        z = x.double() @ dense.double().t() + (0 if bias is None else bias.double())
        assert y.is_contiguous() and y.dtype == dtype
        assert relative_error(y, ACTIVATIONS[activation](z)) <= tolerance, (M, activation)

        gx = cpu.grad_x(grad, crow, col, values, plan, C * c)
        assert gx.is_contiguous() and gx.dtype == dtype
        assert relative_error(gx, grad.double() @ dense.double()) <= tolerance, M

        gv = cpu.grad_values(grad, x, crow, col, plan, r, c)
        assert gv.shape == values.shape and gv.is_contiguous() and gv.dtype == dtype
        expected = stored_blocks(grad.double().t() @ x.double(), crow, col, r, c)
        assert relative_error(gv, expected) <= tolerance, M


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "blocksize", "sparsity"),
    [
        (128, 256, 32, 0.7),  # few outputs read an element of x
        (64, 1024, (64, 16), 0.5),  # rows of x a multiple of 4096 bytes apart
        (1024, 128, 64, 0.1),  # many
    ],
)
def test_x_in_order_and_x_that_must_be_copied_give_the_same_bits(
    kernel: str, dtype: torch.dtype, N: int, K: int, blocksize, sparsity: float
) -> None:
    dense, crow, col, values = random_bsr(N, K, blocksize, sparsity, dtype)
    for M in (12, 24, 29, 197):
        x = torch.randn(M, K).to(dtype)
        spread = torch.zeros(M, 2 * K, dtype=dtype)
        spread[:, ::2] = x
        padded = torch.zeros(M, K + 7, dtype=dtype)
        padded[:, :K] = x
        y = cpu.forward(x, crow, col, values, None, "none", None)
        assert relative_error(y, x.double() @ dense.double().t()) <= TOLERANCE[dtype]
        for other in (spread[:, ::2], padded[:, :K]):
            z = cpu.forward(other, crow, col, values, None, "none", None)
            if kernel == "pytorch":
                torch.testing.assert_close(z, y)
            else:
                assert torch.equal(z, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_on_their_whole_range(kernel: str, activation: str) -> None:
    """A 1 x 1 identity weight applies the activation alone."""
    z = torch.cat(
        [torch.linspace(-12, 12, 40001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90, -90])]
    )
    one = torch.ones(16, 16, 16).tril().triu()[:1].contiguous()  # (1, 16, 16) identity block
    index = torch.tensor([0, 1]).int(), torch.tensor([0]).int()
    x = torch.nn.functional.pad(z, (0, -z.numel() % 16)).view(-1, 16)
    y = cpu.forward(x, *index, one, None, activation, None)
    expected = ACTIVATIONS[activation](x.double())
    assert relative_error(y, expected) < 1.5e-7
    if kernel != "pytorch":  # element by element as well, which torch's own float32 gelu is not
        assert ((y.double() - expected).abs() <= 4e-7 * expected.abs().clamp(min=0.5)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_extremes_are_torch_s(
    kernel: str, activation: str, dtype: torch.dtype
) -> None:
    """Signs of zeros included. The reference is torch in float64: its float32 GELU on CPUs overflows at 3e38 itself,
    and makes zeros of the other sign where there is no AVX-512, and so does what is made of it."""
    z = torch.tensor(EXTREMES).to(dtype)
    index = torch.arange(len(z) + 1).int(), torch.arange(len(z)).int()
    one = torch.ones(len(z), 1, 1, dtype=dtype)  # blocks on a diagonal: no sum, no infinity times 0
    for M in (1, 40):
        y = cpu.forward(z.expand(M, -1), *index, one, None, activation, None)
        expected = ACTIVATIONS[activation](z.double()).to(dtype)
        by_torch = kernel == "pytorch" and activation == "gelu"
        known = (z.abs() < 1e38) | torch.tensor(not by_torch)
        y, expected = y[:, known], expected[known].expand(M, -1)
        torch.testing.assert_close(y, expected, equal_nan=True)
        zeros = (expected == 0) & (z[known] != 0)  # of +-0 itself, a sum with 0 makes 0
        assert by_torch or torch.equal(y.signbit()[zeros], expected.signbit()[zeros])


def test_nan_and_infinity_go_through(kernel: str) -> None:
    one = torch.eye(16).expand(1, 16, 16).contiguous()
    index = torch.tensor([0, 1]).int(), torch.tensor([0]).int()
    for M in (1, 40):
        x = torch.zeros(M, 16)
        x[0, 3] = float("nan")
        for activation in ACTIVATIONS:
            assert cpu.forward(x, *index, one, None, activation, None)[0].isnan().any(), activation
        bias = torch.zeros(16)
        bias[2], bias[5] = float("inf"), float("-inf")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            y = cpu.forward(
                x[:, :0], torch.tensor([0, 0]).int(), index[1][:0], one[:0], None, "relu", None
            )
            assert (y == 0).all()
            y = cpu.forward(
                torch.zeros(M, 16, dtype=dtype), *index, one.to(dtype), bias.to(dtype), "none", None
            )
            assert (y[:, 2] == float("inf")).all() and (y[:, 5] == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_rounding_is_torch_s(kernel: str, dtype: torch.dtype) -> None:
    """Every 16-bit number survives, and sums round to nearest, ties to even, subnormals included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    x = torch.nn.functional.pad(every, (0, -every.numel() % 16)).view(-1, 16)
    one = torch.eye(16, dtype=dtype).expand(1, 16, 16).contiguous()
    index = torch.tensor([0, 1]).int(), torch.tensor([0]).int()
    assert torch.equal(cpu.forward(x, *index, one, None, "none", None), x)
    bias = torch.randn(16).to(dtype) * 2.0 ** torch.randint(-24, 3, (16,))
    bias = bias.to(dtype)
    expected = (x.float() + bias.float()).to(dtype)
    assert torch.equal(cpu.forward(x, *index, one, bias, "none", None), expected)


@pytest.mark.parametrize(
    ("crow", "col", "message"),
    [
        ([0, 1, 3], [0, 1, 2], r"col_indices must lie in \[0, 2\)"),
        ([0, 1, 3], [0, -1, 1], r"col_indices must lie in \[0, 2\)"),
        ([0, 4, 3], [0, 1, 1], "crow_indices must start at 0, never decrease"),
        ([1, 1, 3], [0, 1, 1], "crow_indices must start at 0, never decrease"),
        ([0, 1, 2], [0, 1, 1], "end at nnz = 3"),
        ([0, 1, 2**30], [0, 1, 1], "end at nnz = 3"),
    ],
)
def test_indices_outside_the_matrix_are_refused(kernel: str, crow, col, message: str) -> None:
    x, values = torch.randn(5, 32), torch.randn(3, 16, 16)
    crow, col = torch.tensor(crow).int(), torch.tensor(col).int()
    with pytest.raises(ValueError, match=message):
        cpu.forward(x, crow, col, values, None, "none", None)
    plan = torch.zeros(2 + 2 + 3 + 3 + 3 + 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        cpu.grad_values(x, x, crow, col, plan, 16, 16)


def test_gradients_do_not_depend_on_the_plan(kernel: str) -> None:
    """A plan of another index, or of nothing, gives the same bits as the right one."""
    _, crow, col, values = random_bsr(96, 64, 16, 0.5)
    _, other_crow, other_col, _ = random_bsr(96, 64, 16, 0.5, seed=1)
    plan = build_plan(crow, col, 4)
    x, grad = torch.randn(5, 64), torch.randn(5, 96)

    def gradients(plan: Tensor | None) -> list[Tensor]:
        return [
            op.bsr_linear_grad_x(grad, crow, col, values, 64, plan),
            op.bsr_linear_grad_values(grad, x, crow, col, 16, 16, plan),
        ]

    right = gradients(plan)
    for stale in (None, build_plan(other_crow, other_col, 4), torch.full_like(plan, 2**30)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(stale), right, strict=True))
    y = cpu.forward(x, crow, col, values, None, "none", plan)
    assert torch.equal(y, cpu.forward(x, crow, col, values, None, "none", plan - 2**30))


def test_the_result_does_not_depend_on_the_number_of_threads(kernel: str, threads: None) -> None:
    _, crow, col, values = random_bsr(384, 256, 32, 0.7)
    plan = build_plan(crow, col, 8)
    for M in (1, 6, 50, 500):
        x, grad, bias = torch.randn(M, 256), torch.randn(M, 384), torch.randn(384)
        results = []
        for n in (1, 2, 3, 7, 2):
            torch.set_num_threads(n)
            results.append(
                (
                    cpu.forward(x, crow, col, values, bias, "gelu", plan),
                    cpu.grad_x(grad, crow, col, values, plan, 256),
                    cpu.grad_values(grad, x, crow, col, plan, 32, 32),
                )
            )
        if kernel == "pytorch":  # a BLAS may add in another order with other threads
            torch.testing.assert_close(results[0], results[1])
        else:
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        again = cpu.forward(x, crow, col, values, bias, "gelu", plan)
        assert torch.equal(again, results[-1][0])


def test_rows_do_not_depend_on_their_neighbours(has_compiled: None) -> None:
    """A row's result is the same bits in a batch of any size from the smallest packed one on."""
    _, crow, col, values = random_bsr(128, 128, 16, 0.5)
    x = torch.randn(300, 128)
    whole = cpu.forward(x, crow, col, values, None, "none", None)
    for M in (60, 77, 299):
        assert torch.equal(cpu.forward(x[:M], crow, col, values, None, "none", None), whole[:M])


def test_an_updated_weight_is_seen_by_the_next_call(kernel: str) -> None:
    _, crow, col, values = random_bsr(64, 64, 16, 0.5)
    for M in (1, 50):
        x = torch.randn(M, 64)
        before = cpu.forward(x, crow, col, values, None, "none", None)
        values.data.mul_(2)
        assert torch.equal(cpu.forward(x, crow, col, values, None, "none", None), 2 * before)


def test_the_plain_case_takes_the_short_way(has_compiled: None) -> None:
    """`call` serves what needs no copy and no error by itself, padded blocks as well, and leaves the rest."""
    dense, crow, col, values = random_bsr(64, 96, 16, 0.5)
    bias, plan = torch.randn(64), build_plan(crow, col, 6)
    asked: list[tuple] = []

    def general(*args) -> str:
        asked.append(args)
        return "general"

    for x in (
        torch.randn(5, 96),
        torch.randn(2, 3, 96),
        torch.randn(96, 7).t(),
        torch.randn(1, 96),
    ):
        for b, p in ((bias, plan), (None, None)):
            y = cpu.call(general, x, crow, col, values, b, 64, "silu", p)
            z = x.double() @ dense.double().t() + (0 if b is None else b.double())
            assert y.shape == (*x.shape[:-1], 64) and y.is_contiguous()
            assert relative_error(y, ACTIVATIONS["silu"](z)) < 1e-6
    x = torch.randn(5, 96)
    y = cpu.call(general, x[:, :90], crow, col, values, bias[:60], 60, "none", plan)
    z = x[:, :90].double() @ dense[:60, :90].double().t() + bias[:60].double()
    assert relative_error(y, z) < 1e-6
    assert not asked
    other_ways: list[tuple] = [
        (x[:, :80], crow, col, values, None, None, "none", plan),
        (x[:0], crow, col, values),
        (x[0], crow, col, values),
        (torch.randn(3, 2, 96).transpose(0, 1), crow, col, values),
        (x.double(), crow, col, values),
        (x.int(), crow, col, values.int()),
        (x, crow.long(), col, values),
        (x, crow, col.long(), values),
        (x, crow, col[1:], values),
        (x, crow, col, values.transpose(1, 2)),
        (x, crow, col, values[0]),
        (x, crow[None], col, values),
        (x, crow, col, values, bias[1:]),
        (x, crow, col, values, bias.double()),
        (x, crow, col, values, None, 48),
        (x, crow, col, values, None, 65),
        (x, crow, col, values, None, None, "swish"),
        (x, crow, col, values, None, None, "none", plan[1:]),
        (x, crow, col, values.to("meta")),
        (x.to("meta"), crow, col, values),
        (x, crow, col, values, bias.to("meta")),
    ]
    for n, args in enumerate(other_ways):
        assert cpu.call(general, *args) == "general", n
        assert len(asked) == n + 1


def test_several_python_threads_at_once(kernel: str) -> None:
    problems = [
        (random_bsr(256, 256, 32, 0.6, seed=s), torch.randn(20 * s + 1, 256)) for s in range(4)
    ]
    failures: list[object] = []

    def work(s: int) -> None:
        (dense, crow, col, values), x = problems[s]
        plan = build_plan(crow, col, 8)
        for _ in range(15):
            y = cpu.forward(x, crow, col, values, None, "none", plan)
            gv = cpu.grad_values(y, x, crow, col, plan, 32, 32)
            errors = (
                relative_error(y, x.double() @ dense.double().t()),
                relative_error(gv, stored_blocks(y.double().t() @ x.double(), crow, col, 32, 32)),
            )
            if max(errors) > 1e-6:
                failures.append((s, errors))

    workers = [threading.Thread(target=work, args=(s % 4,)) for s in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def python(code: str, timeout: float = 120, **environment: str) -> str:
    """Run code in a new process; its standard output."""

    root = Path(torchao_superblock.__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


FORK = """
import os, sys, torch
from tests.reference import random_bsr
from torchao_superblock.ops import cpu
from torchao_superblock.ops.plan import build_plan
torch.set_num_threads(2)
dense, crow, col, values = random_bsr(512, 512, 32, 0.5)
x, plan = torch.randn(300, 512), build_plan(crow, col, 16)
def work():
    y = cpu.forward(x, crow, col, values, None, "gelu", plan)
    return y, cpu.grad_x(y, crow, col, values, plan, 512), cpu.grad_values(y, x, crow, col, plan, 32, 32)
expected = work()                       # starts the pool of threads
child = os.fork()
if child == 0:
    import signal; signal.alarm(60)     # a hang ends here, with a status that is not 0
    # compared by numpy: torch's own parallel loops would hang here
    same = all((a.numpy() == b.numpy()).all() for a, b in zip(work(), expected))
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    os._exit(0 if same and threads == 1 else 1)
_, status = os.waitpid(child, 0)
print(status)
same = all(torch.equal(a, b) for a, b in zip(work(), expected))
print(same)                             # the parent goes on as before
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_runs_on_one_thread(has_compiled: None) -> None:
    assert python(FORK).split() == ["0", "True"]


FORK_BEFORE_THE_FIRST_CALL = """
import os, sys, torch
import torchao_superblock
from tests.reference import random_bsr
from torchao_superblock.ops import bsr_linear
torch.set_num_threads(2)
dense, crow, col, values = random_bsr(512, 512, 32, 0.5)
x = torch.randn(300, 512)
expected = x @ dense.t()                # starts the pool of threads
assert "torchao_superblock.ops._cpu" not in sys.modules
child = os.fork()
if child == 0:
    import signal; signal.alarm(60)     # a hang ends here, with a status that is not 0
    y = bsr_linear(x, crow, col, values)
    error = abs(y.numpy() - expected.numpy()).max()  # torch's own parallel loops would hang here
    os._exit(0 if error < 1e-4 and "torchao_superblock.ops._cpu" in sys.modules else 1)
_, status = os.waitpid(child, 0)
print(status)
print(torch.allclose(bsr_linear(x, crow, col, values), expected, atol=1e-4))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_forked_before_the_kernel_was_loaded_runs_on_one_thread(has_compiled: None) -> None:
    assert python(FORK_BEFORE_THE_FIRST_CALL).split() == ["0", "True"]


def test_the_gil_is_released(has_compiled: None) -> None:
    """Another Python thread runs while the kernel does: it sees the call begin and not yet end."""
    _, crow, col, values = random_bsr(2048, 2048, 64, 0.0)
    x = torch.randn(1024, 2048)
    state = {"calls": 0, "ticks_inside": 0, "inside": False, "stop": False}

    def tick() -> None:
        while not state["stop"]:
            if state["inside"]:
                state["ticks_inside"] += 1
            time.sleep(0.0002)

    ticker = threading.Thread(target=tick)
    switch = sys.getswitchinterval()
    # This interval takes the lock from no one: the ticker only runs while this thread has let go.
    sys.setswitchinterval(1000)
    try:
        ticker.start()
        state["inside"] = True
        cpu.forward(x, crow, col, values, None, "none", None)
        state["inside"] = False
        state["stop"] = True
    finally:
        state["stop"] = True
        sys.setswitchinterval(switch)
        ticker.join()
    assert state["ticks_inside"] > 0


SHOW = "from torchao_superblock.ops import cpu; print(cpu.backend_info()['name']); print(cpu.backend_info()['reason'])"


def test_the_environment_forces_the_pytorch_path() -> None:
    name, reason = python(SHOW, TORCHAO_SUPERBLOCK_CPU_BACKEND="pytorch").split("\n")
    assert name == "pytorch" and "TORCHAO_SUPERBLOCK_CPU_BACKEND=pytorch" in reason


def test_the_environment_chooses_the_instruction_set(has_compiled: None) -> None:
    name, reason = python(
        SHOW, TORCHAO_SUPERBLOCK_CPU_ISA="baseline", TORCHAO_SUPERBLOCK_CPU_BACKEND=""
    ).split("\n")
    assert name == "c-baseline" and "TORCHAO_SUPERBLOCK_CPU_ISA=baseline" in reason


@pytest.mark.parametrize(
    ("variable", "choices"),
    [
        ("TORCHAO_SUPERBLOCK_CPU_BACKEND", "'c' or 'pytorch'"),
        ("TORCHAO_SUPERBLOCK_CPU_ISA", "baseline"),
    ],
)
def test_an_unknown_choice_in_the_environment_is_an_error(
    has_compiled: None, variable: str, choices: str
) -> None:
    with pytest.raises(ValueError, match=f"{variable}='fastest'.*{choices}"):
        compiled.load({variable: "fastest"})


def test_a_stale_extension_is_reported_and_not_used(has_compiled: None, tmp_path: Path) -> None:
    (tmp_path / "changed.c").write_text("int changed;\n")
    kernel, info = compiled.load({}, tmp_path)
    assert kernel is None and info["name"] == "pytorch"
    assert "stale" in info["reason"] and "pip install" in info["reason"]
    assert info["matches_source"] is False and info["source_hash"] == source_hash(tmp_path)


def test_a_missing_extension_is_reported() -> None:
    kernel, info = compiled.load({}, name="torchao_superblock.ops._missing")
    assert kernel is None and info["name"] == "pytorch" and "compiler" in info["reason"]


def test_the_extension_in_use_is_of_these_sources(has_compiled: None) -> None:
    info = cpu.backend_info()
    assert info["matches_source"] is True
    assert info["source_hash"] == info["built_from"] == source_hash(CSRC)
    assert info["isa"] in info["supported_isas"] and info["name"] == f"c-{info['isa']}"
    assert info["threading"].startswith("openmp")


def test_the_source_hash_names_every_change(tmp_path: Path) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    first = source_hash(copy)
    assert first == source_hash(CSRC)
    header = copy / "kernels.h"
    header.write_bytes(header.read_bytes().replace(b"\n", b"\r\n"))
    assert source_hash(copy) == first  # line endings aside
    header.write_text(header.read_text() + "\n/* one more line */\n")
    assert source_hash(copy) not in (None, first)
    assert source_hash(tmp_path / "nothing") is None


def test_a_kernel_that_is_not_there_cannot_be_used(has_compiled: None) -> None:
    before = cpu.backend_info()
    with (
        pytest.raises(ValueError, match="'sse9': this processor has baseline"),
        compiled.using("sse9"),
    ):
        raise AssertionError("used all the same")
    with pytest.raises(KeyError), compiled.using("pytorch"):
        assert cpu.backend_info()["name"] != before["name"]
        raise KeyError
    assert cpu.backend_info() == before


def test_codes_of_activations_and_dtypes_are_those_of_the_c_sources() -> None:
    header = (CSRC / "superblock.h").read_text(encoding="utf-8")
    names = re.search(r"enum sb_activation \{ (.*) \};", header).group(1).split(", ")
    assert [name.removeprefix("SB_").lower() for name in names] == list(CODES)
    assert list(CODES.values()) == list(range(len(names)))
