"""How much a model's loss moves when one layer alone is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.common.blocks import BlockSize
from torchao_superblock.common.calls import shown
from torchao_superblock.pruning.masks.settings import check_sparsity_level
from torchao_superblock.pruning.one_shot.calibration import Calibration, find_targets
from torchao_superblock.pruning.one_shot.prune import (
    Layers,
    check_damping,
    check_solve_dtype,
)
from torchao_superblock.pruning.summary import _by, _table
from torchao_superblock.pruning.targets import SkippedTensor


@dataclass(frozen=True)
class LayerSensitivity:
    """What pruning one weight alone does to the loss.

    Attributes:
        fqn: of the weight.
        shape: `(out_features, in_features)`.
        blocksize: `(rows, cols)`.
        n_blocks: of its grid.
        changes: loss minus the dense model's, one for each level.
    """

    fqn: str
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    n_blocks: int
    changes: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` measured; `print(sensitivity)` shows a table.

    Attributes:
        loss: of the dense model.
        levels: the sparsity levels that were tried, rising.
        layers: in the order of the forward.
        skipped: what could not be pruned, each with the reason.
    """

    loss: float
    levels: tuple[float, ...]
    layers: list[LayerSensitivity] = field(default_factory=list)
    skipped: list[SkippedTensor] = field(default_factory=list)

    def __str__(self) -> str:
        header = ("tensor", "shape", "blocks", *(f"{level:.0%}" for level in self.levels))
        rows = [
            (
                layer.fqn,
                _by(layer.shape),
                str(layer.n_blocks),
                *(f"{change:+.4g}" for change in layer.changes),
            )
            for layer in self.layers
        ]
        lines = _table(header, rows)
        lines.append(
            f"change of the loss, {self.loss:.4g} dense, when one tensor alone is pruned that far"
        )
        lines += [f"skipped {entry.fqn}: {entry.reason}" for entry in self.skipped]
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor | float],
    levels: Sequence[float],
    blocksize: BlockSize,
    config: Sequence[Mapping[str, Any]] | None = None,
    *,
    mask_fn: Callable[[Any], Tensor | None] | None = None,
    progress: bool = True,
    damping: float = 0.3,
    solve_dtype: torch.dtype | None = None,
) -> Sensitivity:
    """Measures how the loss moves when one layer alone is pruned in one shot and repaired.

    One forward from the layer on for each layer, level and batch. The model is not changed.

    Args:
        model: see :func:`torchao_superblock.prune_one_shot`, as for all that is not named here.
        batches: to calibrate and to measure with.
        loss_fn: takes the model's output for a batch and the batch, returns a number that is smaller
            for a better model. The mean over batches counts.
        levels: sparsity levels to try, in `[0, 1)`.
        blocksize: int for square blocks, or `(rows, cols)`.
        config: which weights; levels in it are not used. None: every `nn.Linear`.
        mask_fn: which tokens are real.
        progress: show a bar, if tqdm is installed.
        damping: pull towards the dense weights.
        solve_dtype: of moments and solutions.

    Returns:
        The changes of the loss, a table when printed; `torchao_superblock.visualize.plot_sensitivity`
        draws it and :func:`torchao_superblock.allocate` makes a config of it.

    Raises:
        ValueError: as `prune_one_shot`; for no level, or a loss that is not finite.

    Example:
        >>> loss = lambda output, batch: F.cross_entropy(output.logits, batch["labels"])
        >>> table = sensitivity(model, batches, loss, [0.3, 0.5, 0.7], 32)  # doctest: +SKIP
        >>> config = allocate(table, sparsity_level=0.5)  # doctest: +SKIP
    """
    tried = sorted({check_sparsity_level(level, "sensitivity: ") for level in levels})
    if not tried:
        raise ValueError("sensitivity: levels is empty; give the levels to try, such as [0.5, 0.8]")
    check_damping(damping, "sensitivity")
    defaults = {"sparsity_level": tried[0], "blocksize": blocksize}
    targets, skipped = find_targets(model, config, defaults, "sensitivity")
    dtype = check_solve_dtype(solve_dtype, targets, "sensitivity")

    def loss_of(output: object, batch: int) -> float:
        loss = loss_fn(output, calibration.batches[batch])
        value = float(loss)
        if not math.isfinite(value):
            raise ValueError(f"sensitivity: loss_fn returned {value} for batch {batch}")
        return value

    with Calibration(model, targets, batches, mask_fn, dtype, "sensitivity") as calibration:
        calibration.discover(loss_of)
        n_batches = len(calibration.batches)
        dense = sum(calibration.outputs) / n_batches
        result = Sensitivity(dense, tuple(tried), skipped=skipped)
        for group in shown(calibration.groups, "sensitivity", progress):
            layers = Layers(calibration.moments(group, dense_only=True), damping)
            for target in group.targets:
                changes = []
                for level in tried:
                    solution = layers.solve(target, level)
                    replaced = {target: (solution.weight, solution.bias)}
                    losses = [
                        loss_of(
                            calibration.forwards.run(calibration.dense, batch, replaced=replaced),
                            batch,
                        )
                        for batch in range(n_batches)
                    ]
                    changes.append(sum(losses) / n_batches - dense)
                n, k = target.weight.shape
                result.layers.append(
                    LayerSensitivity(
                        target.fqn,
                        (n, k),
                        target.blocksize,
                        solution.mask.numel(),
                        tuple(changes),
                    )
                )
            calibration.forwards.done.update(group.targets)
    return result
