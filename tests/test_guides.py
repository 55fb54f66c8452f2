"""The code of the guides runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from torchao_superblock import swap_to_bsr

DOCS = Path(__file__).parents[1] / "docs"


def code_of(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_which_sparsifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    names = {
        "model": model,
        "loader": [(torch.randn(16, 32), None) for _ in range(5)],
        "epochs": 4,
        "blocksize": 8,
    }
    distil, go_on = code_of("which_sparsifier.md")
    assert distil.count("\n") <= 30
    exec(compile(distil, "distil", "exec"), names)
    zeros = [module.sparsity for module in model if hasattr(module, "sparsity")]
    assert len(names["report"].swapped) + len(names["report"].skipped) == 2
    assert all(sparsity > 0.7 for sparsity in zeros)

    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight[:32] = 0
        model[2].weight[:, 32:] = 0
    names["model"] = model
    exec(compile(go_on, "go on", "exec"), names)
    assert [entry.kept for entry in names["sparsifier"].summary().groups] == [16, 16]


def test_leaving(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="the guide exports to ONNX (the `onnx` extra)")
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[0].weight[:32] = 0
        model[2].weight[:, 32:] = 0
    x, dense = torch.randn(4, 32), model[0].weight.clone()
    swap_to_bsr(model, 8, min_sparsity=0.5)
    assert not isinstance(model[0], nn.Linear)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), "model.pt2")
    back, onnx, program = code_of("leaving.md")
    names = {"model": model, "x": x}
    exec(compile(onnx, "onnx", "exec"), names)
    assert (tmp_path / "model.onnx").exists()
    exec(compile(program, "program", "exec"), names)
    torch.testing.assert_close(names["program"](x), model(x))
    exec(compile(back, "back", "exec"), names)
    assert torch.equal(model[0].weight, dense)
