"""What tuning found, kept for later processes: one file for each card and version of torch and Triton.

Choices are kept as what JSON can hold, by what they are good for; what either means is not known here.
"""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import triton

from torchao_superblock.ops.cuda.problem import Device

FORMAT = 6
# By the name of the card, then by what an entry is good for. A card's file is read when the first entry is asked for.
_entries: dict[str, dict[str, Any]] = {}


def cache_file(device: Device) -> Path:
    """Where finds for a device are kept, in the user's cache directory."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif os.name == "nt" and os.environ.get("LOCALAPPDATA"):
        base = Path(os.environ["LOCALAPPDATA"])
    else:
        base = Path.home() / ".cache"
    name = "-".join([device.name, torch.__version__, triton.__version__])
    return base / "torchao_superblock" / f"tune-{re.sub('[^a-zA-Z0-9.+-]', '_', name)}.json"


def entries(device: Device) -> dict[str, Any]:
    """All entries of a card. A file that cannot be used is ignored, with a warning."""
    known = _entries.get(device.name)
    if known is None:
        known, path = {}, "the user's cache directory"
        try:
            path = cache_file(device)
            if path.exists():
                known = _parse(path.read_text(encoding="utf-8"), device)
        except Exception as error:
            warnings.warn(
                f"torchao_superblock: the tuning results in {path} are ignored "
                f"({type(error).__name__}: {error}); delete the file, or run torchao_superblock.tune again",
                stacklevel=2,
            )
        _entries[device.name] = known
    return known


def lookup(device: Device, key: dict[str, Any]) -> Any:
    """The entry for a key, or None."""
    return entries(device).get(_name(key))


def adopt(device: Device, key: dict[str, Any], entry: Any) -> None:
    """Use an entry from now on in this process.

    Args:
        device: where.
        key: what it is good for.
        entry: what JSON can hold; None leaves what there was.
    """
    entries(device).pop(_name(key), None)
    if entry is not None:
        entries(device)[_name(key)] = entry


def save(device: Device, keys: list[dict[str, Any]]) -> None:
    """Add adopted entries to the file, in one step: who reads it meanwhile sees the old or the new one.

    Args:
        device: where.
        keys: of the entries.
    """
    path = cache_file(device)
    try:
        kept = _parse(path.read_text(encoding="utf-8"), device)
    except Exception:
        kept = {}  # none yet, or not usable: entries() has said so
    kept |= {_name(key): lookup(device, key) for key in keys}
    content = _header(device) | {
        "entries": [{"for": json.loads(name), "choice": kept[name]} for name in kept]
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(draft, path)


def forget() -> None:
    """As in a new process."""
    _entries.clear()


def _name(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _header(device: Device) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "device": device.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _parse(text: str, device: Device) -> dict[str, Any]:
    content = json.loads(text)
    header = _header(device)
    if not isinstance(content, dict) or not content.keys() >= {*header, "entries"}:
        raise ValueError("it does not hold tuning results")
    written_for = {key: content[key] for key in header}
    if written_for != header:
        raise ValueError(f"it was written for {written_for}, this is {header}")
    return {_name(entry["for"]): entry["choice"] for entry in content["entries"]}
