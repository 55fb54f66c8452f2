"""The plain kernels, understood by the compiler for every generation of GPU without one."""

import re
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

import triton

from tests.ops.cuda.common import A100, H200, OLD_TRITON, T4, problem
from torchao_superblock.ops import build_plan, split_plan
from torchao_superblock.ops.cuda import choose, gradient, matmul
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.launch import Kernel
from torchao_superblock.ops.cuda.problem import FMA, NATIVE, TF32, TF32X3, Device, Problem
from torchao_superblock.ops.cuda.tf32 import prepare_pack

TRITON_TYPES = {
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class Recorded(Kernel):
    """A kernel that is compiled for nobody: it keeps what it was asked to launch."""

    empty = staticmethod(
        lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    )
    launches: list[tuple["Recorded", tuple, tuple]]

    def __call__(self, grid, device_index, tensors, *numbers) -> None:
        self.launches.append((self, tensors, (*numbers, *self.numbers)))


@pytest.fixture
def recorded() -> type[Recorded]:
    return type("Recorded", (Recorded,), {"launches": []})


def launch(
    kernel_type: type[Recorded], asked: Problem, choice: Choice, dtype: torch.dtype, M: int
) -> None:
    """Have a problem served on CPU tensors."""
    nnz = asked.nnz
    transposed = asked.kind == "grad_x"
    R, C = (asked.C, asked.R) if transposed else (asked.R, asked.C)
    col = torch.arange(nnz, dtype=torch.int32) % C
    crow = torch.linspace(0, nnz, R + 1).int()
    plan = build_plan(crow, col, C)
    values = torch.zeros(nnz, asked.r, asked.c, dtype=dtype)
    y, x = (torch.zeros(M, n, dtype=dtype) for n in (asked.N, asked.K))
    parts = split_plan(plan, R, C, nnz)
    if asked.kind != "forward":
        out = torch.zeros(M, R * asked.r, dtype=dtype)
        gradient.prepare_check(asked, choice, kernel_type)(out, crow, col, parts)
    if asked.kind == "grad_values":
        gradient.prepare(asked, choice, kernel_type)(y, x, crow, col, parts)
        return
    bias = torch.zeros(asked.N, dtype=dtype) if asked.has_bias else None
    plan = parts if transposed else plan if asked.plan_entries else None
    matmul.prepare(asked, choice, kernel_type)(x, crow, col, values, bias, plan, (M, asked.N))


@pytest.mark.parametrize("device", [T4, A100, OLD_TRITON], ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_triton_understands_every_kernel_without_a_gpu(
    dtype: torch.dtype, device: Device, recorded: type[Recorded]
) -> None:
    """Its interpreter runs as Python does and lets pass what the compiler does not, like a variable of two types."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    precisions = [NATIVE]
    if dtype == torch.float32:
        precisions = [TF32, TF32X3] if device.capability >= 80 else [FMA]
    for precision in precisions:
        for block in ((16, 16), (64, 64), (3, 5), (40, 80)):
            shape = (4 * block[0], 24 * block[1], block, 0.5, dtype)
            make = partial(problem, precision=precision, device=device)
            for M in (1, 300, 5000):
                asked = make(M, *shape, has_bias=True, activation="gelu", plan_entries=1)
                rule = choose.plain(asked)
                for splits, even in ((1, False), (3, True)):
                    choice = rule._replace(tile=rule.tile._replace(splits=splits, even=even))
                    launch(recorded, asked, choice, dtype, M)
                    bare = asked._replace(has_bias=False, activation="none", plan_entries=0)
                    launch(recorded, bare, choice, dtype, M)
                asked = make(M, *shape, kind="grad_x")
                launch(recorded, asked, choose.plain(asked), dtype, M)
                asked = make(M, *shape, kind="grad_values")
                launch(recorded, asked, choose.by_rule(asked), dtype, M)
            shape = (37, 53, block, 0.5, dtype)  # the last blocks are padded
            asked = make(300, *shape, has_bias=True, activation="gelu", plan_entries=1)
            launch(recorded, asked, choose.plain(asked), dtype, 300)
            asked = make(300, *shape, kind="grad_x")
            launch(recorded, asked, choose.plain(asked), dtype, 300)
            asked = make(300, *shape, kind="grad_values")
            launch(recorded, asked, choose.by_rule(asked), dtype, 300)
    pack = prepare_pack(
        problem(64, 64, 64, 16, 1, dtype, kind="grad_x"), parts=False, kernel_type=recorded
    )
    pack(torch.zeros(16, 16, 16, dtype=dtype), torch.zeros(16, dtype=torch.int32))

    target = GPUTarget("cuda", device.capability, 32)
    backend = make_backend(target)
    modules = backend.get_module_map()
    seen: set[tuple] = set()
    for kernel, tensors, numbers in recorded.launches:
        names = iter(kernel.function.arg_names)
        types = {name: TRITON_TYPES[t.dtype] for t, name in zip(tensors, names, strict=False)}
        types |= {name: "i32" for _, name in zip(numbers, names, strict=False)}
        types |= dict.fromkeys(names, "constexpr")
        kind = (kernel.function.__name__, *types.values(), *kernel.constants)
        if kind in seen:
            continue
        seen.add(kind)
        options = backend.parse_options(dict(kernel.options))
        generators = backend.get_codegen_implementation(options)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(kernel.function, types, kernel.constants_by_name)
        source.make_ir(target, options, generators, modules, context)
    expected = {"bsr_matmul_kernel", "sum_splits_kernel", "grad_values_kernel"}
    expected |= {"pack_blocks_kernel", "check_plan_kernel"}
    if dtype.itemsize == 2:
        expected.add("grad_values_lines_kernel")
    assert {name for name, *_ in seen} == expected


@pytest.mark.parametrize("name", ["bsr_matmul_kernel", "sum_splits_kernel"])
def test_kernels_whose_launch_overlaps_wait_before_they_touch_memory(
    name: str, recorded: type[Recorded]
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    asked = problem(16, 4096, 14336, 64, 0.1, has_bias=True, plan_entries=1)
    choice = choose.plain(asked)
    assert choice.tile.splits > 1 and choice.tile.even
    launch(recorded, asked, choice, torch.bfloat16, 16)
    (launched,) = (k for k, *_ in recorded.launches if k.function is getattr(matmul, name))
    assert launched.constants_by_name["OVERLAPS"] and launched.options["launch_pdl"]
    assert launched.constants_by_name.get("ROUND", 132) == H200.processors
    kernel = launched.function
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {argument: "*bf16" for argument in types if argument.endswith("_ptr")}
    types |= {argument: "*i32" for argument in types if argument in matmul.INDICES}
    types |= dict.fromkeys(launched.constants_by_name, "constexpr")
    for overlaps in (False, True):
        constants = launched.constants_by_name | {"OVERLAPS": overlaps}
        source = ASTSource(kernel, types, constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert ptx.count("griddepcontrol.wait") == overlaps
        touches = re.search(r"\b(ld\.global|st\.global|cp\.async)", ptx)
        assert touches and ptx.find("griddepcontrol.wait") < touches.start()


# Bytes of the widest accesses of x, and of y, that rows of so many features allow.
@pytest.mark.parametrize(
    ("N", "K", "of_x", "of_y"),
    [(1024, 256, 16, 16), (1000, 200, 16, 16), (2730, 1024, 16, 4), (1024, 2730, 4, 16)],
)
@pytest.mark.parametrize("kind", ["forward", "grad_x", "grad_values"])
def test_padding_leaves_loads_and_stores_as_wide_as_rows_allow(
    kind: str, N: int, K: int, of_x: int, of_y: int, recorded: type[Recorded]
) -> None:
    """Else a layer whose last blocks are padded would take several times as long as one of whole blocks."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    recorded.overlaps = False
    asked = problem(300, N, K, 64, 0.2, kind=kind)
    launch(recorded, asked, choose.by_rule(asked), torch.bfloat16, 300)
    product = ("bsr_matmul_kernel", "grad_values_kernel")
    (launched,) = (one for one in recorded.launches if one[0].function.__name__ in product)
    kernel, tensors, numbers = launched
    names = kernel.function.arg_names
    types = {name: TRITON_TYPES[t.dtype] for name, t in zip(names, tensors, strict=False)}
    constants, divisible = dict(kernel.constants_by_name), []
    wide = {"x_ptr", "values_ptr", "grad_ptr", "y_ptr", "out_ptr"}
    strides = {"x_stride_m", "grad_stride_m", "N"}
    for name, number in zip(names[len(tensors) :], numbers, strict=False):
        if number == 1:
            constants[name] = 1
        types[name] = "constexpr" if number == 1 else "i32"
        wide |= {name} & strides if number % 16 == 0 else set()
    types |= dict.fromkeys(kernel.constants_by_name, "constexpr")
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in wide}
    source = ASTSource(kernel.function, types, constants, divisible)
    ptx = triton.compile(source, GPUTarget("cuda", 90, 32), options=dict(kernel.options)).asm["ptx"]
    copies = re.findall(
        r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x([0-9a-f]+)", ptx
    )
    stores = re.findall(r"st\.global\.(?:v(\d)\.)?b(\d+)", ptx)
    stored = {int(vector or 1) * int(bits) // 8 for vector, bits in stores}
    if kind == "grad_values":  # both operands are read, and blocks are whole
        of_x, of_y = min(of_x, of_y), 16
    assert min(int(size, 16) for size in copies) == of_x and stored == {of_y}
    assert not re.search(r"ld\.global(\.L1::\w+)?\.b16", ptx)


def test_a_compiler_launches_traced_kernels_its_own_way(recorded: type[Recorded]) -> None:
    recorded.overlaps = False  # as of a TracedKernel
    asked = problem(16, 4096, 14336, 64, 0.1)
    launch(recorded, asked, choose.plain(asked), torch.bfloat16, 16)
    for kernel, *_ in recorded.launches:
        assert not kernel.constants_by_name["OVERLAPS"] and "launch_pdl" not in kernel.options
