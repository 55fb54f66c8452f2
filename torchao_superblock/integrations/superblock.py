"""Checkpoints that the superblock project published, and those of its heirs in torchao.

Their masks follow a rule of their own, which has to be met to the last block: one that is kept here and pruned there
is a weight that was never trained to be used. Of n scores of a layer, with the level s,

    s = min(s, 1 - 1 / n)
    k = 1 + round(.01 * float(s * 100) * (n - 1))          in float64, in this order
    kept = score >= the k-th smallest score                scores above 9e9 count as 9e9; ties are kept
    weight = (weight * scale + shift) * kept

where this package keeps `max(1, round(n * (1 - s)))` blocks: of 2304 at a level of 0.90 theirs are 231, ours 230.

Source: https://github.com/pytorch-labs/superblock, `supermask.py`, and torchao's `sparsity/supermask.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchao_superblock.common.all_or_nothing import all_or_nothing
from torchao_superblock.common.names import nearest_names
from torchao_superblock.pruning import SupermaskSparsifier

__all__ = ["load_superblock_checkpoint", "superblock_mask"]

_SCORES_MAX = 9e9
_EXTRAS = ("scores", "shift", "scale")


def superblock_mask(scores: Tensor, sparsity_level: float) -> Tensor:
    """The blocks that the superblock project keeps of a layer.

    Args:
        scores: floating, one for each block, of any shape.
        sparsity_level: fraction of blocks pruned, in `[0, 1]`; at most `1 - 1 / n` of it is used.

    Returns:
        Bool of the shape of `scores`, `True` = kept. Blocks whose scores tie with the last one are kept as well.

    Raises:
        ValueError: for a level outside `[0, 1]`, no scores, or NaN among them.

    Example:
        >>> int(superblock_mask(torch.rand(48, 12), 0.70).sum())
        173
    """
    if not 0 <= sparsity_level <= 1:
        raise ValueError(f"sparsity_level={sparsity_level!r} must be in [0, 1]")
    n_blocks = scores.numel()
    if n_blocks == 0 or bool(scores.isnan().any()):
        raise ValueError("the scores are " + ("NaN in places" if n_blocks else "none"))
    level = min(float(sparsity_level), 1 - 1 / n_blocks)
    # Not `level * (n - 1)`: the rounding of exactly these products is what they trained with.
    k = 1 + round(0.01 * float(level * 100) * (n_blocks - 1))
    # In the dtype of the scores, as they did it; half precision has no kthvalue everywhere.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    clamped = scores.detach().to(dtype).clamp(max=_SCORES_MAX)
    return clamped >= clamped.flatten().kthvalue(k).values


def load_superblock_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    sparsity_level: float | None = None,
    blocksize: int | None = None,
    *,
    ema: bool = False,
    as_masks: bool = False,
) -> nn.Module:
    """Loads a checkpoint of the superblock project, or of torchao's `SupermaskLinear`, into a dense model.

    Takes files whose `"model"` holds `<layer>.weight`, `.bias`, `.scores`, `.shift` and `.scale`, plain state
    dicts, and either with weights of the layout `torch.sparse_bsr`. Only tensors and an `argparse.Namespace` are
    unpickled. Layers without scores are dense. Scores of projections whose attention reads `.weight` itself
    (`nn.MultiheadAttention.out_proj`, the windowed attention of torchvision's Swin) never acted and are dropped.

    Args:
        model: neither prepared nor swapped, for example `torchvision.models.vit_b_16()`; is changed in place.
        path: the file.
        sparsity_level: fraction of blocks pruned; None for what the file's `args` say for this type of layer
            (`sparsity_linear`, `sparsity_conv1x1`, `sparsity_conv`), over which an argument wins.
        blocksize: side of their square blocks; None for what `args` say (`sp_linear_tile_size`, ...), over which an
            argument wins. Either has to agree with the tensors: with the grid of the scores, with stored blocks.
        ema: load `"model_ema"`, the average.
        as_masks: False leaves a squashed model, whose pruned blocks are 0.0, ready for :func:`swap_to_bsr`. True leaves
            a prepared one that computes the same and trains on: weights, and, where the file has scores, the scores
            (where only blocks are stored, or those of a convolution are smaller than its kernel, the mask stays).
            :func:`squash` folds it, and `SupermaskSparsifier().param_groups(model)` keeps scores out of weight decay.

    Returns:
        The model.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is truncated, of another kind, or a checkpoint of another architecture; no level or block
            size is known; or they contradict the tensors, or NaN is among the scores.
        TypeError: `blocksize` is no int.
        RuntimeError: the model is prepared already, or on the meta device, or, with `as_masks`, a layer cannot be
            masked. After any error the model is as it was.

    Example:
        >>> model = build_model()  # such as torchvision.models.vit_b_16()
        >>> model = load_superblock_checkpoint(model, "checkpoint.pth", ema=True)
        >>> report = swap_to_bsr(model)
    """
    if blocksize is not None and (isinstance(blocksize, bool) or not isinstance(blocksize, int)):
        raise TypeError(f"blocksize={blocksize!r} must be an int: their blocks are square")
    if blocksize is not None and blocksize < 1:
        raise ValueError(f"blocksize={blocksize!r} must be at least 1")
    _refuse_model(model)
    file = os.fspath(path)
    state, recorded = _read(file, ema)
    masked: list[_Masked] = []
    dense: dict[str, Tensor] = {}
    modules, own = dict(model.named_modules()), model.state_dict()
    for name in [key.removesuffix(".scores") for key in state if key.endswith(".scores")]:
        if f"{name}.scores" in own or f"{name}.weight" not in state:
            continue  # a parameter of the model's own
        scores, shift, scale = (state.pop(f"{name}.{key}", None) for key in _EXTRAS)
        weight = state[f"{name}.weight"]
        if weight.layout is torch.sparse_bsr or name not in modules or _acted_not(modules, name):
            continue  # folded already; refused below; dense
        kind = _Kind.of(modules[name], recorded, f"{file}: {name!r}: ")
        level = kind.level(sparsity_level)
        tile = kind.tile(blocksize, weight, scores)
        try:
            mask = superblock_mask(scores, level)
        except ValueError as error:
            raise ValueError(kind.where + str(error)) from error
        clamped = scores.clamp(max=_SCORES_MAX)
        masked.append(_Masked(f"{name}.weight", mask, (tile,) * mask.ndim, clamped))
        weight = weight if scale is None else weight * scale
        weight = weight if shift is None else weight + shift
        dense[f"{name}.weight"] = weight.masked_fill(~masked[-1].of_elements(weight.shape), 0)
    for key, tensor in state.items():
        if tensor.layout is torch.sparse_bsr:
            stored = _stored_blocks(key, tensor)
            stored.check(sparsity_level, blocksize, f"{file}: ")
            masked.append(stored)
            tensor = tensor.to_dense()
        dense.setdefault(key, tensor)
    _refuse_other_architecture(model, own, dense, file)
    with all_or_nothing(model, [*model.parameters(), *model.buffers()]):
        model.load_state_dict(dense)
        if as_masks:
            _prepare(model, masked, file)
    return model


# ------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------


def _read(file: str, ema: bool) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state dict without wrappers' prefixes, and what `args` recorded."""
    with open(file, "rb") as stream:
        try:
            with (
                torch.serialization.safe_globals([argparse.Namespace]),
                torch.sparse.check_sparse_tensor_invariants(),
            ):
                content = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # of any kind, OSError too: the unpickler meets what is there
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(
                f"{file}: cannot be read as a checkpoint of tensors and an argparse.Namespace: it is truncated, no "
                f"file of torch.save, or holds other objects ({reason})"
            ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not the dict of a checkpoint")
    key = "model_ema" if ema else "model"
    recorded = content.get("args")
    recorded = vars(recorded) if isinstance(recorded, argparse.Namespace) else recorded
    if key in content:
        state = content[key]
    elif not ema and any(isinstance(value, Tensor) for value in content.values()):
        state = content
    else:
        raise ValueError(f"{file}: has no {key!r}; it has {sorted(map(str, content))[:8]}")
    if not isinstance(state, Mapping):
        raise ValueError(f"{file}: its {key!r} is a {type(state).__name__}, not a state dict")
    state = {name: value for name, value in state.items() if not (ema and name == "n_averaged")}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{file}: {name!r} is a {type(value).__name__}, not a tensor")
    while state and all(name.startswith("module.") for name in state):  # DDP, AveragedModel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state, recorded if isinstance(recorded, Mapping) else {}


def _refuse_other_architecture(
    model: nn.Module, own: Mapping[str, Tensor], dense: Mapping[str, Tensor], file: str
) -> None:
    missing = [name for name in own if name not in dense]
    extra = [name for name in dense if name not in own]
    shapes = [name for name in own if name in dense and own[name].shape != dense[name].shape]
    if not (missing or extra or shapes):
        return
    name = (shapes or missing or extra)[0]
    if shapes:
        text = f"{name!r} has shape {tuple(dense[name].shape)} in the file and {tuple(own[name].shape)} in the model"
    elif missing:
        text = f"it has no {name!r}" + nearest_names(name, extra)
    else:
        text = f"the model has no {name!r}" + nearest_names(name, list(own))
    raise ValueError(
        f"{file}: not a checkpoint of this {type(model).__name__}: {text} ({len(shapes)} shapes differ, "
        f"{len(missing)} tensors are missing, {len(extra)} unknown). Build the model that it was saved from, with the "
        "same number of classes. Nothing was loaded"
    )


def _refuse_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise RuntimeError(
                f"load_superblock_checkpoint: {name!r} is parametrized (prepared already?): load into the plain model, "
                "with as_masks=True for one whose masks train on"
            )
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise RuntimeError(
                f"load_superblock_checkpoint: {name!r} is on the meta device: call "
                "model.to_empty(device=...) first"
            )


# ------------------------------------------------------------------------------------------------
# Levels, block sizes, masks
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """What `args` call the level and the block size of a type of layer, and what they say."""

    level_name: str
    tile_name: str
    recorded: Mapping[str, Any]
    where: str

    @staticmethod
    def of(module: nn.Module, recorded: Mapping[str, Any], where: str) -> _Kind:
        kind = "linear"
        if isinstance(module, nn.Conv2d):
            pointwise = tuple(module.kernel_size) == (1, 1)
            kind = "conv1x1" if pointwise and recorded.get("sparsity_conv1x1", 1) else "conv"
        return _Kind(f"sparsity_{kind}", f"sp_{kind}_tile_size", recorded, where)

    def level(self, given: float | None) -> float:
        level = self.recorded.get(self.level_name) if given is None else given
        if (
            isinstance(level, bool)
            or not isinstance(level, int | float)
            or (level == 0 and given is None)
        ):
            raise ValueError(
                f"{self.where}has scores, and the file's args.{self.level_name} is {level!r}: say "
                "sparsity_level=..., the level that it was trained with"
            )
        return level

    def tile(self, given: int | None, weight: Tensor, scores: Tensor) -> int:
        tile = self.recorded.get(self.tile_name) if given is None else given
        if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
            raise ValueError(
                f"{self.where}has scores, and the file's args.{self.tile_name} is {tile!r}: say blocksize=..."
            )
        grid = tuple(-(-size // tile) for size in weight.shape)
        if grid != tuple(scores.shape):
            source = f"args.{self.tile_name}" if given is None else "blocksize"
            recorded = self.recorded.get(self.tile_name)
            also = "" if given is None else f"; the file's args.{self.tile_name} is {recorded!r}"
            raise ValueError(
                f"{self.where}{source}={tile} cuts its shape {tuple(weight.shape)} into {grid} blocks, and its "
                f"scores are {tuple(scores.shape)}{also}"
            )
        return tile


@dataclass(frozen=True)
class _Masked:
    """A weight and its mask: bool over the grid of blocks of these extents, in two dimensions or four."""

    fqn: str
    mask: Tensor
    blocks: tuple[int, ...]
    scores: Tensor | None = None

    def of_elements(self, shape: tuple[int, ...], dims: tuple[int, ...] | None = None) -> Tensor:
        """The mask with one element for each of the weight's, along some dimensions or all."""
        mask = self.mask
        for dim in range(mask.ndim) if dims is None else dims:
            mask = mask.repeat_interleave(self.blocks[dim], dim).narrow(dim, 0, shape[dim])
        return mask

    def entry(self, weight: Tensor) -> dict[str, Any]:
        """For the config of a sparsifier."""
        entry: dict[str, Any] = {"tensor_fqn": self.fqn}
        in_kernel = weight[0, 0].numel()
        columns = weight[0].numel()
        whole_kernels = self.mask[0, 0].numel() == 1
        if whole_kernels:
            entry["blocksize"] = (
                min(self.blocks[0], weight.shape[0]),
                min(self.blocks[1] * in_kernel, columns),
            )
        else:
            entry["blocksize"] = (min(self.blocks[0], weight.shape[0]), 1)
        if whole_kernels and self.scores is not None:
            return {**entry, "sparsity_level": 1 - int(self.mask.sum()) / self.mask.numel()}
        mask = self.mask
        if not whole_kernels:
            mask = self.of_elements(tuple(weight.shape), (1, 2, 3))
        return {**entry, "mask": mask.flatten(1)}

    def check(self, sparsity_level: float | None, blocksize: int | None, where: str) -> None:
        """Arguments must not contradict blocks that are stored."""
        if blocksize is not None and self.blocks != (blocksize, blocksize):
            raise ValueError(
                f"{where}blocksize={blocksize}, and {self.fqn!r} stores blocks of {self.blocks}; leave the "
                "argument out"
            )
        if sparsity_level is None:
            return
        kept = int(
            superblock_mask(
                torch.arange(self.mask.numel(), device="cpu").double(), sparsity_level
            ).sum()
        )
        if kept != int(self.mask.sum()):
            raise ValueError(
                f"{where}sparsity_level={sparsity_level} keeps {kept} blocks, and {self.fqn!r} stores "
                f"{int(self.mask.sum())} of {self.mask.numel()}; leave the argument out"
            )


def _stored_blocks(key: str, weight: Tensor) -> _Masked:
    """The mask of a weight of the layout `torch.sparse_bsr`."""
    crow, col, blocks = weight.crow_indices(), weight.col_indices(), weight.values().shape[1:]
    mask = torch.zeros(
        crow.numel() - 1, weight.shape[1] // blocks[1], dtype=torch.bool, device=crow.device
    )
    mask[torch.arange(len(mask), device=crow.device).repeat_interleave(crow.diff()), col.long()] = (
        True
    )
    return _Masked(key, mask, tuple(blocks))


def _acted_not(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether the layer above reads `.weight` itself: their linear, which masks in its own forward, was not called."""
    owner, _, child = name.rpartition(".")
    if isinstance(modules[owner], nn.MultiheadAttention):
        return child == "out_proj"
    swin = sys.modules.get("torchvision.models.swin_transformer")
    windowed = swin is not None and isinstance(modules[owner], swin.ShiftedWindowAttention)
    return windowed and child in ("qkv", "proj")


def _prepare(model: nn.Module, masked: list[_Masked], file: str) -> None:
    weights = dict(model.named_parameters(remove_duplicate=False))
    masked = [one for one in masked if one.mask.numel() > 1]  # a single block is kept anyway
    if not masked:
        raise ValueError(f"{file}: no layer has scores or stored blocks: nothing can be a mask")
    sparsifier = SupermaskSparsifier(scores_init="weight_norm")
    try:
        sparsifier.prepare(model, [one.entry(weights[one.fqn]) for one in masked])
    except ValueError as error:
        raise RuntimeError(f"{file}: as_masks=True: {error}") from error
    for one in masked:
        owner, _, name = one.fqn.rpartition(".")
        mask = model.get_submodule(owner).parametrizations[name][0]
        if isinstance(mask.scores, nn.Parameter):
            with torch.no_grad():
                mask.scores.copy_(one.scores.view_as(mask.scores))
