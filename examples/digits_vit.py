"""Train a vision transformer with learned block masks, then make it faster than dense.

    python examples/digits_vit.py                          # scikit-learn's digits, about a minute
    python examples/digits_vit.py --sparsity 0.9 --blocksize 16
    python examples/digits_vit.py --data-path my_images/   # one folder for each class
    python examples/digits_vit.py --epochs 1               # short mode: does everything run?

What happens, in the order of the code in `main`:

1. A torchvision VisionTransformer gets a block mask on every MLP weight.
2. It trains from scratch, from dense to sparse: over 40 % of the steps more and more blocks go, the
   ones that training needs least; from 70 % on the masks stay.
3. `squash_mask` folds the masks: ordinary linear layers whose pruned blocks are zero.
4. `swap_to_bsr` replaces them by layers that store and multiply only the other blocks.

The test accuracy after 2, 3 and 4 is the same. Then dense and BSR run side by side for their
latency, and the pictures are saved: accuracy over time, and the block mask of every layer.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from torchao_superblock import SupermaskSparsifier, backends, swap_to_bsr
from torchao_superblock.visualize import plot_block_masks

try:
    import torchvision
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"this example needs {error.name}: pip install 'torchao_superblock[examples]' "
        "(in a clone: pip install -e '.[examples]')"
    ) from error

MLP_WEIGHTS = "encoder.layers.*.mlp.*.weight"


# ------------------------------------------------------------------------------------------------
# Data and model
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Images to train and to test on.

    Attributes:
        train: pairs of an image (3, size, size) and a class.
        test: likewise.
        classes: how many.
        image_size: pixels along each side.
        patch_size: pixels along each side of a patch.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    classes: int
    image_size: int
    patch_size: int


def load_digits_data(seed: int) -> Data:
    """scikit-learn's digits: 1797 real 8 x 8 images, a fifth of each class kept for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    images = (images / 16 - 0.3) / 0.38
    labels = torch.tensor(labels)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, stratify=labels, random_state=seed
    )
    return Data(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        classes=10,
        image_size=8,
        patch_size=4,
    )


def load_folder_data(path: Path, image_size: int, seed: int) -> Data:
    """An ImageFolder: `path/train` and `path/val` if there are such folders, else a split of `path`."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.Resize((image_size, image_size)),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    if not path.is_dir():
        raise SystemExit(f"--data-path {path}: no such folder")

    def image_folder(folder: Path) -> datasets.ImageFolder:
        try:
            return datasets.ImageFolder(str(folder), transform)
        except FileNotFoundError as error:
            raise SystemExit(
                f"--data-path {folder}: needs one folder for each class, with images in it ({error})"
            ) from error

    if (path / "train").is_dir() and (path / "val").is_dir():
        train: Dataset[Any] = image_folder(path / "train")
        test: Dataset[Any] = image_folder(path / "val")
        classes = train.classes  # type: ignore[attr-defined]
        if classes != test.classes:  # type: ignore[attr-defined]
            raise SystemExit(f"--data-path {path}: train and val have different classes")
    else:
        images = image_folder(path)
        classes = images.classes
        if len(images) < 2:
            raise SystemExit(f"--data-path {path}: needs at least two images, found {len(images)}")
        count = max(1, len(images) // 5)
        generator = torch.Generator().manual_seed(seed)
        train, test = random_split(images, [len(images) - count, count], generator=generator)
    return Data(train, test, len(classes), image_size, patch_size=image_size // 8)


def build_model(data: Data) -> nn.Module:
    """A small VisionTransformer: 4 layers of width 256, MLPs of width 1024."""
    return torchvision.models.VisionTransformer(
        image_size=data.image_size,
        patch_size=data.patch_size,
        num_layers=4,
        num_heads=4,
        hidden_dim=256,
        mlp_dim=1024,
        num_classes=data.classes,
    )


# ------------------------------------------------------------------------------------------------
# Training and testing
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, images: Dataset[Any], device: torch.device) -> tuple[Tensor, float]:
    """Logits of all images, on the CPU, and the accuracy."""
    model.eval()
    logits, classes = [], []
    for x, y in DataLoader(images, batch_size=512):
        logits.append(model(x.to(device)).cpu())
        classes.append(y)
    scores = torch.cat(logits)
    return scores, (scores.argmax(dim=1) == torch.cat(classes)).float().mean().item()


def training_steps(data: Data, arguments: argparse.Namespace) -> int:
    """Steps of the optimizer in the whole training."""
    return arguments.epochs * math.ceil(len(data.train) / arguments.batch_size)  # type: ignore[arg-type]


def train(
    model: nn.Module,
    parameters: Any,
    data: Data,
    arguments: argparse.Namespace,
    device: torch.device,
    after_step: Callable[[], None],
    title: str,
) -> list[float]:
    """Trains with AdamW, a warm-up and a cosine, and returns the test accuracy after each epoch."""
    generator = torch.Generator().manual_seed(arguments.seed)
    loader = DataLoader(
        data.train, batch_size=arguments.batch_size, shuffle=True, generator=generator
    )
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate)
    steps = training_steps(data, arguments)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.learning_rate, total_steps=max(2, steps), pct_start=0.2
    )
    accuracies: list[float] = []
    with tqdm(total=steps, desc=title, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(arguments.epochs):
            model.train()
            for x, y in loader:
                loss = F.cross_entropy(model(x.to(device)), y.to(device), label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                after_step()
                bar.update()
            accuracies.append(predict(model, data.test, device)[1])
            bar.set_postfix(
                epoch=epoch + 1, loss=f"{loss.item():.3f}", test=f"{accuracies[-1]:.1%}"
            )
    return accuracies


# ------------------------------------------------------------------------------------------------
# Latency, sizes, pictures
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def latency(
    models: dict[str, nn.Module], x: Tensor, seconds: float = 4.0
) -> dict[str, list[float]]:
    """Seconds of a forward for each model, taken in turns so that a noisy machine is fair."""

    def once(model: nn.Module) -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for model in models.values():
        model.eval()
        for _ in range(2):
            once(model)
    times: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, model in models.items():
            times[name].append(once(model))
    return times


def weight_bytes(model: nn.Module, part: str = "") -> int:
    """Bytes of the parameters and buffers whose name contains `part`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.nbytes for name, tensor in tensors if part in name)


