"""The CPU kernel built with AddressSanitizer and UndefinedBehaviorSanitizer, for a Python of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from benchmarks.faults.case import NotHere

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "torchao_superblock" / "ops"
MODULE = "torchao_superblock.ops._cpu"
VARIABLE = "TORCHAO_SUPERBLOCK_SANITIZED_KERNEL"

FLAGS = (
    "-std=gnu11 -O1 -g1 -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all "
    # Small pieces: a problem of a few thousand multiply-adds is cut as a large one would be.
    "-DSB_GROUP_ELEMENTS=2048 -DSB_X_TILE_BYTES=4096 -DSB_SERIAL_WORK=64 -DSB_GRAD_ELEMENTS=1024 "
    "-DSB_CHUNK=3 -DSB_CHUNK_ELEMENTS=256 -DSB_DIRECT_USES=32"
).split()


def compiler() -> str | None:
    """The C compiler, or None."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def build(directory: Path) -> Path:
    """Compiles the kernel as an extension module, unless it lies there already.

    Args:
        directory: where builds are kept, each under a hash of its sources, flags and Python.

    Returns:
        The file of the extension.

    Raises:
        NotHere: there is no compiler with working sanitizers.
    """
    cc, runtime = compiler(), _runtime()
    if cc is None or runtime is None:
        raise NotHere("no C compiler with AddressSanitizer")
    from torchao_superblock.ops.source_hash import source_hash

    sources = source_hash(OPS / "csrc")
    include = sysconfig.get_paths()["include"]
    flags = [*FLAGS, "-fPIC", f'-DSB_SOURCE_HASH="{sources}"', f"-I{include}"]
    key = hashlib.sha256("\n".join([*flags, cc, sys.version]).encode()).hexdigest()[:16]
    target = directory / key / "_cpu.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        out = target.parent / f"{source.stem}.{os.getpid()}.o"
        _compile(cc, *flags, "-c", source, "-o", out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted((OPS / "csrc").glob("*.c"))))
    linked = target.with_suffix(f".{os.getpid()}.so")
    _compile(cc, *FLAGS, "-shared", *objects, "-o", linked, "-lm", "-ldl", "-lpthread")
    for path in objects:
        path.unlink()
    linked.replace(target)
    return target


def _compile(*command: object) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise NotHere(f"the sanitizers' build fails: {result.stderr[-400:]}")


def _runtime() -> str | None:
    """What has to be loaded before Python itself: AddressSanitizer, and the C++ library whose `throw` it wraps."""
    found = [_library("libasan.so"), _library("libstdc++.so.6")]
    return None if None in found else " ".join(found)


def _library(name: str) -> str | None:
    cc = compiler()
    if cc is None:
        return None
    command = [cc, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


def environment(extension: Path) -> dict[str, str]:
    """What a Python process needs in its environment to run on that build (see :func:`use`)."""
    return {
        VARIABLE: str(extension),
        "LD_PRELOAD": str(_runtime()),
        # What Python and torch never give back is not of interest, and the kernel's own heap errors end the process.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def use() -> None:
    """In a process with that environment, before the package is imported: takes the sanitized kernel."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    spec = spec_from_file_location(MODULE, path, loader=ExtensionFileLoader(MODULE, path))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module


def check() -> None:
    """Raises unless the package computes with the sanitized kernel.

    Raises:
        RuntimeError: it does not.
    """
    from torchao_superblock import backends

    name = backends()["cpu"]["name"]
    if not str(name).startswith("c-") or sys.modules[MODULE].__file__ != os.environ[VARIABLE]:
        raise RuntimeError(f"the sanitized kernel is not in use, but {name}")
