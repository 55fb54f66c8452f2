"""`BlockMask`: the parametrization under every way of finding a mask.

A mask is derived, in every forward, from tensors of its own: one score for each block of the grid,
how many blocks to keep, and the held mask while it is frozen. Who writes the scores (the optimizer,
norms of the weights, gradients) is what tells the kinds apart; a kind is a subclass in a file of its
own.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchao_superblock.common.blocks import BlockSize, block_grid, check_blocksize
from torchao_superblock.common.modules import block_masks_of
from torchao_superblock.common.sharding import is_dtensor
from torchao_superblock.ops.block_mask import (
    block_mask,
    block_norm,
    mask_weight,
    mask_weight_backward,
    scale_blocks_,
)

Check = Callable[[object, str], Any]
"""`check(value, where)`: the setting, normalised, or an error that begins with `where`."""


class MaskWeight(torch.autograd.Function):
    """`weight * mask`; scores, which only the gradient knows of, are trained straight through.

    grad_weight = grad * mask
    grad_scores[R, C] = sum over the block of grad * weight, or 0 while frozen
    """

    @staticmethod
    def forward(
        weight: Tensor, scores: Tensor, mask: Tensor, live: Tensor, blocksize: tuple[int, int]
    ) -> Tensor:
        return mask_weight(weight, mask, blocksize)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weight, scores, mask, live, blocksize = inputs
        ctx.blocksize = blocksize
        ctx.scores_dtype = scores.dtype
        ctx.save_for_backward(weight if ctx.needs_input_grad[1] else None, mask, live)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, mask, live = ctx.saved_tensors
        grad_weight, grad_scores = mask_weight_backward(
            grad, weight, mask, live, ctx.blocksize, ctx.needs_input_grad[0]
        )
        if grad_scores is not None:
            grad_scores = grad_scores.to(ctx.scores_dtype)
        return grad_weight, grad_scores, None, None, None


class BlockMask(nn.Module):
    """Parametrization of a 2-D weight that keeps its `n_kept` blocks with the highest scores.

    The mask is computed in every forward from the module's own tensors and nothing else: a
    `state_dict` reproduces the output, a copy is independent, and a changed `n_kept` recompiles
    nothing. The number of kept blocks is exact; of equal scores the one that comes first in
    row-major order wins.

    A kind of mask overrides what differs: :meth:`make_scores` (a buffer, or a Parameter to be
    trained), :meth:`reset_scores`, :meth:`update` (called by the sparsifier's `step()`), and, where
    the factors are not 0 and 1, :meth:`factors` and :meth:`forward`. Its further constructor
    arguments stand in :attr:`SETTINGS` with their checks and become keys of a config.

    Args:
        weight: the `(N, K)` floating weight to be masked; only its shape, its device and the values
            that the kind measures are used.
        blocksize: int for square blocks or `(rows, cols)`. Where N or K is no multiple, the last
            row or column of blocks is smaller.
        sparsity_level: fraction of blocks to prune, in `[0, 1)`.

    Attributes:
        scores: float32 `(ceil(N / rows), ceil(K / cols))`, a Parameter where they are trained.
        n_kept: int64 0-dim buffer, the number of blocks to keep.
        frozen: int8 0-dim buffer; while 1, `held_mask` is the mask.
        held_mask: int8 buffer of the grid's shape, 1 = kept.
        blocksize: `(rows, cols)`.
        weight_shape: `(N, K)`.

    Raises:
        ValueError: for a bad shape, block size or level.
        TypeError: for arguments of the wrong type.
    """

    # By this bsr/ recognises a weight that is not squashed yet, without importing this module.
    _is_block_mask = True

    SETTINGS: ClassVar[Mapping[str, Check]] = {}
    """Constructor arguments of this kind besides `sparsity_level` and `blocksize`."""

    scores: Tensor
    n_kept: Tensor
    frozen: Tensor
    held_mask: Tensor

    def __init__(
        self, weight: Tensor, blocksize: BlockSize = 64, sparsity_level: float = 0.8
    ) -> None:
        super().__init__()
        if weight.ndim != 2:
            raise ValueError(f"a block mask needs a 2-D weight, got shape {tuple(weight.shape)}")
        self.weight_shape = (weight.shape[0], weight.shape[1])
        self.blocksize = check_blocksize(blocksize)
        grid = block_grid(self.weight_shape, self.blocksize)
        device = weight.device
        self._target_n_kept = kept_blocks(math.prod(grid), check_sparsity_level(sparsity_level))
        self.followers: tuple[str, ...] = ()  # parameters registered after the weight
        self.make_scores(grid, device)
        self.register_buffer("n_kept", torch.zeros((), dtype=torch.int64, device=device))
        # Not bool: AveragedModel(use_buffers=True) subtracts buffers.
        self.register_buffer("frozen", torch.zeros((), dtype=torch.int8, device=device))
        self.register_buffer("held_mask", torch.zeros(grid, dtype=torch.int8, device=device))
        self.reset_parameters(weight)

    # ---------------------------------------------------------------------------------------------
    # What a kind overrides
    # ---------------------------------------------------------------------------------------------

    @classmethod
    def settings(cls) -> dict[str, Check]:
        """Every setting of a group with its check, the common ones first."""
        return {
            "sparsity_level": check_sparsity_level,
            "blocksize": _check_blocksize_setting,
            **cls.SETTINGS,
        }

    @classmethod
    def check_weight(cls, weight: Tensor, settings: Mapping[str, Any], where: str) -> None:
        """Refuses a weight that this kind cannot start from, before anything is drawn or changed.

        Args:
            weight: `(N, K)`.
            settings: of the group.
            where: what an error begins with; it names the tensor.

        Raises:
            ValueError: if the mask could not be made.
        """

    def make_scores(self, grid: tuple[int, int], device: torch.device) -> None:
        """Registers `scores`, float32 of the grid's shape."""
        self.register_buffer("scores", torch.zeros(grid, dtype=torch.float32, device=device))

    def reset_scores(self, weight: Tensor | None) -> None:
        """Writes the scores to start from.

        Args:
            weight: `(N, K)` under the mask; None where the caller has none.
        """
        self.scores.zero_()

    def full_scores(self) -> Tensor:
        """The float32 scores of all blocks, without gradient, gathered where they are sharded."""
        return self.scores.detach()

    def factors(self) -> Tensor:
        """What the next forward multiplies the blocks by: `(R, C)`, bool or floating."""
        return self.block_mask()

    def forward(self, weight: Tensor) -> Tensor:
        """`(N, K)` -> the masked `(N, K)` weight."""
        self.refuse_sharded(weight)
        with torch.no_grad():
            mask, live = self._mask_and_live()
        return MaskWeight.apply(weight, self.scores, mask, live, self.blocksize)

    def update(self, weight: Tensor) -> None:
        """Renews the scores; called by `step()` after the level was set.

        Args:
            weight: `(N, K)` under the mask, which FSDP2 may have sharded.
        """

    # ---------------------------------------------------------------------------------------------
    # What all kinds share
    # ---------------------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return self.held_mask.shape[0], self.held_mask.shape[1]

    @property
    def is_frozen(self) -> bool:
        """Whether the mask is held (False on the meta device). Reads it back to the host."""
        return not self.frozen.is_meta and bool(self.frozen)

    def block_norms(self, weight: Tensor) -> Tensor:
        """Euclidean norms of the blocks of `weight`, `(R, C)`, gathered where it is sharded."""
        weight = weight.detach()
        return block_norm(weight.full_tensor() if is_dtensor(weight) else weight, self.blocksize)

    @torch.no_grad()
    def block_mask(self) -> Tensor:
        """The mask of the next forward: a new bool tensor over the block grid, True = kept.

        Where FSDP2 has sharded the scores this gathers them: call it on every rank.
        """
        return self._mask_and_live()[0]

    def _mask_and_live(self) -> tuple[Tensor, Tensor]:
        return block_mask(self.full_scores(), self.n_kept, self.held_mask, self.frozen)

    def refuse_sharded(self, weight: Tensor) -> None:
        """Raises for a DTensor: its blocks are not all here."""
        if is_dtensor(weight):
            raise RuntimeError(
                "cannot mask a sharded weight: under fully_shard read `.weight` inside the forward "
                "of the module, or call `.unshard()` on the FSDP module first"
            )

    def check_foldable(self, fqn: str) -> None:
        """Refuses to fold a mask that means nothing.

        Args:
            fqn: of the masked tensor.

        Raises:
            ValueError: if scores are NaN.
        """
        if bool(self.full_scores().isnan().any()):
            raise ValueError(
                f"squash: the scores of {fqn!r} contain NaN, so its mask means nothing: training "
                "diverged. Go back to an earlier checkpoint, or call reset_parameters() on the "
                "module to start over"
            )

    def set_sparsity_level(self, sparsity_level: float) -> None:
        """Writes `n_kept`; the next forward follows. Nothing is read back to the host.

        Args:
            sparsity_level: fraction of blocks to prune, in `[0, 1)`.
        """
        n_blocks = self.held_mask.numel()
        self._target_n_kept = kept_blocks(n_blocks, check_sparsity_level(sparsity_level))
        with torch.no_grad():
            self.n_kept.fill_(self._target_n_kept)

    @torch.no_grad()
    def freeze(self) -> None:
        """Holds the present mask, whatever the scores and the level do from now on."""
        self.held_mask.copy_(self.block_mask())
        self.frozen.fill_(1)

    @torch.no_grad()
    def unfreeze(self) -> None:
        """Lets the mask follow the scores again."""
        self.frozen.fill_(0)
        self.held_mask.fill_(0)

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Starts over: new scores, the last level that was set, not frozen.

        Args:
            weight: `(N, K)`, what scores may be measured from; the `reset_parameters()` of the
                masked module passes it.
        """
        self.n_kept.fill_(self._target_n_kept)
        BlockMask.unfreeze(self)
        self.reset_scores(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Makes `module.weight = tensor` work: the tensor becomes the weight under the mask."""
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(
                f"cannot assign a tensor of shape {tuple(weight.shape)} to a masked weight of shape "
                f"{self.weight_shape}"
            )
        # A Parameter arrives at registration only, and has to stay the very same one.
        return weight if isinstance(weight, nn.Parameter) else weight.clone()

    @torch.no_grad()
    def fold_(self, weight: Tensor) -> None:
        """Multiplies the blocks of `weight` by their factors, in place; pruned ones become 0.0.

        Args:
            weight: the `(N, K)` weight.
        """
        scale_blocks_(weight, self.factors(), self.blocksize)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockMask:
        # Scores stay float32: in bfloat16 a few hundred blocks share a dozen values.
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)

    def extra_repr(self) -> str:
        settings = "".join(f", {name}={getattr(self, name)!r}" for name in self.SETTINGS)
        return f"blocksize={self.blocksize}, grid={self.grid}{settings}"


