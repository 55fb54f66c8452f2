"""From the command line to a sparsifier and the weights that it masks."""

from __future__ import annotations

import argparse
import fnmatch
import inspect
import re
from typing import Any

from torch import nn

from torchao_superblock import (
    MagnitudeSparsifier,
    RigLSparsifier,
    SpartanSparsifier,
    SupermaskSparsifier,
)
from torchao_superblock.pruning import BlockSparsifier

SPARSIFIERS: dict[str, tuple[type[BlockSparsifier], dict[str, Any]]] = {
    "supermask": (SupermaskSparsifier, {}),
    "magnitude": (MagnitudeSparsifier, {}),
    "weighted-magnitude": (MagnitudeSparsifier, {"gradient_weighted": True}),
    "rigl": (RigLSparsifier, {}),
    "spartan": (SpartanSparsifier, {}),
}

LAYERS: dict[str, tuple[str, ...]] = {
    "mlp": ("*mlp.*.weight",),
    "attention-out": ("*.out_proj.weight", "*.attn.proj.weight"),
    "attention-in": ("*.in_proj_weight", "*.attn.qkv.weight"),
    "head": (),  # the last linear layer, whatever its name
    "linear": (),
    "conv": (),
}
"""What `--layers` calls the weights of torchvision's models; anything else is a glob of names."""

PLAN = ("sparsifier", "sparsity", "blocksize", "update_every", "layers", "exclude")
PLAN += ("skip_first_block", "skip_last_layer")
"""The options that a checkpoint must agree with, beside the steps of ramp and freeze."""


def plan(args: argparse.Namespace, total_steps: int) -> dict[str, Any]:
    """What decides about the masks, as it is stored in a checkpoint.

    Args:
        args: the options.
        total_steps: optimizer steps of the whole training.
    """
    if args.sparsifier == "none":
        return {"sparsifier": "none"}
    steps = {
        f"{name}_steps": None if fraction is None else max(1, round(fraction * total_steps))
        for name, fraction in (("ramp", args.ramp), ("freeze", args.freeze))
    }
    # What a gain is for, Adam's steps, is a learning rate multiplied under SGD.
    gain = {"gain": 0.0 if args.opt.startswith("sgd") else None}
    return {name: getattr(args, name) for name in PLAN} | steps | gain


def build(plan: dict[str, Any]) -> BlockSparsifier | None:
    """The sparsifier of a plan; None for a dense training.

    Raises:
        SystemExit: for settings that do not go together.
    """
    if plan["sparsifier"] == "none":
        return None
    kind, settings = SPARSIFIERS[plan["sparsifier"]]
    if plan["update_every"] is not None:
        if "update_every" not in inspect.signature(kind).parameters:
            raise SystemExit(f"--update-every: {plan['sparsifier']} updates its masks at each step")
        settings = {**settings, "update_every": plan["update_every"]}
    if plan["gain"] is not None:
        settings = {**settings, "gain": plan["gain"]}
    try:
        return kind(
            plan["sparsity"],
            plan["blocksize"],
            ramp_steps=plan["ramp_steps"],
            freeze_step=plan["freeze_steps"],
            **settings,
        )
    except ValueError as error:
        raise SystemExit(f"--sparsifier {plan['sparsifier']}: {error} (see --freeze)") from error


def config(model: nn.Module, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of `prepare(model, config)`.

    Raises:
        SystemExit: for a name or pattern without a match.
    """
    weights = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    # Convolutions first: their glob reaches linear layers as well, which others may want back.
    layers = sorted(dict.fromkeys(plan["layers"]), key=lambda layer: layer != "conv")
    entries = [entry for layer in layers for entry in _reach(model, layer, weights)]
    excluded = list(plan["exclude"])
    for pattern in excluded:
        if not fnmatch.filter(weights, pattern):
            raise SystemExit(f"--exclude {pattern}: no weight of {_names(weights)}")
    if plan["skip_last_layer"]:
        excluded.append(_head(model))
    if plan["skip_first_block"]:
        excluded.append(_first_block(entries, weights))
    kept = [
        entry
        for entry in entries
        if not any(fnmatch.fnmatchcase(entry["tensor_fqn"], pattern) for pattern in excluded)
    ]
    if not any("exclude" not in entry for entry in kept):
        raise SystemExit(f"--layers {' '.join(plan['layers'])}: all of it is skipped or excluded")
    return kept + [{"tensor_fqn": pattern, "exclude": True} for pattern in excluded]


def prepare(sparsifier: BlockSparsifier, model: nn.Module, plan: dict[str, Any]) -> None:
    """`sparsifier.prepare(model, config(model, plan))`, whose errors end the program with a message."""
    try:
        sparsifier.prepare(model, config(model, plan))
    except ValueError as error:
        raise SystemExit(f"--layers {' '.join(plan['layers'])}: {error}") from error


def check_plan(plan: dict[str, Any], saved: dict[str, Any], path: object) -> None:
    """Refuses to go on with other masks than those of the checkpoint.

    Raises:
        SystemExit: naming each option that differs, with both values.
    """
    differing = [
        f"{name} is {plan.get(name)!r} here and {saved.get(name)!r} there"
        for name in {**saved, **plan}
        if plan.get(name) != saved.get(name)
    ]
    if differing:
        raise SystemExit(
            f"--resume {path}: it was trained with other sparsity options: {'; '.join(differing)}. "
            "Give those options (and the epochs and batch size that the steps follow from), or start "
            "anew from its weights with --weights-path. Nothing was changed"
        )


def _names(weights: list[str]) -> str:
    """The model's weights, shortened, for messages."""
    return f"the model is called so; there are {', '.join(weights[:4])}, ... ({len(weights)})"


def _reach(model: nn.Module, layer: str, weights: list[str]) -> list[dict[str, Any]]:
    if layer == "head":
        return [{"tensor_fqn": _head(model)}]
    if layer == "linear":
        return [{"tensor_fqn": "*"}]
    if layer == "conv":
        if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
            raise SystemExit(f"--layers conv: {type(model).__name__} has no convolution")
        linears = [
            f"{name}.{tensor}".lstrip(".")
            for name, module in model.named_modules()
            for kind, tensor in (
                (nn.Linear, "weight"),
                (nn.MultiheadAttention, "in_proj_weight"),
            )
            if isinstance(module, kind)
        ]
        return [
            {"tensor_fqn": "*", "types": (nn.Conv2d,)},
            *({"tensor_fqn": name, "exclude": True} for name in linears),
        ]
    found = [glob for glob in LAYERS.get(layer, (layer,)) if fnmatch.filter(weights, glob)]
    if not found:
        known = "" if layer in LAYERS else f"; names are {', '.join(LAYERS)}"
        raise SystemExit(f"--layers {layer}: no weight of {_names(weights)}{known}")
    return [{"tensor_fqn": glob} for glob in found]


def _head(model: nn.Module) -> str:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise SystemExit(f"--layers head: {type(model).__name__} has no linear layer")
    return f"{linears[-1]}.weight"


def _first_block(entries: list[dict[str, Any]], weights: list[str]) -> str:
    """A glob for the block that holds the first masked weight: `encoder.layers.encoder_layer_0.*`."""
    for name in weights:
        if any(
            fnmatch.fnmatchcase(name, entry["tensor_fqn"])
            for entry in entries
            if "exclude" not in entry
        ):
            block = re.match(r"(?:.*?[._])?0(?=\.)", name)
            if block:
                return f"{block[0]}.*"
    raise SystemExit(f"--skip-first-block: no numbered block in {_names(weights)}; use --exclude")
