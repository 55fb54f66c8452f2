"""The parametrization that learns a block mask: scores -> block mask -> masked weight.

Method: supermasks (Ramanujan et al. 2020, https://arxiv.org/abs/1911.13299) over blocks, as in
https://arxiv.org/abs/2207.00670: one trainable score for each block of a weight, the best `n_kept`
blocks stay, and the gradient passes straight through the hard decision.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchao_superblock.ops.block_mask import (
    block_grid,
    block_mask,
    block_sum,
    mask_weight,
    mask_weight_backward,
    regions,
)

SCORES_INITS = ("kaiming_uniform", "weight_norm")

BlockSize = int | tuple[int, int]


class _MaskWeight(torch.autograd.Function):
    """`weight * mask`; the scores, which only the gradient knows of, are trained straight through.

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


class Supermask(nn.Module):
    """Parametrization of a 2-D weight that keeps its `n_kept` blocks with the highest scores.

    The mask is computed in every forward from the module's own tensors and nothing else: a
    `state_dict` reproduces the output, a copy is independent, and a changed `n_kept` recompiles
    nothing. The number of kept blocks is exact; of equal scores the one that comes first in
    row-major order wins.

    `scores` stay float32 under `.half()`, `.to(torch.bfloat16)` and FSDP2's mixed precision: in
    bfloat16 a few hundred blocks share a dozen values, and a step of a usual size changes none.

    Args:
        weight: the `(N, K)` floating weight to be masked; only its shape, device and, for
            `"weight_norm"`, its values are used.
        blocksize: int for square blocks or `(rows, cols)`. Where N or K is no multiple, the last
            row or column of blocks is smaller.
        sparsity_level: fraction of blocks to prune, in `[0, 1)`.
        scores_init: `"kaiming_uniform"` (random, to train from scratch) or `"weight_norm"` (the norm
            of each block, to fine-tune).

    Attributes:
        scores: float32 Parameter `(ceil(N / rows), ceil(K / cols))`.
        n_kept: int64 0-dim buffer, the number of blocks to keep.
        frozen: int8 0-dim buffer; while 1, `held_mask` is the mask and the gradient of the scores
            is zero.
        held_mask: int8 buffer of the grid's shape, 1 = kept.
        blocksize: `(rows, cols)`.

    Raises:
        ValueError: for a bad shape, block size, level or init.
        TypeError: for arguments of the wrong type.

    Example:
        >>> linear = nn.Linear(768, 3072)
        >>> mask = Supermask(linear.weight, blocksize=64, sparsity_level=0.9)
        >>> mask(linear.weight).shape
        torch.Size([3072, 768])
    """

    # By this bsr/ recognises a weight that is not squashed yet, without importing this module.
    _is_block_mask = True

    n_kept: Tensor
    frozen: Tensor
    held_mask: Tensor
    _sharded_scores: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        blocksize: BlockSize = 64,
        sparsity_level: float = 0.8,
        scores_init: str = "kaiming_uniform",
    ) -> None:
        super().__init__()
        if weight.ndim != 2:
            raise ValueError(f"a block mask needs a 2-D weight, got shape {tuple(weight.shape)}")
        self.weight_shape = (weight.shape[0], weight.shape[1])
        self.blocksize = check_blocksize(blocksize)
        self.scores_init = check_scores_init(scores_init)
        grid = block_grid(self.weight_shape, self.blocksize)
        device = weight.device
        self._target_n_kept = kept_blocks(math.prod(grid), check_sparsity_level(sparsity_level))
        self._sharded_scores = None
        self.followers: tuple[str, ...] = ()  # parameters registered after the weight
        self.scores = nn.Parameter(torch.empty(grid, dtype=torch.float32, device=device))
        self.register_buffer("n_kept", torch.zeros((), dtype=torch.int64, device=device))
        # Not bool: AveragedModel(use_buffers=True) subtracts buffers.
        self.register_buffer("frozen", torch.zeros((), dtype=torch.int8, device=device))
        self.register_buffer("held_mask", torch.zeros(grid, dtype=torch.int8, device=device))
        self.reset_parameters(weight)

    def forward(self, weight: Tensor) -> Tensor:
        if _is_dtensor(weight):
            raise RuntimeError(
                "cannot mask a sharded weight: under fully_shard read `.weight` inside the forward "
                "of the module, or call `.unshard()` on the FSDP module first"
            )
        with torch.no_grad():
            mask, live = self._mask_and_live()
        return _MaskWeight.apply(weight, self.scores, mask, live, self.blocksize)

    @torch.no_grad()
    def block_mask(self) -> Tensor:
        """The mask of the next forward: a new bool tensor over the block grid, True = kept.

        Where FSDP2 has sharded the scores this gathers them: call it on every rank.
        """
        return self._mask_and_live()[0]

    def _mask_and_live(self) -> tuple[Tensor, Tensor]:
        return block_mask(self.full_scores(), self.n_kept, self.held_mask, self.frozen)

    def full_scores(self) -> Tensor:
        """The float32 scores of all blocks, without gradient, gathered where they are sharded.

        Raises:
            RuntimeError: if something else cast the scores to another dtype.
        """
        scores = self.scores.detach()
        if _is_dtensor(scores):
            return scores.full_tensor()
        if scores.dtype == torch.float32:
            return scores
        # FSDP2's mixed precision hands the forward a rounded copy. The float32 shards are still
        # there; gathering these few numbers keeps the forward's mask the one that is squashed.
        if self._sharded_scores is not None:
            return self._sharded_scores.detach().full_tensor()
        raise RuntimeError(
            f"the scores of a block mask are {scores.dtype} and must be float32: rounded scores "
            "tie and stop learning. `.half()` and `.to()` leave them alone; a loop that casts "
            "`parameter.data` must skip them (`sparsifier.param_groups(model)` lists them last)"
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
            weight: `(N, K)`, what `"weight_norm"` measures. Without it such scores are left as they
                are; the `reset_parameters()` of the masked module passes it.
        """
        self.n_kept.fill_(self._target_n_kept)
        self.unfreeze()
        if self.scores_init == "kaiming_uniform":
            nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        elif weight is not None:
            if weight.is_meta or self.scores.is_meta:
                return
            self.scores.copy_(block_norm(weight.detach(), self.blocksize))

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
        """Writes 0.0 to the pruned blocks of `weight`, in place (a product would leave -0.0).

        Args:
            weight: the `(N, K)` weight, or the DTensor that holds its shards.
        """
        pruned = self.block_mask().logical_not()
        if _is_dtensor(weight):
            from torchao_superblock.pruning.fsdp import local_range

            r, c = self.blocksize
            rows, cols = (local_range(weight, dim) for dim in (0, 1))
            device = pruned.device
            block_rows = torch.arange(rows.start, rows.stop, device=device) // r
            block_cols = torch.arange(cols.start, cols.stop, device=device) // c
            weight.to_local().masked_fill_(pruned[block_rows][:, block_cols], 0.0)
            return
        for rows, cols, block_rows, block_cols, (r, c) in regions(weight.shape, self.blocksize):
            blocks = weight[rows, cols].unflatten(1, (-1, c)).unflatten(0, (-1, r))
            blocks.masked_fill_(pruned[block_rows, block_cols][:, None, :, None], 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Supermask:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)

    def __setattr__(self, name: str, value: object) -> None:
        # FSDP2 swaps the sharded parameter for the gathered one by plain assignment; the float32
        # shards would otherwise be out of reach during a forward in mixed precision.
        if name == "scores" and "_parameters" in self.__dict__:
            present = self._parameters.get("scores")
            swapped_in = _is_dtensor(present) and not _is_dtensor(value)
            if swapped_in or _is_dtensor(value):
                object.__setattr__(self, "_sharded_scores", present if swapped_in else None)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        grid = tuple(self.held_mask.shape)
        return f"blocksize={self.blocksize}, grid={grid}, scores_init={self.scores_init!r}"


def find_supermask(module: nn.Module, tensor_name: str) -> Supermask | None:
    """The Supermask on a tensor of this module, or None."""
    if not parametrize.is_parametrized(module, tensor_name):
        return None
    for parametrization in module.parametrizations[tensor_name]:
        if isinstance(parametrization, Supermask):
            return parametrization
    return None


def supermasks_of(module: nn.Module) -> dict[str, Supermask]:
    """Supermasks on the tensors of this very module, by tensor name."""
    if not parametrize.is_parametrized(module):
        return {}
    masks = {name: find_supermask(module, name) for name in module.parametrizations}
    return {name: mask for name, mask in masks.items() if mask is not None}


def named_supermasks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Supermask]]:
    """Every Supermask in a model.

    Yields:
        The FQN of the masked tensor, the module that owns it, the tensor's name there, and the mask.
    """
    for path, module in model.named_modules():
        for name, mask in supermasks_of(module).items():
            yield (f"{path}.{name}" if path else name), module, name, mask


def has_supermask(module: nn.Module) -> bool:
    """Whether there is a Supermask anywhere in a module."""
    return any(isinstance(child, Supermask) for child in module.modules())


def block_norm(weight: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """Euclidean norm of each block, `(R, C)`.

    Computed in float64 where the device has it, so that blocks are told apart as far as float32
    scores can tell them apart, whatever the weight's dtype.
    """
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    weight = weight.to(dtype)
    return block_sum(weight, weight, blocksize).sqrt()


def kept_blocks(n_blocks: int, sparsity_level: float) -> int:
    """How many of `n_blocks` a level keeps: at least one, rounded to the nearest."""
    return max(1, round(n_blocks * (1 - sparsity_level)))


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


def check_blocksize(value: object, where: str = "") -> tuple[int, int]:
    """Returns the block size as `(rows, cols)`, or raises with `where` in front."""
    sizes = (value, value) if isinstance(value, numbers.Integral) else value
    if (
        not isinstance(sizes, tuple | list)
        or len(sizes) != 2
        or any(isinstance(size, bool) or not isinstance(size, numbers.Integral) for size in sizes)
    ):
        raise TypeError(
            f"{where}blocksize={value!r} must be an int, or a pair of ints (rows, cols) = "
            "(out_features, in_features)"
        )
    rows, cols = (int(size) for size in sizes)
    if rows < 1 or cols < 1:
        raise ValueError(f"{where}blocksize={value!r} must be at least 1; usual are 16, 32 and 64")
    return rows, cols


def check_scores_init(value: object, where: str = "") -> str:
    """Returns the name of the init, or raises with `where` in front."""
    if value not in SCORES_INITS:
        raise ValueError(
            f"{where}scores_init={value!r} is unknown; use 'kaiming_uniform' to train from scratch "
            "or 'weight_norm' to fine-tune"
        )
    return str(value)


def _is_dtensor(value: object) -> bool:
    # Importing DTensor takes longer than the rest of this package; without it there is none.
    if type(value) in (torch.Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)
