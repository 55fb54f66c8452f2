"""Figures 2, 3 and 6: whole vision transformers, dense against swapped."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.cells.question import Row, Tick
from benchmarks.figure.points import Point, Sweep
from benchmarks.measure.error import relative_error
from benchmarks.measure.precision import dtype_of, precision
from benchmarks.measure.timings import Failure
from benchmarks.model.catalogue import TINY_VIT
from benchmarks.model.compare import (
    EAGER,
    GRAPH,
    LARGEST_ERROR,
    measure_models,
    row_of,
    ways_on,
)
from benchmarks.model.forms import PEERS, counts, swapped
from benchmarks.model.masks import zero_blocks_of
from benchmarks.model.vit import HUGE, SCOPES, build_vit


def dense_vit(
    point: Point, device: torch.device, *, tiny: bool, huge: bool
) -> tuple[nn.Module, list[str], torch.Tensor]:
    """A dense model with zero blocks, the names of the weights that have them, and images."""
    sizes = TINY_VIT if tiny else HUGE if huge else {}
    with torch.device(device):
        model = build_vit(**sizes).to(dtype_of(point.mode))
        images = torch.randn(point.batch, 3, model.image_size, model.image_size)
    pattern = SCOPES[point.what.removeprefix("tiny ")]
    weights = zero_blocks_of(model, pattern, point.block, point.sparsity)
    return model, list(weights), images.to(dtype_of(point.mode))


def release(device: torch.device) -> None:
    """Gives back what a point has used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class WholeModel(Sweep):
    """Speedup of a whole vision transformer, eager and as CUDA graphs on both sides.

    Args:
        huge: ViT-H/14 in the place of ViT-B/16.
    """

    huge: bool = False

    def run(self, cell: Point, tick: Tick) -> Row:
        """Measures a model; `what` is a scope."""
        try:
            with precision(cell.mode), torch.no_grad():
                return self._row(cell, tick)
        finally:
            release(self.device)

    def _row(self, cell: Point, tick: Tick) -> Row:
        tick("building")
        dense, names, images = dense_vit(cell, self.device, tiny=self.tiny, huge=self.huge)
        ours, report = swapped(dense, cell.block, cell.sparsity, narrow=False)
        narrow, _ = swapped(dense, cell.block, cell.sparsity, narrow=True)
        if not report.swapped:
            raise RuntimeError(f"no layer was swapped, so there is nothing to compare:\n{report}")
        sides: dict[str, nn.Module | Failure] = {
            "dense": dense,
            "ours": ours,
            "ours narrow": narrow,
        }
        for peer, build in PEERS.items() if self.peers else ():
            if peer == "torchao" and self.device.type != "cuda":
                continue  # its tensors are for GPUs
            try:
                sides[peer] = build(dense, names, cell.block)
            except Exception as error:
                sides[peer] = Failure.of(error)
        few = images[:2]
        reference = dense(few)
        error = max(relative_error(model(few), reference) for model in (ours, narrow))
        if not error <= LARGEST_ERROR:
            raise ArithmeticError(f"the swapped model's logits are {error:.1e} off the dense one's")
        ways = ways_on(self.device, (EAGER, GRAPH))
        step = partial(_forward, images)
        measured = measure_models(
            sides, step, ways, self.device, seconds=self.seconds, tick=tick, no_graphs=PEERS
        )
        row = row_of(measured, list(sides), ways)
        failures = row.pop("failures")
        return {
            **row,
            "images/s": 1e3 * cell.batch / row["ours ms"],
            "error": error,
            **counts(report, names),
            "failures": failures,
        }


def _forward(images: torch.Tensor, side: str, runs: nn.Module) -> torch.Tensor:
    return runs(images)