def find_mask(module: nn.Module, tensor_name: str) -> BlockMask | None:
    """The mask on a tensor of this module, or None."""
    return masks_of(module).get(tensor_name)


def masks_of(module: nn.Module) -> dict[str, BlockMask]:
    """Masks on the tensors of this very module, by tensor name."""
    return {name: mask for name, mask in block_masks_of(module) if isinstance(mask, BlockMask)}


def named_masks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, BlockMask]]:
    """Every mask in a model.

    Yields:
        The FQN of the masked tensor, the module that owns it, the tensor's name there, and the mask.
    """
    for path, module in model.named_modules():
        for name, mask in masks_of(module).items():
            yield (f"{path}.{name}" if path else name), module, name, mask


def has_mask(module: nn.Module) -> bool:
    """Whether there is a mask anywhere in a module."""
    return any(isinstance(child, BlockMask) for child in module.modules())


def kept_blocks(n_blocks: int, sparsity_level: float) -> int:
    """How many of `n_blocks` a level keeps: at least one, rounded to the nearest."""
    return max(1, round(n_blocks * (1 - sparsity_level)))


def _check_blocksize_setting(value: object, where: str = "") -> BlockSize:
    rows, cols = check_blocksize(value, where)
    return (rows, cols) if isinstance(value, tuple | list) else rows


def check_sparsity_level(value: object, where: str = "") -> float:
    """Returns the level as a float, or raises with `where` in front."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        else:
            raise TypeError(
                f"{where}sparsity_level={value!r} is a {type(value).__name__}; it must be a number "
                "in [0, 1), the fraction of blocks to prune"
            )
    level = float(value)
    if not 0 <= level < 1:
        raise ValueError(
            f"{where}sparsity_level={level} is outside [0, 1): it is the fraction of blocks to "
            "prune, for example 0.8; at 1 nothing would be left"
        )
    return level
