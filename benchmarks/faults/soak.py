"""Memory over many calls: what a call takes it gives back."""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.faults import models
from benchmarks.faults.case import Fault, Kind, NotHere
from torchao_superblock import SupermaskSparsifier, load_bsr, save_bsr, squash, swap_to_bsr


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


def memory() -> tuple[int, int]:
    """Bytes in use of the C heap, and blocks in use of Python's.

    Raises:
        NotHere: the C library does not tell.
    """
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError as error:
        raise NotHere("the C library has no mallinfo2") from error
    mallinfo.restype = _Mallinfo
    gc.collect()
    info = mallinfo()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


class Soak(Kind):
    """Many equal calls: once caches are filled, memory must not grow."""

    def __init__(self, name: str, about: str, unit: int, short: int, long: int) -> None:
        self.name, self.about = name, about
        self.unit, self.short, self.long = unit, short, long

    # What allocators keep for themselves, and caches of bounded size, may differ by so much.
    slack_bytes, slack_blocks = 64 * 1024, 300

    def run(self, index: int) -> str:
        self.random(index)
        torch.set_num_threads(2 if index % 8 > 5 else 1)
        call = self.calls(index)
        # The first fifth fills caches.
        for i in range(self.unit // 5):
            call(i)
        start = memory()
        for i in range(self.unit // 5, self.unit):
            call(i)
        end = memory()
        grown = end[0] - start[0], end[1] - start[1]
        if grown[0] > self.slack_bytes or grown[1] > self.slack_blocks:
            rounds = self.unit - self.unit // 5
            raise Fault("memory grows", f"{grown[0]} bytes, {grown[1]} blocks in {rounds} calls")
        return "no growth"

    def calls(self, index: int) -> Callable[[int], object]:
        """What to call, with the number of the call."""
        raise NotImplementedError


class Forwards(Soak):
    """Forwards of one model: of one shape, of many shapes, with a backward, in inference mode."""

    def __init__(self) -> None:
        about = "forwards of one or many shapes, with and without gradients: no growth of memory"
        super().__init__("soak/forward", about, 500, 4, 600)

    def calls(self, index: int) -> Callable[[int], object]:
        model = models.swapped("sequence", 1)
        inputs = [torch.randn(rows, 32) for rows in range(1, 40)]

        def inference(i: int) -> None:
            with torch.inference_mode():
                model(inputs[7])

        def shapes(i: int) -> None:
            with torch.no_grad():
                model(inputs[i % len(inputs)])

        def training(i: int) -> None:
            model(inputs[i % 3]).sum().backward()

        def graph(i: int) -> None:
            model(inputs[i % 5])

        return (inference, shapes, training, graph)[index % 4]


class Lives(Soak):
    """Whole lives of a model: prepared, trained, squashed, swapped, saved, loaded, copied."""

    def __init__(self) -> None:
        about = "models prepared, trained, squashed, swapped, saved, loaded and dropped: no growth of memory"
        super().__init__("soak/life", about, 50, 1, 60)

    # Classes that torch makes for each parametrized module live in its caches for a while.
    slack_bytes, slack_blocks = 256 * 1024, 1000

    def calls(self, index: int) -> Callable[[int], object]:
        directory = tempfile.TemporaryDirectory()
        path = Path(directory.name) / "model.safetensors"

        def life(i: int) -> None:
            model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16))
            sparsifier = SupermaskSparsifier(0.5, models.BLOCK)
            sparsifier.prepare(model)
            model(torch.ones(3, 32)).sum().backward()
            sparsifier.step()
            if i % 2:
                squash(model)
            else:
                sparsifier.squash_mask()
            swap_to_bsr(model, models.BLOCK, min_sparsity=0.0, fuse_activations=True)
            save_bsr(model, path)
            load_bsr(model, path)
            model.load_state_dict(model.state_dict())
            model(torch.ones(3, 32)).sum().backward()
            assert directory

        return life


SOAK = [Forwards(), Lives()]
