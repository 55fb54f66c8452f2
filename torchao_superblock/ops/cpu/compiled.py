"""Which kernel serves the CPU: the compiled one of `csrc/` if it is there and current, else plain PyTorch.

Environment variables, read at import:

- `TORCHAO_SUPERBLOCK_CPU_BACKEND`: `c` or `pytorch`; unset takes the compiled kernel where it can.
- `TORCHAO_SUPERBLOCK_CPU_ISA`: `baseline`, `avx2` or `avx512`; unset takes the best of the processor.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from torchao_superblock.ops.forks import in_forked_child
from torchao_superblock.ops.source_hash import source_hash

BACKEND_VARIABLE = "TORCHAO_SUPERBLOCK_CPU_BACKEND"
ISA_VARIABLE = "TORCHAO_SUPERBLOCK_CPU_ISA"
CSRC = Path(__file__).parents[1] / "csrc"

_REBUILD = "rebuild it with `pip install -e .` (or `pip install .`) in the source directory"


def load(
    environment: Mapping[str, str] = os.environ,
    csrc: Path = CSRC,
    name: str = "torchao_superblock.ops._cpu",
) -> tuple[ModuleType | None, dict[str, object]]:
    """Load the compiled kernel.

    Args:
        environment: where the two variables stand.
        csrc: the sources that it must have been built from, if they are there.
        name: of the extension module.

    Returns:
        The module, or None, and what :func:`backend_info` says about it.

    Raises:
        ValueError: a variable has a value that is not known, or not known here.
    """
    sources = source_hash(csrc)
    info: dict[str, object] = {"name": "pytorch", "source_hash": sources}
    wanted = environment.get(BACKEND_VARIABLE, "").lower()
    if wanted not in ("", "c", "pytorch"):
        raise ValueError(
            f"{BACKEND_VARIABLE}={wanted!r}: expected 'c' or 'pytorch', or leave it unset"
        )
    if wanted == "pytorch":
        return None, info | {"reason": f"{BACKEND_VARIABLE}=pytorch asks for it"}
    try:
        kernel = import_module(name)
    except ImportError as error:
        reason = f"the compiled kernel is not there ({error}); install a C compiler and {_REBUILD}"
        return None, info | {"reason": reason}
    info |= {
        "built_from": kernel.source_hash,
        "matches_source": sources in (None, kernel.source_hash),
    }
    if not info["matches_source"]:
        reason = "the compiled kernel is stale: it was built from other sources than those in "
        return None, info | {"reason": f"{reason}ops/csrc; {_REBUILD}"}
    if in_forked_child():
        kernel.run_on_one_thread()
    reason = "the compiled kernel is built from this very source"
    if sources is None:
        reason = "the compiled kernel is there, without its sources to compare with"
    isa = environment.get(ISA_VARIABLE, "").lower()
    if isa:
        if isa not in kernel.supported_isas():
            raise ValueError(
                f"{ISA_VARIABLE}={isa!r}: this processor has {', '.join(kernel.supported_isas())}"
            )
        kernel.select_isa(isa)
        reason += f"; {ISA_VARIABLE}={isa} chose the instruction set"
    name = f"c-{kernel.isa()}"
    return kernel, info | {"name": name, "reason": reason, "source_hash": kernel.source_hash}


kernel, _info = load()
"""The extension module that serves the CPU; None where plain PyTorch does."""


def backend_info() -> dict[str, object]:
    """Say which kernel serves the CPU, and why.

    Returns:
        `name` (`c-avx512`, `c-avx2`, `c-baseline` or `pytorch`), `reason` (a sentence), `source_hash` (of the
        C sources next to this file), and for a compiled kernel `built_from`, `matches_source`, `isa`,
        `supported_isas` and `threading`.

    Example:
        >>> backend_info()["reason"]
        'the compiled kernel is built from this very source'
    """
    found = dict(_info)
    if kernel is not None:
        found["name"] = f"c-{kernel.isa()}"
        found["isa"] = kernel.isa()
        found["supported_isas"] = kernel.supported_isas()
        found["threading"] = kernel.threading()
    return found


@contextmanager
def using(name: str) -> Iterator[None]:
    """Have a certain kernel serve this process meanwhile, to compare or to test.

    Args:
        name: `"pytorch"`, or an instruction set of the compiled kernel: `"baseline"`, `"avx2"`, `"avx512"`.

    Raises:
        ValueError: there is no compiled kernel, or this processor cannot run that one.
    """
    global kernel, _info
    before = kernel, _info
    compiled, isa = kernel, None
    if name == "pytorch":
        reason = "somebody asked for it, for a while"
        kernel, _info = None, {"name": name, "reason": reason, "source_hash": _info["source_hash"]}
    elif compiled is None:
        raise ValueError(f"no compiled kernel serves here: {_info['reason']}")
    elif name not in compiled.supported_isas():
        raise ValueError(f"{name!r}: this processor has {', '.join(compiled.supported_isas())}")
    else:
        isa = compiled.isa()
        compiled.select_isa(name)
    try:
        yield
    finally:
        kernel, _info = before
        if isa is not None:
            compiled.select_isa(isa)
