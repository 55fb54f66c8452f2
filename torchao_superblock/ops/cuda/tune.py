"""`tune`: search further than the shipped rules do, once, for a model on the GPU at hand.

The rules in `choose.py` are good on the GPUs that they were made on, for the shapes that were looked at. Tuning times
other tiles for the very layers and batch of a model and keeps what is faster, in the user's cache directory, so that
later processes start with it. A tile decides in which order sums are formed, nothing else: results change by rounding
at most, and a tile whose output differs by more is thrown away.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from torchao_superblock.ops.cuda import backend, choose, found
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.device import INTERPRET
from torchao_superblock.ops.cuda.problem import TF32, Problem

# A new tile must be this much faster: less is noise.
WORTHWHILE = 0.97
# How far two orders of summation may differ, relative to the norm of the result.
ROUNDING = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
TF32_ROUNDING = 2e-3


class Tuned(NamedTuple):
    """What was found for one problem.

    Attributes:
        problem: shape, block size, dtype, activation and bucket of tokens.
        choice: the kernel and tile that serve it from now on.
        before_us: microseconds a call before tuning.
        after_us: microseconds a call after tuning.
    """

    problem: Problem
    choice: Choice
    before_us: float
    after_us: float


class TuneReport(list[Tuned]):
    """What :func:`tune` found, one entry for each distinct problem; prints as a table."""

    def __str__(self) -> str:
        lines = [
            f"{'tokens':>7} {'weight':>14} {'block':<17} {'before':>10} {'after':>10}  kernel, tile"
        ]
        for problem, choice, before_us, after_us in self:
            weight = f"{problem.R * problem.r}x{problem.C * problem.c}"
            block = f"{problem.r}x{problem.c}"
            if problem.activation != "none":
                block += f" {problem.activation}"
            kernel = f"{'Gluon' if choice.kernel == 'hopper' else 'plain'} {tuple(choice.tile)}"
            times = f"{before_us:>7.1f} us {after_us:>7.1f} us"
            lines.append(f"{problem.M:>7} {weight:>14} {block:<17} {times}  {kernel}")
        return "\n".join(lines)


def microseconds(function: Callable[[], Tensor]) -> float:
    """What a call takes the GPU."""
    if INTERPRET:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e6
    return triton.testing.do_bench_cudagraph(function, rep=10, return_mode="median") * 1e3


def differs(out: Tensor, reference: Tensor, precision: int) -> bool:
    """Whether two results differ by more than rounding, or hold what is not a number."""
    limit = TF32_ROUNDING if precision == TF32 else ROUNDING[out.dtype]
    difference = norm = 0.0
    for some, expected in zip(out.split(4096), reference.split(4096), strict=True):
        difference += float((some.double() - expected.double()).square().sum())
        norm += float(expected.double().square().sum())
    return not difference <= limit**2 * norm


def _progress(items: list[Any], title: str) -> Iterator[Any]:
    """A progress bar where tqdm is installed, lines otherwise."""
    try:
        from tqdm import tqdm
    except ImportError:
        for number, item in enumerate(items):
            if number % 10 == 0:
                print(f"{title}: {number}/{len(items)}", file=sys.stderr, flush=True)
            yield item
    else:
        yield from tqdm(items, desc=title)


def search(
    problem: Problem,
    candidates: list[Choice],
    run: Callable[[Choice], Tensor],
    measure: Callable[[Callable[[], Tensor]], float] = microseconds,
) -> dict[Choice, float]:
    """Time choices that give the same result.

    Args:
        problem: a forward product.
        candidates: the first is the plain kernel's by rule, which says what is right.
        run: serves the problem by a choice.
        measure: times a call.

    Returns:
        Microseconds of each choice that could be launched and was right.

    Raises:
        ValueError: the result holds a NaN or an infinity.
    """
    N, K = problem.R * problem.r, problem.C * problem.c
    title = f"{problem.M} tokens, {N}x{K}, block {problem.r}x{problem.c}"
    rule = candidates[0]
    reference = run(rule)
    if not bool(reference.isfinite().all()):
        raise ValueError(
            f"tune: the product of {title} holds a NaN or an infinity, so tiles cannot be compared; give an "
            "example_input for which the model's activations are finite"
        )
    times = {rule: measure(lambda: run(rule))}
    for choice in _progress(candidates[1:], title):
        try:
            if not differs(run(choice), reference, problem.precision):
                times[choice] = measure(lambda choice=choice: run(choice))
        except Exception:  # a tile that this GPU cannot compile or launch is no candidate
            continue
    return times


def fastest(problem: Problem, times: dict[Choice, float]) -> tuple[Choice, Choice]:
    """The choice for a problem, and the plain kernel's, by what they took; a draw goes to the rule's.

    Args:
        problem: a forward product.
        times: from :func:`search`.
    """

    def best(choices: list[Choice], rule: Choice) -> Choice:
        least = min(choices, key=times.__getitem__)
        worth_it = times[least] <= WORTHWHILE * times.get(rule, float("inf"))
        return least if worth_it else rule

    rule = choose.by_rule(problem)
    plain = best([c for c in times if c.kernel == "matmul"], choose.plain(problem))
    gluons = [choice for choice in times if choice.kernel == "hopper"]
    if not gluons:
        return plain, plain
    gluon = best(gluons, Choice("hopper", choose.hopper_tile(problem)))
    bias = WORTHWHILE if rule.kernel == "matmul" else 1 / WORTHWHILE
    return (gluon if times[gluon] <= bias * times[plain] else plain), plain


def _adopt(problem: Problem, choice: Choice | None) -> None:
    """Let a choice serve a problem from the next call on; None lets the rules."""
    entry = None if choice is None else choose.to_json(choice)
    found.adopt(problem.device, choose.tuning_key(problem), entry)
    backend.forget()


def tune(model: nn.Module, example_input: Any) -> TuneReport:
    """Find faster tile sizes for a swapped model on this GPU, and remember them for later processes.

    Runs the model once to see which products it computes, then times other tiles for each of them (seconds to a minute
    each, mostly compilation; a progress bar shows where it is). Only forward products on CUDA are tuned, each with the
    activation that is fused into it. The finds go to `$XDG_CACHE_HOME/torchao_superblock`
    (`~/.cache/torchao_superblock`), one file for each GPU model, torch and Triton version. Results of the model
    change by rounding at most.

    Args:
        model: a model with :class:`BSRLinear` layers on a CUDA device. It is run in its current mode, without
            gradients.
        example_input: what it is called with: a tensor, a tuple of positional arguments or a dict of keyword
            arguments. The number of tokens matters (to the next power of two), so use a typical batch.

    Returns:
        One entry for each distinct product: its problem, the fastest tile, microseconds before and after.

    Raises:
        ValueError: the model computes no block-sparse product on a CUDA device, or one that holds a NaN or an infinity.

    Example:
        >>> swap_to_bsr(model)  # doctest: +SKIP
        >>> print(tune(model, torch.randn(256, 3, 224, 224, device="cuda")))  # doctest: +SKIP
    """
    calls: dict[tuple[int, str], tuple[Problem, tuple[Any, ...]]] = {}

    def record(*call: Any) -> None:
        x, crow, _, values, *rest = call
        problem = backend.forward_problem(x, crow, values, *rest)
        key = json.dumps(choose.tuning_key(problem))
        calls.setdefault((problem.device.index, key), (problem, call))

    with torch.no_grad(), backend.observed(record):
        if isinstance(example_input, dict):
            model(**example_input)
        elif isinstance(example_input, tuple | list):
            model(*example_input)
        else:
            model(example_input)
    if not calls:
        raise ValueError(
            "tune: the model computed no block-sparse product on a CUDA device; move the swapped model and its input "
            "there first (model.to('cuda'))"
        )
    report = TuneReport()
    for problem, call in calls.values():
        device = problem.device
        with torch.no_grad(), nullcontext() if INTERPRET else torch.cuda.device(device.index):
            report.append(tune_call(problem, call))
        found.save(device, [choose.tuning_key(p) for p in _kinds(problem)])
    return report


def _kinds(problem: Problem) -> list[Problem]:
    """A problem, and what it is for a call that the Gluon kernel cannot serve, if this one it can."""
    without = problem._replace(device=problem.device._replace(gluon=False))
    return [problem, without] if choose.tuning_key(problem)["gluon"] else [problem]


def tune_call(
    problem: Problem,
    call: tuple[Any, ...],
    candidates: list[Choice] | None = None,
    measure: Callable[[Callable[[], Tensor]], float] = microseconds,
) -> Tuned:
    """Time choices on the tensors of one call and let the fastest serve its problem from now on.

    Args:
        problem: what the call asks for.
        call: arguments of :func:`~torchao_superblock.ops.cuda.backend.forward`.
        candidates: choices to try, the plain kernel's by rule first; None tries all that are worth it.
        measure: times a call.

    Returns:
        What was found.

    Raises:
        ValueError: the result holds a NaN or an infinity.
    """
    before_us = measure(lambda: backend.forward(*call))
    candidates = choose.candidates(problem) if candidates is None else candidates
    known = [choose.tuned(kind) for kind in _kinds(problem)]
    candidates = list(dict.fromkeys([*candidates, *filter(None, known)]))

    def run(choice: Choice) -> Tensor:
        return backend.forward(*call, choice=choice)

    times = search(problem, candidates, run, measure)
    choices = fastest(problem, times)
    for kind, choice in zip(_kinds(problem), choices, strict=False):
        _adopt(kind, choice)
    return Tuned(problem.bucketed(), choices[0], before_us, times[choices[0]])
