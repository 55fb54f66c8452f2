"""What a model is, in a form that can be compared: for "as before" and "as after"."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

Portrait = dict[str, Any]


def portrait(model: nn.Module, prefix: str = "") -> Portrait:
    """Classes, tensors (content, dtype, ties), hooks and public attributes of every module.

    Two models built alike have equal portraits: it does not depend on addresses.
    """
    seen: dict[int, str] = {}
    result: Portrait = {}
    for fqn, module in model.named_modules(prefix=prefix, remove_duplicate=False):
        cls = type(module)
        result[f"{fqn}: class"] = (cls.__name__, tuple(base.__name__ for base in cls.__bases__))
        result[f"{fqn}: same as"] = seen.setdefault(id(module), fqn)
        result[f"{fqn}: children"] = tuple(module._modules)
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(module, kind)
            result[f"{fqn}: {kind}"] = tuple(tensors)
            for name, tensor in tensors.items():
                key = f"{fqn}.{name}"
                if tensor is None:
                    result[key] = None
                else:
                    result[key] = (describe(tensor), seen.setdefault(id(tensor), key))
        attributes = vars(module)
        result[f"{fqn}: not in state dict"] = tuple(sorted(module._non_persistent_buffers_set))
        result[f"{fqn}: hooks"] = {
            name: len(value)
            for name, value in attributes.items()
            if "hook" in name and _sized(value)
        }
        result[f"{fqn}: attributes"] = {
            name: _without_addresses(value)
            for name, value in attributes.items()
            if not name.startswith("_")
            and isinstance(value, bool | int | float | str | tuple | None)
        }
    return result


def _without_addresses(value: object) -> object:
    """A value that is equal in two models built alike: modules in a tuple are known by their class."""
    if not isinstance(value, tuple):
        return value
    return tuple(type(v).__name__ if isinstance(v, nn.Module) else v for v in value)


def _sized(value: object) -> bool:
    return hasattr(value, "__len__")


def describe(tensor: Tensor) -> tuple[Any, ...]:
    """Class, dtype, shape, device, whether it is trained, and its content."""
    facts = (type(tensor).__name__, tensor.dtype, tuple(tensor.shape), tensor.device.type)
    return (*facts, tensor.requires_grad, content(tensor))


def content(tensor: Tensor) -> str:
    """A hash of a tensor's bytes; of its class where it has none."""
    if tensor.is_meta:
        return "meta"
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return digest(flat.view(torch.uint8).numpy().tobytes())


def digest(data: bytes) -> str:
    """A short hash."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def random_state() -> Portrait:
    """The state of torch's generator."""
    return {"the random state": content(torch.get_rng_state())}


def identities(model: nn.Module) -> dict[str, int]:
    """Which objects a model is made of: optimizers, hooks and ties go by them."""
    found = {f"{fqn}: object": id(module) for fqn, module in model.named_modules()}
    for fqn, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            found[f"{fqn}.{name}: object"] = id(tensor)
    return found


def folder(directory: Path) -> Portrait:
    """Every file of a folder: what is in it, whatever the order in which it was written."""
    return {f"file {name}": _file(directory / name) for name in sorted(os.listdir(directory))}


def _file(path: Path) -> object:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: describe(file.get_tensor(key)) for key in file.keys()}
            return (file.metadata(), tensors)
    except Exception as error:
        return f"unreadable: {type(error).__name__}, {path.stat().st_size} bytes"


def differences(left: Portrait, right: Portrait, limit: int = 4) -> str:
    """The first entries in which two portraits differ, as text."""
    absent = "absent"
    found = [
        f"{key} is {left.get(key, absent)}, not {right.get(key, absent)}"
        for key in {**left, **right}
        if left.get(key, absent) != right.get(key, absent)
    ]
    more = f" (and {len(found) - limit} more)" if len(found) > limit else ""
    return "; ".join(text[:300] for text in found[:limit]) + more
