"""Packages that one question needs and the product does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def needs(question: str, **packages: str) -> None:
    """Checks that packages are there.

    Args:
        question: what needs them.
        **packages: module name to name on the package index.

    Raises:
        ImportError: with the command that installs those that are missing.
    """
    missing = [name for module, name in packages.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ImportError(
            f"the question {question!r} needs {' and '.join(missing)}: pip install "
            f"{' '.join(missing)} (or pip install 'torchao_superblock[quality]')"
        )


def folder_of(module: str) -> Path:
    """Where a package is installed, without importing it (and what it would import)."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
