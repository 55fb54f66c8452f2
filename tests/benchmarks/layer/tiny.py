"""A cell that takes no time, and a context to run it in."""

from pathlib import Path

import torch

from benchmarks.layer.cells import Cell
from benchmarks.layer.runs import Context, Failures
from benchmarks.measure.roofline import Roofline
from benchmarks.report.files import Report

TINY = Cell(4, (32, 64), 16, 0.75, "float32")


def tiny_context(folder: Path, device: str = "cpu") -> Context:
    """A quick context whose report goes to `folder`."""
    roofline = Roofline(1e9, {"float32": 1e9, "bfloat16": 1e9})
    report = Report("test", "Test", device, directory=folder)
    return Context(torch.device(device), report, roofline, Failures(), quick=True)
