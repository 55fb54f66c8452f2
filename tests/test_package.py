"""What holds for the package as a whole: its public names, and how little it needs."""

import importlib
import pkgutil
import subprocess
import sys

import torchao_superblock

OPTIONAL = (
    "triton",
    "torchao",
    "torchvision",
    "sklearn",
    "tqdm",
    "matplotlib",
    "rich",
    "onnx",
    "onnxscript",
    "transformers",
    "accelerate",
    "peft",
)


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_names():
    assert sorted(torchao_superblock.__all__) == [
        "BSRConv1x1",
        "BSRLinear",
        "BSRMultiheadAttention",
        "BSRWeight",
        "MagnitudeSparsifier",
        "RigLSparsifier",
        "SpartanSparsifier",
        "SupermaskSparsifier",
        "SwapReport",
        "allocate",
        "backends",
        "load_bsr",
        "prune_one_shot",
        "save_bsr",
        "sensitivity",
        "squash",
        "swap_to_bsr",
        "swap_to_dense",
        "to_bsr_linear",
        "tune",
    ]
    assert all(hasattr(torchao_superblock, name) for name in torchao_superblock.__all__)


def test_import_brings_in_no_optional_package():
    # Compared with torch alone, which may import some of them by itself.
    code = f"import sys, torch; print([name for name in {OPTIONAL} if name in sys.modules])"
    assert run(code.replace("import sys, torch", "import sys, torchao_superblock")) == run(code)


def test_the_whole_path_works_without_any_optional_package():
    run(
        f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # `import name` raises ImportError
import torch
from torch import nn
from torchao_superblock import BSRLinear, SupermaskSparsifier, backends, swap_to_bsr
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
sparsifier = SupermaskSparsifier(sparsity_level=0.75, blocksize=16)
sparsifier.prepare(model, None)
optimizer = torch.optim.SGD(sparsifier.param_groups(model, weight_decay=0.01), lr=0.1)
x = torch.randn(8, 64)
model(x).square().sum().backward()
optimizer.step()
sparsifier.step()
sparsifier.squash_mask()
dense = model(x)
report = swap_to_bsr(model, min_sparsity=0.5)
assert len(report.swapped) == 2 and isinstance(model[0], BSRLinear), report
assert torch.allclose(model(x), dense, atol=1e-5)
print(backends())
from torchao_superblock import *
try:
    tune(model, x)
except RuntimeError as error:
    assert "install Triton" in str(error)
else:
    raise AssertionError("tune works without Triton?")
"""
    )


def test_cuda_is_served_by_plain_pytorch_where_triton_is_absent():
    run(
        """
import sys
sys.modules["triton"] = None
from torchao_superblock.ops.backends import backend_of
assert backend_of("cuda").module.__name__.endswith("ops.pytorch")
"""
    )


def test_the_two_halves_do_not_import_each_other():
    for half, other in (("pruning", "bsr"), ("bsr", "pruning")):
        run(
            f"""
import importlib.util, pathlib, sys, types
# The package without its __init__, which imports both halves.
root = pathlib.Path(importlib.util.find_spec("torchao_superblock").origin).parent
package = types.ModuleType("torchao_superblock")
package.__path__ = [str(root)]
sys.modules["torchao_superblock"] = package
import torchao_superblock.{half}
assert "torchao_superblock.{other}" not in sys.modules
"""
        )


def test_no_module_takes_the_place_of_a_name_that_is_looked_up_late():
    """Importing a submodule sets an attribute of its package, before or after `__getattr__` did."""
    for package in pkgutil.walk_packages(torchao_superblock.__path__, "torchao_superblock."):
        if not package.ispkg:
            continue
        module = importlib.import_module(package.name)
        if hasattr(module, "__getattr__"):
            submodules = {found.name for found in pkgutil.iter_modules(module.__path__)}
            assert not submodules & set(module.__all__), package.name
