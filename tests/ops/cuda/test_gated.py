"""The kernel that computes both products of a gated MLP: on a GPU, in the interpreter, and compiled without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")
ROOT = Path(__file__).parents[3]


def test_the_kernel_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.cuda.gated_cases"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "group", ["sizes", "activations", "empty_rows", "halves_and_strides", "bad_indices"]
)
def test_the_kernel_on_a_gpu(group):
    from tests.ops.cuda import gated_cases

    getattr(gated_cases, group)()


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_without_a_gpu(capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchao_superblock.ops.cuda.gated import gated_matmul_kernel as kernel

    constants = {"r": 64, "c": 64, "HAS_GATE_BIAS": True, "HAS_UP_BIAS": False, "x_stride_k": 1}
    constants |= {"ACTIVATION": 4, "PRECISION": 0, "BM": 128, "BN": 64, "BK": 64, "GROUP_M": 8}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if not name.endswith("_ptr"):
            return "i32"
        return "*i32" if name.endswith(("start_ptr", "block_ptr")) else "*bf16"

    types = {name: type_of(name) for name in kernel.arg_names}
    source = ASTSource(kernel, types, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert "mma" in ptx


def test_on_hopper_large_products_have_a_kernel_each():
    from torchao_superblock.ops.cuda.gated import is_faster

    llama, vit = 11008 * 4096 // 10, 2752 * 1024 // 10  # stored elements at 0.9
    assert not is_faster(8192, llama, hopper=True) and is_faster(8192, llama, hopper=False)
    assert is_faster(256, llama, hopper=True) and is_faster(25088, vit, hopper=True)
    assert not is_faster(1, vit, hopper=True) and not is_faster(1, vit, hopper=False)
