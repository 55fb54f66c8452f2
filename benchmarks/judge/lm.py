"""The question `lm`: a byte-level GPT on the Python sources of the standard library and torch.

Dimensions: B batch, T positions, D width, V 256 byte values.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.judge.cells import Cell, Row, Tick, sweep
from benchmarks.judge.methods import METHODS
from benchmarks.judge.training import Optimization, pruned_blocks, train

VOCABULARY = 256
MASKED = [{"tensor_fqn": f"blocks.*.{name}.weight"} for name in ("proj", "fc1", "fc2")]


# -------------------------------------------------------------------------------------------------
# Data
# -------------------------------------------------------------------------------------------------


def python_sources() -> Iterator[Path]:
    """Python files of the standard library and of torch, in an order that every machine has."""
    for root in (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            if {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
                continue
            if path.is_file() and 500 < path.stat().st_size < 400_000:
                yield path


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on and to validate on, uint8.

    One file in twenty is for validation, chosen by a hash of its name: copies of a file fall on the
    same side.
    """
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in python_sources():
        digest = hashlib.md5(path.name.encode(), usedforsecurity=False).hexdigest()
        sides[int(digest, 16) % 20 == 0].append(path.read_bytes())
    train_bytes, validation_bytes = (b"\0".join(files) for files in sides)
    return (
        torch.frombuffer(bytearray(train_bytes), dtype=torch.uint8),
        torch.frombuffer(bytearray(validation_bytes), dtype=torch.uint8),
    )


def windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """Token ids `(len(starts), length + 1)`: inputs, and targets one to the right."""
    positions = torch.arange(length + 1, device=data.device)
    return data[starts[:, None] + positions].long()


# -------------------------------------------------------------------------------------------------
# Model
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of the model and of what it is trained and judged on.

    Attributes:
        width: of the residual stream.
        layers: how many.
        heads: how many a layer.
        context: bytes the model sees.
        batch: windows a step.
        lr: learning rate.
        validation: bytes the score is the mean over.
    """

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    lr: float
    validation: int


SIZES = {
    "gpu": Size(384, 6, 6, 256, 64, 1e-3, 2_000_000),
    "small": Size(128, 3, 4, 96, 24, 2e-3, 120_000),
    "tiny": Size(32, 1, 2, 32, 4, 2e-3, 2_000),
}
"""`gpu`: 10.7 M parameters; `small`: some minutes a cell on one core; `tiny`: to try things out."""


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x_BTD)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.proj(attended.transpose(1, 2).flatten(2))
        return x_BTD + self.fc2(F.gelu(self.fc1(self.norm2(x_BTD))))


class GPT(nn.Module):
    """A decoder over bytes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # the residual stream keeps its scale over depth
            for linear in (block.proj, block.fc2):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * size.layers))

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(ids_BT) + self.positions.weight[: ids_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


def next_byte_loss(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross entropy in nats a byte."""
    logits_BTV = model(window[:, :-1])
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), window[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: Tensor, size: Size) -> float:
    """Cross entropy on windows spread evenly over `data`."""
    model.eval()
    count = max(1, min(size.validation, len(data)) // size.context)
    starts = torch.linspace(0, len(data) - size.context - 1, count, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=data.device)
    for chosen in starts.long().to(data.device).split(size.batch):
        with torch.autocast(data.device.type, torch.bfloat16, enabled=data.device.type == "cuda"):
            loss = next_byte_loss(model, windows(data, chosen, size.context))
        total += loss.double() * len(chosen)
    return total.item() / count / math.log(2)


# -------------------------------------------------------------------------------------------------
# Question
# -------------------------------------------------------------------------------------------------


@dataclass
class LanguageModel:
    """See :class:`benchmarks.judge.cells.Question`.

    Args:
        size: a name in :data:`SIZES`.
        steps: lengths of training.
        points: pairs of block size and sparsity.
        methods: names in :data:`benchmarks.judge.methods.METHODS`.
        seeds: how many.
    """

    size: str
    steps: tuple[int, ...]
    points: tuple[tuple[int, float], ...]
    methods: tuple[str, ...]
    seeds: int = 3
    name: str = "lm"
    title: str = "Block masks on a language model"
    metric: str = "bits_per_byte"
    unit: str = "bits per byte"
    decimals: int = 4
    higher_is_better: bool = False
    _steps_of: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._steps_of = {f"{self.size}, {steps} steps": steps for steps in self.steps}

    def check(self) -> None:
        """Needs nothing but torch."""

    def cells(self) -> list[Cell]:
        return sweep(list(self._steps_of), self.methods, self.points, self.seeds)

    def work(self, cell: Cell) -> float:
        size, _, rest = cell.setting.partition(", ")
        return int(rest.split()[0]) * SIZES[size].width ** 2 * SIZES[size].layers

    def load(self, device: torch.device) -> None:
        train_bytes, validation_bytes = corpus()
        digest = hashlib.md5(train_bytes.numpy(), usedforsecurity=False).hexdigest()[:6]
        self._data = f"{len(train_bytes)} + {len(validation_bytes)} bytes, {digest}"
        self._train, self._validation = train_bytes.to(device), validation_bytes.to(device)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Random windows, the same for every method."""
        size, data = SIZES[self.size], self._train
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(data) - size.context - 1, (size.batch,), generator=generator)
            yield windows(data, starts.to(data.device, non_blocking=True), size.context)

    def run(self, cell: Cell, tick: Tick) -> Row:
        size, steps = SIZES[self.size], self._steps_of[cell.setting]
        torch.manual_seed(cell.seed)
        model = GPT(size).to(self._train.device)
        loss = train(
            model,
            METHODS[cell.method],
            MASKED,
            cell.sparsity,
            cell.block,
            batches=self.batches(cell.seed),
            loss_fn=next_byte_loss,
            total_steps=steps,
            autocast=self._train.is_cuda,
            optimization=Optimization(lr=size.lr, weight_decay=0.1, betas=(0.9, 0.95)),
            tick=tick,
        )
        return {
            self.metric: round(bits_per_byte(model, self._validation, size), 4),
            "pruned": round(pruned_blocks(model, MASKED, cell.sparsity, cell.block), 4),
            "train": round(loss / math.log(2), 4),
            "data": self._data,
        }
