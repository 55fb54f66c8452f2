"""`BlockSparsifier`: block masks of any kind behind the interface of `torch.ao.pruning`."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# The base class and the schedulers only work as a pair (torchao has older copies of both): they
# are imported here and nowhere else.
from torch.ao.pruning import BaseSparsifier, CubicSL, LambdaSL

from torchao_superblock.common.blocks import block_grid, check_blocksize
from torchao_superblock.common.modules import hand_over_hooks
from torchao_superblock.common.names import find_fqn, nearest_names, without_wrapper_prefixes
from torchao_superblock.common.swappable import TWINS
from torchao_superblock.pruning.attach import attach, detach
from torchao_superblock.pruning.checkpoints import (
    accept_dense_checkpoints,
    refuse_dense_checkpoints,
)
from torchao_superblock.pruning.masks.base import (
    BlockMask,
    check_sparsity_level,
    find_mask,
    kept_blocks,
    named_masks,
)
from torchao_superblock.pruning.squash import squash_tensors
from torchao_superblock.pruning.summary import MaskedTensor, MaskSummary
from torchao_superblock.pruning.targets import (
    SkippedTensor,
    check_config,
    check_settings,
    resolve,
)

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
        **settings: of the kind of mask, see :attr:`BlockMask.SETTINGS`.

    Raises:
        ValueError: for a level outside `[0, 1)`, a block size below 1, a bad setting.
        TypeError: for arguments of the wrong type.
    """

    mask_type: ClassVar[type[BlockMask]]

    def __init__(
        self, sparsity_level: float = 0.8, blocksize: int | tuple[int, int] = 64, **settings: Any
    ) -> None:
        checks = self.mask_type.settings()
        unknown = sorted(settings.keys() - checks.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unknown setting {unknown[0]!r}; it has "
                f"{', '.join(map(repr, checks))}"
            )
        settings = {"sparsity_level": sparsity_level, "blocksize": blocksize, **settings}
        self._loaded: dict[str, dict[str, Any]] = {}
        super().__init__(defaults=check_settings(settings, checks, f"{type(self).__name__}: "))
        self._skipped: list[SkippedTensor] = []
        self._squashed: dict[str, weakref.ref[nn.Module]] = {}

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
        the module's `reset_parameters()`; writing into what a read returned is lost.

        Args:
            model: not yet wrapped in DDP or fully_shard.
            config: None for the weight of every exact `nn.Linear`, or a list of entries. An entry has
                a `tensor_fqn` and any setting of the constructor (`sparsity_level`, `blocksize`, ...).
                A `tensor_fqn` with `*`, `?` or `[` is a glob over whole names (`*` crosses dots): it
                reaches the weights of `nn.Linear` and its subclasses and the projection weights of
                `nn.MultiheadAttention`, each its own group. Any other names one tensor exactly, which
                can be any 2-D floating parameter. A later entry overrides an earlier glob.
                None and globs skip what cannot be masked; :meth:`summary` lists it.

        Raises:
            ValueError: for a name without a match, a tensor named twice, an exactly named tensor that
                cannot be masked, a bad setting, or if nothing is left to mask.
            TypeError: for a config of the wrong form.
            RuntimeError: if this sparsifier or the tensor is prepared already, or the model is
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
        config = check_config(config, self.mask_type.settings())
        groups, skipped = resolve(model, config, self.defaults)
        _refuse_ddp(model, groups)
        # Before any scores are drawn: an error must not move the random number generator.
        for group in groups:
            where = f"prepare: {group['tensor_fqn']!r} "
            self.mask_type.check_weight(_weight(group), group, where)
        masks = [self._new_mask(group) for group in groups]

        attached: list[dict[str, Any]] = []
        try:
            for group, mask in zip(groups, masks, strict=True):
                attach(group["module"], group["tensor_name"], mask)
                attached.append(group)
            refuse_dense_checkpoints(model)
        except BaseException:
            for group in attached:
                detach(group["module"], group["tensor_name"])
            accept_dense_checkpoints(model)
            raise

        self.model = model
        self.config = config
        self.groups = groups
        self._loaded = {}
        self._skipped = skipped
        self._squashed = {}

    def step(self, use_path: bool = True) -> None:
        """Applies the groups' levels and renews the masks.

        Does nothing while `enable_mask_update` is False (schedulers set it to True). Under FSDP2 call
        it on every rank.

        Args:
            use_path: ignored; the base class has it.

        Raises:
            RuntimeError: before `prepare` and after `squash_mask`.
            ValueError: for a level outside `[0, 1)`; nothing has been changed then.
        """
        self._require_groups("step")
        if not self.enable_mask_update:
            return
        for group in self.groups:
            check_sparsity_level(group["sparsity_level"], f"step: {group['tensor_fqn']!r} has ")
        for entry in self._loaded.values():
            entry.pop("mask", None)
        super().step(use_path)

    def update_mask(  # type: ignore[override]
        self,
        module: nn.Module,
        tensor_name: str,
        tensor_fqn: str,
        sparsity_level: float,
        **kwargs: Any,
    ) -> None:
        """Applies the level of one group; :meth:`step` calls it for each."""
        mask = find_mask(module, tensor_name)
        if mask is None:  # squash(part) has folded this one; the others go on
            return
        mask.set_sparsity_level(sparsity_level)
        mask.update(module.parametrizations[tensor_name].original)

    def freeze(self) -> None:
        """Holds every mask as it is, until :meth:`unfreeze`.

        Trained scores then get zero gradients (never None, which would abort DDP). Momentum or weight
        decay may still move them; the masks do not follow. Neither do they follow a scheduler.

        Raises:
            RuntimeError: before `prepare` and after `squash_mask`.
        """
        self._require_groups("freeze")
        for _group, mask in self._masks():
            mask.freeze()

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
        """
        entries = []
        for group, mask in self._masks():
            grid = mask.grid
            if mask.held_mask.is_meta:
                kept = kept_blocks(math.prod(grid), group["sparsity_level"])
            else:
                kept = int(mask.block_mask().sum())
            entries.append(
                MaskedTensor(
                    fqn=group["tensor_fqn"],
                    shape=mask.weight_shape,
                    blocksize=mask.blocksize,
                    grid=grid,
                    target_sparsity=float(group["sparsity_level"]),
                    sparsity=1 - kept / math.prod(grid),
                    kept=kept,
                    frozen=mask.is_frozen,
                )
            )
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

        Args:
            params_to_keep: settings (`"sparsity_level"`, `"blocksize"`, ...) to leave on each
                squashed module in a dict `sparse_params`. A module with several masked tensors gets
                one such dict for each, by the tensor's name.
            params_to_keep_per_layer: the same for single modules, by their FQN.

        Raises:
            RuntimeError: before `prepare`, or when squashed already.
            ValueError: for an unknown setting or module, or NaN scores. Nothing has been folded then.
        """
        self._require_groups("squash_mask")
        kept = self._kept_params(params_to_keep, params_to_keep_per_layer)
        squash_tensors(
            self.model,
            [
                (group["tensor_fqn"], group["module"], group["tensor_name"], mask)
                for group, mask in self._masks()
            ],
        )
        for group, params in zip(self.groups, kept, strict=True):
            if params:
                _leave_params(group, params, self.groups)
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
                `{nn.Linear: BSRLinear}`. Squashed modules of other types are left as they are.
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
            mapping = {nn.Linear: TWINS[nn.Linear].bsr}
        names = {fqn.rpartition(".")[0] for fqn in self._squashed}
        squashed = {id(ref()) for ref in self._squashed.values() if ref() is not None}
        convertible = [
            (path, child)
            for path, child in module.named_modules(remove_duplicate=False)
            if type(child) in mapping
        ]
        # The very modules; in a copy those of the same name; in a wrapped copy but for the prefix.
        targets = (
            [(path, child) for path, child in convertible if id(child) in squashed]
            or [(path, child) for path, child in convertible if path in names]
            or [
                (path, child)
                for path, child in convertible
                if without_wrapper_prefixes(path) in names
            ]
        )
        if not targets:
            kinds = ", ".join(kind.__name__ for kind in mapping)
            raise ValueError(
                f"convert: no module among {sorted(names)} in this {type(module).__name__} is of a "
                f"type in mapping ({kinds})"
            )
        converted: dict[int, nn.Module] = {}
        for path, child in targets:
            if id(child) not in converted:
                source = child if inplace else copy.deepcopy(child)
                try:
                    new = mapping[type(child)].from_dense(source)  # type: ignore[attr-defined]
                except (TypeError, ValueError, RuntimeError) as error:
                    raise type(error)(f"convert: {path!r}: {error}") from error
                _carry_over(source, new)
                converted[id(child)] = new
        if id(module) in converted:
            return converted[id(module)]
        # Copying with the converted modules already in the memo neither copies the dense weights
        # nor loses the sharing between modules.
        result = module if inplace else copy.deepcopy(module, dict(converted))
        for path, child in targets:
            parent, _, name = path.rpartition(".")
            result.get_submodule(parent)._modules[name] = converted[id(child)]
        return result

    # ---------------------------------------------------------------------------------------------
    # Saving
    # ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Levels, settings and masks, in plain containers (`torch.load(weights_only=True)`).

        The scores are in the model's own state dict, and so is the mask of its next forward.
        """
        groups = []
        for group in self.groups:
            saved = {key: group[key] for key in ("tensor_fqn", *self.mask_type.settings())}
            saved["sparsity_level"] = float(saved["sparsity_level"])
            groups.append(saved)
        return {
            "state": {fqn: dict(entry) for fqn, entry in self.state.items()},
            "groups": groups,
            "enable_mask_update": self.enable_mask_update,
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

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler replaces `step` by a wrapper bound to this very object; weak references and
        # that wrapper stay behind.
        state = {k: v for k, v in self.__dict__.items() if k not in ("step", "_squashed")}
        return {**state, "_squashed_names": list(self._squashed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        names = state.pop("_squashed_names", [])
        state.setdefault("_loaded", state.pop("state", {}))  # what version 0.1 has
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
        self.groups = []
        self._loaded = {}
        self._skipped = []

    def _require_groups(
        self, method: str, way_out: str = "call prepare(model, config) first"
    ) -> None:
        self._notice_squash()
        if self.groups:
            return
        if self._squashed:
            raise RuntimeError(
                f"{method}: the masks are squashed already, there is nothing left to do it to; "
                "call prepare(model, config) to start again"
            )
        raise RuntimeError(f"{method}: no model is prepared; {way_out}")

    def _new_mask(self, group: dict[str, Any]) -> BlockMask:
        settings = {name: group[name] for name in self.mask_type.settings()}
        return self.mask_type(_weight(group), **settings)

    def _masks(self) -> Iterator[tuple[dict[str, Any], BlockMask]]:
        """The groups that still carry a mask: `squash` may have folded those of a part of the model."""
        for group in self.groups:
            mask = find_mask(group["module"], group["tensor_name"])
            if mask is not None:
                yield group, mask

    def _kept_params(
        self,
        params_to_keep: tuple[str, ...] | None,
        per_layer: dict[str, tuple[str, ...]] | None,
    ) -> list[dict[str, Any]]:
        """The `sparse_params` of each group, after validating what was asked for."""
        everywhere = _check_names(params_to_keep, self.groups[0], "params_to_keep")
        layers: dict[str, tuple[str, ...]] = {}
        known = [group["module_fqn"] for group in self.groups]
        for fqn, names in (per_layer or {}).items():
            name = find_fqn(fqn, known)
            if name not in known:
                raise ValueError(
                    f"squash_mask: params_to_keep_per_layer names {fqn!r}, which has no mask"
                    + nearest_names(fqn, known)
                )
            where = f"params_to_keep_per_layer[{fqn!r}]"
            layers[name] = _check_names(names, self.groups[0], where)
        return [
            {name: group[name] for name in (*everywhere, *layers.get(group["module_fqn"], ()))}
            for group in self.groups
        ]


def _weight(group: dict[str, Any]) -> Tensor:
    return group["module"]._parameters[group["tensor_name"]]


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


def _check_names(names: object, group: dict[str, Any], where: str) -> tuple[str, ...]:
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"squash_mask: {where}={names!r} must be a tuple of setting names")
    known = [key for key in group if key != "module"]
    for name in names:
        if name not in known:
            raise ValueError(
                f"squash_mask: {where} names {name!r}, which a group does not have; it has "
                f"{', '.join(map(repr, known))}"
            )
    return tuple(names)


def _leave_params(
    group: dict[str, Any], params: dict[str, Any], groups: list[dict[str, Any]]
) -> None:
    module = group["module"]
    if sum(other["module"] is module for other in groups) > 1:
        params = {**getattr(module, "sparse_params", {}), group["tensor_name"]: params}
    module.sparse_params = params


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


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Hooks, settings that were left on the module, and mode."""
    hand_over_hooks(old, new)
    if hasattr(old, "sparse_params"):
        new.sparse_params = old.sparse_params
    new.train(old.training)
