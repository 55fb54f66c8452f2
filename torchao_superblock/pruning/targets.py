"""From a config to tensors: which weights of a model are masked, with what settings."""

from __future__ import annotations

import fnmatch
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
from torchao_superblock.pruning.masks.base import Check, find_mask

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class SkippedTensor:
    """A weight that a glob, or no config at all, reached and that is not masked.

    Attributes:
        fqn: its fully qualified name.
        shape: its shape.
        code: a short stable word: `smaller_than_block`, `one_block`, `shared`, `parametrized`,
            `not_2d`, `dtype`, `tensor_subclass` or `uninitialized`.
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
        unknown = sorted(str(key) for key in entry if key not in ("tensor_fqn", *checks))
        if unknown:
            raise ValueError(
                f"{where}unknown key {unknown[0]!r}; an entry has 'tensor_fqn' and any of "
                f"{', '.join(map(repr, checks))}"
            )
        entries.append({"tensor_fqn": fqn, **check_settings(entry, checks, where)})
    return entries


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
    # key -> (site, settings, whether it was named exactly)
    chosen: dict[tuple[int, str], tuple[_Site, dict[str, Any], bool]] = {}
    if config is None:
        for site in sites:
            plain = parametrize.type_before_parametrizations(site.module) is nn.Linear
            if plain and site.tensor_name == "weight":
                chosen[site.key] = (site, {}, False)
        if not chosen:
            raise ValueError(
                f"nothing to prune: {type(model).__name__} has no nn.Linear (subclasses are not "
                "counted when config is None). Name the weights: "
                "config=[{'tensor_fqn': '...'}]"
            )
    for entry in config or ():
        pattern = entry["tensor_fqn"]
        settings = {key: value for key, value in entry.items() if key != "tensor_fqn"}
        exact = not any(character in pattern for character in "*?[")
        # As it stands first: a model may have a part of its own that is called `module`.
        matches = [site for site in sites if _matches(pattern.lstrip("."), site, exact)] or [
            site for site in sites if _matches(without_wrapper_prefixes(pattern), site, exact)
        ]
        if not matches:
            raise ValueError(_no_match(pattern, exact, sites))
        for site in matches:
            earlier = chosen.pop(site.key, None)
            if earlier is not None and earlier[2]:
                raise ValueError(
                    f"{site.fqn!r} is configured twice: {pattern!r} names a tensor that an earlier "
                    "entry names exactly. Remove one of them, or put the glob before the exact name "
                    "to override it"
                )
            chosen[site.key] = (site, settings, exact)

    groups, skipped = [], []
    for site, settings, exact in chosen.values():
        group = {**defaults, **settings}
        obstacle = _obstacle(site, check_blocksize(group["blocksize"]), owners)
        if obstacle is not None:
            code, reason, way_out = obstacle
            if exact:
                raise ValueError(f"cannot mask {site.fqn!r}: {reason}; {way_out}")
            shape = () if code == "uninitialized" else _shape(site)
            skipped.append(SkippedTensor(site.fqn, shape, code, reason))
            continue
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
        for name in own:
            key = (id(module), name)
            site = found.setdefault(key, _Site(module, name, clean + name))
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
        if site.parameter is not None or parametrize.is_parametrized(site.module, site.tensor_name):
            yield site


def _matches(pattern: str, site: _Site, exact: bool) -> bool:
    if exact:
        return pattern in site.names
    return site.is_projection and any(fnmatch.fnmatchcase(name, pattern) for name in site.names)


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
    shape = tuple(tensor.shape)
    if tensor.ndim != 2:
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
