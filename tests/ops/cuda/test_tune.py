"""Tuning: what it finds is used, kept, and never trusted blindly. On small tensors in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from tests.ops.cuda.common import H200, problem
from tests.reference import random_bsr, relative_error
from torchao_superblock.ops import build_plan
from torchao_superblock.ops.cuda import choose, found, tune
from torchao_superblock.ops.cuda.backend import forget, forward
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.problem import NATIVE, TF32

ROOT = Path(__file__).parents[3]

PREAMBLE = """
import warnings
import torch
from torch import nn
from tests.ops.cuda import triton_cases  # makes older interpreters loop
from tests.reference import random_bsr, relative_error
from torchao_superblock.ops.cuda import backend, choose, found, tune
from torchao_superblock.ops.cuda.tiles import MatmulTile

dense, crow, col, values = random_bsr(32, 64, 16, 0.5)
x = torch.randn(20, 64)
call = (x, crow, col, values, None, "none", None)
problem = backend.forward_problem(x, crow, values, None, "none", None)
other = choose.plain(problem, MatmulTile(16, 16, 16, 2, 4, 2))
path = found.cache_file(problem.device)

class Model(nn.Module):
    def forward(self, x):
        return backend.forward(x, *call[1:])

def correct():
    return relative_error(Model()(x), x.double() @ dense.double().T) < 1e-6
"""


def interpreted(program: str, cache: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_finds_are_used_and_kept_for_the_next_process(tmp_path: Path) -> None:
    done = interpreted(
        """
assert choose.choose(problem) != other
clock = iter([10.0, 10.0, 1.0])
tuned = tune.tune_call(problem, call, [choose.plain(problem), other], lambda run: (run(), next(clock))[1])
assert (tuned.choice, tuned.before_us, tuned.after_us) == (other, 10.0, 1.0)
report = str(tune.TuneReport([tuned]))
assert "32x64" in report and "plain" in report and str(tuple(other.tile)) in report
assert choose.choose(problem) == other and correct()
found.save(problem.device, [choose.tuning_key(problem)])
""",
        tmp_path,
    )
    assert "20/" not in done.stdout  # progress goes to stderr
    interpreted(
        """
assert path.is_relative_to(__import__("os").environ["XDG_CACHE_HOME"]) and path.exists()
assert choose.choose(problem) == other and correct()
""",
        tmp_path,
    )


def test_a_model_is_tuned_for_every_product_that_it_computes(tmp_path: Path) -> None:
    interpreted(
        """
class Two(Model):
    def forward(self, x):
        y = super().forward(x)
        super().forward(x[:17])  # of the same bucket
        return y, backend.forward(x[:3], *call[1:5], "relu", None)

report = tune.tune(Two(), x)
assert [(t.problem.M, t.problem.activation) for t in report] == [(32, "none"), (16, "relu")]
for tuned in report:
    assert choose.choose(tuned.problem) == tuned.choice
assert correct() and str(report).count("\\n") == 2
found.forget(), choose.forget()
for tuned in report:
    assert choose.tuned(tuned.problem) == tuned.choice
# Nothing is shown any more.
model = nn.Linear(4, 4)
try:
    tune.tune(model, torch.ones(1, 4))
except ValueError as error:
    assert "no block-sparse product" in str(error)
else:
    raise AssertionError("tuning a dense model must say that there is nothing to tune")
