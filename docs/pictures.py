"""Draws `docs/sensitivity.png` and `docs/swap_report.png`: a small classifier of digits, pruned in one shot.

Run `python docs/pictures.py`; it takes some minutes on a CPU.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from torchao_superblock import allocate, prune_one_shot, sensitivity, swap_to_bsr
from torchao_superblock.visualize import plot_sensitivity, plot_swap_report


class Block(nn.Module):
    """Attends between the eight rows of a digit, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Classifier(nn.Module):
    """Digits of 8 x 8 pixels -> ten logits."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.places = nn.Parameter(torch.randn(8, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def draw(folder: Path, steps: int = 600, width: int = 128, depth: int = 3) -> None:
    """Trains, measures, prunes and swaps, and writes both pictures into `folder`."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    model = Classifier(width, depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(1500, (128,))  # the last 297 are for testing
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

    def accuracy() -> float:
        with torch.inference_mode():
            return (model.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean().item()

    dense = accuracy()
    config = [{"tensor_fqn": "blocks.*"}]
    batches = list(x[:1500].split(250))
    labels = {id(batch): part for batch, part in zip(batches, y[:1500].split(250), strict=True)}
    table = sensitivity(
        model,
        batches,
        lambda logits, batch: F.cross_entropy(logits, labels[id(batch)]),
        [0.3, 0.5, 0.7, 0.9],
        blocksize=16,
        config=config,
    )
    plot_sensitivity(table).savefig(folder / "sensitivity.png", dpi=110, bbox_inches="tight")
    prune_one_shot(model, batches, 0.5, 16, allocate(table, sparsity_level=0.5))
    pruned = accuracy()
    report = swap_to_bsr(model, min_sparsity=0.3)
    title = (
        f"Half of the blocks pruned in one shot: {dense:.1%} of 297 digits right before, {pruned:.1%} after\n"
        "bars: fraction of zero blocks"
    )
    figure = plot_swap_report(report, title=title)
    figure.savefig(folder / "swap_report.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    draw(Path(__file__).parent)
