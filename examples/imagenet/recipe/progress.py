"""What a run shows while it goes on, and what it leaves: two CSV files and a picture."""

from __future__ import annotations

import csv
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

STEPS = ("step", "epoch", "lr", "loss", "images_per_second")
EPOCHS = ("epoch", "step", "lr", "train_loss", "loss", "acc1", "acc5")
EPOCHS += ("ema_loss", "ema_acc1", "ema_acc5", "sparsity", "images_per_second", "memory_gib")


class Log:
    """A CSV file that a resumed run goes on with.

    Args:
        path: of the file.
        fields: its columns; one is `epoch`.
        epochs: how many are done: later rows, of a run that was interrupted, are dropped.
    """

    def __init__(self, path: Path, fields: tuple[str, ...], epochs: int) -> None:
        self.path, self.fields = path, fields
        rows: list[dict[str, Any]] = []
        if epochs and path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= epochs]
        draft = path.with_name(f".{path.name}.draft")
        with open(draft, "w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(path)

    def add(self, **row: Any) -> None:
        """Appends a row; floats keep all their digits."""
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.fields).writerow(row)

    def rows(self) -> list[dict[str, str]]:
        """All of them, as text."""
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))


class Bar:
    """A line that shows images/s, time left, loss and memory.

    Args:
        total: images of the whole run.
        done: images of the epochs before.
        shown: False on all ranks but the first.
    """

    def __init__(self, total: int, done: int, shown: bool, device: torch.device) -> None:
        self.device = device
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not shown,
            file=sys.stderr,
        )

    def update(self, images: int, **shown: Any) -> None:
        """Goes on by some images."""
        if shown:
            memory = f"{memory_gib(self.device):.1f} GiB"
            self.bar.set_postfix(**shown, memory=memory, refresh=False)
        self.bar.update(images)

    def say(self, text: str) -> None:
        """Prints above the line."""
        if not self.bar.disable:
            tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        """Leaves the line as it is."""
        self.bar.close()


def memory_gib(device: torch.device) -> float:
    """The largest use so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save_curve(rows: list[dict[str, str]], path: Path) -> None:
    """Loss and accuracy over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    lines = (
        (losses, "train_loss", "training", "#8d99ae"),
        (losses, "loss", "test", "#1d4e89"),
        (losses, "ema_loss", "test, average", "#e09f3e"),
        (accuracies, "acc1", "top-1", "#1d4e89"),
        (accuracies, "ema_acc1", "top-1, average", "#e09f3e"),
    )
    for axis, key, label, color in lines:
        points = [(int(row["epoch"]), float(row[key])) for row in rows if row[key]]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=label, color=color)
    for axis, title in ((losses, "loss"), (accuracies, "test accuracy (%)")):
        axis.set(xlabel="epoch", ylabel=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
