"""What the README promises runs as it stands there."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


class TinyEncoder(nn.Module):
    """Names its MLP weights as the usage's glob expects them."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([block])})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder["layers"][0]["mlp"](x)


def test_the_usage_runs(capsys):
    model = TinyEncoder()

    class Loss:
        def backward(self) -> None:
            model(torch.randn(3, 256)).square().mean().backward()

    usage = fenced("python")[0]
    names = {"torch": torch, "model": model, "loader": range(2), "loss": Loss()}
    exec(compile(usage, "README.md", "exec"), names)
    assert len(names["report"].swapped) + len(names["report"].skipped) == 2
    assert "encoder.layers.0.mlp.0" in capsys.readouterr().out


def test_pruning_a_pretrained_model_runs(capsys):
    model = TinyEncoder()
    names = {
        "model": model,
        "dense_model": copy.deepcopy(model),
        "batches": [torch.randn(50, 256)],
        "loss_fn": lambda output, batch: (output - batch).square().mean(),
    }
    _, pretrained = fenced("python")
    exec(compile(pretrained, "README.md", "exec"), names)
    assert names["report"].sparsity == 0.5
    assert "encoder.layers.0.mlp.1" in capsys.readouterr().out
    assert names["config"][0]["blocksize"] == 32


@pytest.mark.parametrize("marker", ["main command", "test command"])
def test_the_commands_are_marked_for_ci_and_need_no_other_setup(marker):
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
    assert found is not None
    lines = found.group(1).strip().splitlines()
    assert lines[0] == "python3 -m venv .venv"
    assert all(line.startswith(".venv/bin/") for line in lines[1:])


def test_every_file_it_names_exists():
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    scripts = re.findall(r"`((?:examples|benchmarks|torchao_superblock|tests)/[\w/.]*)`", README)
    assert linked and scripts
    for name in [*linked, *scripts]:
        assert (ROOT / name).exists(), name


def test_every_option_it_names_exists():
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("examples", "benchmarks")
        for path in (ROOT / folder).glob("*.py")
    )
    for option in re.findall(r"`(--[a-z-]+)`", README):
        assert f'"{option}"' in sources, option
