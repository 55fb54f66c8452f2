"""Block masks under a `Trainer`."""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from torchao_superblock.integrations.transformers.masks import masks_of
from torchao_superblock.pruning import BlockSparsifier

SPARSIFIER_FILE = "sparsifier.pt"


class SparseTrainerMixin:
    """A `Trainer` that decays no scores of block masks: `class SparseTrainer(SparseTrainerMixin, Trainer)`.

    Decay pulls all scores towards zero alike and says nothing about the blocks. A `Trainer` decides on its groups when
    it builds the optimizer, and a resumed one must find the same, so it cannot be left to a callback.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that are decayed."""
        scores = {id(parameter) for _, mask in masks_of(model) for parameter in mask.parameters()}
        parameters = dict(model.named_parameters())
        names = super().get_decay_parameter_names(model)
        return [name for name in names if id(parameters.get(name)) not in scores]


class SparsifierCallback(TrainerCallback):
    """Steps a sparsifier with a `Trainer`, and saves it beside each checkpoint.

    Before training it looks whether the optimizer trains all scores and decays none (:class:`SparseTrainerMixin`). A
    training that is resumed finds the sparsifier in the checkpoint's folder, and goes on as if it had not stopped.

    Args:
        sparsifier: has prepared the model of the `Trainer`.
        squash: fold the masks when training ends (with `load_best_model_at_end`, those of the best model).
        resume_from: the folder that training is resumed from, if it is neither in `output_dir` nor
            `TrainingArguments.resume_from_checkpoint`.

    Raises:
        RuntimeError: at the start of a training: the model is not the one that the sparsifier has prepared, or the
            optimizer is not made for it.
        FileNotFoundError, ValueError: the checkpoint has no state of this sparsifier.

    Example:
        >>> from transformers import Trainer
        >>> class SparseTrainer(SparseTrainerMixin, Trainer):
        ...     pass
        >>> sparsifier.prepare(model, [{"tensor_fqn": "*layers*"}])  # doctest: +SKIP
        >>> callback = SparsifierCallback(sparsifier, squash=True)  # doctest: +SKIP
        >>> SparseTrainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        sparsifier: BlockSparsifier,
        *,
        squash: bool = False,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(sparsifier, BlockSparsifier):
            raise TypeError(
                f"SparsifierCallback: expected a sparsifier, got {type(sparsifier).__name__}"
            )
        self.sparsifier = sparsifier
        self.squash = squash
        self.resume_from = resume_from

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        modules = set(model.modules())
        groups = self.sparsifier.groups
        if not groups or any(group["module"] not in modules for group in groups):
            raise RuntimeError(
                "SparsifierCallback: the sparsifier has not prepared the model of this Trainer; call "
                "sparsifier.prepare(model) before the Trainer is made"
            )
        self._check_optimizer(model, optimizer)
        if state.global_step:
            self._restore(args, state)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        # Here gradients are still there. A step that the scaler of float16 skipped had none to go by.
        if not getattr(optimizer, "step_was_skipped", False):
            self.sparsifier.step()

    def on_save(self, args, state, control, **kwargs) -> None:
        content = {"global_step": state.global_step, "sparsifier": self.sparsifier.state_dict()}
        if not args.should_save:
            return
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"SparsifierCallback: there is no {folder!r} to save the sparsifier in (a search for hyperparameters "
                "saves elsewhere; set save_strategy='no' there)"
            )
        path = os.path.join(folder, SPARSIFIER_FILE)
        torch.save(content, f"{path}.part")
        os.replace(f"{path}.part", path)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.squash:
            self.sparsifier.squash_mask()

    def _check_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        way_out = (
            "leave the optimizer to class SparseTrainer(SparseTrainerMixin, Trainer), or build it from "
            "sparsifier.param_groups(model, weight_decay)"
        )
        for fqn, mask in masks_of(model):
            is_trained = isinstance(mask.scores, nn.Parameter)
            parameter = mask.scores if is_trained else mask.carrier
            if parameter is None:  # neither gradients nor the optimizer matter to this kind
                continue
            if not parameter.requires_grad:
                raise RuntimeError(
                    f"SparsifierCallback: the scores of {fqn!r} do not require gradients, so its mask would never "
                    "change; call requires_grad_(True) on its mask (peft freezes what is no adapter), or hold the "
                    "masks with sparsifier.freeze()"
                )
            if is_trained and id(parameter) not in groups:
                raise RuntimeError(
                    f"SparsifierCallback: the optimizer does not train the scores of {fqn!r}. It was built before "
                    f"prepare(), or for another model: {way_out}"
                )
            if is_trained and groups[id(parameter)].get("weight_decay"):
                raise RuntimeError(
                    f"SparsifierCallback: the optimizer decays the scores of {fqn!r} by "
                    f"{groups[id(parameter)]['weight_decay']}, which says nothing about blocks: {way_out}"
                )

    def _restore(self, args, state) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folders = [os.path.join(args.output_dir, name)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, args.resume_from_checkpoint)
        if self.resume_from is not None:
            folders = [os.fspath(self.resume_from)]
        paths = [os.path.join(folder, SPARSIFIER_FILE) for folder in folders]
        path = next(filter(os.path.isfile, paths), None)
        if path is None:
            raise FileNotFoundError(
                f"SparsifierCallback: training goes on from step {state.global_step}, and there is no "
                f"{' or '.join(map(repr, paths))}; pass the checkpoint's folder as resume_from, or start anew"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
        try:
            step, saved = content["global_step"], content["sparsifier"]
            masks = {fqn: entry["mask"] for fqn, entry in saved["state"].items()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"SparsifierCallback: {path!r} holds no sparsifier") from error
        if step != state.global_step:
            raise ValueError(
                f"SparsifierCallback: {path!r} is of step {step}, training goes on from {state.global_step}; pass the "
                "right folder as resume_from"
            )
        own = self.sparsifier.state  # the masks of the model's next forward
        for fqn, mask in masks.items():
            if fqn in own and not torch.equal(own[fqn]["mask"].cpu(), mask.cpu()):
                raise ValueError(
                    f"SparsifierCallback: {path!r} has another mask for {fqn!r} than the model that was resumed, so "
                    "it is of another run; pass the right folder as resume_from"
                )
        self.sparsifier.load_state_dict(saved)