""",
        tmp_path,
    )


def test_results_may_differ_by_rounding_only() -> None:
    ones = torch.ones(3)
    assert tune.differs(ones, torch.full((3,), 1.001), NATIVE)
    assert not tune.differs(ones, torch.full((3,), 1.001), TF32)
    assert tune.differs(torch.full((3,), float("nan")), ones, NATIVE)
    assert tune.differs(ones, torch.full((3,), float("nan")), TF32)
    assert not tune.differs(ones, torch.full((3,), 1.0000001), NATIVE)


ASKED = problem(50432, 3072, 768, 64, 0.1)
PLAIN_RULE = choose.plain(ASKED)
PLAIN_OTHER = next(c for c in choose.candidates(ASKED)[1:] if c.kernel == "matmul")
GLUON_RULE = Choice("hopper", choose.hopper_tile(ASKED))
GLUON_OTHER = next(c for c in choose.candidates(ASKED) if c.kernel == "hopper" and c != GLUON_RULE)


def test_a_choice_that_changes_the_result_or_fails_is_thrown_away() -> None:
    y = torch.randn(4, 3)

    def run(choice: Choice) -> torch.Tensor:
        if choice == GLUON_RULE:
            raise RuntimeError("does not compile")
        return y + 1 if choice == PLAIN_OTHER else y

    choices = [PLAIN_RULE, PLAIN_OTHER, GLUON_RULE, GLUON_OTHER]
    times = tune.search(ASKED, choices, run, lambda function: float(function().numel()))
    assert times == {PLAIN_RULE: 12.0, GLUON_OTHER: 12.0}
    y[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or an infinity"):
        tune.search(ASKED, choices, run, lambda function: 1.0)


@pytest.mark.parametrize(
    ("plain_other", "gluon_rule", "gluon_other", "rule_is_plain", "expected"),
    [
        (100, 100, 100, False, GLUON_RULE),
        (100, 100, 90, False, GLUON_OTHER),
        (100, 100, 98.5, False, GLUON_RULE),  # a draw
        (90, 100, 100, False, PLAIN_OTHER),
        (98.5, 100, 100, False, GLUON_RULE),
        (98.5, 100, 100, True, PLAIN_RULE),
        (90, 100, 100, True, PLAIN_OTHER),
        (100, 99, 90, True, GLUON_OTHER),
        (100, 90, 89, True, GLUON_RULE),
        (100, None, 98, False, GLUON_OTHER),  # the rule's does not run
        (100, None, None, False, PLAIN_RULE),
    ],
)
def test_a_draw_goes_to_what_the_rules_say(
    plain_other: float,
    gluon_rule: float | None,
    gluon_other: float | None,
    rule_is_plain: bool,
    expected: Choice,
) -> None:
    # Without the Gluon kernel in its device the rule is the plain kernel.
    asked = ASKED._replace(device=H200._replace(gluon=not rule_is_plain))
    times = {
        PLAIN_RULE: 100.0,
        PLAIN_OTHER: plain_other,
        GLUON_RULE: gluon_rule,
        GLUON_OTHER: gluon_other,
    }
    times = {choice: us for choice, us in times.items() if us is not None}
    chosen, plain = tune.fastest(asked, times)
    assert chosen == expected
    assert plain == (PLAIN_OTHER if plain_other == 90 else PLAIN_RULE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("M", "activation"), [(16, "none"), (50000, "none"), (50000, "gelu")])
def test_tuning_on_a_gpu_keeps_the_result_and_its_finds(
    dtype: torch.dtype, M: int, activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao_superblock.ops.cuda.backend import forward_problem

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found.forget(), forget()
    dense, crow, col, values = random_bsr(1536, 768, 64, 0.9, dtype, device="cuda")
    plan = build_plan(crow, col, 12)
    x = torch.randn(M, 768, device="cuda").to(dtype)
    call = (x, crow, col, values, None, activation, plan)
    asked = forward_problem(x, crow, values, None, activation, plan)
    candidates = choose.candidates(asked)
    gluons = [choice for choice in candidates if choice.kernel == "hopper"]
    assert bool(gluons) is (asked.device.gluon and M == 50000)
    expected = x[:64].double() @ dense.double().T
    if activation == "gelu":
        expected = torch.nn.functional.gelu(expected)
    tuned = tune.tune_call(asked, call, [*candidates[:3], *gluons[:4]])
    assert tuned.problem.activation == activation
    y = forward(*call)
    assert relative_error(y[:64], expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    # The next process.
    found.save(asked.device, [choose.tuning_key(asked)])
    found.forget(), forget()
    assert choose.choose(asked) == tuned.choice
    assert torch.equal(forward(*call), y)
    found.forget(), forget()
