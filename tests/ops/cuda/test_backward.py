"""The pass for activations and biases, and repeated backwards: in the interpreter, on a GPU, compiled without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.reference import TOLERANCE, random_bsr, relative_error
from torchao_superblock.ops import ACTIVATIONS

pytest.importorskip("triton", reason="Triton is not installed here")
ROOT = Path(__file__).parents[3]
GROUPS = ["activations", "shapes_and_strides", "extremes", "determinism", "repeated", "plans"]


def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.cuda.backward_cases"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{group} passed" for group in GROUPS]


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_on_a_gpu(group):
    from tests.ops.cuda import backward_cases

    getattr(backward_cases, group)()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("activation", range(6))
def test_the_pass_compiles_without_a_gpu(capability, activation):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchao_superblock.ops.cuda.activation_pass import activation_gradient_kernel as kernel

    constants = {"ACTIVATION": activation, "SUMS": True, "FLOAT64": False, "SHORT": True}
    constants |= {"BM": 32, "BN": 128, "grad_stride_n": 1}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if not name.endswith("_ptr"):
            return "i32"
        return "*fp32" if name == "sums_ptr" else "*bf16"

    types = {name: type_of(name) for name in kernel.arg_names}
    divisible = [["tt.divisibility", 16]]
    wide = ("grad_ptr", "z_ptr", "out_ptr", "sums_ptr", "N", "grad_stride_m")
    attrs = {(kernel.arg_names.index(name),): divisible for name in wide}
    source = ASTSource(kernel, types, constants, attrs)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    # 16 bytes a thread and load: anything less does not keep memory busy.
    assert "ld.global.v4.b32" in ptx
    assert activation == 0 or "st.global.v4.b32" in ptx


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["none", "gelu", "quick_gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_repeated_step_gives_what_the_first_gave_and_asks_the_device_nothing(dtype, activation):
    from torchao_superblock import BSRLinear
    from torchao_superblock.ops import fast_path

    dense, crow, col, values = random_bsr(256, 192, 64, 0.5, dtype, "cuda")
    bias = torch.randn(256, device="cuda").to(dtype)
    layer = BSRLinear(192, 256, 64, crow, col, values, bias, activation=activation)
    x = torch.randn(4, 600, 192, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(4, 600, 256, device="cuda").to(dtype)
    tensors = (x, layer.values, layer.bias)

    def step():
        return torch.autograd.grad(layer(x), tensors, grad)

    fast_path.forget()
    first = step()
    step(), step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        repeated = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, repeated, strict=True):
        assert torch.equal(one, other)
    z = (x.double() @ dense.double().T + layer.bias.double()).detach().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, grad.double())
    assert relative_error(repeated[0], expected @ dense.double()) <= TOLERANCE[dtype]
    assert relative_error(repeated[2], expected.sum((0, 1))) <= TOLERANCE[dtype]
