"""Checkpoints of dense, masked and otherwise masked models do not fit each other: said before any write.

Only a model that carries a mask can say so. One that is dense throughout has none of this package's
code, and torch alone speaks of keys that are missing and unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from torchao_superblock.pruning.finding import has_mask, masks_of
from torchao_superblock.pruning.masks.base import refuse_broken_state


def refuse_dense_checkpoints(model: nn.Module) -> None:
    """Makes `load_state_dict` raise for a checkpoint whose masks are not those of the model, before it writes.

    Every module above a mask is given the check: a load may start at any of them, and reaches the
    mask only after it has overwritten what comes before.
    """
    for module in model.modules():
        if has_mask(module) and not any(True for _ in _checks(module)):
            module.register_load_state_dict_pre_hook(_check_checkpoint)


def accept_dense_checkpoints(model: nn.Module) -> bool:
    """Removes the check where no mask is left; says whether there was one."""
    removed = False
    for module in model.modules():
        if not has_mask(module):
            for key in list(_checks(module)):
                del module._load_state_dict_pre_hooks[key]
                removed = True
    return removed


def _checks(module: nn.Module) -> Iterator[int]:
    for key, hook in module._load_state_dict_pre_hooks.items():
        if getattr(hook, "hook", hook) is _check_checkpoint:
            yield key


def _check_checkpoint(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    modules = dict(module.named_modules(remove_duplicate=False))
    for path, child in modules.items():
        for name, mask in masks_of(child).items():
            here = f"{prefix}{path}." if path else prefix
            stored = f"{here}parametrizations.{name}.original"
            index = list(child.parametrizations[name]).index(mask)
            key = f"{here}parametrizations.{name}.{index}."
            refuse_broken_state(state_dict, key, here + name)
            if here + name in state_dict and stored not in state_dict:
                raise RuntimeError(_dense_into_masked(here, name, here + "scores" in state_dict))
    for key in state_dict:
        found = _OF_A_MASK.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        child = modules.get(found["path"].removesuffix(".")) if found else None
        if child is not None and found["name"] not in masks_of(child):
            raise RuntimeError(_masked_into_dense(prefix + found["path"], found["name"]))


# What a mask, and no other parametrization, stores beside the weight.
_OF_A_MASK = re.compile(r"(?P<path>.*?)parametrizations\.(?P<name>[^.]+)\.\d+\.held_mask")


def _dense_into_masked(path: str, name: str, has_scores: bool) -> str:
    stored = f"{path}parametrizations.{name}"
    text = f"the checkpoint holds a dense {path + name!r}, but this model is prepared: its weights are "
    text += f"stored as '{stored}.original' beside their scores. "
    if has_scores:
        text += (
            f"It is one of torchao's SupermaskLinear: rename {path + name!r} to '{stored}.original' and "
            f"'{path}scores' to '{stored}.0.scores' (ranked alike, at the same block size), and so on "
            "for each layer, and load it with strict=False. The level stays that of this model; torchao "
            "rounds it to blocks in another way"
        )
    else:
        text += (
            "To start from its weights, load it before prepare(). To put them under the masks that are "
            f"here, scores and levels staying as they are, rename {path + name!r} to "
            f"'{stored}.original', and so on for each masked weight, and load it with strict=False"
        )
    return text + ". Nothing was loaded"


def _masked_into_dense(path: str, name: str) -> str:
    return (
        f"the checkpoint holds a block mask for {path + name!r}, which is not masked in this model. "
        "Nothing was loaded. Prepare the model with the config that it was saved with; for its dense "
        "weights, load it into such a model first and fold the masks there with squash(model)"
    )
