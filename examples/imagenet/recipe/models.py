"""Models of torchvision by name, one of our own to try things, and pretrained weights for either."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from recipe.data import pretrained


def vit_micro(image_size: int, num_classes: int) -> VisionTransformer:
    """Two layers of width 64 over 4 x 4 patches: learns the digits on a laptop."""
    return VisionTransformer(image_size, image_size // 4, 2, 4, 64, 256, num_classes=num_classes)


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    """The model that the options name, with its pretrained weights.

    Raises:
        SystemExit: for an unknown model, a crop that it does not take, or weights of another model.
    """
    known = ["vit_micro", *models.list_models(module=models)]
    if args.model not in known:
        near = get_close_matches(args.model, known, n=3)
        raise SystemExit(f"--model {args.model}: torchvision has none; near: {', '.join(near)}")
    if args.model.startswith("vit_") and args.train_crop_size != args.val_crop_size:
        raise SystemExit(
            f"--model {args.model} has one image size: --train-crop-size {args.train_crop_size} and "
            f"--val-crop-size {args.val_crop_size} must be the same"
        )
    options: dict[str, Any] = {"num_classes": classes}
    if args.model in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if args.model == "vit_micro":
        if args.train_crop_size % 4:
            raise SystemExit("--model vit_micro: --train-crop-size must be a multiple of 4")
        model: nn.Module = vit_micro(args.train_crop_size, classes)
    else:
        if args.model.startswith("vit_"):
            options["image_size"] = args.train_crop_size
        model = models.get_model(args.model, weights=None, **options)
    if args.weights:
        state = pretrained(args.model, args.weights).get_state_dict(check_hash=True)
        load_weights(model, state, classes, f"--weights {args.weights}")
    elif args.weights_path:
        load_weights(model, read(args.weights_path), classes, f"--weights-path {args.weights_path}")
    return model


def read(path: Any) -> dict[str, Tensor]:
    """A state dict: the file itself, or its `"model"`.

    Raises:
        SystemExit: if there is none.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: the unpickler meets what is there
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"{path}: no readable checkpoint ({reason})") from error
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SystemExit(f"{path}: holds no state dict, neither as it is nor as 'model'")
    return dict(state)


def load_weights(model: nn.Module, state: dict[str, Tensor], classes: int, where: str) -> None:
    """Loads what fits; only a head for another number of classes may start anew, and is named.

    Raises:
        SystemExit: if it is of another model; nothing has been loaded then.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.startswith("aux")}
    if isinstance(model, VisionTransformer) and "encoder.pos_embedding" in state:
        if state["encoder.pos_embedding"].shape != own["encoder.pos_embedding"].shape:
            state = dict(interpolate_embeddings(model.image_size, model.patch_size, state))
    shapes = [k for k in own if k in state and state[k].shape != own[k].shape]
    others = sorted(own.keys() ^ state.keys())
    wrong = others + [key for key in shapes if own[key].shape[:1] != (classes,)]
    if wrong:
        raise SystemExit(
            f"{where}: not of this {type(model).__name__}: {wrong[0]!r} "
            + ("is in one of them only" if others else "has another shape")
            + f" ({len(wrong)} such tensors). Nothing was loaded"
        )
    if shapes:
        print(f"{where}: the head is new, for {classes} classes: {', '.join(shapes)}")
    model.load_state_dict(
        {key: own[key] if key in shapes else value for key, value in state.items()}
    )
