"""Images and labels: what to read, how to augment it, and in which order.

Augmentation draws its random numbers from (seed, epoch, place in the epoch), not from a generator that runs along. So
an epoch is the same whatever the number of loader processes, and after a resume.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate
from torchvision import datasets, models
from torchvision.transforms import InterpolationMode, v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------------
# Transforms
# ------------------------------------------------------------------------------------------------


def train_transform(args: argparse.Namespace) -> v2.Transform:
    """Crop, flip, one of the automatic augmentations, normalise, erase."""
    interpolation = InterpolationMode(args.interpolation)
    steps: list[Any] = [
        v2.RandomResizedCrop(
            args.train_crop_size,
            scale=(args.crop_scale, 1.0),
            interpolation=interpolation,
            antialias=True,
        ),
        v2.RandomHorizontalFlip(args.hflip_prob),
    ]
    if args.auto_augment == "ra":
        steps.append(v2.RandAugment(magnitude=args.ra_magnitude, interpolation=interpolation))
    elif args.auto_augment == "ta_wide":
        steps.append(v2.TrivialAugmentWide(interpolation=interpolation))
    elif args.auto_augment == "augmix":
        steps.append(v2.AugMix(severity=args.augmix_severity, interpolation=interpolation))
    elif args.auto_augment is not None:
        policy = v2.AutoAugmentPolicy(args.auto_augment)
        steps.append(v2.AutoAugment(policy, interpolation=interpolation))
    return v2.Compose([*steps, *_to_floats(), v2.RandomErasing(args.random_erase)])


def val_transform(args: argparse.Namespace) -> Any:
    """Resize, crop, normalise; the weights' own where these are only tested."""
    if args.weights and args.test_only:
        return pretrained(args.model, args.weights).transforms()
    interpolation = InterpolationMode(args.interpolation)
    return v2.Compose(
        [
            v2.Resize(args.val_resize_size, interpolation=interpolation, antialias=True),
            v2.CenterCrop(args.val_crop_size),
            *_to_floats(),
        ]
    )


def _to_floats() -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def pretrained(model: str, name: str) -> models.WeightsEnum:
    """`IMAGENET1K_V1`, `DEFAULT` or the whole name -> torchvision's weights.

    Raises:
        SystemExit: for a name that torchvision does not have.
    """
    try:
        if "." in name:
            return models.get_weight(name)
        return models.get_model_weights(model)[name]
    except (KeyError, ValueError, AttributeError) as error:
        raise SystemExit(f"--weights {name}: torchvision has no such weights of {model}") from error


# ------------------------------------------------------------------------------------------------
# Data sets
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images to train and to test on, and the names of their classes."""

    train: Dataset[Any]
    val: Dataset[Any]
    classes: list[str]


class Digits(Dataset[Any]):
    """scikit-learn's digits, 8 x 8 pixels, as PIL images."""

    def __init__(self, train: bool, transform: Any) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        self.images, self.labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = torch.tensor(self.images[index]).view(1, 8, 8).mul(255 / 16).to(torch.uint8)
        image = v2.functional.to_pil_image(pixels.expand(3, -1, -1))
        return self.transform(image), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


