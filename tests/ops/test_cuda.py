"""The CUDA backend: dispatch, precision switch and export; on a GPU also the full grid of cases."""

import functools
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

import triton
import triton.language as tl
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops import triton_cases
from tests.reference import TOLERANCE, assert_replays, random_bsr, relative_error
from torchao_superblock.ops import build_plan, cuda, launch

ROOT = Path(__file__).parents[2]
bsr_linear = torch.ops.torchao_superblock.bsr_linear
bsr_linear_module = importlib.import_module("torchao_superblock.ops.bsr_linear")


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


@pytest.mark.parametrize(
    ("M", "R", "C", "block", "even"),
    [
        (16, 224, 64, 64, True),  # 224 programs
        (128, 224, 64, 64, True),
        (256, 224, 64, 64, False),  # 448: those that leave first make room for more
        (512, 64, 224, 64, True),  # 256
        (512, 32, 112, 128, True),  # 256 of 64 tokens
        (512, 12, 48, 64, False),  # 48: one a processor
        (16, 64, 224, 64, True),  # five for a row
        (16, 64, 64, 64, False),  # 128 of 32 outputs
        (64, 64, 224, 64, False),  # split
    ],
)
def test_few_programs_a_processor_are_evened_out(
    M: int, R: int, C: int, block: int, even: bool
) -> None:
    for itemsize in (2, 4):
        nnz = R * C // 10
        problem = cuda.Problem("forward", M, R, C, block, block, nnz, itemsize, 0, 90, 132)
        assert cuda.matmul_tile(problem).even is (even and itemsize == 2)


def test_the_gradient_of_small_blocks_is_chosen_by_how_many_there_are() -> None:
    def tile(
        blocksize: tuple[int, int], density: float, M: int = 65536, itemsize: int = 2
    ) -> object:
        r, c = blocksize
        R, C = 3072 // r, 768 // c
        precision = cuda.NATIVE if itemsize == 2 else cuda.TF32X3
        nnz = int(density * R * C)
        return cuda.grad_values_tile(
            cuda.Problem("grad_values", M, R, C, r, c, nnz, itemsize, precision, 90, 132)
        )

    for blocksize in ((16, 16), (8, 8), (64, 16), (32, 32)):
        assert tile(blocksize, 0.5) is None
        assert isinstance(tile(blocksize, 0.02), cuda.LineTile)
        assert isinstance(tile(blocksize, 0.5, M=512), cuda.LineTile)
        assert isinstance(tile(blocksize, 0.5, itemsize=4), cuda.GradTile)
    assert isinstance(tile((64, 64), 0.5), cuda.GradTile)
    assert isinstance(tile((128, 128), 0.02), cuda.GradTile)


@pytest.mark.parametrize("ahead_of_time", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_ahead_of_time_compilers_see_the_kernels(
    ahead_of_time: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cuda._devices, 0, cuda._Device(90, 132, True))
    monkeypatch.setattr(cuda, "_tuned_devices", {0})
    monkeypatch.setattr(cuda, "OVERLAP", None)  # whoever asked for it would fail

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


class Launcher:
    """Stands for a compiled kernel's `run`: records what it is asked to launch."""

    def __init__(self, launches: list[tuple]) -> None:
        self.launches = launches

    def __call__(self, X, Y, Z, stream, function, metadata, _, enter, leave, *arguments):
        self.launches.append((function, (X, Y, Z), arguments))


@pytest.mark.parametrize(
    ("capability", "driver", "overlap"),
    [
        ((8, 0), 13000, False),
        ((9, 0), 12020, False),
        ((9, 0), 12030, True),
        ((10, 0), 13000, False),
    ],
)
def test_launches_overlap_where_that_was_measured(
    capability: tuple[int, int], driver: int, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(launch, "_driver_version", lambda: driver)
    assert launch.can_overlap(0) is overlap


def _pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: int = 90, can_overlap: bool = False
) -> None:
    """CUDA's way of calling, on CPU tensors: they are on device -1, the current one, for which nothing is tuned."""
    monkeypatch.setitem(cuda._devices, -1, cuda._Device(capability, 132, can_overlap))
    monkeypatch.setattr(cuda, "_tuned_devices", {-1})
    monkeypatch.setattr(cuda, "_index", lambda x: -1)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)


