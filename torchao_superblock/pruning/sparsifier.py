"""`BlockSparsifier`: block masks of any kind behind the interface of `torch.ao.pruning`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# The base class and the schedulers only work as a pair (torchao has older copies of both): they
# are imported here and nowhere else.
from torch.ao.pruning import BaseSparsifier, CubicSL, LambdaSL

from torchao_superblock.common.all_or_nothing import all_or_nothing
from torchao_superblock.common.blocks import block_grid, check_blocksize
from torchao_superblock.common.names import find_fqn, nearest_names
from torchao_superblock.common.swappable import TWINS, meet
from torchao_superblock.pruning.attach import attach
from torchao_superblock.pruning.checkpoints import refuse_dense_checkpoints
from torchao_superblock.pruning.convert import replace_squashed
from torchao_superblock.pruning.finding import find_mask, named_masks
from torchao_superblock.pruning.masks.base import BlockMask
from torchao_superblock.pruning.masks.given import GivenMask
from torchao_superblock.pruning.masks.settings import check_sparsity_level
from torchao_superblock.pruning.masks.together import Levels, carried
from torchao_superblock.pruning.ramp import Progress, Ramp, check_ramp
from torchao_superblock.pruning.reading import read_masked_children_once
from torchao_superblock.pruning.replaced import Links, follow, refuse_adapters
from torchao_superblock.pruning.sparse_params import kept_params, leave_params
from torchao_superblock.pruning.squash import check_foldable, fold
from torchao_superblock.pruning.summary import MaskedTensor, MaskSummary
from torchao_superblock.pruning.targets import (
    SkippedTensor,
    check_config,
    check_settings,
    resolve,
)
from torchao_superblock.pruning.watch import ScoresWatch, learned, remove_settled
from torchao_superblock.pruning.written import refuse_lost_write

__all__ = ["BlockSparsifier", "CubicSL", "LambdaSL"]


class _MaskStates(Mapping[str, dict[str, Any]]):
    """FQN -> `{"mask": ...}`; a mask is computed when its entry is read."""

    def __init__(
        self, masks: Mapping[str, BlockMask], loaded: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._masks = masks
        self._loaded = loaded

    def __getitem__(self, fqn: str) -> dict[str, Any]:
        entry = dict(self._loaded.get(fqn, {}))
        if "mask" not in entry and fqn in self._masks:
            self._masks[fqn].refuse_released(f"state: {fqn!r}")
            entry["mask"] = self._masks[fqn].block_mask()
        elif fqn not in self._masks and not entry:
            raise KeyError(fqn)
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter({**self._masks, **self._loaded})

    def __len__(self) -> int:
        return len({**self._masks, **self._loaded})


class BlockSparsifier(BaseSparsifier):
    """Puts block masks on a model's weights, keeps them up to date, and folds them.

    The base of every sparsifier here. A subclass names its kind of mask in :attr:`mask_type` and
    gives its constructor that kind's settings; all else is shared.

    Args:
        sparsity_level: fraction of blocks pruned, in `[0, 1)`; exactly
            `max(1, round(n_blocks * (1 - sparsity_level)))` blocks are kept.
        blocksize: int for square blocks or `(rows, cols)` = (out_features, in_features).
        ramp_steps: with `n`, the level rises cubically from 0 to `sparsity_level` over the first `n`
            calls of :meth:`step`; under a scheduler of torch the ramp scales the scheduler's level.
            None for the level as it is.
        freeze_step: the call of :meth:`step` at which the masks are frozen; not before the ramp
            ends. None leaves it to :meth:`freeze`.
        gain: exponent of what kept blocks are multiplied by, see :class:`BlockMask`; None is 0.5 on
            a ramp and 0 without one. For optimizers whose steps do not depend on the size of
            gradients (Adam and its kin); under SGD it multiplies the learning rate of a layer by
            `density ** (-2 * gain)`, so give 0 there.
        **settings: of the kind of mask, see :attr:`BlockMask.SETTINGS`.

    Attributes:
        ramp: both numbers of steps.

    Raises:
        ValueError: for a level outside `[0, 1)`, a block size below 1, a bad setting, a freeze before
            the end of the ramp.
        TypeError: for arguments of the wrong type.
    """

    mask_type: ClassVar[type[BlockMask]]

    _links: Links | None = None
    _watch: ScoresWatch | None = None

    def __init__(
        self,
        sparsity_level: float = 0.8,
        blocksize: int | tuple[int, int] = 64,
        *,
        ramp_steps: int | None = None,
        freeze_step: int | None = None,
        gain: float | None = None,
        **settings: Any,
    ) -> None:
        self.ramp = check_ramp(ramp_steps, freeze_step, f"{type(self).__name__}: ")
        self._steps = 0
        if gain is None:
            gain = 0.0 if ramp_steps is None else 0.5
        settings["gain"] = gain
        checks = self.mask_type.settings()
        unknown = sorted(settings.keys() - checks.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown setting {unknown[0]!r}; it has "
                f"{', '.join(map(repr, checks))}"
            )
        settings = {"sparsity_level": sparsity_level, "blocksize": blocksize, **settings}
        self._loaded: dict[str, dict[str, Any]] = {}
        self._levels = Levels()
        super().__init__(defaults=check_settings(settings, checks, f"{type(self).__name__}: "))
        self._skipped: list[SkippedTensor] = []
        self._squashed: dict[str, weakref.ref[nn.Module]] = {}
        self._squashing = False  # begun and, if it was interrupted, to be finished

    @classmethod
    def require_freeze_step(cls, freeze_step: int | None, why: str) -> None:
        """Raises if there is none; `why` says what the kind needs it for."""
        if freeze_step is None:
            raise ValueError(
                f"{cls.__name__}: freeze_step is needed, since it {why}; for example 75 % of the calls of step()"
            )

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        """Refuses settings of a group that do not go with those of the sparsifier; for subclasses."""

    @property
    def state(self) -> Mapping[str, dict[str, Any]]:
        """FQN -> a dict with the bool `"mask"` of the next forward, computed when it is read.

        Between `load_state_dict` and the next `step()` it is the mask that was loaded. Under FSDP2
        read it on every rank.
        """
        masks = {group["tensor_fqn"]: mask for group, mask in self._masks()}
        return _MaskStates(masks, self._loaded)

    @state.setter
    def state(self, value: Mapping[str, dict[str, Any]]) -> None:
        # The base class starts with an empty one.
        self._loaded = {fqn: dict(entry) for fqn, entry in value.items()}

    # ---------------------------------------------------------------------------------------------
    # Training
    # ---------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, config: list[dict[str, Any]] | None = None) -> None:
        """Puts a block mask on the weights that the config names. The model changes in place.

        From then on the weight is computed at each read: initialise it before, by assignment, or with
        the module's `reset_parameters()`; writing into what a read returned is
        lost, and the next read says so (not where it was written through `.data`).

        Args:
            model: not yet wrapped in DDP or fully_shard.
            config: None for the weight of every exact `nn.Linear`, or a list of entries. An entry has
                a `tensor_fqn` and any setting of the constructor (`sparsity_level`, `blocksize`, ...).
                A `tensor_fqn` that is the name of a tensor as it stands means that one, which can be
                any 2-D floating parameter. Another with `*`, `?` or `[` is a glob over whole names
                (`*` crosses dots): it reaches the weights of `nn.Linear` and its subclasses and the
                projection weights of `nn.MultiheadAttention`, each its own group. An entry with
                `"exclude": True` takes out what earlier entries reached (entries that all exclude
                start from what None reaches). A later entry overrides an earlier glob.
                None and globs skip what cannot be masked; :meth:`summary` lists it.

        Raises:
            ValueError: for a name without a match, a tensor named twice, an exactly named tensor that
                cannot be masked, a bad setting, or if nothing is left to mask.
            TypeError: for a config of the wrong form.
            RuntimeError: if this sparsifier or the tensor is prepared already, the tensor belongs to
                the base of an adapter, or the model is
                wrapped. The model is unchanged after an error.
        """
        self._notice_squash()
        if self.groups:
            raise RuntimeError(
                "prepare: this sparsifier has already prepared a model; call squash_mask() first, or "
                f"use another {type(self).__name__}"
            )
        if not isinstance(model, nn.Module):
            raise TypeError(f"prepare: model must be an nn.Module, got {type(model).__name__}")
        for module in model.modules():
            meet(type(module))
        config = check_config(config, self.mask_type.settings())
        groups, skipped = resolve(model, config, self.defaults)
        _refuse_ddp(model, groups)
        refuse_adapters(model, {g["module"]: g["tensor_fqn"] for g in groups}, "prepare")
        # Before any scores are drawn: an error must not move the random number generator.
        for group in groups:
            where = f"prepare: {group['tensor_fqn']!r} "
            self.check_group(group, where)
            if "mask" not in group:
                self.mask_type.check_weight(_weight(group), group, where)
        prepared = {
            "model": model,
            "config": config,
            "groups": groups,
            "_loaded": {},
            "_steps": 0,
            "_skipped": skipped,
            "_squashed": {},
            "_squashing": False,
            "_links": None,
        }
        before = dict(vars(self))
        try:
            with all_or_nothing(model):
                for group in groups:
                    attach(group["module"], group["tensor_name"], self._new_mask(group))
                read_masked_children_once(model)
                refuse_dense_checkpoints(model)
                remove_settled()
                masks = [find_mask(group["module"], group["tensor_name"]) for group in groups]
                if any(learned(mask) is not None for mask in masks):
                    prepared["_watch"] = ScoresWatch(self._masks)
                vars(self).update(prepared)  # the last line that can be interrupted
        except BaseException:
            self.__dict__ = before
            raise

    def step(self, use_path: bool = True) -> None:
        """Takes one step along the ramp: renews the masks, applies the groups' levels, freezes in time.

        Call it once per step of the optimizer, before `zero_grad()`: some kinds of mask read
        gradients. Does nothing while `enable_mask_update` is False (schedulers set it to True), and
        the step does not count then. Under FSDP2 call it on every rank.

        Args:
            use_path: ignored; the base class has it.

        Raises:
            RuntimeError: before `prepare` and after `squash_mask`, or where gradients that the masks
                need are gone; if a masked module was replaced by one without a mask, or became the
                base of an adapter; if a masked weight was written in place; if FSDP 1 or ZeRO-3 has
                released what this kind of mask measures.
            ValueError: for a level outside `[0, 1)`; nothing has been changed then.
        """
        remove_settled()
        self._require_groups("step")
        if not self.enable_mask_update:
            return
        for group in self.groups:
            where = f"step: {group['tensor_fqn']!r}"
            check_sparsity_level(group["sparsity_level"], f"{where} has ")
            refuse_lost_write(group["module"], group["tensor_name"], f"{where}: ")
        found = [(group, mask, _original(group)) for group, mask in self._masks()]
        for group, mask, weight in found:
            mask.refuse_step(weight, f"step: {group['tensor_fqn']!r}")
        _require_gradients([mask for _, mask, _ in found], type(self).__name__)
        self._steps += 1
        for entry in self._loaded.values():
            entry.pop("mask", None)
        if getattr(self.update_mask, "__func__", None) is _UPDATE_MASK:
            self._update(found)
        else:  # somebody has a say in each mask
            super().step(use_path)
        if self._steps == self.ramp.freeze_step:
            self.freeze()

    def update_mask(  # type: ignore[override]
        self,
        module: nn.Module,
        tensor_name: str,
        tensor_fqn: str,
        sparsity_level: float,
        **kwargs: Any,
    ) -> None:
        """Renews one mask and applies a level to it.

        :meth:`step` does so for all groups at once, or calls this for each where a subclass has its own.
        """
        mask = find_mask(module, tensor_name)
        if mask is None:  # squash(part) has folded this one; the others go on
            return
        weight = module.parametrizations[tensor_name].original
        self._update([({"sparsity_level": sparsity_level}, mask, weight)])

    @torch.no_grad()
    def _update(self, found: list[tuple[dict[str, Any], BlockMask, Tensor]]) -> None:
        masks = [mask for _, mask, _ in found]
        progress = Progress(self._steps, self.ramp, carried(masks))
        fraction = self.ramp.fraction(self._steps)
        numbers = []
        for group, mask, weight in found:
            mask.update(weight, progress)
            numbers.append(mask.aim_at(group["sparsity_level"] * fraction))
        self._levels.write(masks, numbers)
        for _, mask, weight in found:
            mask.apply_gain(weight)

    def freeze(self) -> None:
        """Holds every mask as it is, until :meth:`unfreeze`.

        Trained scores then get zero gradients (never None, which would abort DDP). Momentum or weight
        decay may still move them; the masks do not follow. Neither do they follow a scheduler.

        Raises:
            RuntimeError: before `prepare` and after `squash_mask`.
        """
        self._require_groups("freeze")
        for group, mask in self._masks():
            mask.refuse_freeze(_original(group), f"freeze: {group['tensor_fqn']!r}")
        for group, mask in self._masks():
            mask.freeze(_original(group))

    def unfreeze(self) -> None:
        """Lets the masks follow scores and levels again.

        Raises:
            RuntimeError: before `prepare` and after `squash_mask`.
        """
        self._require_groups("unfreeze")
        for _group, mask in self._masks():
            mask.unfreeze()

    def param_groups(self, model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: everything else, and the scores without weight decay.

        Decay would pull all scores towards zero alike and say nothing about the blocks.

        Args:
            model: the prepared model, also wrapped (DDP, fully_shard) or a copy.
            weight_decay: for everything but the scores.

        Returns:
            Two dicts with `params` and `weight_decay`; the second holds the scores (none, where this
            kind of mask has none to train). Add an `lr` to it to train them at another rate.

        Raises:
            RuntimeError: if the model is not prepared.
        """
        masks = [mask for *_, mask in named_masks(model)]
        scores = {id(parameter) for mask in masks for parameter in mask.parameters()}
        if not masks:
            raise RuntimeError(
                "param_groups: the model has no scores; call prepare(model) before building the "
                "optimizer"
            )
        parameters = list(model.parameters())
        return [
            {
                "params": [p for p in parameters if id(p) not in scores],
                "weight_decay": weight_decay,
            },
            {"params": [p for p in parameters if id(p) in scores], "weight_decay": 0.0},
        ]

    def summary(self) -> MaskSummary:
        """What is masked how far, and what was skipped and why; prints as a table.

        Reads the masks back to the host. Under FSDP2 call it on every rank.

        Raises:
            RuntimeError: if a masked module was replaced by one without a mask, or became the base of
                an adapter; if FSDP 1 or ZeRO-3 has released the scores.
            ValueError: if an average was written into the model whose mixed masks mean nothing.
        """
        self._follow("summary")
        entries = []
        for group, mask in self._masks():
            mask.check_sound(f"summary: {group['tensor_fqn']!r}: ")
            entries.append(MaskedTensor.of(group, mask))
        return MaskSummary(entries, list(self._skipped))

    # ---------------------------------------------------------------------------------------------
    # Afterwards
    # ---------------------------------------------------------------------------------------------

    def squash_mask(
        self,
        params_to_keep: tuple[str, ...] | None = None,
        params_to_keep_per_layer: dict[str, tuple[str, ...]] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Folds the masks into the weights; see :func:`torchao_superblock.pruning.squash`.

        Interrupted at any point it leaves a model that computes the same; call it again to go on.

        Args:
            params_to_keep: settings (`"sparsity_level"`, `"blocksize"`, ...) to leave on each
                squashed module in a dict `sparse_params`. A module with several masked tensors gets
                one such dict for each, by the tensor's name.
            params_to_keep_per_layer: the same for single modules, by their FQN.

        Raises:
            RuntimeError: before `prepare`, or when squashed already.
            ValueError: for an unknown setting or module, or NaN scores. Nothing has been folded then.
        """
        if not self._squashing:
            self._require_groups("squash_mask")
        kept = kept_params(self.groups, params_to_keep, params_to_keep_per_layer)
        found = [
            (group["tensor_fqn"], group["module"], group["tensor_name"], mask)
            for group, mask in self._masks()
        ]
        check_foldable(self.model, found)
        self._squashing = True
        fold(self.model, found)
        for group, params in zip(self.groups, kept, strict=True):
            if params:
                leave_params(group, params, self.groups)
        self._notice_squash()

    def convert(
        self,
        module: nn.Module,
        mapping: dict[type[nn.Module], type[nn.Module]] | None = None,
        inplace: bool = False,
        parameterization: type[nn.Module] | None = None,
    ) -> nn.Module:
        """Replaces the linears that this sparsifier squashed by `mapping[type].from_dense(linear)`.

        Hooks, also those with kwargs, go over to the new module; their handles stay valid when the
        conversion is in place.

        Args:
            module: the squashed model, a part of it, or a copy.
            mapping: from module type to replacement; by default what `swap_to_bsr` makes of a type,
                `{nn.Linear: BSRLinear, nn.MultiheadAttention: BSRMultiheadAttention}`. Squashed modules of other types
                are left as they are. A type that has projections in it is replaced as a whole.
            inplace: change `module` rather than a deep copy of it.
            parameterization: ignored; the base class has it.

        Returns:
            The converted model; a new module if `module` itself is replaced.

        Raises:
            RuntimeError: if masks are not squashed yet, or nothing was squashed.
            ValueError: if no squashed module in `module` has a type in `mapping`, or what
                `from_dense` raises. `module` is unchanged after an error.
        """
        self._notice_squash()
        unsquashed = [fqn for fqn, *_ in named_masks(module)]
        if unsquashed:
            raise RuntimeError(
                f"convert: {unsquashed[0]!r} is not squashed yet; call squash_mask() or "
                "squash(model) first"
            )
        if not self._squashed:
            raise RuntimeError(
                "convert: this sparsifier has squashed nothing; call prepare(), train, and "
                "squash_mask() first"
            )
        if mapping is None:
            mapping = {cls: TWINS[cls].bsr for cls in (nn.Linear, nn.MultiheadAttention)}
        return replace_squashed(module, mapping, self._squashed, inplace)

    # ---------------------------------------------------------------------------------------------
    # Saving
    # ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Levels, settings and masks, in plain containers (`torch.load(weights_only=True)`).

        The scores are in the model's own state dict, and so is the mask of its next forward.
        """
        self._follow("state_dict")
        groups = []
        for group in self.groups:
            saved = {key: group[key] for key in ("tensor_fqn", *self.mask_type.settings())}
            saved["sparsity_level"] = float(saved["sparsity_level"])
            groups.append(saved)
        return {
            "state": {fqn: dict(entry) for fqn, entry in self.state.items()},
            "groups": groups,
            "enable_mask_update": self.enable_mask_update,
            "step": self._steps,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Restores what :meth:`state_dict` returned, into a sparsifier prepared in the same way.

        Args:
            state_dict: is not changed.
            strict: whether the groups have to be the same; otherwise those in common are loaded.

        Raises:
            RuntimeError: before `prepare`.
            ValueError: for a state dict of another model, other shapes or other block sizes. Nothing
                has been changed then.
        """
        self._require_groups("load_state_dict", "call prepare(model, config) first, as for saving")
        own = {group["tensor_fqn"]: group for group in self.groups}
        try:
            saved = {find_fqn(group["tensor_fqn"], own): group for group in state_dict["groups"]}
            states = {find_fqn(fqn, own): entry for fqn, entry in state_dict["state"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"load_state_dict: not the state dict of a {type(self).__name__}: it needs 'state' "
                f"and 'groups' ({type(error).__name__}: {error})"
            ) from error
        if strict and set(saved) != set(own):
            missing, extra = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
            name = (missing or extra)[0]
            raise ValueError(
                f"load_state_dict: saved for another model: {name!r} is "
                + ("masked here and not in the state dict" if missing else "not masked here")
                + nearest_names(name, sorted(saved if missing else own))
                + ". Prepare the model with the config it was saved with, or pass strict=False"
            )
        for fqn, entry in states.items():
            mask = entry.get("mask") if isinstance(entry, Mapping) else None
            if not isinstance(entry, Mapping) or (
                isinstance(mask, Tensor) and mask.dtype != torch.bool
            ):
                raise ValueError(
                    f"load_state_dict: {fqn!r}: its state must be a dict with a bool tensor 'mask', got "
                    + (f"a {mask.dtype} mask" if mask is not None else type(entry).__name__)
                )
        common = [fqn for fqn in own if fqn in saved]
        updates = {}
        for fqn in common:
            where = f"load_state_dict: {fqn!r}: "
            settings = check_settings(saved[fqn], self.mask_type.settings(), where)
            _check_same_blocks(own[fqn], settings, states.get(fqn, {}).get("mask"), where)
            updates[fqn] = settings
        for fqn in common:
            own[fqn].update(updates[fqn])
            mask = find_mask(own[fqn]["module"], own[fqn]["tensor_name"])
            device = mask.n_kept.device if mask is not None else None
            entry = {
                key: value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
                for key, value in states.get(fqn, {}).items()
            }
            self._loaded[fqn] = {**self._loaded.get(fqn, {}), **entry}
        self.enable_mask_update = bool(state_dict.get("enable_mask_update", True))
        self._steps = int(state_dict.get("step", 0))

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler replaces `step` by a wrapper bound to this very object; weak references and
        # that wrapper stay behind.
        local = ("step", "_squashed", "_links", "_watch", "_levels")
        state = {k: v for k, v in self.__dict__.items() if k not in local}
        return {**state, "_squashed_names": list(self._squashed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        names = state.pop("_squashed_names", [])
        # What version 0.1 has, and has not.
        state.setdefault("_loaded", state.pop("state", {}))
        state = {"ramp": Ramp(), "_steps": 0, "_squashing": False, **state, "_levels": Levels()}
        self.__dict__.update(state)
        nothing = nn.Module()
        self._squashed = {name: weakref.ref(nothing) for name in names}

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.defaults.items())
        return f"{type(self).__name__}({settings})  # {len(self.groups)} masked tensors"

    # ---------------------------------------------------------------------------------------------
    # Helpers
    # ---------------------------------------------------------------------------------------------

    def _notice_squash(self) -> None:
        """Lets go of the groups once their masks are gone, also if squash(model) folded them."""
        if any(find_mask(g["module"], g["tensor_name"]) is not None for g in self.groups):
            return
        if self.groups:
            self._squashed = {g["tensor_fqn"]: weakref.ref(g["module"]) for g in self.groups}
        vars(self).update(groups=[], _loaded={}, _skipped=[], _squashing=False)
        if self._watch is not None:
            self._watch.close()
            self._watch = None
            remove_settled()

    def _require_groups(
        self, method: str, way_out: str = "call prepare(model, config) first"
    ) -> None:
        self._notice_squash()
        if self.groups:
            self._follow(method)
            return
        if self._squashed:
            raise RuntimeError(
                f"{method}: the masks are squashed already, there is nothing left to do it to; "
                "call prepare(model, config) to start again"
            )
        raise RuntimeError(f"{method}: no model is prepared; {way_out}")

    def _follow(self, method: str) -> None:
        """Takes note of modules that were replaced since the last call."""
        if self.groups:
            self._links = follow(self.model, self.groups, self._links, method)

    def _new_mask(self, group: dict[str, Any]) -> BlockMask:
        if "mask" in group:
            return GivenMask(_weight(group), group["blocksize"], group["mask"])
        settings = {name: group[name] for name in self.mask_type.settings()}
        settings["sparsity_level"] *= self.ramp.fraction(0)
        return self.mask_type(_weight(group), **settings)

    def _masks(self) -> Iterator[tuple[dict[str, Any], BlockMask]]:
        """The groups that still carry a mask: `squash` may have folded those of a part of the model."""
        for group in self.groups:
            mask = find_mask(group["module"], group["tensor_name"])
            if mask is not None:
                yield group, mask


_UPDATE_MASK = BlockSparsifier.update_mask  # ours, whatever others put in its place


def _require_gradients(masks: list[BlockMask], name: str) -> None:
    carriers = [mask for mask in masks if mask.carrier is not None]
    if not carriers or any(mask.carrier.grad is not None for mask in carriers):
        return
    if all(mask.is_frozen for mask in carriers):
        return
    raise RuntimeError(
        f"step: {name} reads what the backwards since the last step said of the blocks, and finds "
        "no gradient. Call sparsifier.step() after loss.backward() and optimizer.step(), before "
        "optimizer.zero_grad()"
    )


def _weight(group: dict[str, Any]) -> Tensor:
    return group["module"]._parameters[group["tensor_name"]]


def _original(group: dict[str, Any]) -> Tensor:
    return group["module"].parametrizations[group["tensor_name"]].original


def _refuse_ddp(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """DDP reduces the gradients of the parameters it found when it was built, and no others."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            inside = {id(child) for child in module.modules()}
            late = [group for group in groups if id(group["module"]) in inside]
            if late and module.process_group.size() > 1:
                raise RuntimeError(
                    f"prepare: {late[0]['tensor_fqn']!r} is wrapped in DistributedDataParallel "
                    "already, which would not average the gradients of its scores: the masks of the "
                    "ranks would drift apart. Call prepare() first and wrap the model afterwards"
                )


def _check_same_blocks(
    group: dict[str, Any], settings: Mapping[str, Any], mask: object, where: str
) -> None:
    blocksize = check_blocksize(group["blocksize"])
    saved = check_blocksize(settings.get("blocksize", blocksize), where)
    if saved != blocksize:
        raise ValueError(
            f"{where}saved with blocksize {saved}, prepared with {blocksize}; prepare the model with "
            "the config it was saved with"
        )
    block_mask = find_mask(group["module"], group["tensor_name"])
    grid = block_grid(block_mask.weight_shape, blocksize) if block_mask is not None else ()
    if isinstance(mask, Tensor) and tuple(mask.shape) != grid:
        raise ValueError(
            f"{where}the saved mask has {tuple(mask.shape)} blocks and the weight here has {grid}: "
            "it was saved for a weight of another shape"
        )
