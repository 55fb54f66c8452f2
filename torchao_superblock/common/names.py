"""Fully qualified names (FQNs): what wrappers put into them, and what may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def without_compile_prefix(fqn: str) -> str:
    """The FQN without the `_orig_mod` that torch.compile puts in it."""
    return ".".join(part for part in fqn.split(".") if part != "_orig_mod")


def without_wrapper_prefixes(fqn: str) -> str:
    """The FQN without what DDP and torch.compile put in it: `module.` in front, `_orig_mod` anywhere."""
    parts = [part for part in fqn.split(".") if part and part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def find_fqn(fqn: str, known: Iterable[str]) -> str:
    """The one of the known FQNs that is meant, with wrapper prefixes or without; else `fqn`."""
    known = list(known)
    if fqn in known:
        return fqn
    return {without_wrapper_prefixes(one): one for one in known}.get(
        without_wrapper_prefixes(fqn), fqn
    )


def nearest_names(name: str, names: Sequence[str]) -> str:
    """The end of a sentence: what may have been meant, or nothing."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=3, cutoff=0.3)
    if not close:
        return ""
    return "; nearest: " + ", ".join(map(repr, close))


def by_class(table: Mapping[type | str, T], cls: type) -> T | None:
    """The entry for exactly this class, which is in the table as itself or by its qualified name."""
    entry = table.get(cls)
    return table.get(f"{cls.__module__}.{cls.__qualname__}") if entry is None else entry
