"""`tune`: search further than the shipped rules do, once, for a model on the GPU at hand.

The rules in `cuda.py` and `hopper.py` are good on the GPUs that they were made on, for the shapes that were looked
at. Tuning times other tiles for the very layers and batch of a model and keeps what is faster, in the user's cache
directory, so that later processes start with it. A tile decides in which order sums are formed, nothing else: results
change by rounding at most, and a tile whose output differs by more is thrown away.
"""

import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from torchao_superblock.ops import cuda, hopper
from torchao_superblock.ops.cuda import INTERPRET, Found, Problem, Tile
from torchao_superblock.ops.hopper import Strips

FORMAT = 5
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
        tile: the fastest tile of the plain Triton kernel.
        plain: whether plain Triton is to be used even where the Gluon kernel could.
        strips: the Gluon kernel's fastest tile, where that kernel serves the problem and is the faster one.
        before_us: microseconds a call before tuning.
        after_us: microseconds a call after tuning.
    """

    problem: Problem
    tile: Tile
    plain: bool
    strips: Strips | None
    before_us: float
    after_us: float


class TuneReport(list[Tuned]):
    """What :func:`tune` found, one entry for each distinct problem; prints as a table."""

    def __str__(self) -> str:
        lines = [
            f"{'tokens':>7} {'weight':>14} {'block':<17} {'before':>10} {'after':>10}  kernel, tile"
        ]
        for found in self:
            problem = found.problem
            weight = f"{problem.R * problem.r}x{problem.C * problem.c}"
            block = f"{problem.r}x{problem.c}"
            kernel = str(tuple(found.tile if found.strips is None else found.strips))
            kernel = f"{'plain' if found.strips is None else 'Gluon'} {kernel}"
            if problem.activation != "none":
                block += f" {problem.activation}"
            times = f"{found.before_us:>7.1f} us {found.after_us:>7.1f} us"
            lines.append(f"{problem.M:>7} {weight:>14} {block:<17} {times}  {kernel}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The file.


def cache_file(index: int) -> Path:
    """Where finds for a device are kept: in the user's cache directory, one file for each GPU model and version."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif os.name == "nt" and os.environ.get("LOCALAPPDATA"):
        base = Path(os.environ["LOCALAPPDATA"])
    else:
        base = Path.home() / ".cache"
    name = "-".join(_header(index)[key] for key in ("device", "torch", "triton"))
    safe = "".join(letter if letter.isalnum() or letter in ".+-" else "_" for letter in name)
    return base / "torchao_superblock" / f"tune-{safe}.json"


