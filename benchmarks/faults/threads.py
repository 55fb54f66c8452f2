"""Threads that share a model."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from benchmarks.faults import models
from benchmarks.faults.case import Fault, Kind
from torchao_superblock import BSRLinear


def random_layer(width: int, block: int, seed: int) -> BSRLinear:
    """A layer that stores half of its blocks, whatever the seed."""
    torch.default_generator.manual_seed(seed)
    linear = nn.Linear(width, width)
    kept = torch.rand(width // block, width // block).flatten().argsort()
    mask = (kept < kept.numel() // 2).view(width // block, -1)
    with torch.no_grad():
        linear.weight *= mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return BSRLinear.from_dense(linear, block)


class LoadWhileRunning(Kind):
    """One thread loads patterns of as many blocks, others run the layer forward and backward."""

    name = "threads/load"
    about = (
        "load_state_dict in one thread while others run forward and backward: nothing crashes, and then the layer "
        "computes what was loaded last"
    )
    short, long = 3, 60
    forwards = 100
    patience = 40.0  # a broken heap may also hang

    def run(self, index: int) -> str:
        source = self.random(index)
        torch.set_num_threads(source.choice([1, 2]))
        width, block, rows = source.choice([(512, 16, 256), (256, 8, 64), (128, 16, 300)])
        layers = [random_layer(width, block, seed) for seed in (1, 2, 3)]
        states = [layer.state_dict() for layer in layers[1:]]
        x = torch.randn(rows, width)
        expected = [layer(x) for layer in layers[1:]]
        shared, errors = layers[0], []

        def forward(train: bool) -> None:
            for _ in range(self.forwards):
                try:
                    with torch.set_grad_enabled(train):
                        y = shared(x)
                    if train:
                        y.sum().backward()
                except (RuntimeError, ValueError):
                    continue  # half of the old index and half of the new one: refused
                except BaseException as error:
                    errors.append(error)
                    return

        count = source.choice([1, 2, 3])
        threads = [threading.Thread(target=forward, args=(i == 2,)) for i in range(count)]
        for thread in threads:
            thread.start()
        loads = 0
        while loads == 0 or any(thread.is_alive() for thread in threads):
            shared.load_state_dict(states[loads % 2])
            loads += 1
        if errors:
            raise Fault(f"a forward raises {type(errors[0]).__name__}", errors[0])
        if not torch.allclose(shared(x), expected[(loads - 1) % 2], atol=1e-5):
            raise Fault("another model after loading", f"{width}, block {block}")
        return "right"


class LoadWhileRunningSanitized(LoadWhileRunning):
    """The same on the kernel built with AddressSanitizer."""

    name = "threads/load-sanitized"
    about = "the same under AddressSanitizer: nothing is read or written out of bounds"
    short, long = 2, 30
    sanitizer = True
    forwards = 30


class ForwardTogether(Kind):
    """Several threads use one model, each with inputs of its own shapes."""

    name = "threads/forward"
    about = (
        "forwards and backwards of one model in several threads at once: each gets its own results"
    )
    short, long = 4, 100

    def run(self, index: int) -> str:
        source = self.random(index)
        torch.set_num_threads(source.choice([1, 2]))
        model = models.swapped("sequence", 1)
        inputs = [torch.randn(source.choice([1, 3, 40]), 32, requires_grad=True) for _ in range(4)]
        expected = [self._both(model, x) for x in inputs]
        wrong: list[str] = []

        def work(x: Tensor, right: tuple[Tensor, Tensor]) -> None:
            for _ in range(20):
                try:
                    together = zip(self._both(model, x), right, strict=True)
                    if not all(torch.allclose(a, b, atol=1e-5) for a, b in together):
                        wrong.append("other numbers")
                except Exception as error:
                    wrong.append(repr(error))

        threads = [
            threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            raise Fault("threads disturb each other", wrong[0])
        return "right"

    @staticmethod
    def _both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = model(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]


THREADS = [LoadWhileRunning(), LoadWhileRunningSanitized(), ForwardTogether()]
