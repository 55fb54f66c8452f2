"""From a config to tensors: which weights of a model are masked, with what settings."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchao_superblock.common.blocks import block_grid, check_blocksize
from torchao_superblock.common.modules import parameter_owners, storage_address
from torchao_superblock.common.names import nearest_names, without_wrapper_prefixes
from torchao_superblock.common.sharding import is_dtensor
from torchao_superblock.common.weights import is_hidden, other_weights
from torchao_superblock.ops.block_mask import nonzero_blocks
from torchao_superblock.pruning.finding import find_mask
from torchao_superblock.pruning.masks.settings import Check

_EXTRAS = ("mask", "types", "exclude")
"""What an entry may have besides its name and settings."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class SkippedTensor:
    """A weight that a glob, or no config at all, may be thought to reach and that is not masked.

    Attributes:
        fqn: its fully qualified name.
        shape: its shape.
        code: a short stable word: `smaller_than_block`, `one_block`, `shared`, `parametrized`,
            `not_a_parameter`, `not_2d`, `grouped`, `dtype`, `layout`, `tensor_subclass` or
            `uninitialized`; `excluded` by an entry; `not_plain_linear`, `not_linear` or `embedding`
            where it had to be named.
        reason: the same in a sentence.
    """

    fqn: str
    shape: tuple[int, ...]
    code: str
    reason: str


@dataclass
class _Site:
    """A parameter of a module; a module registered twice has more names and is one site."""

    module: nn.Module
    tensor_name: str
    fqn: str
    is_other_weight: bool = False
    names: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, str]:
        return id(self.module), self.tensor_name

    @property
    def parameter(self) -> Tensor | None:
        return self.module._parameters.get(self.tensor_name)

    @property
    def is_projection(self) -> bool:
        if isinstance(self.module, nn.Linear):
            return self.tensor_name == "weight"
        return isinstance(self.module, nn.MultiheadAttention) and self.tensor_name in _PROJECTIONS

    @property
    def is_plain_linear(self) -> bool:
        kind = parametrize.type_before_parametrizations(self.module)
        return kind is nn.Linear and self.tensor_name == "weight"

    def is_reached(self, types: tuple[type[nn.Module], ...]) -> bool:
        """Whether a glob for these types of modules reaches it."""
        return self.is_projection or (
            isinstance(self.module, types) and self.tensor_name == "weight"
        )

    @property
    def is_weight(self) -> bool:
        """Whether a glob, or no config at all, may be thought to reach it."""
        return self.is_projection or self.is_other_weight


def check_config(config: object, checks: Mapping[str, Check]) -> list[dict[str, Any]] | None:
    """Validates the form of a config and returns a copy of it.

    Args:
        config: what the user gave.
        checks: of the settings that an entry may have, by name.

    Raises:
        TypeError: if it is not a list of dicts.
        ValueError: if an entry names no tensor, has an unknown key or a bad value.
    """
    if config is None:
        return None
    if isinstance(config, Mapping | str) or not isinstance(config, Sequence):
        raise TypeError(
            f"config must be a list of dicts like {{'tensor_fqn': 'layers.*.weight'}}, got "
            f"{type(config).__name__}" + (": put it in a list" if isinstance(config, dict) else "")
        )
    entries = []
    for i, entry in enumerate(config):
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"config[{i}]={entry!r} must be a dict with a 'tensor_fqn', got "
                f"{type(entry).__name__}"
            )
        fqn = entry.get("tensor_fqn")
        if not isinstance(fqn, str) or not fqn:
            raise ValueError(
                f"config[{i}] needs a 'tensor_fqn': the full name of a weight such as "
                f"'encoder.layers.0.mlp.0.weight', or a glob; it has {sorted(map(str, entry))}"
            )
        where = f"config[{i}] ({fqn!r}): "
        unknown = sorted(str(key) for key in entry if key not in ("tensor_fqn", *_EXTRAS, *checks))
        if unknown:
            raise ValueError(
                f"{where}unknown key {unknown[0]!r}; an entry has 'tensor_fqn' and any of "
                f"{', '.join(map(repr, (*checks, *_EXTRAS)))}"
            )
        entries.append(
            {
                "tensor_fqn": fqn,
                **check_settings(entry, checks, where),
                **_check_extras(entry, where),
            }
        )
    return entries


