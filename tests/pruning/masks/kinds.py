"""Every kind of mask there is, for the tests that all of them must pass. A new one is a line of `KINDS`."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchao_superblock.pruning import BlockSparsifier, SupermaskSparsifier


def _from_contributing() -> type[BlockSparsifier]:
    """The example of CONTRIBUTING.md: what stands there has to work."""
    page = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    code = re.search(r"<!-- example mask -->\n```python\n(.*?)```", page, re.DOTALL).group(1)
    assert code.count("\n") <= 60
    module = types.ModuleType("example_mask")
    sys.modules[module.__name__] = module  # pickle looks its classes up
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))
    return module.LargestNormSparsifier


# name -> f(sparsity_level, blocksize) -> a new sparsifier
KINDS: dict[str, Callable[..., Any]] = {
    "supermask": SupermaskSparsifier,
    "supermask_norms": lambda *args: SupermaskSparsifier(*args, scores_init="weight_norm"),
    "example": _from_contributing(),
}
