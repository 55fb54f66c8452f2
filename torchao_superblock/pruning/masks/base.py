"""`BlockMask`: the parametrization under every way of finding a mask.

A mask is derived, in every forward, from tensors of its own: one score for each block of the grid,
how many blocks to keep, and the held mask while it is frozen. Who writes the scores (the optimizer,
norms of the weights, gradients) is what tells the kinds apart; a kind is a subclass in a file of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchao_superblock.common.blocks import BlockSize, block_grid, check_blocksize
from torchao_superblock.common.sharding import (
    full_tensor,
    is_dtensor,
    local_rows_and_columns,
    local_tensor,
    refuse_released,
)
from torchao_superblock.ops.block_mask import (
    BROKEN,
    block_mask,
    block_norm,
    is_transformed,
    scale_blocks_,
)
from torchao_superblock.ops.block_mask.guards import (
    NOTHING_HELD,
    Guards,
    held_sum,
    level_checksum,
    pattern_checksum,
    settle,
)
from torchao_superblock.pruning.masks.product import (
    MaskWeight,
    TransformableMaskWeight,
    at_unit_scale,
)
from torchao_superblock.pruning.masks.settings import (
    Check,
    check_blocksize_setting,
    check_gain,
    check_sparsity_level,
)
from torchao_superblock.pruning.ramp import Progress


class BlockMask(nn.Module):
    """Parametrization of a 2-D weight that keeps its `n_kept` blocks with the highest scores.

    The mask is computed in every forward from the module's own tensors and nothing else: a
    `state_dict` reproduces the output, a copy is independent, and a changed `n_kept` recompiles
    nothing. The number of kept blocks is exact; of equal scores the one that comes first in
    row-major order wins.

    Level and held mask survive averages of the buffers (`AveragedModel(use_buffers=True)`, Lightning's
    `EMAWeightAveraging`) once all that was averaged agrees but for a tenth. Until then the mask is
    broken: no block is kept, the forward is NaN, and squash, summary and loading refuse it by name.
    Change them with the methods below; what is written straight into the buffers counts as damage.

    A kind of mask overrides what differs: :meth:`make_scores` (a buffer, or a Parameter to be
    trained), :meth:`reset_scores`, :meth:`update` (called by the sparsifier's `step()`), and, where
    the factors are not those of a hard choice, :meth:`factors` and :meth:`forward`. Its further
    constructor arguments stand in :attr:`SETTINGS` with their checks and become keys of a config. A
    kind that has to know gradients registers a :meth:`carrier <register_carrier>`.

    With a `gain` of `p`, the kept blocks are multiplied by `density ** -p` (the nearest power of two
    in fact), density being the fraction of blocks that is kept. Where a tenth of the weights is
    left, each has to do more of the work than steps meant for a dense layer let it; under an
    optimizer whose steps do not depend on the size of gradients, such as Adam, this lets the layer
    move as much as it did. As a level rises, `step()` divides the weight by what the gain
    grows, so that the function stays.

    Args:
        weight: the `(N, K)` floating weight to be masked; only its shape, its device and the values
            that the kind measures are used.
        blocksize: int for square blocks or `(rows, cols)`. Where N or K is no multiple, the last
            row or column of blocks is smaller.
        sparsity_level: fraction of blocks to prune, in `[0, 1)`.
        gain: exponent of the density, in `[0, 1]`; 0 for none.

    Attributes:
        scores: float32 `(ceil(N / rows), ceil(K / cols))`, a Parameter where they are trained.
        n_kept: int64 0-dim buffer, the number of blocks to keep.
        frozen: int8 0-dim buffer; while 1, `held_mask` is the mask.
        held_mask: int8 buffer of the grid's shape, 1 = kept.
        checksums: int64 `(2,)`, moments: float64 `(3,)`, held_mean: float32 of the grid's shape:
            buffers that tell whether these three were averaged, and what they were
            (:class:`~torchao_superblock.ops.block_mask.guards.Guards`).
        factor: float32 0-dim buffer, what kept blocks are multiplied by; None without a gain.
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

    update_reads_weight: ClassVar[bool] = True
    """Whether :meth:`update` and :meth:`freeze` may read the weight; what is sharded away is refused then."""

    scores: Tensor
    n_kept: Tensor
    frozen: Tensor
    held_mask: Tensor
    checksums: Tensor
    moments: Tensor
    held_mean: Tensor
    factor: Tensor | None
    carrier: nn.Parameter | None
    gain: float = 0.0
    tensor_shape: tuple[int, ...] | None = None
    """Of the tensor, where that is no matrix: `(out, in, height, width)` of a convolution."""
    statistic: bool = False
    """Whether the carrier is given squared norms of gradients in place of gradients of the scores."""

    def __init__(
        self,
        weight: Tensor,
        blocksize: BlockSize = 64,
        sparsity_level: float = 0.8,
        gain: float = 0.0,
    ) -> None:
        super().__init__()
        if weight.ndim not in (2, 4):
            raise ValueError(
                f"a block mask needs a 2-D weight (or a 4-D one of a convolution), got shape {tuple(weight.shape)}"
            )
        self.weight_shape = (weight.shape[0], math.prod(weight.shape[1:]))
        if weight.ndim > 2:
            self.tensor_shape = tuple(weight.shape)
        self.blocksize = check_blocksize(blocksize)
        grid = block_grid(self.weight_shape, self.blocksize)
        device = weight.device
        self._target_n_kept = kept_blocks(math.prod(grid), check_sparsity_level(sparsity_level))
        self.followers: tuple[str, ...] = ()  # parameters registered after the weight
        self.register_parameter("carrier", None)
        self.register_buffer("factor", None)
        self.make_scores(grid, device)
        self.register_buffer("n_kept", torch.zeros((), dtype=torch.int64, device=device))
        # Not bool: AveragedModel(use_buffers=True) subtracts buffers.
        self.register_buffer("frozen", torch.zeros((), dtype=torch.int8, device=device))
        self.register_buffer("held_mask", torch.zeros(grid, dtype=torch.int8, device=device))
        self._make_guards()
        self.gain = check_gain(gain)
        if self.gain:
            self.register_buffer("factor", torch.ones((), dtype=torch.float32, device=device))
        self.reset_parameters(weight)

    # ---------------------------------------------------------------------------------------------
    # What a kind overrides
    # ---------------------------------------------------------------------------------------------

    @classmethod
    def settings(cls) -> dict[str, Check]:
        """Every setting of a group with its check, the common ones first."""
        return {
            "sparsity_level": check_sparsity_level,
            "blocksize": check_blocksize_setting,
            "gain": check_gain,
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

    @property
    def gain_now(self) -> float:
        """What the next forward multiplies kept blocks by, beside what is soft about them."""
        return 1.0 if self.factor is None or self.factor.is_meta else float(self.factor)

    def factors(self) -> Tensor:
        """What the next forward multiplies the blocks by: `(R, C)`, bool or float32."""
        return self._factors_and_live()[0]

    def forward(self, weight: Tensor) -> Tensor:
        """`(N, K)` -> the masked `(N, K)` weight."""
        self.refuse_sharded(weight)
        factors, live = self._factors_and_live()
        carrier = self.scores if self.carrier is None else self.carrier
        matrix = weight if weight.ndim == 2 else weight.flatten(1)
        function = TransformableMaskWeight if is_transformed() else MaskWeight
        masked = function.apply(matrix, carrier, factors, live, self.blocksize, self.statistic)
        return masked if weight.ndim == 2 else masked.view(weight.shape)

    def update(self, weight: Tensor, progress: Progress) -> None:
        """Renews the scores; called by `step()`, under `no_grad`, before it applies the level.

        Args:
            weight: `(N, K)` under the mask, which FSDP2 may have sharded.
            progress: how many steps were taken, and the ramp.
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

    @torch.no_grad()
    def write_unless_frozen(self, values: Mapping[str, Tensor]) -> None:
        """Copies values into buffers; a mask that is held keeps what it has. The host does not wait.

        Args:
            values: by the names of the buffers.
        """
        for name, value in values.items():
            buffer = self._buffers[name]
            buffer.copy_(torch.where(self.frozen != 0, buffer, value))

    @property
    def known_frozen(self) -> bool | None:
        """Whether the mask is held; None where finding out would make the host wait for the device."""
        return bool(self.frozen) if self.frozen.is_cpu else None

    @property
    def guards(self) -> Guards:
        """What tells whether `n_kept`, `frozen` and `held_mask` were averaged."""
        buffers = (
            self._buffers
        )  # of each forward's host time three attributes would be a microsecond
        return Guards(buffers["checksums"], buffers["moments"], buffers["held_mean"])

    @property
    def is_broken(self) -> bool:
        """Whether an average left no mask (False on the meta device). Reads it back to the host."""
        return not self.frozen.is_meta and not bool(self._settled()[3])

    def block_norms(self, weight: Tensor) -> Tensor:
        """Euclidean norms of the blocks of `weight`, `(R, C)`, gathered where it is sharded."""
        return block_norm(full_tensor(weight).flatten(1), self.blocksize)

    def register_carrier(self) -> None:
        """Registers a Parameter of the grid's shape whose gradient, not value, is of interest.

        Only gradients are summed over accumulated backwards and averaged over ranks by whatever
        trains the model, and counted once where a checkpointed part runs twice. So what has to be
        known of gradients leaves as one. The optimizer may move the Parameter; nothing reads it.
        """
        carrier = torch.zeros(self.scores.shape, dtype=torch.float32, device=self.scores.device)
        self.carrier = nn.Parameter(carrier)

    @torch.no_grad()
    def carried(self) -> Tensor | None:
        """What the last backwards left in the carrier, divided by its root mean square.

        An :meth:`update` finds the same in `progress.carried`, computed for all masks at once.

        Returns:
            `(R, C)`, zeros where it is not finite (a scaled loss that overflowed); None if there was
            no backward since gradients were last set to None.
        """
        if self.carrier is None or self.carrier.grad is None:
            return None
        return at_unit_scale([full_tensor(self.carrier.grad)])[0]

    @torch.no_grad()
    def block_mask(self) -> Tensor:
        """The mask of the next forward: a new bool tensor over the block grid, True = kept.

        Of a broken mask (:attr:`is_broken`) no block is kept.

        Where FSDP2 has sharded the scores this gathers them: call it on every rank.
        """
        return self._mask_and_live()[0]

    def _factors_and_live(self) -> tuple[Tensor, Tensor]:
        mask, live = self._mask_and_live()
        return (mask if self.factor is None else mask * self.factor), live

    def _mask_and_live(self) -> tuple[Tensor, Tensor]:
        buffers = self._buffers  # in each forward four attributes would take a microsecond more
        return block_mask(
            self.full_scores(),
            buffers["n_kept"],
            buffers["held_mask"],
            buffers["frozen"],
            self.guards,
        )

    def _settled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`n_kept`, `held_mask`, `frozen` as they were before an average, and whether they are sound."""
        return settle(self.n_kept, self.held_mask, self.frozen, self.guards)

    def refuse_sharded(self, weight: Tensor) -> None:
        """Raises for a DTensor: its blocks are not all here."""
        if is_dtensor(weight):
            raise RuntimeError(
                "cannot mask a sharded weight: under fully_shard read `.weight` inside the forward "
                "of the module, or call `.unshard()` on the FSDP module first"
            )

    def refuse_released(self, where: str, way_out: str = "") -> None:
        """Raises where FSDP 1 or ZeRO-3 has taken the scores out of memory; see there."""
        refuse_released(self.scores, self.grid, where, way_out)

    def refuse_step(self, weight: Tensor, where: str) -> None:
        """The same for what :meth:`update` and :meth:`apply_gain` use; levels alone need nothing.

        Args:
            weight: under the mask; is not read.
            where: what the error begins with.
        """
        if self.carrier is not None:
            refuse_released(self.carrier, self.grid, where)
        if self.update_reads_weight or self.factor is not None:
            refuse_released(weight, self.tensor_shape or self.weight_shape, where)

    def refuse_freeze(self, weight: Tensor, where: str) -> None:
        """The same for what :meth:`freeze` uses."""
        self.refuse_released(where)
        if self.update_reads_weight:
            refuse_released(weight, self.tensor_shape or self.weight_shape, where)

    def check_foldable(self, fqn: str) -> None:
        """Refuses to fold a mask that means nothing.

        Args:
            fqn: of the masked tensor.

        Raises:
            ValueError: if the mask is broken, or scores are NaN.
        """
        self.check_sound(f"squash: {fqn!r}: ")
        if bool(self.full_scores().isnan().any()):
            raise ValueError(
                f"squash: the scores of {fqn!r} contain NaN, so its mask means nothing: training "
                "diverged. Go back to an earlier checkpoint, or call reset_parameters() on the "
                "module to start over"
            )

    def check_sound(self, where: str) -> None:
        """Refuses a mask whose level or pattern an average has mixed beyond repair.

        Args:
            where: what the error begins with; it names the tensor.

        Raises:
            ValueError: if the mask is broken.
        """
        if self.is_broken:
            raise ValueError(where + _BROKEN)

    def set_sparsity_level(self, sparsity_level: float) -> None:
        """Writes `n_kept` and its guards; the next forward follows. Nothing is read back to the host.

        Args:
            sparsity_level: fraction of blocks to prune, in `[0, 1)`.
        """
        self._write_level(self.aim_at(sparsity_level))

    def aim_at(self, sparsity_level: float) -> int:
        """Takes note of a level that the caller is about to write into `n_kept` and its guards.

        Args:
            sparsity_level: fraction of blocks to prune, in `[0, 1)`.

        Returns:
            How many blocks it keeps.
        """
        n_kept = kept_blocks(self.held_mask.numel(), check_sparsity_level(sparsity_level))
        if n_kept != self._target_n_kept:  # a module's own attributes are dear to write
            self._target_n_kept = n_kept
        return n_kept

    @torch.no_grad()
    def _write_level(self, n_kept: int) -> None:
        self.n_kept.fill_(n_kept)
        self.checksums[0].fill_(level_checksum(n_kept))
        self.moments[0].fill_(n_kept)
        self.moments[1].fill_(n_kept**2)

    @torch.no_grad()
    def apply_level(self, sparsity_level: float, weight: Tensor) -> None:
        """:meth:`set_sparsity_level`, and a gain that follows without changing the function.

        Args:
            sparsity_level: fraction of blocks to prune, in `[0, 1)`.
            weight: `(N, K)` under the mask; divided by what the gain grows, in place.
        """
        self.set_sparsity_level(sparsity_level)
        self.apply_gain(weight)

    def apply_gain(self, weight: Tensor) -> None:
        """Makes the gain that of the level aimed at, without changing the function; call it under `no_grad`.

        Args:
            weight: `(N, K)` under the mask; divided by what the gain grows, in place.
        """
        if self.factor is None:
            return
        new = self._gain_of_level()
        if new == self._last_factor:
            return
        self._last_factor = new
        held = self.frozen.bool()  # a held mask keeps its density, whatever the level says
        new = torch.where(held, self.factor, torch.full_like(self.factor, new))
        local_tensor(weight).mul_((self.factor / new).to(weight.dtype))
        self.factor.copy_(new)

    def _gain_of_level(self) -> float:
        # A power of two: what it grows by is taken from the weight exactly, in any dtype.
        return 2.0 ** round(self.gain * math.log2(self.held_mask.numel() / self._target_n_kept))

    @torch.no_grad()
    def freeze(self, weight: Tensor | None = None) -> None:
        """Holds the present mask, whatever the scores and the level do from now on.

        A broken mask stays broken. Nothing is read back to the host.

        Args:
            weight: `(N, K)` under the mask, for kinds whose factors end up in it.
        """
        mask, live = self._mask_and_live()
        self.hold(mask)
        broken = live == BROKEN
        self.checksums[1].masked_fill_(broken, 0)
        self.moments[2].masked_fill_(broken, math.nan)

    @torch.no_grad()
    def hold(self, mask: Tensor) -> None:
        """Freezes, and holds a given mask.

        Args:
            mask: bool `(R, C)`, True = kept.
        """
        self.held_mask.copy_(mask)
        self.frozen.fill_(1)
        self.checksums[1].copy_(pattern_checksum(1, held_sum(self.held_mask)))
        self.moments[2].fill_(1)
        self.held_mean.copy_(mask)

    @torch.no_grad()
    def unfreeze(self) -> None:
        """Lets the mask follow the scores again."""
        self.frozen.fill_(0)
        self.held_mask.fill_(0)
        self.checksums[1].fill_(NOTHING_HELD)
        self.moments[2].fill_(0)
        self.held_mean.fill_(0)

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Starts over: new scores, the last level that was set, not frozen.

        Args:
            weight: `(N, K)`, what scores may be measured from; the `reset_parameters()` of the
                masked module passes it.
        """
        self._write_level(self._target_n_kept)
        BlockMask.unfreeze(self)
        if self.factor is not None:
            self._last_factor = self._gain_of_level()
            self.factor.fill_(self._last_factor)
        self.reset_scores(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Makes `module.weight = tensor` work: the tensor becomes the weight under the mask."""
        shape = self.tensor_shape or self.weight_shape
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"cannot assign a tensor of shape {tuple(weight.shape)} to a masked weight of shape "
                f"{shape}"
            )
        # A Parameter arrives at registration only, and has to stay the very same one.
        return weight if isinstance(weight, nn.Parameter) else weight.clone()

    @torch.no_grad()
    def fold_(self, weight: Tensor) -> None:
        """Multiplies the blocks of `weight` by their factors, in place; pruned ones become 0.0.

        Args:
            weight: the `(N, K)` weight.
        """
        scale_local_blocks_(weight, self.factors().to(weight.device), self.blocksize)

    def _make_guards(self) -> None:
        grid, device = self.held_mask.shape, self.held_mask.device
        checksums = torch.zeros(2, dtype=torch.int64, device=device)
        # Squares need float64: an average that drifts by its rounding must not look like a mixture.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.register_buffer("checksums", checksums)
        self.register_buffer("moments", torch.zeros(3, dtype=dtype, device=device))
        self.register_buffer("held_mean", torch.zeros(grid, dtype=torch.float32, device=device))

    @torch.no_grad()
    def _trust_state(self) -> None:
        """Makes the guards of what stands in `n_kept`, `frozen` and `held_mask`, or was settled."""
        if not hasattr(self, "held_mean") or self.held_mean.device != self.held_mask.device:
            self._make_guards()
        n_kept = self.n_kept.to(self.moments.dtype)
        self.checksums[0].copy_(level_checksum(self.n_kept))
        self.checksums[1].copy_(pattern_checksum(self.frozen.long(), held_sum(self.held_mask)))
        self.moments.copy_(torch.stack([n_kept, n_kept**2, self.frozen.to(n_kept.dtype)]))
        self.held_mean.copy_(self.held_mask)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            refuse_broken_state(state_dict, prefix)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        absent: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs
        )
        guards = [prefix + name for name in Guards._fields]
        # Checkpoints of earlier versions have none: nothing averaged is taken for granted.
        old = prefix + "n_kept" in state_dict and set(guards) <= set(absent)
        missing_keys += [key for key in absent if not (old and key in guards)]
        if old:
            self._trust_state()
        elif not _goes_on(prefix):
            self._repair()

    @torch.no_grad()
    def _repair(self) -> None:
        """Writes what an average of equal masks did to `n_kept`, `frozen` and `held_mask` back."""
        if self.is_broken or self.frozen.is_meta:
            return
        n_kept, held_mask, frozen, _ = self._settled()
        # While the mask is held, the level may still be a mixture.
        self.n_kept.copy_(n_kept)
        self.held_mask.copy_(held_mask)
        self.frozen.copy_(frozen)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # What pickles of version 0.1 lack.
        self._parameters.setdefault("carrier", None)
        self._buffers.setdefault("factor", None)
        if "checksums" not in self._buffers:
            self._trust_state()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockMask:
        # Scores stay float32: in bfloat16 a few hundred blocks share a dozen values.
        def move_only(tensor: Tensor) -> Tensor:
            try:
                moved = fn(tensor)
            except TypeError:  # a device without float64, which only `moments` are
                tensor = tensor.to(torch.float32)
                moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)

    def extra_repr(self) -> str:
        gain = f", gain={self.gain}" if self.gain else ""
        settings = "".join(f", {name}={getattr(self, name)!r}" for name in self.SETTINGS)
        return f"blocksize={self.blocksize}, grid={self.grid}{gain}{settings}"


