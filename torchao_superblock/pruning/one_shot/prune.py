"""Block sparsity for a pretrained model from a few batches, without training."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.common.blocks import BlockSize, block_grid
from torchao_superblock.common.calls import shown
from torchao_superblock.pruning.masks.base import kept_blocks
from torchao_superblock.pruning.masks.settings import check_sparsity_level
from torchao_superblock.pruning.one_shot.calibration import Calibration, Part, find_targets
from torchao_superblock.pruning.one_shot.capture import Target
from torchao_superblock.pruning.one_shot.moments import Moments
from torchao_superblock.pruning.one_shot.refine import find_parts, refine
from torchao_superblock.pruning.one_shot.report import OneShotReport, PrunedTensor, RefinedPart
from torchao_superblock.pruning.one_shot.solve import Problem, block_costs, choose_blocks, repair

ALLOCATIONS = ("uniform", "global")


def prune_one_shot(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity_level: float,
    blocksize: BlockSize,
    config: Sequence[Mapping[str, Any]] | None = None,
    *,
    allocation: str = "uniform",
    refine_steps: int = 0,
    mask_fn: Callable[[Any], Tensor | None] | None = None,
    progress: bool = True,
    damping: float = 0.3,
    solve_dtype: torch.dtype | None = None,
) -> OneShotReport:
    """Prunes blocks of a pretrained model and repairs what is left, from a few batches of inputs.

    Layer after layer, in the order of the forward and those that share an input together: the
    blocks whose removal costs least (optimal brain surgeon, for whole blocks) become zero, and the
    other weights of each row of blocks, and the bias, are set by least squares so that the layer,
    fed with what the pruned layers before it give, comes closest to what it gives in the dense
    model. Afterwards the weights hold plain zeros, as after `squash`: ready for `swap_to_bsr`, or
    to be fine-tuned under a mask.

    Layers are seen where `F.linear` is called, so the projections of `nn.MultiheadAttention` and
    the layers of fused encoders count. The model runs in eval mode. A layer that is called more
    than once in a forward is solved for all its calls together.

    Memory, besides the model: the pruned weights once more; for the dense and for the pruned model
    each, the output of every finished module at the top of the tree (of each block of a
    transformer: blocks x tokens x features), on the model's device; for the layers at hand, their
    inputs in one batch and three `K x K` moments. A forward is computed about once for each of the
    two, however many layers there are. Modules that take a cache or another object besides tensors
    and numbers are computed anew for every group of layers: give `use_cache=False` to language
    models of transformers.

    Args:
        model: in any mode, on any device; its parameters are written at the very end.
        batches: calibration batches: each a tensor, a tuple of positional arguments or a dict of
            keyword arguments of the model. Kept in a list, so they are iterated over once. A few
            thousand tokens are a good number.
        sparsity_level: fraction of the blocks of each weight to prune, in `[0, 1)`.
        blocksize: int for square blocks, or `(rows, cols)`.
        config: which weights, as for a sparsifier's `prepare`: entries with a `tensor_fqn` (or a
            glob) and perhaps a `sparsity_level` or a `blocksize` of their own.
            None: every `nn.Linear`.
        allocation: `"uniform"`: every weight at its level. `"global"`: the same number of blocks
            over all, taken where they cost the smallest share of a layer's outputs in the dense
            model, which takes one more pass. For layers of unlike roles these shares do not compare:
            it kept more of MiniLM at 0.5 with all linears (59 against 53 % of the way from nothing
            to dense) and much less at 0.3 with its MLPs alone (59 against 81 %). Levels by the loss
            that they cost come from :func:`torchao_superblock.allocate`.
        refine_steps: with a positive number, so many steps of Adam afterwards on the kept weights
            and biases of one part of the model at a time (a block of a transformer: the elements of
            the outermost `nn.ModuleList` or `nn.Sequential`), towards the dense part's outputs.
        mask_fn: takes a batch and returns a bool tensor `(batch, sequence)`, True for real tokens,
            so that padding does not count, or None. Without it a 2-D `attention_mask` in a dict is
            used. Inputs without a sequence, of a pooled layer say, count whole.
        progress: show a bar, if tqdm is installed.
        damping: pull of each weight towards its dense value, as a fraction of the mean second
            moment of the layer's inputs. The fewer tokens, the more of it: with 4,000 of them for
            MiniLM 0.2 to 0.6 was best where all linears are pruned, and 0.01 to 0.3 no different
            for its MLPs alone.
        solve_dtype: `torch.float32` or `torch.float64`, of moments and solutions. None: float64 for
            a model in float64, else float32.

    Returns:
        A report: every tensor with its sparsity and the share of its outputs that is lost, and what
        was skipped and why.

    Raises:
        ValueError: for a config that reaches nothing; a layer that no batch reaches; inputs or
            weights with NaN or infinity; masks that do not fit; settings outside their range.
        TypeError: for batches or settings of the wrong type.
        ArithmeticError: if a layer cannot be solved for.
            After any error the model is as it was.

    References:
        Hassibi and Stork 1993 (optimal brain surgeon); Frantar and Alistarh 2022,
        https://arxiv.org/abs/2208.11580 (layer by layer); Nagel et al. 2020,
        https://arxiv.org/abs/2004.10568 (dense outputs from pruned inputs).

    Example:
        >>> batches = [tokenizer(texts, return_tensors="pt", padding=True)]  # doctest: +SKIP
        >>> print(prune_one_shot(model, batches, 0.5, blocksize=32))  # doctest: +SKIP
    """
    level = check_sparsity_level(sparsity_level, "prune_one_shot: ")
    if allocation not in ALLOCATIONS:
        raise ValueError(
            f"prune_one_shot: allocation={allocation!r} is unknown; use 'uniform', 'global', or a "
            "config with a level for each weight"
        )
    if isinstance(refine_steps, bool) or not isinstance(refine_steps, numbers.Integral):
        raise TypeError(f"prune_one_shot: refine_steps={refine_steps!r} must be an int")
    if refine_steps < 0:
        raise ValueError(f"prune_one_shot: refine_steps={refine_steps} must not be negative")
    check_damping(damping, "prune_one_shot")
    defaults = {"sparsity_level": level, "blocksize": blocksize}
    targets, skipped = find_targets(model, config, defaults, "prune_one_shot")
    dtype = check_solve_dtype(solve_dtype, targets, "prune_one_shot")
    with Calibration(model, targets, batches, mask_fn, dtype, "prune_one_shot") as calibration:
        calibration.discover()
        levels = {target: target.sparsity_level for target in targets}
        if allocation == "global":
            levels = _global_levels(calibration, damping, progress)
        report = OneShotReport(skipped=skipped)
        _prune(calibration, levels, damping, int(refine_steps), progress, report)
    _write(calibration)
    return report


def _prune(
    calibration: Calibration,
    levels: Mapping[Target, float],
    damping: float,
    refine_steps: int,
    progress: bool,
    report: OneShotReport,
) -> None:
    """Solves for all targets; the results stand in the pruned stream."""
    masks: dict[Target, Tensor] = {}
    parts = []
    if refine_steps:
        parts = find_parts(calibration.model, [group.targets for group in calibration.groups])
    names = {module: fqn for fqn, module in calibration.model.named_modules()}
    for group in shown(calibration.groups, "prune_one_shot", progress):
        layers = Layers(calibration.moments(group), damping)
        for target in group.targets:
            solution = layers.solve(target, levels[target])
            calibration.pruned.replaced[target] = solution.weight, solution.bias
            masks[target] = solution.mask
            report.tensors.append(_entry(target, solution))
        calibration.forwards.done.update(group.targets)
        for part in list(parts):
            own = {id(parameter) for parameter in part.parameters()}
            inside = [target for target in calibration.targets if id(target.weight) in own]
            if calibration.forwards.done.issuperset(inside):
                parts.remove(part)
                full = {target: _full_mask(masks[target], target) for target in inside}
                before, after = refine(calibration, part, full, refine_steps)
                report.refined.append(RefinedPart(names[part], before, after))


@dataclass(frozen=True)
class Solution:
    """A pruned and repaired weight.

    Attributes:
        mask: bool over the block grid, True = kept.
        weight: `(N, K)`, of the parameter's dtype.
        bias: `(N,)`, or None where the layer has none of its own.
        error: share of the dense outputs that is lost.
        paired: whether it was solved towards the dense model's outputs.
    """

    mask: Tensor
    weight: Tensor
    bias: Tensor | None
    error: float
    paired: bool


class Layers:
    """The targets of a group, ready to be solved for at any level.

    Args:
        moments: of the inputs of each range of rows.
        damping: see :func:`prune_one_shot`.
    """

    def __init__(self, moments: Mapping[Part, Moments], damping: float) -> None:
        self._moments = moments
        self._damping = damping
        self._problems: dict[tuple[Moments, bool], Problem] = {}

    def costs(self, target: Target) -> Tensor:
        """What removing each block of columns costs each row: `(N, C)`."""
        with self._named(target):
            return torch.cat(
                [
                    block_costs(
                        problem.right_side(rows) @ problem.inverse,
                        problem.inverse,
                        target.blocksize,
                    )
                    for _, rows, problem in self._parts(target)
                ]
            )

    def power(self, target: Target) -> float:
        """Mean square of the dense outputs."""
        return sum(problem.error(rows, rows)[1] for _, rows, problem in self._parts(target))

    def solve(self, target: Target, level: float) -> Solution:
        """Chooses blocks and repairs the others."""
        grid = block_grid(tuple(target.weight.shape), target.blocksize)
        n_kept = kept_blocks(grid[0] * grid[1], level)
        mask = choose_blocks(self.costs(target), target.blocksize[0], n_kept)
        weights, shifts, lost, power = [], [], 0.0, 0.0
        with self._named(target):
            for start, rows, problem in self._parts(target):
                weight = repair(problem, rows, mask, start, target.blocksize)
                means = problem.statistics
                weights.append(weight)
                shifts.append(rows @ means.dense_mean - weight @ means.pruned_mean)
                part_lost, part_power = problem.error(rows, weight)
                lost, power = lost + part_lost, power + part_power
        bias = None
        if target.bias is not None:
            parameter, first = target.bias
            dense = parameter.detach()[first : first + len(target.weight)]
            bias = (dense.to(shifts[0].dtype) + torch.cat(shifts)).to(parameter.dtype)
        return Solution(
            mask,
            torch.cat(weights).to(target.weight.dtype),
            bias,
            lost / power if power > 0 else 0.0,
            all(self._moments[target, start].paired for start, _ in target.parts()),
        )

    def _parts(self, target: Target) -> Iterator[tuple[int, Tensor, Problem]]:
        for start, stop in target.parts():
            moments = self._moments[target, start]
            key = moments, target.bias is not None
            if key not in self._problems:
                statistics = moments.statistics(centered=key[1])
                self._problems[key] = Problem(statistics, self._damping)
            rows = target.weight.detach()[start:stop].to(moments.dtype)
            yield start, rows, self._problems[key]

    @staticmethod
    def _named(target: Target) -> _Named:
        return _Named(target.fqn)


class _Named:
    """Says for which layer an equation has no solution."""

    def __init__(self, fqn: str) -> None:
        self._fqn = fqn

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ArithmeticError):
            raise ArithmeticError(f"cannot solve for {self._fqn!r}: {error}") from error


def _global_levels(calibration: Calibration, damping: float, progress: bool) -> dict[Target, float]:
    """Levels at which the last block of every layer costs the same share of its dense outputs."""
    costs: dict[Target, Tensor] = {}
    for group in shown(calibration.groups, "allocation", progress):
        layers = Layers(calibration.moments(group, dense_only=True), damping)
        for target in group.targets:
            rows = target.blocksize[0]
            by_row = layers.costs(target)
            grid = by_row.new_zeros(-(-len(by_row) // rows), by_row.shape[1])
            grid.index_add_(0, torch.arange(len(by_row), device=by_row.device) // rows, by_row)
            costs[target] = grid.flatten().cpu().double() / (layers.power(target) or 1.0)
        calibration.forwards.done.update(group.targets)
    calibration.forwards.done.clear()
    calibration.dense.reset()
    counts = [cost.numel() for cost in costs.values()]
    n_kept = sum(
        kept_blocks(count, target.sparsity_level)
        for count, target in zip(counts, costs, strict=True)
    )
    order = torch.cat(list(costs.values())).argsort(descending=True, stable=True)
    kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    kept[order[:n_kept]] = True
    return {
        target: min(1 - own.double().mean().item(), 1 - 1 / len(own))
        for target, own in zip(costs, kept.split(counts), strict=True)
    }


def _full_mask(mask: Tensor, target: Target) -> Tensor:
    rows, cols = target.blocksize
    n, k = target.weight.shape
    return mask.repeat_interleave(rows, 0)[:n].repeat_interleave(cols, 1)[:, :k]


def _entry(target: Target, solution: Solution) -> PrunedTensor:
    shape = (target.weight.shape[0], target.weight.shape[1])
    kept = int(solution.mask.sum())
    notes = []
    if target.foreign_bias:
        notes.append("its bias is not its own and stays")
    if not solution.paired:
        notes.append("own outputs as target: other tokens reach it once pruned")
    return PrunedTensor(
        target.fqn,
        shape,
        target.blocksize,
        block_grid(shape, target.blocksize),
        1 - kept / solution.mask.numel(),
        kept,
        solution.error,
        "; ".join(notes),
    )


@torch.no_grad()
def _write(calibration: Calibration) -> None:
    """The one place where the model changes, when nothing can go wrong any more."""
    for target, (weight, bias) in calibration.pruned.replaced.items():
        target.weight.copy_(weight)
        if bias is not None and target.bias is not None:
            parameter, first = target.bias
            parameter[first : first + len(bias)].copy_(bias)


def check_damping(damping: object, caller: str) -> None:
    """Refuses what is no positive number."""
    if isinstance(damping, bool) or not isinstance(damping, numbers.Real):
        raise TypeError(f"{caller}: damping={damping!r} must be a number above 0, such as 0.3")
    if not 0 < damping < float("inf"):
        raise ValueError(f"{caller}: damping={damping!r} must be above 0, such as 0.3")


def check_solve_dtype(
    dtype: torch.dtype | None, targets: Sequence[Target], caller: str
) -> torch.dtype:
    """The dtype to solve in."""
    if dtype is None:
        double = any(target.weight.dtype == torch.float64 for target in targets)
        return torch.float64 if double else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{caller}: solve_dtype={dtype} must be torch.float32 or torch.float64: in fewer digits "
            "the equations have no solution"
        )
    return dtype
