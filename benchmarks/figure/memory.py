"""Figure 4: memory of a whole ViT-B/16, dense against swapped."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.cells.question import Row, Tick
from benchmarks.figure.points import Point, Sweep
from benchmarks.figure.vits import dense_vit, release
from benchmarks.measure.precision import precision
from benchmarks.model.forms import counts, swapped

MB = 1e6


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for tensors in (model.parameters(), model.buffers()) for t in tensors)


def peak_bytes(model: nn.Module, images: torch.Tensor) -> int | None:
    """The most that a forward has allocated at once, model and images included; None on a CPU, which does not count."""
    if images.device.type != "cuda":
        return None
    model(images)  # what is allocated once and kept is there now
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    model(images)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@dataclass
class Memory(Sweep):
    """Peak of a forward, size of the file and bytes of the swapped weights, as fractions of the dense model's."""

    metric: str = "weights"
    unit: str = "of dense"

    def run(self, cell: Point, tick: Tick) -> Row:
        """Measures a model; `what` is a scope. One of the two is on the device at a time."""
        try:
            with precision(cell.mode), torch.no_grad():
                return self._row(cell, tick)
        finally:
            release(self.device)

    def _row(self, cell: Point, tick: Tick) -> Row:
        from torchao_superblock import save_bsr

        tick("building")
        dense, names, images = dense_vit(cell, self.device, tiny=self.tiny, huge=False)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "dense.pt")
            torch.save(dense.state_dict(), file)
            dense_file = file.stat().st_size
            dense_peak = peak_bytes(dense, images)
            ours, report = swapped(dense, cell.block, cell.sparsity, narrow=False)
            if not report.swapped:
                raise RuntimeError(
                    f"no layer was swapped, so there is nothing to compare:\n{report}"
                )
            itemsize = images.element_size()
            dense_weights = sum(math.prod(entry.shape) for entry in report.swapped) * itemsize
            ours_weights = tensor_bytes(ours) - (tensor_bytes(dense) - dense_weights)
            del dense
            release(self.device)
            tick("measuring")
            file = Path(folder, "ours.safetensors")
            save_bsr(ours, file)
            ours_file = file.stat().st_size
            ours_peak = peak_bytes(ours, images)
        return {
            "dense weights MB": dense_weights / MB,
            "ours weights MB": ours_weights / MB,
            "weights": ours_weights / dense_weights,
            "dense file MB": dense_file / MB,
            "ours file MB": ours_file / MB,
            "file": ours_file / dense_file,
            "dense peak MB": None if dense_peak is None else dense_peak / MB,
            "ours peak MB": None if ours_peak is None else ours_peak / MB,
            "peak": None if dense_peak is None or ours_peak is None else ours_peak / dense_peak,
            **counts(report, names),
        }
