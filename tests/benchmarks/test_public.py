"""Benchmarks use public names only: a copy of the folder has to measure one version of the package after another."""

import ast
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Those that try to break the package look inside it.
FILES = [p for p in BENCHMARKS.rglob("*.py") if "faults" not in p.relative_to(BENCHMARKS).parts]
ROOMS = ("torchao_superblock", "torchao_superblock.ops", "torchao_superblock.pruning")


def imported(path: Path) -> list[tuple[str, str]]:
    """Module and name of everything that a file imports from the package, anywhere in it."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    nodes = [n for n in nodes if n.module and n.module.startswith("torchao_superblock")]
    return [(node.module, alias.name) for node in nodes for alias in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_only_public_names_are_imported(path):
    for module, name in imported(path):
        if module == "torchao_superblock.integrations":  # a file each, named by the user
            continue
        assert module in ROOMS, f"{module}.{name}"
        assert name in importlib.import_module(module).__all__, f"{module}.{name}"


def test_the_layer_and_the_masks_are_among_them():
    found = {entry for path in FILES for entry in imported(path)}
    assert ("torchao_superblock.ops", "build_plan") in found
    assert ("torchao_superblock.pruning", "SupermaskSparsifier") in found
