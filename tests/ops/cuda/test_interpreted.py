"""The plain Triton kernels in Triton's interpreter: the same code and grid as on a GPU, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "groups",
    [
        ("block_sizes",),
        ("dtypes", "activations", "token_counts"),
        ("indices", "strides"),
        ("tiles", "precision", "determinism"),
        ("gradients_of_small_blocks", "stale_plans", "repeated_calls"),
        ("padding",),
    ],
    ids=" and ".join,
)
def test_kernels_match_dense_float64(groups: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.cuda.triton_cases", *groups],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{group} passed" for group in groups]


def test_importing_the_package_does_not_import_triton() -> None:
    program = "import sys, torchao_superblock; print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "False", done.stdout + done.stderr
