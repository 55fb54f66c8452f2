"""The API reference: every public name is in it, and the examples of its docstrings run."""

import argparse
import doctest
import functools
import importlib
import importlib.util
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import torchao_superblock
from torchao_superblock import allocate, bsr, pruning, swap_to_bsr
from torchao_superblock.pruning import SupermaskSparsifier

API = Path(__file__).parents[1] / "docs" / "api"
DOCUMENTED = [
    path
    for page in sorted(API.glob("*.md"))
    for path in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


class Checker(doctest.OutputChecker):
    """An example that states no output may print what it likes."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def documented_object(path: str) -> Any:
    """What a page names: a module, or something in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, name = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


class Encoder(nn.Module):
    """Names its MLP weights as the examples' glob expects them."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([block])})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder["layers"][0]["mlp"](x)


class Labelled(nn.Sequential):
    """Takes and gives what models of transformers do."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=super().forward(x))


def tokenized(*texts: Any, **options: Any) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(64, 128), "labels": torch.randint(128, (64,))}


def half_zero(width: int = 128) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    with torch.no_grad():
        model[0].weight[: width // 2] = 0
        model[2].weight[:, : width // 2] = 0
    return model


def flops(call: Callable[[], object]) -> float:
    """Stands in for a clock."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def table_of(model: nn.Module, batches: list[torch.Tensor]) -> Any:
    def loss(output: torch.Tensor, _: Any) -> torch.Tensor:
        return output.square().mean()

    return torchao_superblock.sensitivity(model, batches, loss, [0.5, 0.9], 32, progress=False)


def of_transformers() -> dict[str, Any]:
    """A small model, its data, and a folder of one with zeros."""
    transformers = importlib.import_module("transformers")
    models = importlib.import_module("tests.integrations.transformer_models")
    dense = models.build("llama")
    models.train_and_squash("llama", dense, steps=1)
    dense.save_pretrained("dense_with_zeros")
    tokens = torch.arange(1, 9)
    options = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    return {
        "model": models.build("llama"),
        "sparsifier": SupermaskSparsifier(0.5, blocksize=16),
        "data": [{"input_ids": tokens, "labels": tokens}],
        "args": transformers.TrainingArguments("run", **options),
    }


def of_lightning() -> dict[str, Any]:
    """The library, and a small module that has its data with it."""
    lightning = importlib.import_module("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(128, 128))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(torch.randn(1000, 128))

    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu"}
    trainer = functools.partial(lightning.Trainer, **quiet)
    return {"lightning": types.SimpleNamespace(Trainer=trainer), "module": Module()}


def names_of(path: str) -> dict[str, Any]:
    """What the examples of an object take as given."""
    name = path.rsplit(".", 1)[-1]
    names: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "F": F,
        **{public: getattr(torchao_superblock, public) for public in torchao_superblock.__all__},
    }
    x = torch.randn(16, 128)
    if name.endswith("Sparsifier"):
        names |= {"model": Encoder(), "loader": [x, x], "loss": lambda y: y.square().mean()}
    elif name in ("squash", "plot_block_masks", "swap_to_bsr"):
        model = nn.Sequential(nn.Linear(128, 128))
        sparsifier = SupermaskSparsifier(0.5, blocksize=32)
        sparsifier.prepare(model)
        names |= {"model": model, "sparsifier": sparsifier}
    elif name in ("prune_one_shot", "sensitivity"):
        model = Labelled(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128))
        names |= {"model": model, "tokenizer": tokenized, "texts": [], "batches": [tokenized()]}
    elif name in ("allocate", "plot_sensitivity"):
        model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512))
        batches = [torch.randn(64, 512)]
        names |= {"model": model, "batches": batches, "table": table_of(model, batches)}
        names |= {"x": batches[0], "allocate": functools.partial(allocate, timer=flops)}
    elif name in ("save_bsr", "load_bsr"):
        names |= {"model": half_zero(), "build_model": half_zero}
        swap_to_bsr(names["model"], min_sparsity=0.4)
        torchao_superblock.save_bsr(names["model"], "model.safetensors")
    elif name == "plot_swap_report":
        names |= {"model": half_zero()}
    elif name == "tune":
        linear = nn.Linear(224, 128, device="cuda")
        with torch.no_grad():
            linear.weight[:64] = 0
        names |= {"model": nn.Sequential(linear)}
    elif name == "export":
        names |= {"model": half_zero(), "x": x, "onnxruntime": pytest.importorskip("onnxruntime")}
        swap_to_bsr(names["model"], min_sparsity=0.4)
    elif name == "load_superblock_checkpoint":
        names |= {"build_model": lambda: nn.Sequential(nn.Linear(128, 128))}
        state = {
            f"module.{key}": value for key, value in names["build_model"]().state_dict().items()
        }
        state |= {"module.0.scores": torch.rand(4, 4), "n_averaged": torch.tensor(9)}
        args = argparse.Namespace(sparsity_linear=0.9, sp_linear_tile_size=32)
        torch.save({"model_ema": state, "args": args}, "checkpoint.pth")
    elif name in ("BlockSparseConfig", "SparsifierCallback"):
        names |= of_transformers()
    elif name == "BlockSparsity":
        names |= of_lightning()
    elif name == "sparsify_":
        names |= {"model": half_zero()}
    elif name == "BSRWeight":
        names |= {"linear": half_zero()[0], "x": x}
    return names


def examples() -> list[Any]:
    found = []
    finder = doctest.DocTestFinder(exclude_empty=True)
    for path in DOCUMENTED:
        try:
            documented = documented_object(path)
        except ImportError as error:  # of a library that an integration needs; it says which
            if ".integrations." not in path or "pip install" not in str(error):
                raise
            skip = pytest.mark.skip(reason=str(error))
            found.append(pytest.param(path, None, id=path, marks=skip))
            continue
        for test in finder.find(documented, path):
            if test.examples:
                gpu = [pytest.mark.gpu] if test.name.endswith("tune") else []
                found.append(pytest.param(path, test, id=test.name, marks=gpu))
    return found


@pytest.mark.parametrize(("path", "test"), examples())
def test_the_examples_run(path, test, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    test.globs.update(names_of(test.name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where tune() leaves its finds
    for example in test.examples:
        if example.options.pop(doctest.SKIP, False):
            example.want = (
                ""  # skipped elsewhere because it needs more, or says what another machine says
            )
    told: list[str] = []
    doctest.DocTestRunner(Checker()).run(test, out=told.append)
    assert not told, "".join(told)


def test_it_has_every_public_name():
    documented = {path.rsplit(".", 1)[-1] for path in DOCUMENTED}
    public = {*torchao_superblock.__all__, *bsr.__all__}
    public |= {name for name in pruning.__all__ if name.startswith("Block")}
    assert public <= documented
