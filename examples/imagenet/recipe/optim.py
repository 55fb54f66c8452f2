"""Optimizer, schedule, average and scaler of the recipe."""

from __future__ import annotations

import argparse

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchao_superblock.pruning import BlockSparsifier

EMBEDDINGS = ("*class_token", "*pos_embedding", "*relative_position_bias_table", "*layer_scale")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS += (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)


def parameter_groups(
    model: nn.Module, args: argparse.Namespace, sparsifier: BlockSparsifier | None
) -> list[dict]:
    """Groups by weight decay: matrices, and norms, biases and embeddings with their own values.

    Scores are not decayed: it would pull them all towards zero alike, and says nothing of the blocks.
    """
    scores = set()
    if sparsifier is not None:
        scores = {id(p) for p in sparsifier.param_groups(model)[1]["params"]}
    named = dict(model.named_parameters())
    norms = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    own = {
        "scores": (0.0, [name for name, p in named.items() if id(p) in scores]),
        "norm": (args.norm_weight_decay, sorted(norms)),
        "bias": (args.bias_weight_decay, ["*bias"]),
        "embedding": (args.transformer_embedding_decay, list(EMBEDDINGS)),
    }
    groups, taken = [], set[int]()
    # timm tells what decays from what does not; each kind with a value of its own is asked for in turn.
    for value, patterns in own.values():
        if value is None:
            continue
        split = param_groups_weight_decay(
            model, 1.0, no_weight_decay_list=patterns, weight_decay_exclude_1d=False
        )
        chosen = [
            p for g in split if not g["weight_decay"] for p in g["params"] if id(p) not in taken
        ]
        taken |= {id(p) for p in chosen}
        if chosen:
            groups.append({"params": chosen, "weight_decay": value})
    rest = [p for p in named.values() if p.requires_grad and id(p) not in taken]
    return [{"params": rest, "weight_decay": args.weight_decay}, *groups]


def optimizer_of(groups: list[dict], args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD, RMSprop or AdamW, with the constants of torchvision's recipe."""
    if args.opt.startswith("sgd"):
        nesterov = args.opt == "sgd_nesterov"
        return torch.optim.SGD(groups, args.lr, momentum=args.momentum, nesterov=nesterov)
    if args.opt == "rmsprop":
        return torch.optim.RMSprop(groups, args.lr, momentum=args.momentum, eps=0.0316, alpha=0.9)
    return torch.optim.AdamW(groups, args.lr)


def schedule_of(optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> LRScheduler:
    """Warm-up, then steps, a cosine or an exponential; one step for each epoch."""
    warmup = args.lr_warmup_epochs
    if args.lr_scheduler == "steplr":
        main: LRScheduler = StepLR(optimizer, args.lr_step_size, args.lr_gamma)
    elif args.lr_scheduler == "cosineannealinglr":
        main = CosineAnnealingLR(optimizer, T_max=args.epochs - warmup, eta_min=args.lr_min)
    else:
        main = ExponentialLR(optimizer, args.lr_gamma)
    if not warmup:
        return main
    kind = LinearLR if args.lr_warmup_method == "linear" else ConstantLR
    first = kind(optimizer, args.lr_warmup_decay, total_iters=warmup)
    return SequentialLR(optimizer, [first, main], milestones=[warmup])


def average_of(model: nn.Module, args: argparse.Namespace) -> AveragedModel | None:
    """The average, built before anything shards the model. Masks and running statistics are copied, not averaged.

    The decay is torchvision's: adjusted so that it means the same at any batch size and number of epochs.
    """
    if not args.model_ema:
        return None
    adjust = args.batch_size * args.accumulation_steps * args.model_ema_steps / args.epochs
    decay = 1 - min(1.0, (1 - args.model_ema_decay) * adjust)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


class StepsTaken:
    """Counts the steps that an optimizer takes; a gradient scaler skips some."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.count = 0
        optimizer.register_step_post_hook(self._note)

    def _note(self, *_: object) -> None:
        self.count += 1
