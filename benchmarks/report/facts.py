"""The machine and the versions that a result is of."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: str | torch.device) -> str:
    """Name of the hardware behind `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_name()} ({capability}, {torch.get_num_threads()} threads)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str | torch.device) -> dict[str, str]:
    """Hardware, versions and the backend in use: the header of every result file."""
    device = torch.device(device)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts["compute capability"] = f"{major}.{minor}"
    else:
        with contextlib.suppress(OSError):
            facts["load average at start"] = f"{os.getloadavg()[0]:.2f}"
    for package in ("torch", "triton", "torchao", "torchvision"):
        version = _version(package)
        facts[package] = version or "not installed"
    facts["python"] = platform.python_version()
    with contextlib.suppress(Exception):
        import torchao_superblock

        backends = torchao_superblock.backends()
        info = backends.get(device.type, backends)
        facts["torchao_superblock"] = (
            f"{_version('torchao_superblock') or 'source tree'}, backend {info.get('name', info)}"
        )
    return facts