def _header(index: int) -> dict[str, Any]:
    device = "interpreter" if INTERPRET else torch.cuda.get_device_name(index)
    return {
        "format": FORMAT,
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _strips(problem: Problem) -> list[Strips]:
    """The Gluon kernel's tiles for a problem."""
    dtype = {2: torch.bfloat16, 4: torch.float32}.get(problem.itemsize, torch.float64)
    exact = problem.precision == cuda.TF32X3
    return hopper.candidates(problem.R, problem.C, problem.r, problem.c, dtype, exact=exact)


def _parse(text: str, index: int) -> dict[Problem, Found]:
    """Entries of a cache file, or an exception if it is not one of ours for this device."""
    content = json.loads(text)
    header = {key: content[key] for key in _header(index)}
    if header != _header(index):
        raise ValueError(f"it was written for {header}, this is {_header(index)}")
    entries = {}
    for entry in content["entries"]:
        problem, tile = Problem(**entry["problem"]), Tile(**entry["tile"])
        numbers = (tile.BM, tile.BN, tile.BK, tile.num_warps)
        in_range = all(type(n) is int and n > 0 and n & (n - 1) == 0 for n in numbers) and (
            16 <= tile.BM <= 256
            and 16 <= tile.BN <= 256
            and 16 <= tile.BK <= 256
            and tile.num_warps <= 8
            and tile.GROUP_M in range(1, 1025)
            and tile.num_stages in range(1, 9)
            and tile.splits in range(1, 65)
            and isinstance(tile.ordered, bool)
            and isinstance(tile.even, bool)
            and isinstance(entry["plain"], bool)
        )
        if not in_range:
            raise ValueError(f"{tile} is not a tile that can be launched")
        strips = None if entry["strips"] is None else Strips(**entry["strips"])
        if strips is not None and strips not in _strips(problem):
            warnings.warn(
                f"torchao_superblock: what was tuned for {problem} is passed over, because {strips} is not a tile of "
                "this version; run torchao_superblock.tune again",
                stacklevel=2,
            )
            continue
        entries[problem] = Found(tile, entry["plain"], strips)
    return entries


def load(index: int) -> None:
    """Take over what was found on this device earlier. A file that cannot be used is ignored, with a warning."""
    path: Path | str = "the user's cache directory"
    try:
        path = cache_file(index)
        if not path.exists():
            return
        cuda._tuned.update(_parse(path.read_text(encoding="utf-8"), index))
    except Exception as error:
        warnings.warn(
            f"torchao_superblock: the tuning results in {path} are ignored "
            f"({type(error).__name__}: {error}); delete the file, or run torchao_superblock.tune again",
            stacklevel=2,
        )


def _use(problem: Problem, found: Found | None) -> None:
    """Let `found` serve a problem from the next call on; None lets the rules."""
    if found is None:
        cuda._tuned.pop(problem, None)
    else:
        cuda._tuned[problem] = found
    cuda.forget_launches()


def _save(found: dict[Problem, Found], index: int) -> None:
    """Add to the file, in one step, so that a process that reads meanwhile sees the old or the new one."""
    path = cache_file(index)
    entries: dict[Problem, Found] = {}
    try:
        entries = _parse(path.read_text(encoding="utf-8"), index)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
        pass  # none yet, or not usable: load() has said so
    content = _header(index) | {
        "entries": [
            {
                "problem": problem._asdict(),
                "tile": tile._asdict(),
                "plain": plain,
                "strips": None if strips is None else strips._asdict(),
            }
            for problem, (tile, plain, strips) in (entries | found).items()
        ]
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(draft, path)


# ---------------------------------------------------------------------------------------------------------------------
# The search.


def candidates(problem: Problem) -> list[Tile]:
    """Tiles worth timing for a problem, the rule's own first."""
    rule = cuda.matmul_tile(problem)
    few_tokens = problem.M <= 64
    heights = [
        BM
        for BM in (16, 32, 64, 128, 256)
        if BM <= max(16, problem.M) and BM * 4 >= min(problem.M, 256)
    ]
    run = problem.c & -problem.c
    steps = sorted({rule.BK, *(BK for BK in (32, 64, 128) if BK <= max(run, rule.BK))})
    found = [rule]
    for BM, BK, num_warps, num_stages in itertools.product(heights, steps, (4, 8), (2, 3, 4)):
        accumulators = (
            BM * rule.BN // (num_warps * 32) * (2 if problem.precision == cuda.TF32X3 else 1)
        )
        shared = num_stages * (BM + rule.BN) * BK * problem.itemsize
        if accumulators > 128 or shared > 200_000 or (num_warps == 8 and accumulators < 16):
            continue
        for splits in {1, rule.splits, 2 * rule.splits} if few_tokens else (1,):
            found.append(
                Tile(BM, rule.BN, BK, rule.GROUP_M, num_warps, num_stages, splits, rule.ordered)
            )
    found.append(rule._replace(even=not rule.even))
    if not few_tokens:
        found += [rule._replace(GROUP_M=group) for group in (1, 2, 4, 32)]
        found.append(rule._replace(ordered=not rule.ordered))
    return list(dict.fromkeys(found))


def _microseconds(function: Callable[[], Tensor]) -> float:
    if INTERPRET:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e6
    return triton.testing.do_bench_cudagraph(function, rep=10, return_mode="median") * 1e3


def _differs(out: Tensor, reference: Tensor, precision: int) -> bool:
    """Whether two results differ by more than rounding, or hold what is not a number."""
    limit = TF32_ROUNDING if precision == cuda.TF32 else ROUNDING[out.dtype]
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


def _tune_call(arguments: tuple[Any, ...], problem: Problem, index: int) -> Tuned:
    """Time every candidate on the tensors of one call; leave the fastest adopted."""
    before_us = _microseconds(lambda: cuda.forward(*arguments))
    known = cuda._tuned.get(problem)
    _use(problem, None)

    def plain() -> Tensor:
        return cuda._plain_forward(*arguments, index)

    title = f"{problem.M} tokens, {problem.R * problem.r}x{problem.C * problem.c}, block {problem.r}x{problem.c}"
    reference = plain()
    if not bool(reference.isfinite().all()):
        raise ValueError(
            f"tune: the product of {title} holds a NaN or an infinity, so tiles cannot be compared; give an "
            "example_input for which the model's activations are finite"
        )
    best = cuda.matmul_tile(problem)
    rule_us = best_us = _microseconds(plain)
    rule_is_plain = cuda.hopper_kernel(*arguments, index) is None
    strips: list[Strips] = []
    if cuda._load_hopper() is not None and hopper.supports(*arguments):
        strips = _strips(problem)
    strips_us: dict[Strips, float] = {}
    tiles = dict.fromkeys([*candidates(problem)[1:], *([known.tile] if known else [])])
    for tile in _progress([*tiles, *strips], title):
        run = plain
        if isinstance(tile, Strips):
            run = partial(hopper.forward, *arguments, tile=tile)
        else:
            _use(problem, Found(tile))
        try:
            if _differs(run(), reference, problem.precision):
                continue
            us = _microseconds(run)
        except Exception:  # a tile that this GPU cannot compile or launch is no candidate
            continue
        if isinstance(tile, Strips):
            strips_us[tile] = us
        elif us < best_us and us < WORTHWHILE * rule_us:
            best, best_us = tile, us
    # Where the Gluon kernel is in play it wins or loses explicitly; a draw goes to what the rule would take.
    found = Tuned(problem, best, bool(strips), None, before_us, best_us)
    if strips_us:
        fastest = min(strips_us, key=lambda tile: strips_us[tile])
        rule_strips = hopper._choose(arguments[0], arguments[1], arguments[3], problem.activation)
        if strips_us[fastest] > WORTHWHILE * strips_us.get(rule_strips, float("inf")):
            fastest = rule_strips
        us = strips_us[fastest]
        if us < WORTHWHILE * best_us or (not rule_is_plain and best_us >= WORTHWHILE * us):
            found = found._replace(plain=False, strips=fastest, after_us=us)
    _use(problem, Found(best, found.plain, found.strips))
    return found


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
    calls: dict[tuple[Problem, torch.device], tuple[tuple[Any, ...], int]] = {}

    def record(*arguments: Any) -> None:
        x, crow, _, values = arguments[:4]
        index = cuda._index(x)
        activation, M = arguments[5], x.shape[0]
        problem = cuda._forward_problem(x, crow, values, activation, cuda.m_bucket(M), index)
        calls.setdefault((problem, x.device), (arguments, index))

    previous, cuda._recorder = cuda._recorder, record
    try:
        with torch.no_grad():
            if isinstance(example_input, dict):
                model(**example_input)
            elif isinstance(example_input, tuple | list):
                model(*example_input)
            else:
                model(example_input)
    finally:
        cuda._recorder = previous
    if not calls:
        raise ValueError(
            "tune: the model computed no block-sparse product on a CUDA device; move the swapped model and its input "
            "there first (model.to('cuda'))"
        )
    report: dict[int, TuneReport] = {}
    with torch.no_grad():
        for (problem, _), (arguments, index) in calls.items():
            known = cuda._tuned.get(problem)
            try:
                with nullcontext() if INTERPRET else torch.cuda.device(index):
                    found = _tune_call(arguments, problem, index)
            except BaseException:  # interrupted: what was being tried must not stay
                _use(problem, known)
                raise
            report.setdefault(index, TuneReport()).append(found)
    for index, tuned in report.items():
        _save({found.problem: cuda._tuned[found.problem] for found in tuned}, index)
    return TuneReport(itertools.chain.from_iterable(report.values()))