def scale_local_blocks_(weight: Tensor, factors: Tensor, blocksize: tuple[int, int]) -> None:
    """Multiplies each block of a weight in place, as far as this rank holds it; 0 writes 0.0.

    Args:
        weight: `(N, K)`, or the DTensor that holds its shards.
        factors: `(R, C)`, bool or floating.
        blocksize: `(r, c)`.
    """
    if not is_dtensor(weight):
        weight = weight.detach()
        matrix = weight.flatten(1)
        scale_blocks_(matrix, factors, blocksize)
        if matrix.data_ptr() != weight.data_ptr():  # flattening channels-last copies
            weight.copy_(matrix.view(weight.shape))
        return
    rows, cols = local_rows_and_columns(weight)
    r, c = blocksize
    block_rows = torch.arange(rows.start, rows.stop, device=factors.device) // r
    block_cols = torch.arange(cols.start, cols.stop, device=factors.device) // c
    scale_blocks_(local_tensor(weight), factors[block_rows][:, block_cols], (1, 1))


_BROKEN = (
    "an average has mixed masks of different levels, or held ones, in its buffers, so that none of "
    "them is left. Go on averaging until nearly all that is averaged agrees, or take the masks of the "
    "trained model: squash(average, masks_from=model)"
)


def refuse_broken_state(state_dict: Mapping[str, Any], prefix: str, fqn: str | None = None) -> None:
    """Refuses the state of a broken mask, before it is loaded.

    What is loaded into an `AveragedModel` is taken as it is: the run goes on, and so does the average.

    Args:
        state_dict: of a model.
        prefix: of the mask's keys.
        fqn: of the masked tensor.

    Raises:
        RuntimeError: if it is broken.
    """
    names = ("n_kept", "held_mask", "frozen", *Guards._fields)
    tensors = [state_dict.get(prefix + name) for name in names]
    if not all(isinstance(t, Tensor) and not t.is_meta and not is_dtensor(t) for t in tensors):
        return
    if _goes_on(prefix):
        return
    n_kept, held_mask, frozen, *guards = tensors
    try:
        *_, sound = settle(n_kept, held_mask, frozen, Guards(*guards))
    except (RuntimeError, ValueError):  # of other shapes: loading says so
        return
    if not bool(sound):
        raise RuntimeError(f"the checkpoint's mask of {fqn or prefix!r} means nothing: {_BROKEN}")


def _goes_on(prefix: str) -> bool:
    # An AveragedModel of an interrupted run: all that a module below it sees of it is this name.
    return prefix.startswith("module.")


def refuse_nan(weight: Tensor, where: str) -> None:
    """Raises for a weight whose blocks have no norm to be ranked by; `where` names the tensor."""
    if not weight.is_meta and bool(weight.isnan().any()):
        raise ValueError(f"{where}contains NaN, so its blocks have no norm to be ranked by")


def kept_blocks(n_blocks: int, sparsity_level: float) -> int:
    """How many of `n_blocks` a level keeps: at least one, rounded to the nearest."""
    return max(1, round(n_blocks * (1 - sparsity_level)))
