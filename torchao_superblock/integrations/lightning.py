"""Lightning: a callback that masks, steps, saves, resumes and squashes."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from torchao_superblock.pruning import BlockSparsifier, squash
from torchao_superblock.pruning.finding import named_masks

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl  # the same library under its older name
    except ImportError as error:
        raise ImportError(
            f"torchao_superblock.integrations.lightning needs Lightning ({error}): "
            "pip install 'torchao_superblock[lightning]'"
        ) from error

__all__ = ["BlockSparsity"]

_AVERAGING = getattr(pl.callbacks, "WeightAveraging", ())


class BlockSparsity(pl.Callback):
    """Trains a LightningModule with block masks.

    - Prepares the module when a fit begins, before the optimizers are built: write
      `callback.sparsifier.param_groups(self, weight_decay)` in `configure_optimizers`, so that scores do not decay.
    - Calls `sparsifier.step()` after every step of the optimizer: once for several accumulated batches, not for a step
      that a GradScaler skips.
    - Keeps the sparsifier's state in the checkpoints; a resumed fit goes on where it stopped.
    - Squashes when the fit ends. `test`, `validate` and `predict` with a checkpoint of the masked model
      (`ckpt_path="best"`) get their masks back for as long as they take.

    With Lightning's `WeightAveraging` give this callback first; what is squashed then are the averaged weights under
    the masks of the trained model.

    Args:
        sparsifier: not prepared yet. It belongs to this callback from here on.
        config: as `sparsifier.prepare` takes it; names begin within the LightningModule (`"model.layers.*.weight"`).
        squash: whether the masks are folded when a fit ends. A sharded module (FSDP) cannot be: pass False, gather the
            state dict and squash a copy that is not sharded.

    Example:
        >>> sparsity = BlockSparsity(SupermaskSparsifier(0.9, 32, ramp_steps=400, freeze_step=700))
        >>> trainer = lightning.Trainer(callbacks=[sparsity], max_steps=1000)
        >>> trainer.fit(module)
        >>> report = swap_to_bsr(module)
    """

    def __init__(
        self,
        sparsifier: BlockSparsifier,
        config: list[dict[str, Any]] | None = None,
        *,
        squash: bool = True,
    ) -> None:
        if not isinstance(sparsifier, BlockSparsifier):
            raise TypeError(
                "BlockSparsity: sparsifier must be one of torchao_superblock's, got "
                f"{type(sparsifier).__name__}"
            )
        self.sparsifier = sparsifier
        self.config = config
        self.squash = squash
        self._seen_steps = 0
        self._scale: float | None = None
        self._trained: nn.Module | None = None
        self._only_for_now = False
        self._handle: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepares the module; for other stages than a fit only if a checkpoint with masks is loaded."""
        masked = next(named_masks(pl_module), None) is not None
        if stage == "fit":
            self._check_order(trainer)
            if not masked:
                self.sparsifier.prepare(pl_module, self.config)
            elif not self._is_prepared():
                raise RuntimeError(
                    "BlockSparsity: the module carries block masks of another sparsifier; give the callback that one, "
                    "or squash the module first"
                )
        elif not masked:
            # Only what is loaded says whether the masks are wanted.
            self._handle = pl_module.register_load_state_dict_pre_hook(self._prepare_to_load)

    def _prepare_to_load(self, module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        if any(".parametrizations." in name for name in state_dict):
            if next(named_masks(module), None) is None:
                self.sparsifier.prepare(module, self.config)
                self._only_for_now = True

    def _check_order(self, trainer: pl.Trainer) -> None:
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        if any(isinstance(other, _AVERAGING) for other in before):
            raise ValueError(
                "BlockSparsity: WeightAveraging stands before it in the list of callbacks, and would copy the module "
                "before it has masks; put BlockSparsity first"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to count the optimizer's steps; a checkpoint to go on from is loaded by now."""
        self._seen_steps = trainer.global_step
        self._scale = _loss_scale(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """One step of the sparsifier for each step of the optimizer; the gradients are still there."""
        if trainer.global_step == self._seen_steps:
            return  # a batch of several that are accumulated
        self._seen_steps = trainer.global_step
        before, self._scale = self._scale, _loss_scale(trainer)
        if before is not None and self._scale < before:
            return  # the scaler skipped it
        self.sparsifier.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the trained masks, if an average is about to be copied over them."""
        averaged = any(isinstance(other, _AVERAGING) for other in trainer.callbacks)
        if averaged and self.squash and not trainer.interrupted:
            self._trained = copy.deepcopy(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Folds the masks; every checkpoint has been written by now."""
        if not self.squash or trainer.interrupted:
            return
        if self._trained is not None:
            squash(pl_module, masks_from=self._trained)
            self._trained = None
        else:
            self.sparsifier.squash_mask()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Squashes again what was prepared only to load a checkpoint."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._only_for_now:
            self._only_for_now = False
            self.sparsifier.squash_mask()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the sparsifier's state, if it has any now."""
        return {"sparsifier": self.sparsifier.state_dict() if self._is_prepared() else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint, after the module's."""
        state = state_dict["sparsifier"]
        if state is not None and self._is_prepared():
            self.sparsifier.load_state_dict(state)

    def _is_prepared(self) -> bool:
        return any(parametrize.is_parametrized(g["module"]) for g in self.sparsifier.groups)


def _loss_scale(trainer: pl.Trainer) -> float | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.get_scale()
