"""What a sparsifier's `summary()` returns: entries to compute with, a table to read."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    fqn: str
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    grid: tuple[int, int]
    target_sparsity: float
    sparsity: float
    kept: int
    frozen: bool


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
                    "frozen" if entry.frozen else "",
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
        if self.skipped:
            lines.append(f"{_count(len(self.skipped), 'tensor')} skipped:")
            lines += [f"  {entry.fqn} {_by(entry.shape)}: {entry.reason}" for entry in self.skipped]
        return "\n".join(lines)


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
