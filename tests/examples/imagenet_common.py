"""What the tests of examples/imagenet share: its programs as modules, tiny runs, tiny images."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples" / "imagenet"


def program(name: str) -> ModuleType:
    """`train` or `evaluate`, as it is when it is started in its folder."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    full = f"imagenet_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, FOLDER / f"{name}.py")
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


TINY = "--device cpu -j 0 --data fake --fake-images 24 --fake-classes 3 --model vit_micro"
TINY += " --train-crop-size 8 --opt adamw --lr 1e-2 -b 8 --epochs 2 --print-freq 1"
SPARSE = "--sparsifier magnitude --update-every 1 --sparsity 0.75 --blocksize 16"
SPARSE += " --ramp 0.5 --freeze 1.0"


def train(output: Path, *options: str) -> dict[str, float]:
    """A run of a few steps."""
    arguments = [*TINY.split(), *(word for option in options for word in option.split())]
    return program("train").main([*arguments, "--output-dir", str(output)])


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def losses(output: Path) -> list[str]:
    """Of each step, with all digits."""
    return [row["loss"] for row in rows(output / "log.csv")]


def make_images(folder: Path, per_class: int, classes: tuple[str, ...] = ("dark", "light")) -> None:
    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(per_class):
            pixels = 40 + 150 * i + torch.randint(-20, 20, (14, 16, 3), generator=generator)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{j}.png")
