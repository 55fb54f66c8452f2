"""The code of the guides runs as it stands there, page by page and from top to bottom as in a notebook.

A page with code has an entry in `PAGES`: the names that it takes as given, and what has to hold at its end.
"""

import argparse
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchao_superblock import (
    BSRConv1x1,
    BSRLinear,
    BSRMultiheadAttention,
    SupermaskSparsifier,
    swap_to_bsr,
    swap_to_dense,
)
from torchao_superblock.cli import main as command_line

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

Names = dict[str, Any]


def text_of(page: str) -> str:
    """The page with the sections of other files that it includes."""

    def included(match: re.Match[str]) -> str:
        name, section = match.groups()
        source = (ROOT / name).read_text(encoding="utf-8")
        start, end = (f"<!-- --8<-- [{word}:{section}] -->" for word in ("start", "end"))
        return source[source.index(start) + len(start) : source.index(end)]

    text = (DOCS / page).read_text(encoding="utf-8")
    return re.sub(r'^--8<-- "([^:"]+):(\w+)"$', included, text, flags=re.MULTILINE)


def blocks_of(page: str, language: str) -> list[tuple[str, str, str]]:
    """What stands before each block of a page, its options and its code."""
    fence = rf"((?:<!--[^\n]*-->\n)?)^```{language}([^\n]*)\n(.*?)^```"
    return re.findall(fence, text_of(page), flags=re.DOTALL | re.MULTILINE)


