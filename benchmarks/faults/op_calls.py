"""Hostile calls of the op: whatever the arguments hold, it computes or refuses, and touches nothing else's memory.

Runs on the kernel built with AddressSanitizer, cut into small pieces. A valid call must also be right, whatever plan of
the right size comes with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.faults.case import Fault, Kind
from benchmarks.faults.gradients import check_gradients
from benchmarks.faults.problems import Problem, random_problem, strided
from torchao_superblock.ops import bsr_linear, build_plan

REFUSALS = (ValueError, TypeError, RuntimeError)
_ARGUMENTS = ("crow", "col", "x", "values", "bias", "plan", "out_features", "activation")
_HUGE = (2**31 - 1, -(2**31), -1, 2**24, 2**16, 1)


def _random_integers(like: Tensor, source: random.Random) -> Tensor:
    low, high = source.choice([(-3, 9), (-(2**31), 2**31 - 1), (0, 100)])
    return torch.randint(low, high, like.shape, dtype=torch.int64).to(torch.int32)


def _poke(index: Tensor, source: random.Random) -> Tensor:
    """One entry becomes something else."""
    index = index.clone()
    if index.numel():
        index[source.randrange(index.numel())] = source.choice(_HUGE)
    return index


def _spoil_index(index: Tensor, source: random.Random) -> Tensor:
    """Another content, shape, dtype or layout."""
    spoil: list[Callable[[Tensor], Tensor]] = [
        lambda t: _random_integers(t, source),
        lambda t: _poke(t, source),
        lambda t: _poke(t, source),
        lambda t: t.flip(0),
        lambda t: t[torch.randperm(len(t))],
        lambda t: t.long(),
        lambda t: t.float(),
        lambda t: t[:-1],
        lambda t: torch.cat([t, t[-1:]]),
        lambda t: t[None],
        lambda t: t[:0],
        lambda t: t[:1].expand(t.shape) if t.numel() else t,
        lambda t: torch.stack([t, t], 1)[:, 0],
        lambda t: t.to("meta"),
        lambda t: t.cumsum(0).int(),
    ]
    return source.choice(spoil)(index)


def _spoil_floats(tensor: Tensor, source: random.Random) -> Tensor:
    """Another shape, dtype or layout; or content that is not a number."""
    spoil: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.to(source.choice([torch.float64, torch.float16, torch.int32, torch.complex64])),
        lambda t: t[..., :-1],
        lambda t: torch.cat([t, t], -1),
        lambda t: torch.cat([t, t], 0) if t.dim() else t,
        lambda t: t[None],
        lambda t: t.flatten(),
        lambda t: t[:0] if t.dim() else t,
        lambda t: t.sum(),
        lambda t: t.new_zeros(()).expand(t.shape),
        lambda t: t.transpose(0, -1) if t.dim() > 1 else t,
        lambda t: t.to("meta"),
        lambda t: t.to_sparse() if t.dim() else t,
        lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
        lambda t: torch.complex(t.float(), t.float()).conj().imag,
    ]
    return source.choice(spoil)(tensor)


def _other_plan(p: Problem, source: random.Random) -> Tensor:
    """A plan that belongs to something else, or is none."""
    plan = build_plan(p.crow, p.col, p.n_block_cols)
    spoil: list[Callable[[Tensor], Tensor]] = [
        lambda t: _random_integers(t, source),
        lambda t: _poke(t, source),
        lambda t: t.flip(0),
        lambda t: torch.zeros_like(t),
        lambda t: t[torch.randperm(t.numel())],
        lambda t: strided(t, source),
    ]
    return source.choice(spoil)(plan)


class OpCalls(Kind):
    """Valid problems with up to three things wrong, through every entrance of the op."""

    name = "op/hostile"
    about = (
        "random index contents, shapes, dtypes, strides and plans of something else through the op and its "
        "gradients, under AddressSanitizer"
    )
    short, long = 400, 10_000
    sanitizer = True

    def run(self, index: int) -> str:
        source = self.random(index)
        torch.set_num_threads(source.choice([1, 2, 3]))
        p = random_problem(source, largest=5)
        foreign = source.random() < 0.3
        if foreign:
            p.plan = _other_plan(p, source)
        spoiled = source.sample(_ARGUMENTS, source.choice([0, 1, 1, 2, 3]))
        for what in spoiled:
            _spoil(p, what, source)
        try:
            if not spoiled:
                check_gradients(p)
                return "right"
            source.choice([_forward, _registered, _backward, _grad_x, _grad_values])(p)
        except REFUSALS as error:
            if not spoiled and not foreign:
                raise Fault("a valid call was refused", error) from error
            return "refused"
        except Fault:
            raise
        except Exception as error:
            name = type(error).__name__
            raise Fault(f"refused with {name}", f"{', '.join(spoiled)}: {error}") from error
        return "computed"


def _spoil(p: Problem, what: str, source: random.Random) -> None:
    if what in ("crow", "col"):
        setattr(p, what, _spoil_index(getattr(p, what), source))
    elif what in ("x", "values"):
        setattr(p, what, _spoil_floats(getattr(p, what), source))
    elif what == "bias" and p.bias is not None:
        p.bias = _spoil_floats(p.bias, source)
    elif what == "plan" and p.plan is not None:
        p.plan = _spoil_index(p.plan, source)
    elif what == "out_features":
        p.out_features = source.choice([0, -1, 1, 77, 2**31, 2**62])
    elif what == "activation":
        p.activation = source.choice(["", "GELU", "tanh", "none\0"])


def _forward(p: Problem) -> None:
    bsr_linear(*p.arguments())
    bsr_linear(*p.arguments())  # a call that repeats another takes a shorter way


def _registered(p: Problem) -> None:
    torch.ops.torchao_superblock.bsr_linear(*p.arguments())


def _backward(p: Problem) -> None:
    p.x = p.x.detach().requires_grad_()
    p.values = p.values.detach().requires_grad_()
    y = bsr_linear(*p.arguments())
    y.backward(torch.randn(y.shape).to(y.dtype))


def _grad(p: Problem) -> Tensor:
    rows = p.values.shape[1] if p.values.dim() > 1 else 1
    return torch.randn(*p.x.shape[:-1], (len(p.crow) - 1) * rows).to(p.values.dtype)


def _grad_x(p: Problem) -> None:
    K = p.x.shape[-1] if p.x.dim() else 1
    torch.ops.torchao_superblock.bsr_linear_grad_x(_grad(p), p.crow, p.col, p.values, K, p.plan)


def _grad_values(p: Problem) -> None:
    r, c = p.values.shape[1:] if p.values.dim() == 3 else (1, 1)
    torch.ops.torchao_superblock.bsr_linear_grad_values(_grad(p), p.x, p.crow, p.col, r, c, p.plan)


OP_CALLS = [OpCalls()]
