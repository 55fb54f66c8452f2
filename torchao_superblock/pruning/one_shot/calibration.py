"""The calibration batches: which weights they reach, in what order, and with what inputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.common.blocks import check_blocksize
from torchao_superblock.pruning.masks.settings import check_sparsity_level
from torchao_superblock.pruning.one_shot.capture import Call, Target, find_bias
from torchao_superblock.pruning.one_shot.forwards import Forwards, Stream
from torchao_superblock.pruning.one_shot.moments import Moments
from torchao_superblock.pruning.targets import SkippedTensor, check_config, resolve

Part = tuple[Target, int]
"""A target and the first of a range of its rows that are always called together."""

_CHECKS = {"sparsity_level": check_sparsity_level, "blocksize": check_blocksize}
_KEYS = ("tensor_fqn", *_CHECKS, "exclude")


def find_targets(
    model: nn.Module, config: object, defaults: Mapping[str, Any], caller: str
) -> tuple[list[Target], list[SkippedTensor]]:
    """The weights that a config reaches.

    Args:
        model: whose.
        config: as `prepare` takes it, with levels and block sizes only.
        defaults: `sparsity_level` and `blocksize` of entries without their own.
        caller: for messages.

    Raises:
        ValueError: see :func:`torchao_superblock.pruning.targets.resolve`; a setting that means
            nothing here; a weight with values that are not finite.
    """
    entries = check_config(config, _CHECKS)
    for i, entry in enumerate(entries or ()):
        unknown = [key for key in entry if key not in _KEYS]
        if unknown:
            raise ValueError(
                f"{caller}: config[{i}] ({entry['tensor_fqn']!r}) has {unknown[0]!r}, which means "
                "nothing when blocks are chosen from calibration batches; remove it"
            )
    groups, skipped = resolve(model, entries, defaults)
    targets = []
    for group in groups:
        weight = getattr(group["module"], group["tensor_name"])
        fqn = group["tensor_fqn"]
        if weight.ndim != 2:
            raise ValueError(
                f"{caller}: {fqn!r} has shape {tuple(weight.shape)}; only weights that F.linear "
                "multiplies with can be repaired. Leave it out of the config"
            )
        if weight.is_meta:
            raise ValueError(f"{caller}: {fqn!r} is on the meta device and has no values")
        if not bool(weight.detach().isfinite().all()):
            raise ValueError(f"{caller}: {fqn!r} contains NaN or infinity")
        blocksize = check_blocksize(group["blocksize"])
        targets.append(Target(fqn, weight, blocksize, group["sparsity_level"]))
    return targets, skipped


@dataclass(eq=False)
class Inputs:
    """Inputs that one or more ranges of rows share, such as those of query, key and value.

    Attributes:
        leader: the range at whose calls they are looked at.
        members: all ranges that share them.
    """

    leader: Part
    members: list[Part] = field(default_factory=list)


@dataclass(eq=False)
class Group:
    """Targets that are pruned at once because they share inputs.

    Attributes:
        inputs: all that its targets see.
        targets: in the order of their first calls.
        looks: for each batch, at how many calls inputs are looked at.
    """

    inputs: list[Inputs]
    targets: list[Target]
    looks: list[int]


class Calibration:
    """Batches going through a model; a context in which the model can be looked into.

    Args:
        model: never written to.
        targets: the weights of interest.
        batches: see :func:`torchao_superblock.prune_one_shot`.
        mask_fn: see there.
        dtype: of moments.
        caller: for messages.

    Attributes:
        forwards: the model's forwards.
        dense, pruned: the two streams.
        groups: in the order of the forward.
        outputs: what :meth:`discover`'s `on_output` returned, for each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        batches: Iterable[object],
        mask_fn: Callable[[Any], Tensor | None] | None,
        dtype: torch.dtype,
        caller: str,
    ) -> None:
        self.model, self.targets, self.dtype, self.caller = model, targets, dtype, caller
        if isinstance(batches, Tensor | Mapping | str):
            raise TypeError(
                f"{caller}: batches is a {type(batches).__name__}; it must be an iterable of "
                "batches: put a single one in a list"
            )
        self.batches = list(batches)
        if not self.batches:
            raise ValueError(f"{caller}: there is no calibration batch")
        self._masks = [self._mask(i, batch, mask_fn) for i, batch in enumerate(self.batches)]
        self._mask_used = False
        self.forwards = Forwards(model, targets, self.batches)
        self.dense, self.pruned = Stream(len(self.batches)), Stream(len(self.batches))

    def __enter__(self) -> Calibration:
        self.forwards.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.forwards.__exit__(*error)

    def discover(self, on_output: Callable[[object, int], Any] | None = None) -> None:
        """Runs every batch once and finds the groups, the ranges of rows and the biases.

        Raises:
            ValueError: if a target is not reached by any batch, or a mask fits no layer.
        """
        # For each target its calls: rows, batch, number of the input in it, place in the forward.
        calls: dict[Target, list[tuple[int, int, int, int, float]]] = {}
        self.outputs = []
        for batch in range(len(self.batches)):
            alive: dict[int, tuple[weakref.ref, int]] = {}
            seen: list[tuple[Target, int, int, int]] = []
            biased = set(calls)

            def look(call: Call, batch=batch, alive=alive, seen=seen, biased=biased) -> bool:
                self._tokens(call, batch)  # refuses what is not finite
                known, number = alive.get(id(call.x), (None, 0))
                if known is None or known() is not call.x:
                    number = len(seen)
                    alive[id(call.x)] = weakref.ref(call.x), number
                self._note_bias(call, first=call.target not in biased)
                biased.add(call.target)
                seen.append((call.target, call.start, call.stop, number))
                return False

            output = self.forwards.run(self.dense, batch, look)
            self.outputs.append(None if on_output is None else on_output(output, batch))
            for place, (target, start, stop, number) in enumerate(seen):
                calls.setdefault(target, []).append((start, stop, batch, number, place / len(seen)))
        unreached = [target.fqn for target in self.targets if target not in calls]
        if unreached:
            more = f" (and {len(unreached) - 1} more)" if len(unreached) > 1 else ""
            raise ValueError(
                f"{self.caller}: no batch reaches {unreached[0]!r}{more}: F.linear is never called "
                "with it. Give batches that do, or leave it out of the config"
            )
        if any(mask is not None for mask in self._masks) and not self._mask_used:
            shape = next(tuple(mask.shape) for mask in self._masks if mask is not None)
            raise ValueError(
                f"{self.caller}: a mask of shape {shape} fits the inputs of no layer; it must be "
                "(batch, sequence), as the model's inputs are"
            )
        self._group(calls)

    def _group(self, calls: dict[Target, list[tuple[int, int, int, int, float]]]) -> None:
        by_signature: dict[tuple, Inputs] = {}
        inputs_of: dict[Target, list[Inputs]] = {}
        for target, its_calls in calls.items():
            edges = {edge for start, stop, *_ in its_calls for edge in (start, stop)}
            target.cuts = sorted({0, target.weight.shape[0], *edges})
            for start, stop in target.parts():
                signature = tuple(c[2:4] for c in its_calls if c[0] <= start and stop <= c[1])
                if not signature:
                    raise ValueError(
                        f"{self.caller}: no batch reaches rows {start} to {stop} of {target.fqn!r}"
                    )
                inputs = by_signature.setdefault(signature, Inputs((target, start)))
                inputs.members.append((target, start))
                inputs_of.setdefault(target, []).append(inputs)
        place = {target: min(call[4] for call in calls[target]) for target in calls}
        self.groups: list[Group] = []
        left = sorted(calls, key=place.__getitem__)
        while left:
            # All that hangs together with the first by shared inputs.
            inputs, targets, pending = [], set(), [left[0]]
            while pending:
                target = pending.pop()
                if target in targets:
                    continue
                targets.add(target)
                for one in inputs_of[target]:
                    if one not in inputs:
                        inputs.append(one)
                        pending += [member for member, _ in one.members]
            looks = [0] * len(self.batches)
            for one in inputs:
                target, start = one.leader
                for first, last, batch, *_ in calls[target]:
                    looks[batch] += first <= start < last
            self.groups.append(Group(inputs, [t for t in left if t in targets], looks))
            left = [target for target in left if target not in targets]

    def moments(self, group: Group, *, dense_only: bool = False) -> dict[Part, Moments]:
        """Moments of the inputs of a group, for each range of rows.

        Args:
            group: whose targets are not done yet.
            dense_only: take the dense model's inputs for those of the pruned one.

        Raises:
            ValueError: for inputs that are not finite, or if no token is left.
        """
        found = {one.leader: Moments(self.dtype) for one in group.inputs}
        for batch, looks in enumerate(group.looks):
            if not looks:
                continue
            dense = self._look(self.dense, group, found, batch, looks)
            pruned = dense if dense_only else self._look(self.pruned, group, found, batch, looks)
            for leader, moments in found.items():
                moments.add(pruned[leader], dense[leader])
        for (target, _), moments in found.items():
            if moments.count == 0:
                raise ValueError(
                    f"{self.caller}: no token reaches {target.fqn!r}: all are masked, or the layers "
                    "before it, once pruned, send them elsewhere. Give more batches"
                )
        return {member: found[one.leader] for one in group.inputs for member in one.members}

    def _look(
        self, stream: Stream, group: Group, leaders: Mapping[Part, object], batch: int, looks: int
    ) -> dict[Part, Tensor]:
        seen: dict[Part, list[Tensor]] = {leader: [] for leader in leaders}
        count = 0

        def look(call: Call) -> bool:
            nonlocal count
            for start, _ in call.target.parts():
                if call.start <= start < call.stop and (call.target, start) in seen:
                    seen[call.target, start].append(self._tokens(call, batch))
                    count += 1
            return count == looks

        self.forwards.run(stream, batch, look)
        if stream is self.dense and count != looks:
            raise RuntimeError(
                f"{self.caller}: {group.targets[0].fqn!r} was looked at {looks} times for batch {batch} "
                f"and, given the same batch once more, {count} times: a model whose forward differs "
                "from call to call cannot be calibrated"
            )
        return {
            leader: torch.cat(found)
            if found
            else leader[0].weight.new_zeros(0, leader[0].weight.shape[1])
            for leader, found in seen.items()
        }

    def _tokens(self, call: Call, batch: int) -> Tensor:
        """The inputs of a call, `(T, K)`, without padding."""
        x = call.x.detach()
        mask = self._masks[batch]
        if mask is not None:
            leading = x.shape[:-1]
            if call.sequence_first and mask.ndim == 2:
                mask = mask.T
            elif leading != mask.shape and leading == mask.T.shape:
                mask = mask.T
            if leading == mask.shape:
                x, self._mask_used = x[mask], True
            elif leading == (mask.numel(),):
                x, self._mask_used = x[mask.flatten()], True
            elif leading.numel() == mask.numel():
                raise ValueError(
                    f"{self.caller}: the mask of batch {batch} has shape "
                    f"{tuple(self._masks[batch].shape)} and the inputs of {call.target.fqn!r} "
                    f"{tuple(call.x.shape)}; the mask must be (batch, sequence)"
                )
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"{self.caller}: the inputs of {call.target.fqn!r} contain NaN or infinity in batch "
                f"{batch}; nothing can be learned from them"
            )
        return x.reshape(-1, x.shape[-1])

    def token_mask(self, batch: int) -> Tensor | None:
        """True for the tokens of a batch that are not padding, `(batch, sequence)`."""
        return self._masks[batch]

    def _mask(
        self, i: int, batch: object, mask_fn: Callable[[Any], Tensor | None] | None
    ) -> Tensor | None:
        if mask_fn is not None:
            mask = mask_fn(batch)
        else:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if mask is not None and mask.ndim != 2:
                return None  # who sees whom, not what is padding
        if mask is None:
            return None
        where = "mask_fn" if mask_fn is not None else "attention_mask"
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"{self.caller}: {where} gives a {type(mask).__name__} for batch {i}; it must be a "
                "tensor, True for real tokens, or None"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"{self.caller}: {where} of batch {i} has values besides 0 and 1; it must be True "
                "or 1 for real tokens"
            )
        return mask.bool()

    def _note_bias(self, call: Call, first: bool) -> None:
        target = call.target
        if first:
            target.bias = find_bias(call, self.model)
        elif target.bias is not None:
            parameter, begin = target.bias
            expected = parameter.data_ptr() + (begin + call.start) * parameter.element_size()
            if call.bias is None or call.bias.data_ptr() != expected:
                target.bias = None
        if call.bias is not None and target.bias is None:
            target.foreign_bias = True