def mlp(width: int = 32, hidden: int = 64, out: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class Classifier(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = mlp(width, hidden, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


def zeros(model: nn.Sequential, rows: int = 32) -> nn.Sequential:
    """With the first hidden features unused: rows, and columns behind them, of zeros."""
    with torch.no_grad():
        model[0].weight[:rows] = 0
        model[2].weight[:, :rows] = 0
    return model


def swapped(names: Names) -> int:
    report = names["report"]
    assert all(entry.reason for entry in report.skipped)
    return len(report.swapped)


# ---------------------------------------------------------------------------------------------------------------------
# One pair a page.


def check_index(names: Names) -> None:
    model, x, labels = names["model"], names["x"], names["labels"]
    assert (model(x).argmax(1) == labels).float().mean() > 0.85
    assert [entry.fqn for entry in names["report"].skipped][-1] == "4"
    assert swapped(names) == 2


def given_train_from_scratch() -> Names:
    loader = [(torch.randn(16, 64), torch.randint(4, (16,))) for _ in range(5)]
    return {"model": Classifier(64, 128), "loader": loader, "epochs": 4, "loss_fn": F.cross_entropy}


def check_train_from_scratch(names: Names) -> None:
    assert Path("masks.png").stat().st_size > 1000
    sparse = [m.sparsity for m in names["model"].modules() if isinstance(m, BSRLinear)]
    assert len(sparse) == swapped(names) and all(level > 0.7 for level in sparse)
    assert {entry.fqn for entry in names["report"].skipped} >= {"head"}


def given_fine_tune() -> Names:
    loader = [(torch.randn(16, 32), None) for _ in range(5)]
    return {"model": mlp(), "loader": loader, "epochs": 4, "blocksize": 8}


def check_fine_tune(names: Names) -> None:
    sparse = [m for m in names["model"].modules() if isinstance(m, BSRLinear)]
    assert len(sparse) == swapped(names)
    assert all(layer.sparsity > 0.7 and layer.values.grad is not None for layer in sparse)


def given_one_shot() -> Names:
    models = {"model": mlp(96, 192, 96), "dense_model": mlp(96, 192, 96)}
    batches = [torch.randn(64, 96) for _ in range(2)]
    return {**models, "batches": batches, "loss_fn": lambda out, x: (out - x).square().mean()}


def check_one_shot(names: Names) -> None:
    assert names["report"].sparsity == pytest.approx(0.5, abs=0.05)
    assert Path("sensitivity.png").stat().st_size > 1000
    assert Path("swap_report.png").stat().st_size > 1000


def check_own_mask(names: Names) -> None:
    (layer,) = names["model"]
    if isinstance(layer, BSRLinear):  # where blocks of 32 are fast
        assert layer.blocksize == (32, 32)
    kept = {entry.fqn: entry.kept for entry in names["sparsifier"].summary().groups}
    assert kept == {"layers.0.weight": 11, "layers.2.weight": 16}


def check_deploy(names: Names) -> None:
    model, x = names["model"], names["x"]
    assert swapped(names) == 2
    assert type(names["vit"].attention) is BSRMultiheadAttention
    assert type(names["resnet"][0]) is BSRConv1x1
    assert names["classifier"][0].blocksize == (64, 64)
    assert '"swapped, padded to 1024x768 (2.4% more)"' in text_of("deploy.md")
    assert names["twin_of"](names["MyLinear"]).bsr is BSRLinear
    torch.testing.assert_close(names["fresh"](x), model(x))
    torch.testing.assert_close(names["served"](x), model(x))
    commands = [
        line.split() for _, _, code in blocks_of("deploy.md", "bash") for line in code.splitlines()
    ]
    assert len(commands) == 3
    for python, m, package, *arguments in commands:
        assert (python, m, package) == ("python", "-m", "torchao_superblock")
        assert command_line(arguments) == 0, arguments
    assert Path("dense.safetensors").is_file()


def given_leaving() -> Names:
    pytest.importorskip("onnxscript", reason="the guide exports to ONNX (the `onnx` extra)")
    model, x = zeros(mlp()).eval(), torch.randn(4, 32)
    dense = model[0].weight.detach().clone()
    swap_to_bsr(model, 8, min_sparsity=0.5)
    assert isinstance(model[0], BSRLinear)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), "model.pt2")
        return {"model": model, "x": x, "out": model(x), "dense": dense}


def check_leaving(names: Names) -> None:
    assert Path("model.onnx").stat().st_size > 1000
    torch.testing.assert_close(names["program"](names["x"]), names["out"])
    assert torch.equal(names["model"][0].weight, names["dense"])


def given_recipe() -> Names:
    model = mlp(128, 256, 128)
    state = {**model.state_dict(), "0.scores": torch.rand(8, 4), "2.scores": torch.rand(4, 8)}
    args = argparse.Namespace(sparsity_linear=0.9, sp_linear_tile_size=32)
    torch.save({"model": state, "args": args}, "published.pth")
    return {"model": model, "path": "published.pth"}


def check_recipe(names: Names) -> None:
    assert swapped(names) == sum(isinstance(m, BSRLinear) for m in names["model"].modules())
    swap_to_dense(names["model"])
    assert [(names["model"][i].weight == 0).float().mean() for i in (0, 2)] == [0.875, 0.875]


def given_transformers() -> Names:
    pytest.importorskip("transformers", reason="needs the `transformers` extra")
    from tests.integrations.transformer_models import build, inputs_of, train_and_squash

    model = build("llama")
    train_and_squash("llama", model)
    model.save_pretrained("dense")
    tokens = inputs_of("llama")["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in tokens]
    models = {"model": model, "dense_model": build("llama"), "gpt2": build("gpt2")}
    return {**models, "tokens": tokens, "data": data}


def check_transformers(names: Names) -> None:
    assert swapped(names) == 14
    assert len(names["model"].hf_quantizer.report.swapped) == 14
    assert Path("run/checkpoint-4/sparsifier.pt").is_file()
    assert Path("dense/model.safetensors").is_file()
    groups = names["sparsifier"].summary().groups
    assert len(groups) == 8 and not any(group.swap_obstacle for group in groups)


def given_peft() -> Names:
    pytest.importorskip("peft", reason="needs the `peft` extra")
    model, base = zeros(mlp()), zeros(mlp())
    for one in (model, base):
        assert swap_to_bsr(one, 8, min_sparsity=0.5).swapped
    return {"torch": torch, "swapped": model, "base": base, "loader": [torch.randn(4, 32)] * 2}


def check_peft(names: Names) -> None:
    assert isinstance(names["merged"][0], BSRLinear)


def check_write_a_sparsifier(names: Names) -> None:
    for linear in (names["model"][0], names["model"][2]):
        blocks = linear.weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).abs().sum((1, 3))
        assert (blocks > 0).float().mean() == 0.25


def given_lightning() -> Names:
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.randn(64, 64), torch.randint(10, (64,)))
    return {"loader": DataLoader(data, 16)}


def check_lightning(names: Names) -> None:
    layer = names["module"].layers[0]
    assert (layer.weight if type(layer) is nn.Linear else layer.to_dense()).eq(0).any()


def check_torchao(names: Names) -> None:
    model = names["model"]
    assert isinstance(model[0], BSRLinear) and isinstance(model[2], BSRLinear)
    assert type(model[3].weight).__name__ == "Int8Tensor"


