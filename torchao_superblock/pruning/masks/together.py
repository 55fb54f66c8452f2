"""What `step()` does to all masks at once: one call for every layer, where a call a layer is what costs.

A step touches a handful of numbers a layer, so that the host's way to each operation is all of its
time. The results are those of one mask after the other, bit for bit on a CPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from torchao_superblock.common.sharding import full_tensor
from torchao_superblock.ops.block_mask.guards import level_checksum
from torchao_superblock.pruning.masks.base import BlockMask
from torchao_superblock.pruning.masks.product import at_unit_scale


@torch.no_grad()
def carried(masks: Iterable[BlockMask]) -> dict[BlockMask, Tensor]:
    """What the last backwards left in the carriers, each divided by its root mean square.

    Args:
        masks: of any kind, on any device.

    Returns:
        mask -> a new `(R, C)`, zeros where it is not finite (a scaled loss that overflowed). Masks without a
        carrier, or without a backward since gradients were last set to None, are left out.
    """
    found = [(m, m.carrier.grad) for m in masks if m.carrier is not None]
    values = {mask: full_tensor(grad) for mask, grad in found if grad is not None}
    result: dict[BlockMask, Tensor] = {}
    for _, group in _by(values, lambda mask: values[mask].device):
        scaled = at_unit_scale([values[mask] for mask in group])
        result.update(zip(group, scaled, strict=True))
    return result


class Levels:
    """Writes the levels of masks, and what guards them.

    Keeps views of the buffers that it writes; replaced buffers (`.to()`, `load_state_dict(assign=True)`)
    are noticed.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._addresses: list[int] = []
        # Of one device and dtype each, or one call would be many: views, and which numbers they get.
        self._groups: list[tuple[list[Tensor], list[int]]] = []
        self._numbers: list[int] = []
        self._copies: list[list[Tensor]] = []

    @torch.no_grad()
    def write(self, masks: Sequence[BlockMask], numbers: Sequence[int]) -> None:
        """Writes the number of blocks that each mask is to keep. Nothing is read back to the host.

        They are written at every step, whether they changed or not: a buffer may have been loaded or
        averaged since.

        Args:
            masks: on any devices.
            numbers: of blocks, one for each mask.
        """
        if not masks:
            return
        buffers = [
            mask._buffers[name] for mask in masks for name in ("n_kept", "checksums", "moments")
        ]
        addresses = [buffer.data_ptr() for buffer in buffers]  # `.data = ...` leaves the object
        same = addresses == self._addresses and all(map(operator.is_, buffers, self._buffers))
        if not same:
            self._buffers, self._addresses = buffers, addresses
            self._copies, self._numbers = [], []
            views = [v for m in masks for v in (m.n_kept, m.checksums[0], *m.moments[:2].unbind())]
            by_kind = _by(range(len(views)), lambda i: (views[i].device, views[i].dtype))
            self._groups = [([views[i] for i in places], places) for _, places in by_kind]
        written = [x for n in numbers for x in (n, level_checksum(n), n, n**2)]
        if self._copies and written == self._numbers:
            for (views, _), copies in zip(self._groups, self._copies, strict=True):
                torch._foreach_copy_(views, copies)
            return
        for views, places in self._groups:
            # Numbers travel with the launch: no copy from the host that the host would wait for.
            torch._foreach_zero_(views)
            torch._foreach_add_(views, [written[i] for i in places])
        stays = written == self._numbers
        self._copies = [[v.clone() for v in views] for views, _ in self._groups] if stays else []
        self._numbers = written


def _by(items: Iterable, key: Callable) -> Iterable[tuple]:
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.items()