@pytest.mark.parametrize("name", ["bsr_matmul_kernel", "sum_splits_kernel"])
def test_kernels_whose_launch_overlaps_wait_before_they_touch_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _pretend_gpu(monkeypatch, can_overlap=True)
    kernel = getattr(cuda.kernels, name)
    product = cuda._Product(
        cuda.Problem("forward", 16, 64, 224, 64, 64, 1434, 2, cuda.NATIVE, 90, 132),
        -1,
        transposed=False,
        has_perm=False,
        has_order=True,
        has_bias=True,
        has_low=False,
        activation="none",
        wide=False,
    )
    assert product.splits > 1 and product.tile.even
    launched = product.kernel if kernel is product.kernel.function else product.reduce
    assert launched.constants_by_name["OVERLAPS"] and launched.options["launch_pdl"]
    assert product.kernel.constants_by_name["ROUND"] == 132
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {argument: "*bf16" for argument in types if argument.endswith("_ptr")}
    types |= {argument: "*i32" for argument in types if argument in cuda.kernels._INDICES[:-1]}
    types |= dict.fromkeys(launched.constants_by_name, "constexpr")
    for overlaps in (False, True):
        constants = launched.constants_by_name | {"OVERLAPS": overlaps}
        source = ASTSource(kernel, types, constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert ptx.count("griddepcontrol.wait") == overlaps
        touches = re.search(r"\b(ld\.global|st\.global|cp\.async)", ptx)
        assert touches and ptx.find("griddepcontrol.wait") < touches.start()


TRITON_TYPES = {
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_triton_understands_every_kernel_without_a_gpu(
    dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its interpreter runs as Python does and lets pass what the compiler does not, like a variable of two types."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    modules = backend.get_module_map()
    seen: set[tuple] = set()

    def compile_only(kernel, grid, index, tensors, *numbers):
        names = iter(kernel.function.arg_names)
        types = {name: TRITON_TYPES[t.dtype] for t, name in zip(tensors, names, strict=False)}
        types |= {name: "i32" for _, name in zip(numbers, names, strict=False)}
        types |= dict.fromkeys(names, "constexpr")
        kind = (kernel.function.__name__, *types.values(), *kernel.constants)
        if kind in seen:
            return
        seen.add(kind)
        options = backend.parse_options(dict(kernel.options))
        generators = backend.get_codegen_implementation(options)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(kernel.function, types, kernel.constants_by_name)
        source.make_ir(target, options, generators, modules, context)

    rules = cuda.matmul_tile
    _pretend_gpu(monkeypatch, capability, can_overlap=capability == 90)
    monkeypatch.setattr(launch.Kernel, "__call__", compile_only)
    monkeypatch.setattr(cuda, "hopper_kernel", lambda *_, **__: lambda grad, *_: grad)
    for r, c in ((16, 16), (64, 64), (3, 5), (40, 80)):
        _, crow, col, values = random_bsr(4 * r, 24 * c, (r, c), 0.5, dtype)
        bias, plan = torch.zeros(4 * r, dtype=dtype), build_plan(crow, col, 24)
        for M, tf32 in ((1, False), (300, False), (5000, False), (300, True)):
            x = torch.zeros(M, 24 * c, dtype=dtype)
            grad = torch.zeros(M, 4 * r, dtype=dtype)
            monkeypatch.setattr(cuda, "allows_tf32", lambda tf32=tf32: tf32)
            for splits, even in ((1, False), (3, True)):
                change = {"splits": splits, "even": even}
                monkeypatch.setattr(
                    cuda,
                    "matmul_tile",
                    lambda problem, change=change: rules(problem)._replace(**change),
                )
                cuda.forget_launches()
                cuda._plain_forward(x, crow, col, values, bias, "gelu", plan, -1)
                cuda._plain_forward(x, crow, col, values, None, "none", None, -1)
            cuda.grad_x(grad, crow, col, values, plan, 24)
            cuda.grad_values(grad, x, crow, col, plan, r, c)
    cuda.forget_launches()
    expected = {"bsr_matmul_kernel", "sum_splits_kernel", "grad_values_kernel", "check_plan_kernel"}
    if dtype.itemsize == 2:
        expected.add("grad_values_lines_kernel")
    if capability == 90 or (dtype == torch.float32 and capability == 80):
        expected.add("pack_blocks_kernel")
    assert {name for name, *_ in seen} == expected


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """CUDA's way of calling, on CPU tensors and with kernels that only record their launch once they are compiled."""
    recorded: list[tuple] = []

    def fake(kernel: object) -> SimpleNamespace:
        compiled = SimpleNamespace(
            run=Launcher(recorded), function=kernel.fn.__name__, packed_metadata=()
        )

        class Function:
            arg_names = kernel.arg_names

            def __getitem__(self, grid):
                return lambda *args, **kwargs: compiled

        return Function()

    for name in ("bsr_matmul_kernel", "sum_splits_kernel"):
        monkeypatch.setattr(cuda.kernels, name, fake(getattr(cuda.kernels, name)))
    _pretend_gpu(monkeypatch)
    monkeypatch.setattr(launch, "DIRECT_LAUNCH", True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    cuda.forget_launches()
    yield recorded
    cuda.forget_launches()


def test_a_repeated_call_of_the_gluon_kernel_only_launches(
    launches: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = pytest.importorskip("torchao_superblock.ops.hopper")
    _, crow, col, values = random_bsr(64, 96, 32, 0.5, torch.float16)
    bias, plan = torch.randn(64).half(), build_plan(crow, col, 3)
    runs, general_calls = [], []

    def launcher(x, crow, values, bias, activation, plan, *, tile=None):
        def run(*arguments):
            runs.append((tile, *(a.data_ptr() for a in arguments[:-1])))
            return torch.zeros(arguments[-1], dtype=x.dtype)

        return run

    monkeypatch.setattr(hopper, "launcher", launcher)
    monkeypatch.setattr(cuda, "_load_hopper", lambda: hopper)
    monkeypatch.setattr(cuda, "HOPPER_TOKENS", 1)
    kernel = functools.partial(hopper.forward, tile="a tile")
    monkeypatch.setattr(cuda, "hopper_kernel", lambda *arguments: kernel)

    def general(*args):
        general_calls.append(args)
        return bsr_linear_module._forward(cuda, *args)

    def call(x: torch.Tensor, was_known: bool) -> None:
        general_calls.clear(), runs.clear()
        with torch._C._AutoDispatchBelowAutograd():
            y = cuda.call(general, x, crow, col, values, bias, None, "gelu", plan)
        assert len(general_calls) == (0 if was_known else 1)
        assert y.shape == (*x.shape[:-1], 64)
        tensors = (x, crow, col, values, bias, plan)
        assert runs == [("a tile", *(t.data_ptr() for t in tensors))]

    x = torch.randn(4, 5, 96).half()
    call(x, False), call(x, False), call(x, True)
    call(torch.randn(4, 5, 96).half(), True)
    call(torch.randn(20, 96).half(), False)
    monkeypatch.setattr(cuda, "_recorder", lambda *args: None)
    call(x, False)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_repeated_call_only_launches(
    dtype: torch.dtype, splits: int, launches: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = cuda.matmul_tile
    monkeypatch.setattr(cuda, "matmul_tile", lambda problem: rule(problem)._replace(splits=splits))
    _, crow, col, values = random_bsr(64, 96, 16, 0.5, dtype)
    bias, plan = torch.randn(64).to(dtype), build_plan(crow, col, 6)
    general_calls = []

    def general(*args):
        general_calls.append(args)
        return bsr_linear_module._forward(cuda, *args)

    def call(x: torch.Tensor, was_known: bool) -> torch.Tensor:
        general_calls.clear(), launches.clear()
        with torch._C._AutoDispatchBelowAutograd():  # as the dispatcher calls a backend
            y = cuda.call(general, x, crow, col, values, bias, None, "relu", plan)
        assert len(general_calls) == (0 if was_known else 1)
        if was_known:
            at = [tensor.data_ptr() for tensor in (x, crow, col, col, plan, values, values, bias)]
            (function, grid, arguments), *reduction = launches
            assert function == "bsr_matmul_kernel" and grid[1] == splits
            assert list(arguments[:8]) == at
            if splits == 1:
                assert arguments[8] == y.data_ptr() and not reduction
            else:
                ((function, _, last),) = reduction
                assert function == "sum_splits_kernel"
                assert last[:3] == (arguments[8], bias.data_ptr(), y.data_ptr())
            assert y.shape == (*x.shape[:-1], 64) and y.is_contiguous() and y.dtype == dtype
        return y

    def fresh(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    x = fresh(2, 96)
    call(x, False), call(x, False), call(x, True)  # a new shape is only noted at first
    call(fresh(2, 96), True)
    call(fresh(3, 96), False), call(fresh(3, 96), False), call(fresh(3, 96), True)
    call(fresh(1, 2, 96), False), call(fresh(1, 2, 96), False), call(fresh(1, 2, 96), True)
    with torch.inference_mode():
        call(fresh(2, 96), False), call(fresh(2, 96), True)
        assert call(fresh(2, 96), True).is_inference()
    shifted = fresh(1 + 2 * 96)[1:].view(2, 96)
    call(shifted, False), call(shifted, True), call(x, True)
    values = values.clone()
    call(x, True)
    wide = fresh(2, 200)[:, :96]
    call(wide, False), call(wide, True)
    # What no tensor shows.
    tf32 = cuda.allows_tf32()
    monkeypatch.setattr(cuda, "allows_tf32", lambda: not tf32)
    call(x, dtype != torch.float32), call(x, True)
    monkeypatch.setattr(cuda, "allows_tf32", lambda: tf32)
    call(x, True)
    monkeypatch.setattr(cuda, "_recorder", lambda *args: None)
    call(x, False)
    monkeypatch.setattr(cuda, "_recorder", None)
    call(x, True)
    with monkeypatch.context() as patch:
        hook = SimpleNamespace(calls=[1])
        patch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
        with pytest.raises(TypeError, match="subscriptable"):  # the public way, which is not faked
            call(x, False)
    call(x, True)
    cuda.forget_launches()
    call(x, False), call(x, False), call(x, True)


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
    if not launch.can_overlap(torch.cuda.current_device()):
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
def test_a_repeated_call_of_the_function(
    dtype: torch.dtype, mode: type, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        for tf32 in (True, False, True):
            monkeypatch.setattr(cuda, "allows_tf32", lambda tf32=tf32: tf32)
            check(x, tolerance=2e-3 if tf32 else TOLERANCE[dtype])


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [16, 32, 64, 128, (32, 64), (64, 16)])
def test_backward_with_many_tokens(
    blocksize: int | tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        grad_x = cuda.grad_x(grad, crow, col, values, plan, K // c)
        assert relative_error(grad_x, reference) < tolerance
        monkeypatch.setattr(cuda, "HOPPER_TOKENS", 2**31)
        assert (
            relative_error(cuda.grad_x(grad, crow, col, values, plan, K // c), reference)
            < tolerance
        )
        monkeypatch.undo()
        grad_values = cuda.grad_values(grad, x, crow, col, plan, r, c)
        again = cuda.grad_values(grad, x, crow, col, plan, r, c)
        assert torch.equal(grad_values, again) and grad_values.is_contiguous()
        reference = triton_cases.stored_blocks(grad.double().T @ x.double(), crow, col, (r, c))
        assert relative_error(grad_values, reference) < (1e-6 if dtype == torch.float32 else 5e-3)


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
