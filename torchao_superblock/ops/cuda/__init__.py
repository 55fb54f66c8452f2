"""The CUDA backend: what a call asks for (`problem.py`), what serves it (`choose.py`), and kernels that do.

A call becomes a frozen `Problem`, that a `Choice` of a kernel and its tile, and the kernel's `prepare(problem, choice)`
makes of both what runs it, which is kept. `TORCHAO_SUPERBLOCK_PRINT_CHOICE=1` prints each new problem and its choice.
"""

from importlib import import_module
from typing import Any

_OF_BACKWARD = ("activation_gradient", "repeat_backward")
__all__ = [
    *_OF_BACKWARD,
    "aot_twin",
    "backend_info",
    "call",
    "few_tokens_twin",
    "forward",
    "grad_values",
    "grad_x",
]


def __getattr__(name: str) -> Any:
    # What only wants to know about problems and choices need not import the kernels.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{'backward' if name in _OF_BACKWARD else 'backend'}")
    globals()[name] = getattr(module, name)
    return globals()[name]
