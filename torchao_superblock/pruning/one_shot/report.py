"""What one-shot pruning returns: entries to compute with, a table to read."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchao_superblock.pruning.summary import _by, _count, _table
from torchao_superblock.pruning.targets import SkippedTensor


@dataclass(frozen=True)
class PrunedTensor:
    """One weight that was pruned.

    Attributes:
        fqn: its name.
        shape: `(out_features, in_features)`.
        blocksize: `(rows, cols)`.
        grid: block rows and block columns.
        sparsity: fraction of blocks that are zero now.
        kept: number of blocks that are not.
        error: mean square of what is lost of the dense model's outputs of this layer, on the
            calibration batches and with all layers before it pruned, as a fraction of their own
            mean square (variance, where the layer has a bias); before any refinement.
        note: what was not as usual, or "".
    """

    fqn: str
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    grid: tuple[int, int]
    sparsity: float
    kept: int
    error: float
    note: str = ""


@dataclass(frozen=True)
class RefinedPart:
    """One part of the model whose kept weights were trained together.

    Attributes:
        fqn: of the module; "" for the model itself.
        before, after: squared distance of its outputs to the dense model's, as a fraction of their
            power; equal where training did not help and was dropped.
    """

    fqn: str
    before: float
    after: float


@dataclass(frozen=True)
class OneShotReport:
    """What was pruned; `print(report)` shows a table.

    Attributes:
        tensors: in the order of the forward.
        skipped: what globs, or no config, reached and could not prune, each with the reason.
        refined: with `refine_steps`, one entry a part.
    """

    tensors: list[PrunedTensor] = field(default_factory=list)
    skipped: list[SkippedTensor] = field(default_factory=list)
    refined: list[RefinedPart] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Fraction of all blocks that are zero."""
        blocks = sum(entry.grid[0] * entry.grid[1] for entry in self.tensors)
        return 1 - sum(entry.kept for entry in self.tensors) / blocks

    def __str__(self) -> str:
        header = ("tensor", "shape", "block", "grid", "sparsity", "error", "")
        rows = [
            (
                entry.fqn,
                _by(entry.shape),
                _by(entry.blocksize),
                _by(entry.grid),
                f"{entry.sparsity:.1%}",
                f"{entry.error:.3f}",
                entry.note,
            )
            for entry in self.tensors
        ]
        lines = _table(header, rows)
        lines.append(
            f"{_count(len(self.tensors), 'tensor')} pruned: {self.sparsity:.1%} of all blocks; "
            "error: share of the dense outputs that is lost"
        )
        lines += [
            f"refined {part.fqn or 'the model'}: error {part.before:.4f} -> {part.after:.4f}"
            for part in self.refined
        ]
        if self.skipped:
            lines.append(f"{_count(len(self.skipped), 'tensor')} skipped:")
            lines += [f"  {entry.fqn} {_by(entry.shape)}: {entry.reason}" for entry in self.skipped]
        return "\n".join(lines)
