"""Artefacts of torch.export and AOTInductor work where the package is imported; elsewhere torch says what it lacks."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.bsr.common import prune_all
from torchao_superblock import swap_to_bsr

LOADERS = {
    "torch.export": "torch.export.load('{path}').module()",
    "AOTInductor": "torch._inductor.aoti_load_package('{path}')",
}


@pytest.fixture(scope="module", params=LOADERS)
def artefact(request, tmp_path_factory):
    """A folder with an input, its output and what was made of the model; and how that is loaded."""
    if request.param == "AOTInductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("AOTInductor needs a C++ compiler")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artefact")
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    swap_to_bsr(prune_all(model, 16, 0.75), 16, min_sparsity=0, fuse_activations=True)
    x = torch.randn(5, 64)
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.export.export(model, (x[:2],), dynamic_shapes=shapes)
        torch.save((x, model(x)), folder / "example.pt")
    path = folder / "m.pt2"
    if request.param == "AOTInductor":
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        torch.export.save(program, path)
    return folder, LOADERS[request.param].format(path=path)


def run(artefact, imports: str) -> subprocess.CompletedProcess:
    folder, load = artefact
    script = f"""
import torch
{imports}
x, y = torch.load({str(folder / "example.pt")!r})
model = {load}
torch.testing.assert_close(model(x), y)
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_it_loads_where_the_package_is_imported_first(artefact):
    done = run(artefact, "import torchao_superblock")
    assert done.returncode == 0, done.stderr


def test_without_the_package_torch_names_the_op(artefact):
    done = run(artefact, "")
    assert done.returncode != 0
    assert "torchao_superblock" in done.stderr and "bsr_linear" in done.stderr
    words = ("is not registered when deserializing", "Could not find schema for")
    assert any(said in " ".join(done.stderr.split()) for said in words), done.stderr
