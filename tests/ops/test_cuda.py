"""The CUDA backend: dispatch, precision switch and export; on a GPU also the full grid of cases."""

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops import triton_cases
from tests.reference import random_bsr, relative_error
from torchao_superblock.ops import build_plan, cuda

ROOT = Path(__file__).parents[2]
bsr_linear = torch.ops.torchao_superblock.bsr_linear


# ---------------------------------------------------------------------------------------------------------------------
# Anywhere.


PRECISION_SETTINGS = {
    "pass": False,
    "matmul.allow_tf32 = True": True,
    "torch.set_float32_matmul_precision('high')": True,
    "matmul.fp32_precision = 'tf32'": True,
    "matmul.fp32_precision = 'tf32'; torch.set_float32_matmul_precision('highest')": False,
    "matmul.allow_tf32 = True; matmul.fp32_precision = 'ieee'": False,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each setting needs a fresh copy of a process")
def test_float32_precision_follows_torch_whichever_way_it_was_set() -> None:
    """Some of these make torch's own getters raise, and none can be undone: a forked process each."""
    program = f"""
import os, torch
from torchao_superblock.ops import cuda
matmul = torch.backends.cuda.matmul
for setting in {list(PRECISION_SETTINGS)!r}:
    child = os.fork()
    if child == 0:
        exec(setting)
        print(cuda.allows_tf32(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == list(map(str, PRECISION_SETTINGS.values())), done.stderr


def test_token_counts_share_few_buckets() -> None:
    assert [cuda.m_bucket(M) for M in (1, 16, 17, 1000, 1024, 1025)] == [
        16,
        16,
        32,
        1024,
        1024,
        2048,
    ]
    assert cuda.m_bucket(10**9) == 65536
    assert len({cuda.m_bucket(M) for M in range(1, 200_000)}) == 13


@pytest.mark.parametrize("ahead_of_time", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_ahead_of_time_compilers_see_the_kernels(
    ahead_of_time: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cuda._devices, 0, cuda._Device(90, 132))
    monkeypatch.setattr(cuda, "_tuned_devices", {0})

    class Model(torch.nn.Module):
        def forward(self, x, crow, col, values, bias, plan):
            return (bsr_linear(x, crow, col, values, bias, None, "gelu", plan),)

    _, crow, col, values = random_bsr(64, 128, 32, 0.5, dtype)
    plan = build_plan(crow, col, 4)
    real = (torch.empty(2, 1000, 128, dtype=dtype), crow, col, values)
    with FakeTensorMode(), torch.no_grad(), V.set_aot_compilation(ahead_of_time):
        shapes = [*real, torch.empty(64, dtype=dtype), plan]
        inputs = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in shapes]
        graph, _ = aot_export_module(Model(), inputs, trace_joint=False)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert ("torchao_superblock.bsr_linear.default" in targets) is not ahead_of_time
    assert ("triton_kernel_wrapper_functional" in targets) is ahead_of_time
    assert graph.graph.find_nodes(op="output")[0].args[0][-1].meta["val"].shape == (2, 1000, 64)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("group", triton_cases.GROUPS)
def test_kernels_match_dense_float64(group: str) -> None:
    triton_cases.GROUPS[group]()


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 300, 5000])
def test_capturable_in_a_cuda_graph(M: int) -> None:
    dense, crow, col, values = random_bsr(4096, 1024, 64, 0.9, torch.float16, "cuda")
    plan = build_plan(crow, col, 16)
    x = torch.randn(M, 1024, dtype=torch.float16, device="cuda")
    expected = bsr_linear(x, crow, col, values, plan=plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bsr_linear(x, crow, col, values, plan=plan)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert relative_error(y, x.double() @ dense.double().T) < 2e-3
    assert not torch.equal(y, expected)


@pytest.mark.gpu
def test_a_repeated_call_is_still_checked_and_still_reads_its_own_tensors() -> None:
    dense, crow, col, values = random_bsr(128, 256, 32, 0.5, torch.float16, "cuda")
    plan = build_plan(crow, col, 8)
    bias = torch.randn(128, dtype=torch.float16, device="cuda")
    for lead in ((3,), (2, 5), (1, 1), (2, 5), (3,)):
        for b, p, activation in (
            (bias, plan, "relu"),
            (None, None, "none"),
            (bias * 2, plan, "relu"),
        ):
            x = torch.randn(*lead, 256, dtype=torch.float16, device="cuda")
            for values_now in (values, values * 2):
                factor = 1 if values_now is values else 2
                expected = x.double() @ dense.double().T * factor + (0 if b is None else b.double())
                expected = expected.relu() if activation == "relu" else expected
                y = bsr_linear(x, crow, col, values_now, b, None, activation, p)
                assert y.shape == (*lead, 128) and y.is_contiguous()
                assert relative_error(y, expected) < 2e-3
    transposed = torch.randn(256, 3, dtype=torch.float16, device="cuda").T
    y = bsr_linear(transposed, crow, col, values, bias, None, "relu", plan)
    assert relative_error(y, (transposed.double() @ dense.double().T + bias.double()).relu()) < 2e-3
    with pytest.raises(TypeError):
        bsr_linear(x, crow, col, values, bias.float(), None, "relu", plan)
    with pytest.raises(RuntimeError):
        bsr_linear(x, crow.cpu(), col, values, bias, None, "relu", plan)
    with pytest.raises(ValueError):
        bsr_linear(x, crow, col, values, bias, None, "tanh", plan)


@pytest.mark.gpu
def test_no_synchronisation_and_no_allocation_but_output_and_workspace() -> None:
    _, crow, col, values = random_bsr(4096, 4096, 64, 0.9, torch.bfloat16, "cuda")
    plan = build_plan(crow, col, 64)
    for M in (1, 16, 4096):
        x = torch.randn(M, 4096, dtype=torch.bfloat16, device="cuda")
        bsr_linear(x, crow, col, values, plan=plan)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            bsr_linear(x, crow, col, values, plan=plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= 2


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    M, N, K = 40_000, 64, 65_536  # x alone has 2.6e9 elements
    dense, crow, col, values = random_bsr(N, K, (64, 64), 0.98, torch.float16, "cuda")
    x = torch.randn(M, K, dtype=torch.float16, device="cuda")
    plan = build_plan(crow, col, K // 64)
    y = triton_cases.plain_forward(x, crow, col, values, None, "none", plan)
    last = slice(M - 100, M)
    assert relative_error(y[last], x[last].double() @ dense.double().T) < 2e-3
    grad = torch.randn(M, N, dtype=torch.float16, device="cuda")
    grad_x = cuda.grad_x(grad, crow, col, values, plan, K // 64)
    assert relative_error(grad_x[last], grad[last].double() @ dense.double()) < 2e-3
    del grad_x
    grad_values = cuda.grad_values(grad, x, crow, col, plan, 64, 64)
    column = int(col[-1]) * 64
    reference = grad.double().T @ x[:, column : column + 64].double()
    assert relative_error(grad_values[-1], reference) < 2e-3


@pytest.mark.gpu
def test_batch_sizes_do_not_recompile() -> None:
    kernels = importlib.import_module("torchao_superblock.ops.triton_kernels")
    _, crow, col, values = random_bsr(512, 512, 64, 0.9, torch.float16, "cuda")
    plan = build_plan(crow, col, 8)

    def compiled() -> int:
        caches = kernels.bsr_matmul_kernel.device_caches.values()
        return sum(len(cache[0]) for cache in caches)

    for M in range(513, 1025, 64):
        bsr_linear(
            torch.randn(M, 512, dtype=torch.float16, device="cuda"), crow, col, values, plan=plan
        )
        if M == 513:
            first = compiled()
    assert compiled() == first


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_aotinductor_package_runs_without_this_library(dtype: str, tmp_path: Path) -> None:
    build = f"""
    import sys, torch
    from tests.reference import random_bsr
    from torchao_superblock import to_bsr_linear
    torch.manual_seed(0)
    dense, *_ = random_bsr(192, 256, 64, 0.6, torch.{dtype})
    linear = torch.nn.Linear(256, 192, dtype=torch.{dtype})
    linear.weight.data.copy_(dense)
    model = torch.nn.Sequential(to_bsr_linear(linear, 64), torch.nn.GELU()).cuda().eval()
    x = torch.randn(3, 50, 256, dtype=torch.{dtype}, device="cuda")
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({{0: torch.export.Dim("batch", min=2, max=64)}},))
        assert torch.allclose(program.module()(x), model(x))
        torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1] + "/model.pt2")
        larger = torch.randn(17, 50, 256, dtype=torch.{dtype}, device="cuda")
        torch.save([(x, model(x)), (larger, model(larger))], sys.argv[1] + "/cases.pt")
    """
    use = """
    import sys, torch
    model = torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")
    for x, expected in torch.load(sys.argv[1] + "/cases.pt"):
        y = model(x)
        error = ((y.double() - expected.double()).norm() / expected.double().norm()).item()
        assert error < 2e-3, error
    assert "torchao_superblock" not in sys.modules
    """
    for program in (build, use):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile_without_graph_breaks_or_recompiles(mode: str) -> None:
    dense, crow, col, values = random_bsr(256, 256, 32, 0.8, torch.float16, "cuda")
    plan = build_plan(crow, col, 8)

    def function(x):
        return bsr_linear(x, crow, col, values, None, None, "silu", plan) * 2

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, mode=mode)
    with torch.no_grad(), torch.compiler.set_stance("default"):
        for M in (64, 65, 300, 1000):
            x = torch.randn(M, 256, dtype=torch.float16, device="cuda")
            expected = torch.nn.functional.silu(x.double() @ dense.double().T) * 2
            assert relative_error(compiled(x), expected) < 2e-3
    metrics = torch._dynamo.utils.counters
    assert metrics["stats"]["unique_graphs"] >= 1 and not metrics["graph_break"]
