"""What is shipped: an sdist that builds without git, one wheel for all Pythons, one version."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = [
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
]
# Stands in for the compiler: optimising would cost the tests half a minute.
FAST_COMPILER = '#!/bin/sh\nexec {compiler} "$@" -O0\n'
WHICH_KERNEL = "import torchao_superblock as t; print(t.__file__, t.backends()['cpu']['name'])"


def build(kind: str, source: Path, out: Path, **environment: str) -> Path:
    """Calls the build backend as pip does, with the setuptools that is here: nothing is downloaded."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return out / result.stdout.splitlines()[-1]


def kernel_of(wheel: Path, folder: Path) -> str:
    """Unpacks a wheel, uses the package from there and says what serves the CPU."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    result = subprocess.run(
        [sys.executable, "-c", WHICH_KERNEL],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    file, name = result.stdout.split()
    assert Path(file).is_relative_to(folder)
    return name


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist of a tree that no git knows."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        shutil.copy(ROOT / name, tree)
    built = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "torchao_superblock", tree / "torchao_superblock", ignore=built)
    archive = build("sdist", tree, tmp_path_factory.mktemp("sdist"))
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent, filter="data")
    return archive.parent / archive.name.removesuffix(".tar.gz")


def test_the_sdist_builds_one_wheel_for_all_pythons_with_the_kernel_in_it(sdist, tmp_path):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    fast = tmp_path / "compiler"
    fast.write_text(FAST_COMPILER.format(compiler=compiler))
    fast.chmod(0o755)
    wheel = build("wheel", sdist, tmp_path, CC=str(fast))
    if not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled():
        assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {name.split("/")[0] for name in names}
    assert packages == {"torchao_superblock", f"{sdist.name}.dist-info"}
    assert "torchao_superblock/py.typed" in names
    assert not [name for name in names if name.endswith((".c", ".h"))]
    assert kernel_of(wheel, tmp_path / "unpacked").startswith("c-")


def test_without_a_compiler_the_wheel_is_built_all_the_same(sdist, tmp_path):
    wheel = build("wheel", sdist, tmp_path, CC="false")
    assert kernel_of(wheel, tmp_path / "unpacked") == "pytorch"


def test_a_wheel_holds_nothing_that_an_earlier_build_left(sdist, tmp_path):
    build("wheel", sdist, tmp_path, CC="false")
    (package,) = (sdist / "build").glob("lib*/torchao_superblock")
    (package / "removed_since.py").touch()
    (package / "ops" / "_cpu.abi3.so").touch()
    wheel = build("wheel", sdist, tmp_path, CC="false")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "torchao_superblock/ops/cpu/compiled.py" in names
    assert not [name for name in names if "removed_since" in name or name.endswith(".so")]


def test_the_version_is_the_same_everywhere(sdist):
    (stated,) = re.findall(r'version="([\d.]+)"', (ROOT / "setup.py").read_text("utf-8"))
    assert sdist.name == f"torchao_superblock-{stated}"
    assert f"\nversion: {stated}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    newest, date = re.search(
        r"^## ([\d.]+), ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    ).groups()
    assert newest == stated
    assert f"\ndate-released: {date}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_extras_name_libraries_with_lower_bounds(sdist):
    (described,) = sdist.glob("*.egg-info/PKG-INFO")
    text = described.read_text("utf-8")
    extras = set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE))
    assert extras >= {"transformers", "timm", "lightning", "peft", "onnx", "cli", "docs", "torchao"}
    optional = re.findall(r"^Requires-Dist: (\S+?); extra ==", text, re.MULTILINE)
    assert optional and all(re.fullmatch(r"[\w-]+(<\d+,)?>=[\d.]+", needed) for needed in optional)
