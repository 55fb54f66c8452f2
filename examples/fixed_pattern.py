"""Ramp, freeze, swap, and train on: from the freeze on a training step multiplies only the stored blocks.

    python examples/fixed_pattern.py             # scikit-learn's digits, half a minute on a CPU
    python examples/fixed_pattern.py --epochs 4  # short mode: does everything run?

1. A dense network becomes sparse over the first part of the training, and its pattern freezes.
2. There the masks are squashed and the layers swapped, with the optimizer: it goes on with the stored
   blocks and their state, and so does the schedule.
3. The second part of the training runs on `BSRLinear` layers.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from torchao_superblock import SupermaskSparsifier, swap_to_bsr

try:
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"this example needs {error.name}: pip install 'torchao_superblock[examples]' "
        "(in a clone: pip install -e '.[examples]')"
    ) from error


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, and returns the test accuracy before the swap, after it and at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--blocksize", type=int, default=16)
    options = parser.parse_args(arguments)
    if options.epochs < 3:
        parser.error(
            f"--epochs {options.epochs}: the ramp, the freeze and the rest need at least 3"
        )
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    test, train = order[:400], order[400:]

    model = nn.Sequential(
        nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)
    )
    steps_per_epoch = len(train) // 64
    total = options.epochs * steps_per_epoch
    freeze = total // 2
    sparsifier = SupermaskSparsifier(
        options.sparsity, options.blocksize, ramp_steps=int(0.4 * total), freeze_step=freeze
    )
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    weights = [layer.parametrizations.weight.original for layer in (model[0], model[2])]
    others = [p for p in model.parameters() if all(p is not weight for weight in weights)]
    groups = [
        {"params": weights, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},  # biases, scores, and the small last layer
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

    result: dict[str, float] = {}
    with tqdm(total=total, unit="step") as progress:
        for step in range(total):
            batch = train[torch.randint(len(train), (64,))]
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step < freeze:
                sparsifier.step()
            if step == freeze - 1:
                result["masked"] = accuracy(model, images[test], labels[test])
                # The squash multiplies the weights by the mask's gain; Adam's steps are to grow as much.
                gain = sparsifier.summary().groups[0].gain
                optimizer.param_groups[0]["lr"] *= gain
                optimizer.param_groups[0]["weight_decay"] /= gain
                schedule.base_lrs[0] *= gain
                sparsifier.squash_mask()
                print(swap_to_bsr(model, optimizer=optimizer))
                result["swapped"] = accuracy(model, images[test], labels[test])
            progress.set_postfix(loss=f"{loss.item():.3f}")
            progress.update()
    result["end"] = accuracy(model, images[test], labels[test])
    print(
        f"test accuracy when the pattern froze {result['masked']:.1%}, swapped {result['swapped']:.1%}, "
        f"at the end {result['end']:.1%}"
    )
    return result


if __name__ == "__main__":
    main()
