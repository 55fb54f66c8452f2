"""Device type -> backend: one call registers a device, and nothing is imported before it is needed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

import torchao_superblock
from torchao_superblock.ops.backends import Backend, backend_of, register_backend

OPS = Path(torchao_superblock.__file__).parent / "ops"
ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> str:
    path = os.pathsep.join([str(ROOT), str(OPS.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch makes no device without C++",
)
def test_one_call_serves_a_device_of_its_own() -> None:
    """In a process of its own: a device cannot be taken away again."""
    assert python(str(Path(__file__).with_name("toy_device.py"))) == "served"


def test_a_device_that_has_a_backend_keeps_it() -> None:
    before = backend_of("cpu")
    with pytest.raises(ValueError, match="'cpu' has a backend already, torchao_superblock.ops.cpu"):
        register_backend(Backend("cpu", "my_package.cpu"))
    assert backend_of("cpu") is before


def test_a_device_that_torch_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no device type 'abacus'.*rename_privateuse1_backend"):
        register_backend(Backend("abacus", "my_package.abacus"))
    assert backend_of("abacus") is None


def test_importing_the_package_imports_no_kernels() -> None:
    loaded = python("-c", "import sys, torchao_superblock; print(*sys.modules)").split()
    assert "torchao_superblock.ops.op" in loaded
    for name in ("triton", *(f"torchao_superblock.ops.{name}" for name in ("cpu", "_cpu", "cuda"))):
        assert name not in loaded


@pytest.mark.parametrize("module", ["pytorch", "cpu", "cuda"])
def test_backends_import_no_op(module: str) -> None:
    folder = OPS / module
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [OPS / f"{module}.py"]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names}
            else:
                continue
            refused = {
                f"torchao_superblock.ops.{name}" for name in ("op", "autograd", "gated", "backends")
            }
            assert not imported & refused, (file, imported & refused)


def test_the_schema_is_what_exported_programs_hold() -> None:
    assert str(torch.ops.torchao_superblock.bsr_linear.default._schema) == (
        "torchao_superblock::bsr_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, "
        'Tensor? bias=None, SymInt? out_features=None, str activation="none", Tensor? plan=None) -> Tensor'
    )


def test_the_documented_names_of_before_still_import() -> None:
    code = """
from torchao_superblock.ops.bsr_linear import bsr_linear
from torchao_superblock.ops import bsr_linear as same, gather_gemm
import torchao_superblock.ops.gather_gemm
import torchao_superblock.ops as ops
assert bsr_linear is same is ops.bsr_linear and callable(gather_gemm.forward)
print("served")
"""
    assert python("-c", code) == "served"