def load(args: argparse.Namespace) -> Images:
    """The data sets that the options name.

    Raises:
        SystemExit: for a folder that is missing, empty, or has other classes in val than in train.
    """
    train, val = train_transform(args), val_transform(args)
    if args.data == "digits":
        return Images(Digits(True, train), Digits(False, val), [str(i) for i in range(10)])
    if args.data == "fake":
        count, classes = args.fake_images, args.fake_classes
        shape = (3, args.train_crop_size, args.train_crop_size)
        return Images(
            datasets.FakeData(count, shape, classes, train),
            datasets.FakeData(-(-count // 4), shape, classes, val, random_offset=count),
            [str(i) for i in range(classes)],
        )
    trained = _image_folder(args.data_path, "train", train)
    tested = _image_folder(args.data_path, "val", val)
    if trained.classes != tested.classes:
        differing = sorted(set(trained.classes) ^ set(tested.classes))
        raise SystemExit(
            f"--data-path {args.data_path}: train has {len(trained.classes)} classes and val "
            f"{len(tested.classes)}, and they have to be the same; in one of them only: "
            f"{', '.join(differing[:5])}"
        )
    return Images(trained, tested, trained.classes)


def _image_folder(root: Path, part: str, transform: Any) -> datasets.ImageFolder:
    folder = root / part
    if not folder.is_dir():
        raise SystemExit(f"--data-path {root}: there is no folder {folder}")
    try:
        return datasets.ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        raise SystemExit(
            f"--data-path {root}: {folder} needs one folder for each class, with images in it ({error})"
        ) from error


# ------------------------------------------------------------------------------------------------
# Order and batches
# ------------------------------------------------------------------------------------------------


class Draws(Sampler[tuple[int, int]]):
    """What a rank draws in an epoch: an index, and a seed for what happens to the image."""

    def __init__(self, sampler: Any, seed: int, rank: int, size: int) -> None:
        self.sampler, self.seed, self.rank, self.size = sampler, seed, rank, size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another order."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for i, index in enumerate(self.sampler):
            place = i * self.size + self.rank
            yield index, random.Random(f"{self.seed} {self.epoch} {place}").getrandbits(63)

    def __len__(self) -> int:
        return len(self.sampler)


class Seeded(Dataset[Any]):
    """Hands the images out by (index, seed), together with that seed."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Any, int, int]:
        index, seed = draw
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, label = self.images[index]
        return image, label, seed


class MixedBatch:
    """Collates, and mixes images and labels of the batch where that is asked for."""

    def __init__(self, args: argparse.Namespace, classes: int) -> None:
        kinds = ((v2.MixUp, args.mixup_alpha), (v2.CutMix, args.cutmix_alpha))
        mixers = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0]
        self.mix = v2.RandomChoice(mixers) if mixers else None

    def __call__(self, batch: list[tuple[Any, int, int]]) -> tuple[Tensor, Tensor]:
        images, labels = default_collate([sample[:2] for sample in batch])
        if self.mix is None:
            return images, labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch[0][2])
            return self.mix(images, labels)


def train_loader(
    images: Images, args: argparse.Namespace, rank: int, size: int, pin: bool
) -> tuple[DataLoader[Any], Draws]:
    """The batches of a rank, all of one length, and what orders them.

    Raises:
        SystemExit: if the ranks cannot share a batch evenly, or there is not a whole one.
    """
    if args.batch_size % size:
        raise SystemExit(
            f"--batch-size {args.batch_size} is that of all {size} processes together, and {size} does not divide it"
        )
    if args.ra_sampler:
        repeats = args.ra_reps
        sampler = RepeatAugSampler(images.train, num_replicas=size, rank=rank, num_repeats=repeats)
    else:
        sampler = DistributedSampler(images.train, size, rank, seed=args.seed, drop_last=True)
    draws = Draws(sampler, args.seed, rank, size)
    loader = DataLoader(
        Seeded(images.train),
        batch_size=args.batch_size // size,
        sampler=draws,
        num_workers=args.workers,
        pin_memory=pin,
        collate_fn=MixedBatch(args, len(images.classes)),
        drop_last=True,
        persistent_workers=args.workers > 0,
        generator=torch.Generator(),  # the workers' seeds, not of the run's own generator
    )
    if len(loader) < args.accumulation_steps:
        raise SystemExit(
            f"--batch-size {args.batch_size} x --accumulation-steps {args.accumulation_steps}: the "
            f"{len(draws) * size} images of an epoch do not make one optimizer step"
        )
    return loader, draws


def val_loader(
    images: Images, args: argparse.Namespace, rank: int, size: int, pin: bool
) -> DataLoader[Any]:
    """Every `size`-th image from `rank` on. All ranks have equally many: the last ones begin anew.

    Image `i` of a rank is a repeated one where `rank + i * size >= len(images.val)`.
    """
    count = len(images.val)  # type: ignore[arg-type]
    return DataLoader(
        images.val,
        batch_size=max(1, args.batch_size // size),
        sampler=[i % count for i in range(rank, -(-count // size) * size, size)],
        num_workers=args.workers,
        pin_memory=pin,
        generator=torch.Generator(),
    )
