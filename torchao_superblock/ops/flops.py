"""What `torch.utils.flop_counter` counts for the op and its gradients: two for each stored element and token.

That module imports Triton and takes longer to load than this package, so the formulas are registered once somebody else
loads it: a `FlopCounterMode` copies the registry when it is made, and a first call of the op would be too late.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from torchao_superblock.ops.activations import ACTIVATIONS

_COUNTER = "torch.utils.flop_counter"

_Shape = Sequence[int]


def _forward_flops(x: _Shape, crow: _Shape, col: _Shape, values: _Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(values)


def _grad_values_flops(
    grad: _Shape, x: _Shape, crow: _Shape, col: _Shape, r: int, c: int, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(x[:-1]) * col[0] * r * c


def _backward_flops(
    grad: _Shape,
    x: _Shape,
    crow: _Shape,
    col: _Shape,
    values: _Shape,
    bias: _Shape | None,
    activation: str,
    z: _Shape | None,
    plan: _Shape | None,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    computes_z = activation != "none" and z is None
    products = sum(needs[:2]) + computes_z
    return 2 * math.prod(x[:-1]) * math.prod(values) * products


def _gated_flops(x: _Shape, *weights: Any, **_: Any) -> int:
    # crow, col, values and bias of the gate, then of the other.
    return 2 * math.prod(x[:-1]) * (math.prod(weights[2]) + math.prod(weights[6]))


def _register(counter: ModuleType) -> None:
    formulas = {
        "bsr_linear": _forward_flops,
        "bsr_linear_grad_x": _forward_flops,
        "bsr_linear_grad_values": _grad_values_flops,
        "bsr_linear_backward": _backward_flops,
        **{f"bsr_product_{name}": _forward_flops for name in ACTIVATIONS},
        **{f"bsr_padded_product_{name}": _forward_flops for name in ACTIVATIONS},
        **{f"bsr_gated_linear_{name}": _gated_flops for name in ACTIVATIONS if name != "none"},
    }
    for name, formula in formulas.items():
        op = getattr(torch.ops.torchao_superblock, name, None)
        if op is not None and op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)


class _Loader(importlib.abc.Loader):
    """The counter's own loader, and the formulas afterwards."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the counter, once, as everybody else would."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_formulas() -> None:
    """Register the formulas of all ops that there are as soon as `torch.utils.flop_counter` is there."""
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        _register(counter)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
