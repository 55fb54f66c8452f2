"""One file for any layout: what one process, DDP or FSDP2 saved, each of them resumes.

A file is written under another name and renamed once it is complete and on the disk. Killed at any moment, a run leaves
the previous one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from recipe.parallel import World

LAST, BEST = "last.pth", "best.pth"


def model_state(model: nn.Module, world: World) -> dict[str, Any]:
    """The whole state dict; under FSDP2 gathered, on the CPU of rank 0 (call it on every rank)."""
    options = StateDictOptions(full_state_dict=world.fsdp, cpu_offload=world.fsdp)
    return get_model_state_dict(model, options=options)


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, Any]:
    """Likewise, by the names of the parameters."""
    options = StateDictOptions(full_state_dict=world.fsdp, cpu_offload=world.fsdp)
    return get_optimizer_state_dict(model, optimizer, options=options)


def load_model(model: nn.Module, state: dict[str, Any], world: World) -> None:
    """Puts a whole state dict into a model of any layout."""
    options = StateDictOptions(full_state_dict=world.fsdp, broadcast_from_rank0=world.fsdp)
    set_model_state_dict(model, dict(state), options=options)


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World
) -> None:
    """Likewise."""
    options = StateDictOptions(full_state_dict=world.fsdp, broadcast_from_rank0=world.fsdp)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def write(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint in one step."""
    draft = path.with_name(f".{path.name}.draft")
    with open(draft, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    _rename(draft, path)


def copy(source: Path, path: Path) -> None:
    """Gives a checkpoint a second name in one step, without writing it twice where the disk allows that."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    try:
        os.link(source, draft)
    except OSError:
        shutil.copyfile(source, draft)
    _rename(draft, path)


def _rename(draft: Path, path: Path) -> None:
    os.replace(draft, path)
    with contextlib.suppress(OSError):  # not every system can sync a directory
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of this recipe, on the CPU.

    Raises:
        SystemExit: if it cannot be read, or is something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: the unpickler meets what is there
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"{path}: no readable checkpoint ({reason})") from error
    missing = {"model", "epoch", "plan", "options"} - set(
        content if isinstance(content, dict) else ()
    )
    if missing:
        raise SystemExit(
            f"{path}: no checkpoint of this recipe: it lacks {', '.join(sorted(missing))}"
        )
    return content


def check_model(model: nn.Module, state: dict[str, Any], where: object) -> None:
    """Refuses a checkpoint of another architecture before anything is loaded.

    Raises:
        SystemExit: naming the first tensor that differs.
    """
    own = model.state_dict()
    differing = sorted(own.keys() ^ state.keys())
    differing += [key for key in own if key in state and own[key].shape != state[key].shape]
    if differing:
        raise SystemExit(
            f"{where}: saved from another model: {differing[0]!r} is not the same there "
            f"({len(differing)} such tensors). Give the --model, sizes and classes that it was saved with. "
            "Nothing was changed"
        )