PAGES: dict[str, tuple[Callable[[], Names], Callable[[Names], None]]] = {
    "index.md": (dict, check_index),
    "train_from_scratch.md": (given_train_from_scratch, check_train_from_scratch),
    "fine_tune.md": (given_fine_tune, check_fine_tune),
    "one_shot.md": (given_one_shot, check_one_shot),
    "own_mask.md": (
        lambda: {"pruned": zeros(mlp()), "dense": Classifier(32, 64), "blocksize": 8},
        check_own_mask,
    ),
    "deploy.md": (
        lambda: {
            "model": zeros(mlp(64, 2048, 64), 1984),  # enough for any backend to pay
            "build_model": lambda: mlp(64, 2048, 64),
            "x": torch.randn(8, 64),
            "width": 64,
            "sparsifier": SupermaskSparsifier(0.9, 32),
            "resnet": nn.Sequential(nn.Conv2d(64, 640, 1), nn.Conv2d(640, 64, 3)),
            "MyLinear": type("MyLinear", (nn.Linear,), {"forward": nn.Linear.forward}),
            "vit": nn.ModuleDict({"attention": nn.MultiheadAttention(256, 4, batch_first=True)}),
        },
        check_deploy,
    ),
    "transformers.md": (given_transformers, check_transformers),
    "peft.md": (given_peft, check_peft),
    "leaving.md": (given_leaving, check_leaving),
    "recipe.md": (given_recipe, check_recipe),
    "lightning.md": (given_lightning, check_lightning),
    "torchao.md": (
        lambda: {"model": nn.Sequential(*zeros(mlp(64, 2048, 64), 1984), nn.Linear(64, 64))},
        check_torchao,
    ),
    "write_a_sparsifier.md": (dict, check_write_a_sparsifier),
    "write_a_backend.md": (dict, lambda names: None),
}


def run(page: str, gpu: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    monkeypatch.chdir(folder)
    names = PAGES[page][0]()
    for i, (before, _, code) in enumerate(blocks_of(page, "python")):
        if gpu or "<!-- gpu -->" not in before:
            exec(compile(code, f"{page}, block {i}", "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    for name in ("matplotlib", "rich", "onnxscript", "torchao", "lightning"):  # of the extras
        pytest.importorskip(name)
    PAGES[page][1](run(page, False, tmp_path, monkeypatch))


@pytest.mark.gpu
def test_the_code_for_gpus_runs(tmp_path, monkeypatch):
    pages = [page for page in PAGES if "<!-- gpu -->" in text_of(page)]
    assert pages == ["deploy.md"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where tune() leaves its finds
    names = run("deploy.md", True, tmp_path, monkeypatch)
    model, token, graph, out = (names[name] for name in ("model", "token", "graph", "out"))
    with torch.inference_mode():
        token.copy_(torch.randn_like(token))
        graph.replay()
        error = (model(token) - out).float().norm() / out.float().norm()
    assert error < 1e-2  # other tiles, since tune()


def test_the_commands_of_a_page_run(tmp_path):
    """`torchrun` on two processes of the CPU, in the files that the page says."""
    for _, options, code in blocks_of("distribute.md", "python"):
        (title,) = re.findall(r'title="(\S+)"', options)
        # Leaving the usual way, a thread of gloo that outlives its group aborts a run now and then.
        leave = "\nimport os\nimport sys\nsys.stdout.flush()\nos._exit(0)\n"
        (tmp_path / title).write_text(code + leave, encoding="utf-8")
    commands = [code.split() for _, _, code in blocks_of("distribute.md", "bash")]
    assert [command[-1] for command in commands] == ["train.py", "train_sharded.py"]
    for program, *arguments in commands:
        assert program == "torchrun"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        # Without a compiled kernel dense is faster here, and the report says so.
        assert len(re.findall(r"16x16 +79\.7% ", done.stdout)) == 2, done.stdout


def test_no_code_is_left_out():
    """Every block is one that a test runs: here, or of the README, whose commands CI runs."""
    commands = re.findall(
        r"^```bash\n(.*?)^```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    for path in sorted(DOCS.rglob("*.md")):
        page = path.relative_to(DOCS).as_posix()
        text = text_of(page)
        languages = re.findall(r"^```(\w*)[^\n]*\n.*?^```", text, re.DOTALL | re.MULTILINE)
        assert set(languages) <= {"python", "bash", "text"}, page
        assert text.count("```python") == len(blocks_of(page, "python")), page
        if page in ("deploy.md", "distribute.md", "recipe.md"):
            # The commands of the last one are for days and GPUs; tests/examples/test_imagenet.py looks at them.
            assert page == "distribute.md" or page in PAGES
            continue
        assert page in PAGES or "python" not in languages, page
        assert all(code in commands for _, _, code in blocks_of(page, "bash")), page


def test_the_pictures_can_be_drawn_again(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    runpy.run_path(str(DOCS / "pictures.py"))["draw"](tmp_path, steps=1, width=32, depth=1)
    for name in ("sensitivity.png", "swap_report.png"):
        assert (tmp_path / name).stat().st_size > 1000
        assert (DOCS / name).is_file()
