"""`sparse_params`: the settings of a group that a squash leaves on its module when asked to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchao_superblock.common.names import find_fqn, nearest_names


def kept_params(
    groups: list[dict[str, Any]],
    params_to_keep: tuple[str, ...] | None,
    per_layer: dict[str, tuple[str, ...]] | None,
) -> list[dict[str, Any]]:
    """The `sparse_params` of each group, after validating what was asked for."""
    everywhere = _check_names(params_to_keep, groups[0], "params_to_keep")
    layers: dict[str, tuple[str, ...]] = {}
    known = [group["module_fqn"] for group in groups]
    for fqn, names in (per_layer or {}).items():
        name = find_fqn(fqn, known)
        if name not in known:
            raise ValueError(
                f"squash_mask: params_to_keep_per_layer names {fqn!r}, which has no mask"
                + nearest_names(fqn, known)
            )
        where = f"params_to_keep_per_layer[{fqn!r}]"
        layers[name] = _check_names(names, groups[0], where)
    return [
        {name: group[name] for name in (*everywhere, *layers.get(group["module_fqn"], ()))}
        for group in groups
    ]


def leave_params(
    group: dict[str, Any], params: dict[str, Any], groups: list[dict[str, Any]]
) -> None:
    """Leaves the settings on the squashed module; by tensor name, where it has several."""
    module = group["module"]
    if sum(other["module"] is module for other in groups) > 1:
        params = {**getattr(module, "sparse_params", {}), group["tensor_name"]: params}
    module.sparse_params = params


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
