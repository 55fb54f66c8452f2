"""Loss and accuracy over a data set, each image counted once on whatever number of ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from recipe.parallel import World

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str | None, device: torch.device) -> Any:
    """The context of a forward in mixed precision, or none."""
    if amp is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, AMP[amp])


@torch.no_grad()
def test(
    model: nn.Module, loader: DataLoader[Any], world: World, amp: str | None = None
) -> dict[str, float]:
    """Loss, and top-1 and top-5 accuracy in percent. Call it on every rank.

    Args:
        model: is put into inference mode.
        loader: of :func:`recipe.data.val_loader`: ranks with less to do repeat images, which do not count.
        world: of this process.
        amp: None, `"bf16"` or `"fp16"`.
    """
    model.eval()
    count = len(loader.dataset)  # type: ignore[arg-type]
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    place = world.rank
    for x, labels in loader:
        x = x.to(world.device, non_blocking=True)
        labels = labels.to(world.device, non_blocking=True)
        with autocast(amp, world.device):
            logits = model(x)
        places = place + world.size * torch.arange(len(labels), device=world.device)
        place += world.size * len(labels)
        counted = places < count
        logits, labels = logits.float()[counted], labels[counted]
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="sum")
        values = (losses, hits[:, :1].sum(), hits.sum(), counted.sum())
        sums += torch.stack([value.double() for value in values])
    loss, first, any_of_five, images = world.sum(sums).tolist()
    return {
        "loss": loss / images,
        "acc1": 100 * first / images,
        "acc5": 100 * any_of_five / images,
    }