def _check_extras(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What an entry may say besides settings: a given mask, types that a glob reaches, no mask at all."""
    extras: dict[str, Any] = {}
    if "mask" in entry:
        mask = entry["mask"]
        if not (isinstance(mask, Tensor) and mask.dtype == torch.bool) and mask != "weights":
            raise TypeError(
                f"{where}mask must be a bool tensor over the block grid, True = kept, or 'weights' for the blocks "
                f"that are not zero now; got {mask.dtype if isinstance(mask, Tensor) else mask!r}"
            )
        if "sparsity_level" in entry:
            raise ValueError(
                f"{where}it has a mask and sparsity_level={entry['sparsity_level']}: the mask alone says how many "
                "blocks are kept; leave the level out"
            )
        extras["mask"] = mask
    if "types" in entry:
        types = entry["types"]
        types = types if isinstance(types, tuple) else (types,)
        if not types or not all(
            isinstance(one, type) and issubclass(one, nn.Module) for one in types
        ):
            raise TypeError(
                f"{where}types={entry['types']!r} must be a tuple of module types, such as (nn.Conv2d,)"
            )
        extras["types"] = types
    exclude = entry.get("exclude", False)
    if not isinstance(exclude, bool):
        raise TypeError(f"{where}exclude={exclude!r} must be True or False")
    if exclude:
        rest = [repr(key) for key in entry if key not in ("tensor_fqn", "exclude")]
        if rest:
            raise ValueError(
                f"{where}an entry that excludes has no use for {', '.join(rest)}: remove one of the two"
            )
        extras["exclude"] = True
    return extras


def check_settings(
    settings: Mapping[str, Any], checks: Mapping[str, Check], where: str
) -> dict[str, Any]:
    """The settings among the items of `settings`, validated and normalised."""
    return {
        name: check(settings[name], where) for name, check in checks.items() if name in settings
    }


def resolve(
    model: nn.Module, config: list[dict[str, Any]] | None, defaults: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[SkippedTensor]]:
    """Finds what a checked config reaches in a model. Changes nothing.

    Args:
        model: where to look.
        config: entries from :func:`check_config`, or None for every exact `nn.Linear`.
        defaults: settings of entries that do not give their own.

    Returns:
        The groups, as `BaseSparsifier` has them, and what was skipped.

    Raises:
        ValueError: for a name without a match, a tensor named twice, an exact name of a tensor that
            cannot be masked, or if nothing is left to mask.
        RuntimeError: for a tensor that is masked already or sharded.
    """
    sites = list(_sites(model))
    owners = parameter_owners(model, without_wrapper_prefixes)
    groups, skipped = [], []
    everything = config is None or all("exclude" in entry for entry in config)
    chosen = _choose(config or (), sites, [site for site in sites if everything and site.is_weight])
    if everything and not any(site.is_plain_linear for site in sites):
        raise ValueError(
            f"nothing to prune: {type(model).__name__} has no nn.Linear (subclasses are not counted "
            "when no entry names a weight). Name the weights: config=[{'tensor_fqn': '...'}]"
        )
    for site, settings, exact in chosen:
        group = {**defaults, **settings}
        types = group.pop("types", ())
        reached = site.is_plain_linear if everything else site.is_reached(types)
        if "exclude" in settings:
            obstacle = "excluded", settings["exclude"], ""
        elif exact or reached:
            obstacle = _obstacle(site, check_blocksize(group["blocksize"]), owners)
        else:
            obstacle = _out_of_reach(site)
        if obstacle is not None:
            code, reason, way_out = obstacle
            if exact:
                raise ValueError(f"cannot mask {site.fqn!r}: {reason}; {way_out}")
            shape = () if code == "uninitialized" else _shape(site)
            skipped.append(SkippedTensor(site.fqn, shape, code, reason))
            continue
        if "mask" in group:
            group |= _given_mask(site, group)
        groups.append(
            {
                "tensor_fqn": site.fqn,
                "module_fqn": site.fqn.removesuffix(site.tensor_name).removesuffix("."),
                "module": site.module,
                "tensor_name": site.tensor_name,
                **group,
            }
        )
    if not groups:
        reasons = "; ".join(f"{entry.fqn!r}: {entry.reason}" for entry in skipped[:3])
        raise ValueError(f"nothing to prune: the config reaches no weight that can be ({reasons})")
    return groups, skipped


def _choose(
    entries: Sequence[Mapping[str, Any]], sites: list[_Site], everything: list[_Site]
) -> list[tuple[_Site, dict[str, Any], bool]]:
    """What entries reach: the site, its settings, and whether it was named as it stands.

    Of two entries the later one decides. Where that excludes, the settings are the reason alone.

    Args:
        entries: from :func:`check_config`.
        sites: all of the model.
        everything: what is reached before the first entry.
    """
    chosen = {site.key: (site, {}, False) for site in everything}
    too_early: dict[tuple[int, str], str] = {}
    for entry in entries:
        pattern = entry["tensor_fqn"]
        settings = {key: value for key, value in entry.items() if key != "tensor_fqn"}
        excludes = "exclude" in settings
        types = settings.get("types", ())
        if excludes:
            settings = {"exclude": f"the entry {pattern!r} excludes it"}
        matches, exact = _find(pattern, sites, types, excludes)
        if not matches:
            raise ValueError(_no_match(pattern, exact, sites))
        if isinstance(settings.get("mask"), Tensor) and not exact:
            raise ValueError(
                f"{pattern!r}: a glob can name several weights, and a mask is for one: give its whole "
                "name, or 'weights' as the mask"
            )
        for site in matches:
            earlier = chosen.get(site.key)
            if earlier is not None and not (exact or excludes or site.is_reached(types)):
                continue  # a glob that could not mask it does not override what names it
            if earlier is not None and earlier[2]:
                raise ValueError(
                    f"{site.fqn!r} is configured twice: {pattern!r} names a tensor that an earlier "
                    "entry names exactly. Remove one of them, or put the glob before the exact name "
                    "to override it"
                )
            if excludes and earlier is None:
                too_early[site.key] = pattern
                continue
            if site.key in too_early and site.is_reached(types) and not exact:
                raise ValueError(
                    f"{site.fqn!r} is excluded by {too_early[site.key]!r} and reached by the later "
                    f"entry {pattern!r}, and the later of two entries decides. Put the one that "
                    "excludes it after the one that reaches it"
                )
            chosen.pop(site.key, None)
            chosen[site.key] = (site, settings, exact and not excludes)
    return list(chosen.values())


def _find(
    pattern: str, sites: list[_Site], types: tuple[type[nn.Module], ...], excludes: bool
) -> tuple[list[_Site], bool]:
    """The sites that a pattern means, and whether it is their name as it stands rather than a glob."""
    # As it stands first: a part of a model may be called `module`, or have brackets in its name.
    for exact in (True, False):
        for text in (pattern.lstrip("."), without_wrapper_prefixes(pattern)):
            matches = [
                site
                for site in sites
                if _matches(text, site, exact, excludes or site.is_weight or site.is_reached(types))
            ]
            if any(exact or excludes or site.is_reached(types) for site in matches):
                return matches, exact
    return [], not any(character in pattern for character in "*?[")


_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def _wraps(module: nn.Module, path: str) -> bool:
    """Whether a model's root does nothing but hold a `module`, as wrappers of other libraries do."""
    return not path and len(module._modules) == 1 and not module._parameters


def _sites(model: nn.Module) -> Iterator[_Site]:
    found: dict[tuple[int, str], _Site] = {}

    def walk(module: nn.Module, real: str, clean: str) -> None:
        own = list(module._parameters)
        if parametrize.is_parametrized(module):
            own += list(module.parametrizations)
        if isinstance(module, nn.Linear) and is_hidden(module):
            own.append("weight")
        others = {name for name, _ in other_weights(module)}
        for name in own:
            key = (id(module), name)
            site = found.setdefault(key, _Site(module, name, clean + name, name in others))
            site.names += [real + name, clean + name]
        for name, child in module._modules.items():
            if child is None or (name == "parametrizations" and isinstance(child, nn.ModuleDict)):
                continue
            hidden = name == "_orig_mod" or (
                name == "module" and (isinstance(module, _WRAPPERS) or _wraps(module, clean))
            )
            walk(child, f"{real}{name}.", clean if hidden else f"{clean}{name}.")

    walk(model, "", "")
    for site in found.values():
        parametrized = parametrize.is_parametrized(site.module, site.tensor_name)
        hidden = site.tensor_name == "weight" and is_hidden(site.module)
        if site.parameter is not None or parametrized or hidden:
            yield site


def find_module(model: nn.Module, tensor_fqn: str) -> nn.Module | None:
    """The module whose tensor has this name, with wrapper prefixes or without; None if there is none."""
    for site in _sites(model):
        if tensor_fqn in site.names:
            return site.module
    return None


def _matches(pattern: str, site: _Site, exact: bool, reachable: bool) -> bool:
    if exact:
        return pattern in site.names
    return reachable and any(fnmatch.fnmatchcase(name, pattern) for name in site.names)


def _given_mask(site: _Site, group: Mapping[str, Any]) -> dict[str, Any]:
    """The mask of a group that is given one, and its level.

    Raises:
        ValueError: for a mask of another shape or without a block.
    """
    weight = site.parameter.detach().flatten(1)
    blocksize = check_blocksize(group["blocksize"])
    mask, grid = group["mask"], block_grid(weight.shape, blocksize)
    if not isinstance(mask, Tensor):
        if weight.is_meta:
            raise ValueError(
                f"cannot mask {site.fqn!r}: on the meta device it has no blocks to look at"
            )
        mask = nonzero_blocks(weight, blocksize)
    if tuple(mask.shape) != grid:
        raise ValueError(
            f"cannot mask {site.fqn!r}: the mask has shape {tuple(mask.shape)}, and its grid of "
            f"{blocksize[0]}x{blocksize[1]} blocks is {grid}"
        )
    kept = int(mask.sum())
    if kept == 0:
        raise ValueError(f"cannot mask {site.fqn!r}: the mask keeps no block; leave the tensor out")
    return {"mask": mask.to(weight.device), "sparsity_level": 1 - kept / mask.numel()}


def _no_match(pattern: str, exact: bool, sites: list[_Site]) -> str:
    if exact:
        names = [site.fqn for site in sites]
        text = f"no parameter is called {pattern!r}"
    else:
        names = [site.fqn for site in sites if site.is_projection]
        text = (
            f"the glob {pattern!r} matches no weight of an nn.Linear and no projection weight of an "
            "nn.MultiheadAttention"
        )
    # Next to the whole name, the same tensor name in the nearest module is what is usually meant.
    return text + (
        nearest_names(without_wrapper_prefixes(pattern), names) or f"; there are {names[:3]}"
    )


def _shape(site: _Site) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(getattr(site.module, site.tensor_name).shape)


def _out_of_reach(site: _Site) -> tuple[str, str, str]:
    """Why a glob, or no config at all, leaves this weight alone: code, reason and way out."""
    kind = parametrize.type_before_parametrizations(site.module).__name__
    name_it = "name it exactly to mask it"
    if site.is_projection:
        way_out = "name it or use a glob"
        return "not_plain_linear", f"{kind} is not reached without a config: {way_out}", way_out
    if isinstance(site.module, nn.Conv2d):
        way_out = "name it exactly, or its type in a glob's 'types'"
        return "not_linear", f"{kind} is no nn.Linear: {way_out} to mask it", way_out
    ndim = len(_shape(site))
    if ndim != 2:
        return "not_2d", f"{kind} holds it with {ndim} dimensions, and a mask takes 2", ""
    if isinstance(site.module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", f"an embedding is not reached in passing: {name_it}", name_it
    return "not_linear", f"{kind} is no nn.Linear: {name_it}", name_it


def _obstacle(
    site: _Site, blocksize: tuple[int, int], owners: dict[tuple[object, int], list[str]]
) -> tuple[str, str, str] | None:
    """Why this tensor cannot be masked: code, reason and way out; None if it can.

    Raises:
        RuntimeError: where calls are in the wrong order, however the tensor was named.
    """
    if find_mask(site.module, site.tensor_name) is not None:
        raise RuntimeError(
            f"{site.fqn!r} is already prepared: it carries a block mask. Fold it with squash(model) "
            "or squash_mask() before preparing it again"
        )
    tensor = site.parameter
    if tensor is None and not parametrize.is_parametrized(site.module, site.tensor_name):
        return (
            "not_a_parameter",
            "it is no Parameter: others compute it before each forward (torch.nn.utils.prune or "
            "weight_norm)",
            "make it one first, with torch.nn.utils.prune.remove or remove_weight_norm",
        )
    if tensor is None:
        kinds = {type(p).__name__ for p in site.module.parametrizations[site.tensor_name]}
        return (
            "parametrized",
            f"another parametrization ({', '.join(sorted(kinds))}) computes it",
            "remove it first with torch.nn.utils.parametrize.remove_parametrizations",
        )
    if nn.parameter.is_lazy(tensor):
        return "uninitialized", "its shape is not known yet", "run one forward before prepare()"
    if is_dtensor(tensor):
        raise RuntimeError(
            f"{site.fqn!r} is sharded (a DTensor): call prepare() before fully_shard or "
            "parallelize_module, so that the scores are sharded with the weight"
        )
    if is_traceable_wrapper_subclass(tensor):
        kind = type(tensor).__name__
        return "tensor_subclass", f"it is a {kind}", "mask the plain weight before converting it"
    if tensor.layout is not torch.strided:
        return "layout", f"it has the layout {tensor.layout}", "make it dense with to_dense() first"
    shape = tuple(tensor.shape)
    if isinstance(site.module, nn.Conv2d) and site.tensor_name == "weight":
        if site.module.groups > 1:
            return (
                "grouped",
                f"it is a convolution of {site.module.groups} groups, whose channels do not all meet",
                "only convolutions with groups=1 have a grid of blocks",
            )
        shape = (shape[0], math.prod(shape[1:]))
    elif tensor.ndim != 2:
        return (
            "not_2d",
            f"it has shape {shape}, and only 2-D weights have a grid of blocks",
            "name a 2-D floating parameter, such as the weight of an nn.Linear",
        )
    if tensor.dtype not in _DTYPES:
        return (
            "dtype",
            f"it is {tensor.dtype}, not float16, bfloat16, float32 or float64",
            "name a 2-D floating parameter, such as the weight of an nn.Linear",
        )
    if isinstance(site.module, nn.Embedding | nn.EmbeddingBag) and (
        site.module.sparse or site.module.max_norm is not None
    ):
        return (
            "embedding_option",
            "its embedding has sparse=True or max_norm, which write past the mask",
            "build the embedding without them, or leave it out",
        )
    sharing = owners.get(storage_address(tensor), [])
    if len(sharing) > 1:
        others = ", ".join(repr(fqn) for fqn in sharing if fqn != site.fqn) or repr(site.fqn)
        return (
            "shared",
            f"it is shared with {others}",
            "masking it in one place would leave the other dense: untie them first, or leave it out",
        )
    rows, cols = blocksize
    if shape[0] < rows or shape[1] < cols:
        return (
            "smaller_than_block",
            f"a {rows}x{cols} block is larger than its shape {shape}",
            "choose a smaller blocksize for it or leave it out",
        )
    if block_grid(shape, blocksize) == (1, 1):
        return (
            "one_block",
            f"its shape {shape} is a single {rows}x{cols} block, which is always kept",
            "choose a smaller blocksize for it or leave it out",
        )
    return None