def save_accuracy_curve(curves: dict[str, list[float]], path: Path) -> None:
    """Test accuracy over epochs, one line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (name, accuracies), color in zip(curves.items(), ("#1d4e89", "#e09f3e"), strict=False):
        epochs = range(1, len(accuracies) + 1)
        percent = [100 * accuracy for accuracy in accuracies]
        label = f"{name}: {percent[-1]:.1f} %"
        axis.plot(epochs, percent, "o-", markersize=3, color=color, label=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("epoch")
    axis.set_ylabel("test accuracy (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6")
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


# ------------------------------------------------------------------------------------------------
# The whole path
# ------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sparsity", type=float, default=0.8, help="fraction of blocks pruned (%(default)s)")
    add("--blocksize", type=int, default=32, help="side of a block (%(default)s)")
    add("--epochs", type=int, default=15, help="%(default)s; 1 only shows that everything runs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    add("--data-path", type=Path, help="an ImageFolder to train on instead of the digits")
    add("--image-size", type=int, default=64, help="of --data-path's images (%(default)s)")
    add("--output-dir", type=Path, default=Path("output/digits_vit"), help="%(default)s")
    add("--compare-dense", action="store_true", help="train the dense twin too, report the gap")
    add("--batch-size", type=int, default=64, help="of training (%(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="%(default)s")
    add("--seed", type=int, default=0, help="%(default)s; two runs of a seed agree")
    add("--latency-seconds", type=float, default=4.0, help="spent on timing (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    if arguments.image_size % 8 or arguments.image_size < 8:
        parser.error("--image-size must be a multiple of 8: an image is cut into 8 x 8 patches")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example and returns what it measured, by name."""
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device)
    started = time.perf_counter()
    try:  # before the training, not after it
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--output-dir {arguments.output_dir}: {error}") from error
    if arguments.data_path is None:
        data = load_digits_data(arguments.seed)
    else:
        data = load_folder_data(arguments.data_path, arguments.image_size, arguments.seed)
    print(
        f"{len(data.train)} training and {len(data.test)} test images, {data.classes} classes; "  # type: ignore[arg-type]
        f"{device}, torch {torch.__version__}"
    )

    # 1. Block masks on the MLP weights.
    torch.manual_seed(arguments.seed)
    model = build_model(data).to(device)
    twin = copy.deepcopy(model) if arguments.compare_dense else None
    steps = training_steps(data, arguments)
    sparsifier = SupermaskSparsifier(
        sparsity_level=arguments.sparsity,
        blocksize=arguments.blocksize,
        ramp_steps=max(1, round(0.4 * steps)),
        freeze_step=max(1, round(0.7 * steps)),
    )
    sparsifier.prepare(model, config=[{"tensor_fqn": MLP_WEIGHTS}])
    print(sparsifier.summary())

    # 2. Train weights and masks together: sparsifier.step() after each step of the optimizer.
    parameters = sparsifier.param_groups(model, weight_decay=0.05)
    curves = {
        f"{arguments.sparsity:.0%} of the blocks pruned": train(
            model, parameters, data, arguments, device, sparsifier.step, "masked"
        )
    }
    masked_logits, masked_accuracy = predict(model, data.test, device)
    masks_picture = plot_block_masks(model)

    # 3. Fold the masks into the weights.
    sparsifier.squash_mask()
    squashed_logits, squashed_accuracy = predict(model, data.test, device)
    dense = copy.deepcopy(model)

    # 4. Swap whatever has blocks of zeros. Without min_sparsity: only where it is known to pay.
    # This model is not trained any further, so hidden features without a use can go.
    report = swap_to_bsr(
        model,
        arguments.blocksize,
        min_sparsity=0.01,
        fuse_activations=True,
        drop_dead_features=True,
    )
    swapped_logits, swapped_accuracy = predict(model, data.test, device)
    print(report)
    if not report.swapped:
        print("nothing was swapped (see why above): what is called BSR below is dense")

    print("\ntest accuracy")
    print(f"  with masks      {masked_accuracy:.2%}")
    print(f"  after squash    {squashed_accuracy:.2%}")
    print(f"  after the swap  {swapped_accuracy:.2%}")
    folding = relative_change(masked_logits, squashed_logits)
    swapping = relative_change(squashed_logits, swapped_logits)
    print(
        f"  relative change of the logits: {folding:.0e} by the squash, {swapping:.0e} by the swap"
    )
    if not (folding < 1e-4 and swapping < 1e-4):
        raise SystemExit("the three models should compute the same; please report this")

    results: dict[str, Any] = {
        "masked_accuracy": masked_accuracy,
        "squashed_accuracy": squashed_accuracy,
        "swapped_accuracy": swapped_accuracy,
        "curve": next(iter(curves.values())),
        "report": report,
    }
    if twin is not None:
        torch.manual_seed(arguments.seed)
        parameters = [p for p in twin.parameters() if p.requires_grad]
        curves["dense"] = train(twin, parameters, data, arguments, device, lambda: None, "dense")
        results["dense_accuracy"] = curves["dense"][-1]
        gap = results["dense_accuracy"] - swapped_accuracy
        results["accuracy_gap"] = gap
        print(
            f"  dense twin      {results['dense_accuracy']:.2%} "
            f"(dense minus sparse: {gap * 100:+.2f} points)"
        )

    count = min(256, len(data.test))  # type: ignore[arg-type]
    batch = torch.stack([data.test[i][0] for i in range(count)]).to(device)
    times = latency({"dense": dense, "BSR": model}, batch, arguments.latency_seconds)
    ratios = [a / b for a, b in zip(times["dense"], times["BSR"], strict=True)]
    results["speedup"] = statistics.median(ratios)
    print(f"\nlatency of {len(batch)} images ({backend_line(device)})")
    for name, values in times.items():
        print(f"  {name:<15} {statistics.median(values) * 1e3:.1f} ms")
    print(f"  BSR is {results['speedup']:.2f}x as fast as dense (median over {len(ratios)} pairs)")

    print("\nweights")
    for what, part in (("MLP layers", ".mlp."), ("whole model", "")):
        before, after = weight_bytes(dense, part), weight_bytes(model, part)
        results[f"bytes {what}"] = (before, after)
        print(
            f"  {what:<15} {before / 1e6:.2f} MB dense, {after / 1e6:.2f} MB BSR "
            f"({before / after:.1f}x smaller)"
        )

    pictures = [arguments.output_dir / "accuracy.png", arguments.output_dir / "masks.png"]
    save_accuracy_curve(curves, pictures[0])
    masks_picture.savefig(pictures[1], dpi=150)
    results["pictures"] = pictures
    print(f"\nsaved {' and '.join(map(str, pictures))}")
    print(f"done in {time.perf_counter() - started:.0f} s")
    return results


def relative_change(before: Tensor, after: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((after.double() - before.double()).norm() / before.double().norm())


def backend_line(device: torch.device) -> str:
    """Which kernels ran."""
    info = backends().get(device.type, {})
    return f"kernels: {info.get('name', 'unknown')}"


if __name__ == "__main__":
    main(sys.argv[1:])
