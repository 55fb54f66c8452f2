"""A point of a figure, and the grid of them that a figure asks for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from benchmarks.cells.question import Row, Tick


@dataclass(frozen=True)
class Point:
    """What one measurement belongs to.

    Attributes:
        mode: `"float32"`, `"bfloat16"` or any other of `benchmarks.measure.precision`.
        what: is sparse: the scope of a model, or the shape of a layer; `"tiny "` before it in quick runs.
        block: edge of the square blocks.
        sparsity: fraction of blocks that are zero.
        batch: images.
    """

    mode: str
    what: str
    block: int
    sparsity: float
    batch: int

    @property
    def setting(self) -> str:
        """Panel of the picture."""
        return f"{self.mode}, {self.what}"

    def __str__(self) -> str:
        return f"{self.setting}, block {self.block} at {self.sparsity:g}, batch {self.batch}"


@dataclass
class Sweep:
    """A grid of points: a :class:`benchmarks.cells.question.Question` but for `run`.

    Args:
        modes: of the points, and so on; every combination is one.
        whats: scopes or shapes.
        blocks: block sizes.
        sparsities: levels.
        batches: batch sizes.
        tiny: the models or layers are tiny, for tests.
        seconds: that a point is timed for.
        peers: whether torch's and torchao's tensors are timed too.
    """

    name: str
    title: str
    modes: tuple[str, ...]
    whats: tuple[str, ...]
    blocks: tuple[int, ...]
    sparsities: tuple[float, ...]
    batches: tuple[int, ...]
    tiny: bool = False
    seconds: float = 1.5
    peers: bool = True
    metric: str = "ours x"
    unit: str = "x"

    def check(self) -> None:
        """Nothing is needed that the benchmarks do not need anyway."""

    def cells(self) -> list[Point]:
        """Every point; what is most asked for first: the first mode before the next, in it 0.9 and 0.8."""
        prefix = "tiny " if self.tiny else ""
        first = sorted(self.sparsities, key=lambda level: (level != 0.9, level != 0.8))
        return [
            Point(mode, prefix + what, block, sparsity, batch)
            for mode, sparsity, what, batch, block in itertools.product(
                self.modes, first, self.whats, self.batches, self.blocks
            )
        ]

    def work(self, cell: Point) -> float:
        """Half of it is building, the rest grows with the batch."""
        return 1.0 + cell.batch / 256

    def load(self, device: torch.device) -> None:
        """Remembers the device."""
        self.device = device

    def run(self, cell: Point, tick: Tick) -> Row:
        """Measures a point."""
        raise NotImplementedError
