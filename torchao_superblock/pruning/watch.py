"""Whether the optimizer trains the scores, and leaves them out of its weight decay.

An optimizer that was built before `prepare` has never heard of the scores: the masks stay as they
started. One of all parameters alike decays them. Neither can be seen in a loss, so the first steps of
each optimizer are looked at, by torch's own hook. What scores *are* is not judged: learning rates of
zero, steps that a gradient scaler skips and ramps would all look like faults.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from torchao_superblock.pruning.masks.base import BlockMask

_Masks = Iterable[tuple[dict[str, Any], BlockMask]]


class ScoresWatch:
    """Warns once about scores that no optimizer holds, and once about scores that decay.

    Scores with `requires_grad=False` and those of frozen masks are left out: the summary lists them.

    Args:
        masks: the bound method of a sparsifier that yields its groups and their masks now (FSDP2
            replaces the scores). It is not kept alive.
    """

    def __init__(self, masks: Callable[[], _Masks]) -> None:
        self._masks = weakref.WeakMethod(masks)
        self._held: set[int] = set()
        self._stepped: set[int] = set()
        self._gradients: dict[str, torch.Tensor | None] = {}
        self._told_of_decay = False
        self._settled = False
        self._handle = register_optimizer_step_post_hook(self._look)
        _watches.add(self)

    def close(self) -> None:
        """Looks no further; the hook goes at the next :func:`remove_settled`."""
        self._settled = True
        self._gradients.clear()

    def _look(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks = self._masks()
        if masks is None:
            self.close()
        if self._settled or torch.compiler.is_compiling():
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        scores = [
            (group["tensor_fqn"], mask, parameter)
            for group, mask in masks()
            if (parameter := learned(mask)) is not None and parameter.requires_grad
        ]
        self._held |= {id(parameter) for *_, parameter in scores} & groups.keys()
        untrained = {fqn: mask for fqn, mask, p in scores if id(p) not in self._held}
        decayed = {
            fqn: mask
            for fqn, mask, p in scores
            if p is mask.scores and groups.get(id(p), {}).get("weight_decay")
        }
        if decayed and not self._told_of_decay:
            self._told_of_decay = True
            self._warn(
                decayed,
                f"{type(optimizer).__name__} decays the scores of {{}}: it pulls them all towards zero "
                "alike and says nothing about the blocks. Build the optimizer from "
                "sparsifier.param_groups(model, weight_decay=...), which leaves them out (for "
                "transformers.Trainer: optimizers=(optimizer, None))",
            )
        if not untrained:
            self.close()
        elif any(id(_weight(group)) in groups for group, _ in masks()):
            # Only the second step of the optimizer that trains the weights tells: between two of them
            # any other that there is has had its turn.
            if id(optimizer) in self._stepped:
                self._warn(
                    {
                        fqn: mask
                        for fqn, mask in untrained.items()
                        if mask.carrier is None or mask.carrier.grad is self._gradients[fqn]
                    },
                    "no optimizer trains the scores of {}, or clears the gradients that they are made "
                    "of: the masks do not learn. Build the optimizer after prepare(), from "
                    "sparsifier.param_groups(model), or add them: "
                    "optimizer.add_param_group(sparsifier.param_groups(model)[1])",
                )
                self.close()
            self._stepped.add(id(optimizer))
            # Who clears it by other means, as model.zero_grad() does, finds a new one at each step.
            for fqn, mask, parameter in scores:
                self._gradients[fqn] = parameter.grad if parameter is mask.carrier else None

    def _warn(self, found: dict[str, BlockMask], text: str) -> None:
        names = [fqn for fqn, mask in found.items() if not mask.is_frozen]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warnings.warn(
                text.format(f"{names[0]!r}{more}"), UserWarning, stacklevel=4
            )  # optimizer.step()


def learned(mask: BlockMask) -> nn.Parameter | None:
    """What an optimizer has to hold: scores, or the carrier of gradients that scores are made of."""
    return mask.scores if isinstance(mask.scores, nn.Parameter) else mask.carrier


_watches: set[ScoresWatch] = set()


def remove_settled() -> None:
    """Removes the hooks that have seen enough.

    A hook cannot remove itself: torch iterates over them while it runs.
    """
    for watch in [watch for watch in _watches if watch._settled]:
        _watches.discard(watch)
        watch._handle.remove()


def _weight(group: dict[str, Any]) -> torch.Tensor:
    return group["module"].parametrizations[group["tensor_name"]].original
