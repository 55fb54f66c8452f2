"""What a sparsifier's `summary()` returns: entries to compute with, a table to read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.common.swappable import module_obstacle, shape_obstacle
from torchao_superblock.pruning.masks.base import BlockMask, kept_blocks
from torchao_superblock.pruning.reading import type_before_masks
from torchao_superblock.pruning.targets import SkippedTensor


@dataclass(frozen=True)
class MaskedTensor:
    """One group of the sparsifier.

    Attributes:
        fqn: name of the masked tensor.
        shape: `(out_features, in_features)`.
        blocksize: `(rows, cols)`.
        grid: block rows and block columns.
        target_sparsity: the level the next `step()` applies.
        sparsity: fraction of blocks that the present mask prunes.
        kept: number of blocks that it keeps.
        frozen: whether the mask is held.
        scores_frozen: whether scores that are there to be trained take no gradient
            (`requires_grad` is False): the mask then follows the level alone.
        zeros: fraction of the weight's elements in pruned blocks; differs from `sparsity` where the
            blocks at the edges are smaller. None on the meta device.
        swap_obstacle: why no swap can use the zeros, a sentence; None if one can.
        swap_needs_pad: why only a swap with `pad=True` can use them, a sentence; None if others can too.
        gain: what the next forward multiplies kept blocks by (1.0 on the meta device), and a squash the
            weights; Adam's learning rate for them has to grow as much to go on after it.
    """

    fqn: str
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    grid: tuple[int, int]
    target_sparsity: float
    sparsity: float
    kept: int
    frozen: bool
    scores_frozen: bool = False
    zeros: float | None = None
    swap_obstacle: str | None = None
    gain: float = 1.0
    swap_needs_pad: str | None = None

    @classmethod
    def of(cls, group: Mapping[str, Any], mask: BlockMask) -> MaskedTensor:
        """What there is to say about one group; reads its mask back to the host."""
        mask.refuse_released(f"summary: {group['tensor_fqn']!r}")
        n_blocks = math.prod(mask.grid)
        if mask.held_mask.is_meta:
            kept, zeros = kept_blocks(n_blocks, group["sparsity_level"]), None
        else:
            found = mask.block_mask().cpu()
            kept, zeros = int(found.sum()), _pruned_elements(found, mask)
        trained = isinstance(mask.scores, nn.Parameter)
        module = group["module"]
        kind = type_before_masks(module)
        obstacle = module_obstacle(module, kind, group["tensor_name"])
        shape = _shape_obstacle(mask) if obstacle is None else None
        if shape is not None and issubclass(kind, nn.MultiheadAttention):  # never padded
            obstacle, shape = shape, None
        return cls(
            fqn=group["tensor_fqn"],
            shape=mask.tensor_shape or mask.weight_shape,
            blocksize=mask.blocksize,
            grid=mask.grid,
            target_sparsity=float(group["sparsity_level"]),
            sparsity=1 - kept / n_blocks,
            kept=kept,
            frozen=mask.is_frozen,
            scores_frozen=trained and not mask.scores.requires_grad,
            zeros=zeros,
            swap_obstacle=obstacle,
            swap_needs_pad=shape,
            gain=mask.gain_now,
        )


@dataclass(frozen=True)
class MaskSummary:
    """The masks of a model; `print(summary)` shows a table.

    Attributes:
        groups: one entry for each masked tensor, in the order of the sparsifier's groups.
        skipped: what globs, or no config, reached and could not mask, each with the reason.
    """

    groups: list[MaskedTensor] = field(default_factory=list)
    skipped: list[SkippedTensor] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.groups and not self.skipped:
            return "no block masks: call prepare() first"
        lines = []
        if self.groups:
            header = ("tensor", "shape", "block", "grid", "target", "actual", "")
            rows = [
                (
                    entry.fqn,
                    _by(entry.shape),
                    _by(entry.blocksize),
                    _by(entry.grid),
                    f"{entry.target_sparsity:.1%}",
                    f"{entry.sparsity:.1%}",
                    "frozen" if entry.frozen else "scores frozen" if entry.scores_frozen else "",
                )
                for entry in self.groups
            ]
            lines += _table(header, rows)
            blocks = sum(entry.grid[0] * entry.grid[1] for entry in self.groups)
            kept = sum(entry.kept for entry in self.groups)
            lines.append(
                f"{_count(len(self.groups), 'tensor')} masked: "
                f"{kept} of {_count(blocks, 'block')} kept, {1 - kept / blocks:.1%} pruned"
            )
        unused = [entry for entry in self.groups if entry.swap_obstacle is not None]
        if unused:
            lines.append(f"{_count(len(unused), 'tensor')} masked to no use at a swap:")
            lines += [f"  {entry.fqn}: {entry.swap_obstacle}{_zeros(entry)}" for entry in unused]
        ragged = [entry for entry in self.groups if entry.swap_needs_pad is not None]
        if ragged:
            lines.append(f"{_count(len(ragged), 'tensor')} of use at a swap with pad=True:")
            lines += [f"  {entry.fqn}: {entry.swap_needs_pad}{_zeros(entry)}" for entry in ragged]
        if self.skipped:
            lines.append(f"{_count(len(self.skipped), 'tensor')} skipped:")
            lines += [f"  {entry.fqn} {_by(entry.shape)}: {entry.reason}" for entry in self.skipped]
        return "\n".join(lines)


def _pruned_elements(block_mask: Tensor, mask: BlockMask) -> float:
    """Fraction of the elements that `block_mask`, `(R, C)`, prunes: edge blocks may be smaller."""
    heights, widths = (
        torch.full((blocks,), size, dtype=torch.float64, device="cpu").clamp(
            max=length - size * torch.arange(blocks, device="cpu")
        )
        for blocks, size, length in zip(mask.grid, mask.blocksize, mask.weight_shape, strict=True)
    )
    kept = heights @ block_mask.double() @ widths
    return 1 - float(kept) / math.prod(mask.weight_shape)


def _shape_obstacle(mask: BlockMask) -> str | None:
    """Why a swap has to pad the last blocks: a sentence, or None."""
    if shape_obstacle(mask.weight_shape, mask.blocksize) is None:
        return None
    # Smaller blocks than those of the mask may do: a swap reads their size off the zeros.
    return shape_obstacle(mask.weight_shape)


def _zeros(entry: MaskedTensor) -> str:
    if entry.zeros is None or math.isclose(entry.zeros, entry.sparsity):
        return ""
    return f" ({entry.zeros:.1%} of its elements are pruned)"


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return [
        "  ".join(
            # Names are read from the left, numbers compared from the right.
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
