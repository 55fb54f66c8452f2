"""Pictures of block masks, swap reports and sensitivities.

Needs matplotlib, which is imported when a picture is asked for and not before. The figures belong
to no window: save them with `figure.savefig("masks.png")`, or return them from a notebook cell.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchao_superblock.bsr import BSRLinear, SwapReport
from torchao_superblock.bsr.format import infer_blocksize
from torchao_superblock.common.blocks import block_grid, parse_blocksize
from torchao_superblock.ops.block_mask import nonzero_blocks
from torchao_superblock.pruning import Sensitivity
from torchao_superblock.pruning.finding import masks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEPT, _PRUNED, _INK, _FAINT = "#1d4e89", "#edf1f5", "#22303c", "#6b7785"
_SKIPPED = "#e09f3e"


@dataclass(frozen=True)
class LayerMask:
    """The block mask of one weight.

    Attributes:
        fqn: of the tensor, e.g. `"encoder.layers.0.mlp.0.weight"`.
        mask: bool `(R, C)` over the block grid, True = kept; on the CPU.
        shape: of the weight.
        blocksize: `(rows, cols)`.
    """

    fqn: str
    mask: Tensor
    shape: tuple[int, int]
    blocksize: tuple[int, int]

    @property
    def sparsity(self) -> float:
        """Fraction of blocks that are pruned."""
        return 1.0 - self.mask.float().mean().item()


def block_masks(
    model: nn.Module, blocksize: int | tuple[int, int] | None = None
) -> list[LayerMask]:
    """Finds the block mask of every block-sparse weight of a model, whatever its stage.

    Args:
        model: prepared (masks as they would apply in the next forward), squashed (masks read off the blocks of zeros)
            or swapped (masks read off the BSR indices).
        blocksize: of squashed weights; None reads each one's off its zeros.

    Returns:
        One entry a weight, in the order of `model.named_modules()`; weights without a zero block are left out.

    Example:
        >>> linear = nn.Linear(64, 64)
        >>> with torch.no_grad():
        ...     _ = linear.weight[:32].zero_()
        >>> [(entry.fqn, entry.blocksize, entry.sparsity) for entry in block_masks(linear)]
        [('weight', (32, 64), 0.5)]
    """
    wanted = None if blocksize is None else parse_blocksize(blocksize)
    found = []
    for prefix, module in model.named_modules():
        for name, mask, shape, size in _masks_of(module, wanted):
            fqn = f"{prefix}.{name}" if prefix else name
            found.append(LayerMask(fqn, mask.detach().cpu(), shape, size))
    return found


def _masks_of(module: nn.Module, blocksize: tuple[int, int] | None) -> list[tuple[Any, ...]]:
    if isinstance(module, BSRLinear):
        shape, (r, c) = (module.out_features, module.in_features), module.blocksize
        mask = torch.zeros(block_grid(shape, (r, c)), dtype=torch.bool, device="cpu")
        rows = torch.repeat_interleave(
            torch.arange(len(mask), device="cpu"), module.crow_indices.cpu().diff().long()
        )
        mask[rows, module.col_indices.cpu().long()] = True
        return [("weight", mask, shape, (r, c))]
    found: list[tuple[Any, ...]] = [
        (name, mask.block_mask(), mask.weight_shape, mask.blocksize)
        for name, mask in masks_of(module).items()
    ]
    names = {nn.Linear: "weight", nn.MultiheadAttention: "in_proj_weight"}
    for kind, name in names.items():
        weight = module._parameters.get(name) if isinstance(module, kind) else None
        if weight is None or not weight.is_floating_point() or weight.is_meta:
            continue
        size = blocksize or infer_blocksize(weight.detach())
        mask = None if size is None else nonzero_blocks(weight.detach(), size)
        # All zeros is how a layer starts (torchvision's classifier), not what pruning leaves.
        if mask is not None and mask.any() and not mask.all():
            found.append((name, mask, tuple(weight.shape), size))
    return found


def plot_block_masks(
    model: nn.Module,
    blocksize: int | tuple[int, int] | None = None,
    *,
    title: str | None = None,
    width: float = 12.0,
) -> Figure:
    """Draws the block mask of every block-sparse weight: a dark square is a block that is kept.

    Layers of one shape and role stand together, at one scale.

    Args:
        model: prepared, squashed or swapped.
        blocksize: of squashed weights; None reads each one's off its zeros.
        title: heading; by default the number of weights and their overall sparsity.
        width: of the picture at most, in inches.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no weight of the model has a block mask or a block of zeros.

    Example:
        >>> plot_block_masks(model).savefig("masks.png")  # doctest: +SKIP
    """
    figure_type = _figure_type()
    layers = block_masks(model, blocksize)
    if not layers:
        raise ValueError(
            "plot_block_masks: no weight of this model has a block mask or a block of zeros; prepare the model first, "
            "or pass the blocksize of the zeros"
        )
    groups: dict[tuple[Any, ...], list[LayerMask]] = {}
    for layer in layers:
        role = re.sub(r"\d+", "#", layer.fqn)
        groups.setdefault((role, layer.shape, layer.blocksize), []).append(layer)

    boxes = [_Box(members, width - 2 * _MARGIN) for members in groups.values()]
    # Shelves: boxes stand side by side while they fit. All in inches from the top left, so that panels of one group
    # share a scale and nothing overlaps.
    left, top, shelf, used = _MARGIN, 0.85, 0.0, 0.0
    for box in boxes:
        if left > _MARGIN and left + box.width > width - _MARGIN:
            left, top, shelf = _MARGIN, top + shelf + 0.3, 0.0
        box.left, box.top = left, top
        left += box.width + 0.45
        shelf = max(shelf, box.height)
        used = max(used, left - 0.45 + _MARGIN)
    height = top + shelf + 0.25
    kept = sum(int(layer.mask.sum()) for layer in layers)
    total = sum(layer.mask.numel() for layer in layers)
    title = title or f"{len(layers)} weights, {1 - kept / total:.1%} of {total:,} blocks pruned"
    used = max(used, 0.125 * len(title) + 2 * _MARGIN)

    # No layout engine, whatever the user's settings: every panel has its place already.
    figure = figure_type(figsize=(used, height), facecolor="white", layout="none")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / used, 1 - y / height, text, va="top", **style)

    write(_MARGIN, 0.25, title, fontsize=13, fontweight="bold", color=_INK)
    for box in boxes:
        write(box.left, box.top, box.pattern, fontsize=8.5, color=_INK, family="monospace")
        write(box.left, box.top + 0.18, box.caption, fontsize=8, color=_FAINT)
        for x, y, label, layer in box.panels():
            w, h = box.panel_width, box.panel_height
            axes = figure.add_axes((x / used, 1 - (y + h) / height, w / used, h / height))
            _draw_mask(axes, layer.mask, pixels=w * 150)
            write(x, y - 0.17, f"{label}  {layer.sparsity:.0%}".strip(), fontsize=7, color=_FAINT)
    return figure


_MARGIN = 0.35


class _Box:
    """The panels of one group of weights: sizes and places, in inches.

    Args:
        members: weights of one shape, block size and role.
        room: widest the box may be.
    """

    def __init__(self, members: list[LayerMask], room: float) -> None:
        self.members = members
        self.left = self.top = 0.0
        first = members[0]
        self.pattern, self.labels = _pattern([layer.fqn for layer in members])
        self.caption = "{} × {}, blocks of {} × {}".format(*first.shape, *first.blocksize)
        rows, columns = first.mask.shape
        aspect = min(max(columns / rows, 1 / 6), 6.0)
        self.panel_width = min(max(0.75, (1.7 * aspect) ** 0.5), 2.7, room)
        self.panel_height = min(self.panel_width * rows / columns, 3.2)
        self.step_x, self.step_y = self.panel_width + 0.2, self.panel_height + 0.3
        # As many rows as give the box about the height of a tall panel, more if it would get too wide.
        down = math.ceil(3.2 / self.step_y)
        across = -(-len(members) // down)
        self.per_row = max(1, min(across, int((room + 0.2) / self.step_x)))
        down = -(-len(members) // self.per_row)
        self.per_row = -(-len(members) // down)  # no lonely panel in the last row
        text = max(0.071 * len(self.pattern), 0.06 * len(self.caption))
        self.width = max(self.per_row * self.step_x - 0.2, text)
        self.height = 0.6 + down * self.step_y

    def panels(self) -> Iterator[tuple[float, float, str, LayerMask]]:
        """Left and top of every panel, its label and its mask."""
        for i, (layer, label) in enumerate(zip(self.members, self.labels, strict=True)):
            row, column = divmod(i, self.per_row)
            yield (
                self.left + column * self.step_x,
                self.top + 0.6 + row * self.step_y,
                label,
                layer,
            )


def _draw_mask(axes: Any, mask: Tensor, pixels: float) -> None:
    from matplotlib.colors import ListedColormap

    rows, columns = mask.shape
    axes.imshow(
        mask.numpy(),
        cmap=ListedColormap([_PRUNED, _KEPT]),
        vmin=0,
        vmax=1,
        aspect="auto",
        # More blocks than pixels: average them, or a regular pattern would alias.
        interpolation="nearest" if columns < pixels / 2 else "antialiased",
    )
    axes.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    if columns < pixels / 6:
        axes.grid(which="minor", color="white", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _pattern(names: list[str]) -> tuple[str, list[str]]:
    """What names share, with `*` where they differ, and what stands there in each.

    >>> _pattern(["layer_0.up.weight", "layer_1.up.weight"])
    ('layer_*.up.weight', ['0', '1'])
    """
    parts = [name.split(".") for name in names]
    if len(names) == 1:
        return names[0], [""]
    if len({len(part) for part in parts}) > 1:
        return "*", names
    shared: list[str] = []
    labels: list[list[str]] = [[] for _ in names]
    for column in zip(*parts, strict=True):
        prefix = os.path.commonprefix(column)  # noqa: RUF071  characters are what is meant
        if all(part == prefix for part in column):
            shared.append(prefix)
            continue
        prefix = prefix.rstrip("0123456789")  # 10 and 11 differ in a number, not in a last digit
        shared.append(prefix + "*")
        for label, part in zip(labels, column, strict=True):
            label.append(part.removeprefix(prefix))
    return ".".join(shared), [".".join(label) for label in labels]


def plot_swap_report(report: SwapReport, *, title: str | None = None) -> Figure:
    """Draws what a swap did: one bar a linear layer, as long as its fraction of zero blocks.

    Args:
        report: what :func:`torchao_superblock.swap_to_bsr` returned.
        title: heading; by default how many layers were swapped.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no entry.

    Example:
        >>> plot_swap_report(swap_to_bsr(model)).savefig("swap.png")  # doctest: +SKIP
    """
    figure_type = _figure_type()
    entries = [*report.swapped, *report.skipped]
    if not entries:
        raise ValueError("plot_swap_report: the report is empty; the model has no linear layer")
    height = 1.1 + 0.24 * len(entries)
    figure = figure_type(figsize=(11, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for y, entry in enumerate(entries):
        swapped = entry.code == "swapped"
        color = _KEPT if swapped else _SKIPPED
        sparsity = entry.sparsity or 0.0
        axes.barh(y, 1.0, color=_PRUNED, height=0.72)
        axes.barh(y, sparsity, color=color, height=0.72)
        shape = " × ".join(map(str, entry.shape))
        text = shape
        if entry.blocksize:
            text += ", blocks of {} × {}".format(*entry.blocksize)
        if not swapped:
            text += f": {entry.reason if len(entry.reason) < 60 else entry.code}"
        percent = "" if entry.sparsity is None else f"{sparsity:.0%}"
        inside = sparsity > 0.12
        axes.text(
            sparsity - 0.01 if inside else sparsity + 0.01, y, percent, va="center", fontsize=8,
            ha="right" if inside else "left", color="white" if inside else _INK,
        )  # fmt: skip
        axes.text(1.02, y, text, va="center", fontsize=8, color=_INK if swapped else "#9a5b00")
    axes.set_yticks(range(len(entries)), [entry.fqn for entry in entries], fontsize=8, color=_INK)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    default = f"{len(report.swapped)} of {len(entries)} weights swapped to BSR; bars: fraction of zero blocks"
    axes.set_title(title or default, loc="left", fontsize=11, fontweight="bold", color=_INK)
    return figure


def plot_sensitivity(sensitivity: Sensitivity, *, title: str | None = None) -> Figure:
    """Draws how the loss moves when one layer alone is pruned: a row a layer, a column a level.

    Args:
        sensitivity: what :func:`torchao_superblock.sensitivity` returned.
        title: heading; by default the dense model's loss.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the sensitivity has no layer.

    Example:
        >>> plot_sensitivity(table).savefig("sensitivity.png")  # doctest: +SKIP
    """
    figure_type = _figure_type()
    layers = sensitivity.layers
    if not layers:
        raise ValueError("plot_sensitivity: the sensitivity has no layers")
    from matplotlib.colors import LinearSegmentedColormap

    changes = torch.tensor([layer.changes for layer in layers], dtype=torch.float64, device="cpu")
    most = max(changes.max().item(), torch.finfo(torch.float64).tiny)
    levels = [f"{level:.0%}" for level in sensitivity.levels]
    names = [layer.fqn for layer in layers]
    width = 2.5 + 0.075 * max(map(len, names)) + 0.9 * len(levels)
    figure = figure_type(
        figsize=(max(width, 6.0), 1.4 + 0.24 * len(layers)), layout="constrained", facecolor="white"
    )
    axes = figure.add_subplot()
    # A square root, so that small changes can be told apart beside a large one.
    shade = (changes.clamp(min=0) / most).sqrt()
    colors = LinearSegmentedColormap.from_list("sensitivity", [_PRUNED, _SKIPPED, "#9b2226"])
    axes.imshow(shade.numpy(), cmap=colors, vmin=0, vmax=1, aspect="auto")
    for y, layer in enumerate(layers):
        for x, change in enumerate(layer.changes):
            dark = shade[y, x] > 0.75
            axes.text(
                x, y, f"{change:+.3g}", ha="center", va="center", fontsize=7,
                color="white" if dark else _INK,
            )  # fmt: skip
    axes.set_xticks(range(len(levels)), levels, fontsize=8, color=_INK)
    axes.set_yticks(range(len(names)), names, fontsize=8, color=_INK)
    axes.set_xlabel("blocks pruned in this layer alone", fontsize=8, color=_FAINT)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    default = f"Change of the loss ({sensitivity.loss:.4g} dense)"
    axes.set_title(title or default, loc="left", fontsize=11, fontweight="bold", color=_INK)
    return figure


def _figure_type() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "torchao_superblock.visualize needs matplotlib: pip install 'torchao_superblock[examples]' "
            "(or pip install matplotlib)"
        ) from error
    return Figure
