"""Tuning: what it finds is used, kept, and never trusted blindly. Runs in Triton's interpreter, in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.reference import random_bsr, relative_error
from torchao_superblock.ops import build_plan

pytest.importorskip("triton", reason="Triton is not installed here")
ROOT = Path(__file__).parents[2]

PREAMBLE = """
import json, warnings
import torch
from torch import nn
from tests.ops import triton_cases  # makes older interpreters loop
from tests.reference import random_bsr, relative_error
from torchao_superblock.ops import cuda, tuning

dense, crow, col, values = random_bsr(32, 64, 16, 0.5)
x = torch.randn(20, 64)

class Model(nn.Module):
    def forward(self, x):
        return cuda.forward(x, crow, col, values, None, "none", None)

def correct():
    return relative_error(Model()(x), x.double() @ dense.double().T) < 1e-6

# Small numbers of real tiles, and a clock that likes one of them.
other = cuda.Tile(16, 16, 16, 2, 4, 2)
rule = cuda.matmul_tile
tuning.candidates = lambda problem: [rule(problem), other]
def microseconds(function):
    function()
    tile = next(iter(cuda._launches.values())).tile
    return 1.0 if tile == other else 10.0
tuning._microseconds = microseconds
path = tuning.cache_file(-1)
"""


def run(program: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + program],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_finds_are_used_and_kept_for_the_next_process(tmp_path: Path) -> None:
    done = run(
        """
report = tuning.tune(Model(), x)
assert len(report) == 1 and report[0].tile == other and report[0].after_us == 1.0, report
assert "32x64" in str(report) and str(tuple(other)) in str(report)
assert correct()
assert next(iter(cuda._launches.values())).tile == other
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "20/" not in done.stdout  # progress goes to stderr
    done = run(
        """
assert path.is_relative_to(__import__("os").environ["XDG_CACHE_HOME"])
assert correct()
assert next(iter(cuda._launches.values())).tile == other
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_foreign_or_corrupt_file_is_ignored_with_a_warning(tmp_path: Path) -> None:
    done = run(
        """
problem = cuda._forward_problem(x, crow, values, "none", 32, -1)
entry = dict(problem=problem._asdict(), tile=other._replace(BM=17)._asdict(), plain=False, strips=None)
foreign = dict(format=tuning.FORMAT, device="another GPU", torch="0", triton="0", entries=[])
path.parent.mkdir(parents=True)
for content in (
    "not json",
    json.dumps(dict(format=tuning.FORMAT)),
    json.dumps(foreign),
    json.dumps(tuning._header(-1) | dict(entries=[entry])),
    json.dumps(tuning._header(-1) | dict(entries=[dict(problem=3)])),
    "[" * 100_000,
):
    path.write_text(content)
    cuda._tuned_devices.clear()  # as in a new process
    cuda.forget_launches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert correct()
    messages = [str(warning.message) for warning in caught]
    messages = [message for message in messages if "tuning results" in message]
    assert len(messages) == 1 and str(path) in messages[0] and "ignored" in messages[0], messages
    assert not cuda._tuned
# Tuning replaces it.
tuning.tune(Model(), x)
assert [found.tile for found in tuning._parse(path.read_text(), -1).values()] == [other]
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_tile_that_changes_the_result_is_thrown_away(tmp_path: Path) -> None:
    done = run(
        """
tuning._differs = lambda out, reference, precision: True
report = tuning.tune(Model(), x)
assert report[0].tile == rule(report[0].problem)
assert tuning._differs(torch.ones(3), torch.ones(3), cuda.NATIVE)
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    done = run(
        """
assert tuning._differs(torch.ones(3), torch.full((3,), 1.001), cuda.NATIVE)
assert tuning._differs(torch.full((3,), float("nan")), torch.ones(3), cuda.NATIVE)
assert not tuning._differs(torch.ones(3), torch.full((3,), 1.0000001), cuda.NATIVE)
try:
    tuning.tune(nn.Linear(4, 4), torch.ones(1, 4))
except ValueError as error:
    assert "no block-sparse product" in str(error)
else:
    raise AssertionError("tuning a dense model must say that there is nothing to tune")
problem = cuda._forward_problem(x, crow, values, "none", 32, -1)
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_candidates_start_with_the_rule_and_can_be_launched(tmp_path: Path) -> None:
    program = """
import importlib
importlib.reload(tuning)
for M in (16, 64, 512, 65536):
    for r, c in ((16, 16), (64, 64), (3, 5), (128, 32)):
        for itemsize in (2, 4, 8):
            problem = cuda.Problem("forward", M, 12, 12, r, c, 40, itemsize, 0, 90, 132)
            tiles = tuning.candidates(problem)
            assert tiles[0] == cuda.matmul_tile(problem) and len(set(tiles)) == len(tiles) <= 80
            for tile in tiles:
                entry = dict(problem=problem._asdict(), tile=tile._asdict(), plain=False, strips=None)
                text = json.dumps(tuning._header(-1) | dict(entries=[entry]))
                assert tuning._parse(text, -1) == {problem: cuda.Found(tile)}
"""
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("M", "activation"), [(16, "none"), (50000, "none"), (50000, "gelu")])
def test_tuning_on_a_gpu_keeps_the_result_and_its_finds(
    dtype: torch.dtype, M: int, activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao_superblock.ops import cuda, hopper, tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    every, every_strips = tuning.candidates, tuning._strips
    monkeypatch.setattr(tuning, "candidates", lambda problem: every(problem)[:3])
    monkeypatch.setattr(tuning, "_strips", lambda problem: every_strips(problem)[:4])
    dense, crow, col, values = random_bsr(1536, 768, 64, 0.9, dtype, device="cuda")
    plan = build_plan(crow, col, 12)
    x = torch.randn(M, 768, device="cuda").to(dtype)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cuda.forward(x, crow, col, values, None, activation, plan)

    expected = x[:64].double() @ dense.double().T
    if activation == "gelu":
        expected = torch.nn.functional.gelu(expected)
    (found,) = tuning.tune(Model(), x)
    assert found.problem.activation == activation
    on_hopper = torch.cuda.get_device_capability() == (9, 0) and hopper._import_error is None
    assert (found.strips is not None or found.plain) is (on_hopper and M == 50000)
    y = Model()(x)
    assert relative_error(y[:64], expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    # The next process.
    cuda._tuned_devices.clear()
    tuning._use(found.problem, None)
    assert torch.equal(Model()(x), y)
    assert cuda._tuned[found.problem] == cuda.Found(found.tile, found.plain, found.strips)
    tuning._use(found.problem, None)
