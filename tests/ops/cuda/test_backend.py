"""The CUDA backend: dispatch, precision switch, export and repeated calls; on a GPU also the full grid of cases."""

import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

import triton
import triton.language as tl
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

import torchao_superblock
from tests.ops.cuda import triton_cases
from tests.ops.cuda.common import H200
from tests.reference import TOLERANCE, assert_replays, random_bsr, relative_error
from torchao_superblock.ops import build_plan, cuda
from torchao_superblock.ops.cuda import backend, choose, matmul
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.device import device_at, devices
from torchao_superblock.ops.cuda.tiles import BlocksTile, MatmulTile

ROOT = Path(__file__).parents[3]
bsr_linear = torch.ops.torchao_superblock.bsr_linear
bsr_linear_module = importlib.import_module("torchao_superblock.ops.op")


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
from torchao_superblock.ops.precision import allows_tf32
matmul = torch.backends.cuda.matmul
for setting in {list(PRECISION_SETTINGS)!r}:
    child = os.fork()
    if child == 0:
        exec(setting)
        print(allows_tf32(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == list(map(str, PRECISION_SETTINGS.values())), done.stderr


@pytest.mark.parametrize("ahead_of_time", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_ahead_of_time_compilers_see_the_kernels(
    ahead_of_time: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(devices, 0, H200._replace(name="a card without a file"))

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
    # A compiler launches them its own way.
    assert not any("launch_pdl" in node.kwargs.get("kwargs", {}) for node in graph.graph.nodes)
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
@pytest.mark.parametrize("M", [1, 16, 64, 300, 2048])
def test_calls_wait_for_what_they_read(M: int) -> None:
    """Each in a chain reads what the one before it wrote, whether the GPU runs them one by one or may overlap them."""
    calls = []
    for N, K in ((8192, 1024), (1024, 8192)):
        _, crow, col, values = random_bsr(N, K, 64, 0.9, torch.float16, "cuda")
        arguments = (crow, col, values, None, None, "none", build_plan(crow, col, K // 64))
        calls.append(lambda x, arguments=arguments: bsr_linear(x, *arguments))
    start = torch.randn(M, 1024, dtype=torch.float16, device="cuda")
    x, side = torch.empty_like(start), torch.cuda.Stream()

    def chain(after_each=lambda: None) -> torch.Tensor:
        x.copy_(start)  # a copy of memory, no kernel
        y = x
        for i in range(20):
            y = calls[i % 2](y)
            after_each()
            if i % 2:
                y = y.mul_(16 / y.float().norm(dim=1, keepdim=True).clamp(min=1e-3))
                after_each()
        # What comes after two streams.
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z = calls[0](y)
        z2 = calls[0](x)
        torch.cuda.current_stream().wait_stream(side)
        return calls[1](z.add_(z2))

    expected = chain(torch.cuda.synchronize)
    torch.cuda.synchronize()
    assert expected.isfinite().all() and expected.any()
    assert all(torch.equal(chain(), expected) for _ in range(3))
    assert_replays(chain, expected)
    assert_replays(lambda: calls[0](start), calls[0](start))  # nothing before it


@triton.jit
def _write_late(out_ptr, source_ptr, n, BLOCK: tl.constexpr):
    """Copy, long after the next kernel was let in."""
    tl.extra.cuda.gdc_launch_dependents()
    i = tl.arange(0, BLOCK)
    waited = 0
    for _ in range(2000):
        waited += tl.load(source_ptr, volatile=True).to(tl.int32) & 1
    value = tl.load(source_ptr + i, mask=i < n)
    tl.store(out_ptr + i, tl.where(waited < 0, 0.0, value), mask=i < n)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336)])  # in one part; in five, summed up
def test_a_call_waits_for_a_kernel_that_lets_it_in_early(shape: tuple[int, int]) -> None:
    if not device_at(torch.cuda.current_device()).overlaps:
        pytest.skip("launches overlap on Hopper only")
    _, crow, col, values = random_bsr(*shape, 64, 0.9, torch.float16, "cuda")
    plan = build_plan(crow, col, shape[1] // 64)
    source = torch.randn(1, shape[1], dtype=torch.float16, device="cuda")
    expected = bsr_linear(source, crow, col, values, plan=plan)
    x = torch.empty_like(source)

    def late() -> torch.Tensor:
        x.zero_()
        _write_late[(1,)](x, source, x.numel(), BLOCK=16384)
        return bsr_linear(x, crow, col, values, plan=plan)

    assert all(torch.equal(late(), expected) for _ in range(5))
    assert_replays(late, expected)


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
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_repeated_call_of_the_function(dtype: torch.dtype, mode: type) -> None:
    """Directly to the kernel: on the stream and device of the moment, in a graph, under another precision."""
    dense, crow, col, values = random_bsr(4096, 1024, 64, 0.9, dtype, "cuda")
    values = torch.nn.Parameter(values)
    plan = build_plan(crow, col, 16)
    bias = torch.randn(4096, device="cuda").to(dtype)

    def check(
        x: torch.Tensor, y: torch.Tensor | None = None, tolerance: float = TOLERANCE[dtype]
    ) -> None:
        if y is None:
            y = function(x, crow, col, values, bias, None, "none", plan)
        expected = x.double() @ dense.double().T + bias.double()
        assert relative_error(y, expected) <= tolerance

    function = bsr_linear_module.bsr_linear
    with mode():
        for M in (1, 16, 1, 16):
            check(torch.randn(M, 1024, device="cuda").to(dtype))
            check(torch.randn(1 + M * 1024, device="cuda").to(dtype)[1:].view(M, 1024))
        stream = torch.cuda.Stream()
        x = torch.randn(1, 1024, device="cuda").to(dtype)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            x = x * 2  # read by the kernel only if it waits for this
            check(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = function(x, crow, col, values, bias, None, "none", plan)
        x.copy_(torch.randn_like(x))
        graph.replay()
        check(x, y)
        for _ in range(2):
            with triton_cases.tf32_allowed():
                check(x, tolerance=max(2e-3, TOLERANCE[dtype]))
            check(x)


@pytest.mark.gpu
def test_a_tile_that_does_not_fit_makes_way_for_a_smaller_one() -> None:
    dense, crow, col, values = random_bsr(1024, 1024, 128, 0.5, torch.float32, "cuda")
    x = torch.randn(512, 1024, device="cuda")
    problem = backend.forward_problem(x, crow, values, None, "none", None)
    too_much = choose.plain(problem, MatmulTile(128, 128, 128, 1, 8, 3))
    for _ in range(2):
        y = backend.forward(x, crow, col, values, None, "none", None, choice=too_much)
        assert relative_error(y, x.double() @ dense.double().T) < 1e-6
    grad = torch.randn(512, 1024, device="cuda")
    too_much = Choice("blocks", BlocksTile(128, 128, 128, 8, 3))
    y = backend.grad_values(grad, x, crow, col, None, 128, 128, choice=too_much)
    reference = triton_cases.stored_blocks(grad.double().T @ x.double(), crow, col, (128, 128))
    assert relative_error(y, reference) < 1e-6


@pytest.mark.gpu
def test_profilers_see_repeated_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    _, crow, col, values = random_bsr(256, 256, 64, 0.5, torch.float16, "cuda")
    x = torch.randn(4, 256, dtype=torch.float16, device="cuda")
    for _ in range(3):
        expected = bsr_linear(x, crow, col, values)
    seen = []
    hook = type("Hook", (), {"calls": [1], "__call__": lambda self, metadata: seen.append(1)})()
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
    assert torch.equal(bsr_linear(x, crow, col, values), expected)
    assert seen


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 50), (torch.float32, 74)])
def test_a_call_goes_through_few_frames(dtype: torch.dtype, most: int) -> None:
    """Frames of this package, of the first call of a kind and of the third.

    In float32 the first prepares and launches a second kernel, which splits the blocks into TF32 parts.
    """
    package = str(Path(torchao_superblock.__file__).parent)
    _, crow, col, values = random_bsr(192, 320, 64, 0.5, dtype, "cuda")
    bias, plan = torch.randn(192, device="cuda").to(dtype), build_plan(crow, col, 5)
    x = torch.randn(3, 320, device="cuda").to(dtype)

    def frames() -> int:
        seen = []

        def profile(frame, event, _):
            if event == "call" and frame.f_code.co_filename.startswith(package):
                seen.append(frame.f_code.co_name)

        sys.setprofile(profile)
        try:
            bsr_linear_module.bsr_linear(x, crow, col, values, bias, None, "gelu", plan)
        finally:
            sys.setprofile(None)
        return len(seen)

    device_at(x.get_device())
    with torch.inference_mode():
        first, _, third = frames(), frames(), frames()
    assert first <= most and third <= 6, (first, third)


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
    grad_x = cuda.grad_x(grad, crow, col, values, plan, K)
    assert relative_error(grad_x[last], grad[last].double() @ dense.double()) < 2e-3
    del grad_x
    grad_values = cuda.grad_values(grad, x, crow, col, plan, 64, 64)
    column = int(col[-1]) * 64
    reference = grad.double().T @ x[:, column : column + 64].double()
    assert relative_error(grad_values[-1], reference) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [16, 32, 64, 128, (32, 64), (64, 16)])
def test_backward_with_many_tokens(blocksize: int | tuple[int, int], dtype: torch.dtype) -> None:
    """Where the Gluon kernel serves the transposed product, and small blocks their own kernel or a dense product."""
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    tolerance = 3e-7 if dtype == torch.float32 else 5e-3
    for sparsity in (0.5, 0.95):
        N, K, M = 2048, 1024, 20_001
        dense, crow, col, values = random_bsr(N, K, (r, c), sparsity, dtype, "cuda")
        plan = build_plan(crow, col, K // c)
        x = torch.randn(M, K, dtype=dtype, device="cuda")
        grad = torch.randn(M, N, dtype=dtype, device="cuda")
        reference = grad.double() @ dense.double()
        grad_x = cuda.grad_x(grad, crow, col, values, plan, K)
        assert relative_error(grad_x, reference) < tolerance
        grad_x = triton_cases.plain_grad_x(grad, crow, col, values, plan, K)
        assert relative_error(grad_x, reference) < tolerance
        grad_values = cuda.grad_values(grad, x, crow, col, plan, r, c)
        again = cuda.grad_values(grad, x, crow, col, plan, r, c)
        assert torch.equal(grad_values, again) and grad_values.is_contiguous()
        reference = triton_cases.stored_blocks(grad.double().T @ x.double(), crow, col, (r, c))
        assert relative_error(grad_values, reference) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.gpu
def test_batch_sizes_do_not_recompile() -> None:
    _, crow, col, values = random_bsr(512, 512, 64, 0.9, torch.float16, "cuda")
    plan = build_plan(crow, col, 8)

    def compiled() -> int:
        caches = matmul.bsr_matmul_kernel.device_caches.values()
        return sum(len(cache[0]) for cache in caches)

    for M in range(513, 1025, 64):
        bsr_linear(
            torch.randn(M, 512, dtype=torch.float16, device="cuda"), crow, col, values, plan=plan
        )
        if M == 513:
            first = compiled()
    assert compiled() == first


def _shared_runtime() -> dict[str, str]:
    """Environment in which a package uses the C++ runtime that torch itself uses.

    Where g++ links a runtime of its own into every package, as on some images, loading any package, a dense model's
    too, crashes the process unless the shared runtime was there first.
    """
    loaded = re.search(r"/\S*libstdc\+\+\.so\.6\S*", Path("/proc/self/maps").read_text())
    return {} if loaded is None else {"LD_PRELOAD": loaded[0]}


@pytest.mark.gpu
def test_aotinductor_package_runs_without_this_library(tmp_path: Path) -> None:
    """Two dtypes in one package: nearly all of the time is that of the C++ compiler."""
    build = """
    import sys, torch
    from tests.reference import random_bsr
    from torchao_superblock import to_bsr_linear

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for dtype in (torch.float16, torch.float32):
                linear = torch.nn.Linear(256, 192, dtype=dtype)
                linear.weight.data.copy_(random_bsr(192, 256, 64, 0.6, dtype)[0])
                self.add_module(str(dtype)[6:], to_bsr_linear(linear, 64))

        def forward(self, half, single):
            return torch.nn.functional.gelu(self.float16(half)), self.float32(single)

    def inputs(batch):
        x = torch.randn(2, batch, 50, 256, device="cuda")
        return x[0].half(), x[1]

    torch.manual_seed(0)
    model = Model().cuda().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, inputs(3), dynamic_shapes=({0: batch}, {0: batch}))
        torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1] + "/model.pt2")
        cases = [(x, model(*x)) for x in (inputs(3), inputs(17))]
        torch.save(cases, sys.argv[1] + "/cases.pt")
    """
    use = """
    import sys, torch
    model = torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")
    for inputs, expected in torch.load(sys.argv[1] + "/cases.pt"):
        for y, reference in zip(model(*inputs), expected, strict=True):
            error = ((y.double() - reference.double()).norm() / reference.double().norm()).item()
            assert y.dtype == reference.dtype and error < 2e-3, (y.dtype, error)
    assert "torchao_superblock" not in sys.modules
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name, program, extra in (("build", build, {}), ("use", use, _shared_runtime())):
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program), str(tmp_path)],
            cwd=ROOT,
            env=environment | extra,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, f"{name}: {done.returncode}\n{done.stderr[-3000:]}"


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
