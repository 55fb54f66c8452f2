"""Forked children: the parent's threads are not there, so the kernel must not wait for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.faults.case import Fault, Kind
from benchmarks.faults.threads import random_layer
from torchao_superblock import BSRLinear

# A child that answers at all does so in milliseconds.
SECONDS = 20


class Forks(Kind):
    """A fresh parent forks; its child runs the kernel.

    A parent in an interpreter of its own, so that what it has used, and not used, before is known.
    """

    name = "forks"
    about = (
        "children of a parent that used torch's threads, or the kernel, or both, or neither: they compute the same "
        f"and answer within {SECONDS} s"
    )
    short, long = 4, 60
    parents = ("torch's threads", "nothing", "the kernel", "torch's threads and the kernel")

    def run(self, index: int) -> str:
        parent = self.parents[index % len(self.parents)]
        result = subprocess.run(
            [sys.executable, "-c", _PARENT, parent, str(index)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if result.returncode == 3:
            raise Fault("a child hangs", f"the parent used {parent}")
        if result.returncode:
            raise Fault("a child fails", f"the parent used {parent}: {result.stderr[-300:]}")
        return "answered"


_PARENT = "import sys; from benchmarks.faults.forks import parent; sys.exit(parent(*sys.argv[1:]))"


def parent(used: str, index: str) -> int:
    """The program of the parent.

    Args:
        used: one of `Forks.parents`, what it has used before it forks.
        index: of the case.

    Returns:
        An exit status: 0, or 3 if the child hangs, or 1.
    """
    torch.set_num_threads(1)  # with one, torch starts no threads
    problem = _problem(int(index))
    torch.set_num_threads(2)
    if "torch" in used:
        torch.randn(600, 600) @ torch.randn(600, 600)
        torch.randn(2**20).exp_()
    if "kernel" in used:
        _right(problem)
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        status = 1
        try:
            status = 0 if _right(problem) else 1
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return 3
    return 0 if status == 0 else 1


def _problem(seed: int) -> tuple[BSRLinear, Tensor, Tensor]:
    """A layer, an input and an output.

    Large enough for several threads of the kernel, and too small for those of torch, which itself hangs in a child.
    """
    layer = random_layer(128, 16, seed)
    x = torch.randn(200, 128)
    return layer, x, F.linear(x, layer.to_dense(), layer.bias)


def _right(problem: tuple[BSRLinear, Tensor, Tensor]) -> bool:
    layer, x, expected = problem
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.ones(200, 128))
    return torch.allclose(y, expected, atol=1e-4)


FORKS = [Forks()]
