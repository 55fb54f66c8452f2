"""Replace the linear layers of a model by :class:`BSRLinear` where that pays, and say what became of each."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from torchao_superblock.bsr.attention import (
    IN_PROJECTIONS,
    attention_obstacle,
    become_bsr,
    projections,
    with_blocks,
)
from torchao_superblock.bsr.attention_swap import judge_attention
from torchao_superblock.bsr.finish import Finish
from torchao_superblock.bsr.format import (
    gather_blocks,
    infer_blocksize,
    nonzero_blocks,
    stored_blocks,
)
from torchao_superblock.bsr.layers import twin_of
from torchao_superblock.bsr.linear import BSRLinear, bsr_type, conversion_obstacle
from torchao_superblock.bsr.measure import time_parts
from torchao_superblock.bsr.optimizer_state import (
    WAY_OUT,
    Move,
    check_optimizer,
    notes,
    stored_blocks_in,
)
from torchao_superblock.bsr.parts import find_parts
from torchao_superblock.common.all_or_nothing import all_or_nothing
from torchao_superblock.common.blocks import block_grid, padded_shape, parse_blocksize
from torchao_superblock.common.kept_blocks import KeptBlocks, remembered_kept
from torchao_superblock.common.modules import (
    block_masks_of,
    parameter_owners,
    replace_modules,
    storage_address,
)
from torchao_superblock.common.names import without_compile_prefix
from torchao_superblock.common.swappable import TWINS, module_obstacle, shape_obstacle
from torchao_superblock.common.weights import other_weights
from torchao_superblock.ops.break_even import break_even


@dataclass(frozen=True)
class SwapEntry:
    """What became of one linear layer, or of another weight that stays dense.

    Attributes:
        fqn: the layer's fully qualified name; another weight's is that of the tensor, and so is that of a projection
            that `nn.MultiheadAttention` holds itself (`attention.in_proj_weight`).
        shape: `(out_features, in_features)`; another weight's own shape.
        blocksize: `(rows, cols)`, or None where none was found.
        sparsity: fraction of blocks that hold only zeros, or None where it was not looked at.
        reason: a sentence.
        code: a short stable word: `swapped`, or why not: `customised`, `filtered_out`, `invalid_indices`,
            `linear_subclass`, `meta_device`, `no_twin` (nothing block-sparse can take its module's place), `not_called`
            (by the example that was measured with), `odd_shape`, `other_blocksize`, `parametrized`,
            `shape_not_multiple`, `sharded`, `slower_than_dense`, `sparse_layout`, `tied_weight`, `too_few_zero_blocks`,
            `uninitialized`, `unsupported_dtype`, `weight_subclass`.
        dense_ms: where it was measured: milliseconds that the dense layer takes, or the module around it that had to
            be timed as a whole.
        bsr_ms: the same, swapped.
        padded: rows and columns of the whole blocks that are stored, where that is more than `shape`.
    """

    fqn: str
    shape: tuple[int, ...]
    blocksize: tuple[int, int] | None
    sparsity: float | None
    reason: str
    code: str
    dense_ms: float | None = None
    bsr_ms: float | None = None
    padded: tuple[int, int] | None = None

    @property
    def _result(self) -> str:
        if self.code != "swapped":
            return f"skipped: {self.reason}"
        if self.padded is None:
            return "swapped"
        more = math.prod(self.padded) / math.prod(self.shape) - 1.0
        return f"swapped, padded to {self.padded[0]}x{self.padded[1]} ({more:.1%} more)"


@dataclass
class SwapReport:
    """What :func:`swap_to_bsr` did; prints as a table.

    Attributes:
        swapped: one :class:`SwapEntry` for each layer that is a :class:`BSRLinear` now, projections of attention
            included.
        skipped: one for each layer that was left alone, with the reason, and one for each other weight: convolutions,
            experts in one 3-D tensor, matrices that a module holds itself, and embeddings
            if they have blocks of zeros.
        notes: sentences about anything else that was changed in the model.
    """

    swapped: list[SwapEntry] = field(default_factory=list)
    skipped: list[SwapEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{len(self.swapped)} of {len(self.swapped) + len(self.skipped)} weights swapped to BSR"
        ]
        entries = [*self.swapped, *self.skipped]
        measured = any(entry.dense_ms is not None for entry in entries)
        times = ("dense ms", "BSR ms") if measured else ()
        rows = [("layer", "shape", "block", "sparsity", *times, "result")]
        for entry in entries:
            pair = (entry.dense_ms, entry.bsr_ms) if measured else ()
            rows.append(
                (
                    entry.fqn,
                    "x".join(map(str, entry.shape)),
                    "x".join(map(str, entry.blocksize)) if entry.blocksize else "-",
                    f"{entry.sparsity:.1%}" if entry.sparsity is not None else "-",
                    *("-" if ms is None else f"{ms:.3f}" for ms in pair),
                    entry._result,
                )
            )
        if len(rows) > 1:
            widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
            for row in rows:
                cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
                lines.append("  ".join([*cells, row[-1]]))
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def to_bsr_linear(
    linear: nn.Linear, blocksize: int | tuple[int, int] | None = None, *, pad: bool = False
) -> BSRLinear:
    """Convert one linear layer, or raise with the reason; the same as :meth:`BSRLinear.from_dense`.

    Args:
        linear: an `nn.Linear` whose weight has blocks of zeros. It is left as it is.
        blocksize: int, `(rows, cols)`, or None to read it off the zeros.
        pad: take shapes that are not a multiple of the block size, as in :func:`swap_to_bsr`.

    Returns:
        A :class:`BSRLinear` that computes the same, with a copy of the stored blocks and the same `bias` Parameter.

    Raises:
        TypeError, ValueError, RuntimeError: it cannot be converted; the message says why and what to do.

    Example:
        >>> linear = nn.Linear(64, 64)
        >>> with torch.no_grad():
        ...     _ = linear.weight[:32].zero_()
        >>> to_bsr_linear(linear).sparsity
        0.5
    """
    return BSRLinear.from_dense(linear, blocksize, pad=pad)


def swap_to_bsr(
    model: nn.Module,
    blocksize: int | tuple[int, int] | None = None,
    *,
    min_sparsity: float | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    pad: bool = False,
    fuse_activations: bool = False,
    drop_dead_features: bool = False,
    measure: object = None,
    optimizer: Optimizer | None = None,
) -> SwapReport:
    """Replace, in place, every linear layer with enough zero blocks by a :class:`BSRLinear`.

    An `nn.MultiheadAttention` becomes a :class:`BSRMultiheadAttention`, the same object with some or all of its
    projections stored as blocks. Each has its row in the report, judged by its own zeros; without `min_sparsity` they
    are swapped if the module as a whole is faster then, torch's fused path that it leaves counted.

    A 1x1 `nn.Conv2d` with `groups=1` and without padding becomes a :class:`BSRConv1x1`; without `min_sparsity` only on
    a CPU, where that was measured, and if its weight is in channels-last memory. A subclass of `nn.Linear` counts as
    one if it has no method, parameter or buffer of its own (`__init__`, `reset_parameters` and `extra_repr` aside);
    for others :func:`register_twin` says so.

    The weights are looked at as they are: where the zeros come from does not matter. A weight with the layout
    `torch.sparse_bsr` becomes a :class:`BSRLinear` with the blocks that it stores. If anything fails, the model is as
    it was. An optimizer built before holds the dense weights: pass it as `optimizer` to train on, or build it again.

    Args:
        model: any module, not itself an `nn.Linear`.
        blocksize: int or `(rows, cols)` for all layers; None reads each layer's off its zeros.
        min_sparsity: a layer with a smaller fraction of zero blocks is skipped. None means "where it is faster than
            dense": a table of measured break-even points by device, block size and dtype. Where nobody measured, it
            takes a cautious 0.9 and the report says so. With `measure` the times decide alone.
        filter_fn: `filter_fn(module, fqn) -> bool`; a layer for which it is False is skipped. A projection that an
            `nn.MultiheadAttention` holds itself comes as an `nn.Linear` with its weight and the FQN of the weight.
        pad: swap layers whose shape is not a multiple of the block size, too: the last row or column of blocks is
            stored padded with zeros, and the report says how much that is. Features, results, gradients, `to_dense()`
            and what files say are those of the layer without it; the padding's gradient is zero, so that it stays as
            it is. Without `blocksize`, sizes up to the shape are tried, and the zeros of the weight itself decide. What
            is stored, padding included, must be less than dense by as much as the break-even table asks. Projections of
            attention are not padded.
        fuse_activations: let a swapped layer apply the activation that directly follows it (ReLU, GELU or SiLU, also
            those of timm and transformers), and compute a gated MLP's `activation(gate(x)) * up(x)` at once, where that
            gives the same result: nothing else reads the layer's output, no hook sits between the two, and the layer
            has no other place in the model. What follows what is read off each module that calls swapped layers, by
            tracing its forward (`torch.fx`, a few milliseconds each; no module should run meanwhile); `register_mlp`
            says what tracing cannot know. What cannot be traced is left alone and stands in the report. Names stay as
            they are: an identity keeps the activation's place, and a gated MLP becomes a subclass of its class. Hooks
            that are put between the pieces later see what they saw before, as the activation then runs on its own; an
            adapter put around a layer that applies an activation is refused when it runs. Whoever calls such a layer
            from elsewhere gets the activation too. In a training step the activation runs on its own all the same.
        drop_dead_features: make two swapped layers that follow each other, with nothing but activations and dropout
            between them, narrower by the features that need not be computed: those that the second layer stores no
            block for, and those that the first layer stores none for. The latter are the same for every input, and what
            the second layer makes of them goes into its bias (they stay if it has none or cannot hold it, or if a
            dropout is active). The result is the same to rounding. Meant for inference: weights that are gone cannot
            be trained, and `swap_to_dense` has only zeros to put in their place. Whoever calls the first layer alone
            gets fewer features. They go in whole blocks of both layers; where their number is a multiple of 64, as GPU
            kernels want it, it stays one. The report's shapes are those before.
        measure: an example input of the model (a tensor, a tuple of arguments or a dict of keyword arguments): each
            layer that could be swapped is timed dense and swapped on what it is called with, on this machine, and
            swapped if that is faster. What would be fused, or lose features together, is timed as what it becomes and
            swapped together; so is a module with a fused path of torch's that any swapped layer inside turns off: an
            `nn.MultiheadAttention`, an `nn.TransformerEncoderLayer`, an `nn.TransformerEncoder` that skips padding.
            Eager forwards, with `optimizer` forwards and backwards. The report has both times. The model runs once; the
            same shapes, with the same share of stored blocks to 5 %, are timed once.
        optimizer: goes on with the stored blocks in the place of the dense weights: the same object, with the same
            groups and the state of the stored blocks, so that schedulers and a GradScaler stay valid. Blocks that the
            squashed mask kept are stored though they are zero. Any optimizer of `torch.optim` that steps each element
            by itself. A gain of the mask is part of the weights since the squash; a note says what follows for the
            learning rate. Gradients are not taken over.

    Returns:
        A :class:`SwapReport` that accounts for every `nn.Linear` of the model and every other weight.

    Raises:
        RuntimeError: a block mask is not squashed yet.
        ValueError: `model` is itself an `nn.Linear` (it cannot be replaced in place), or `min_sparsity` is
            outside [0, 1], or `blocksize` is below 1, or the model is wrapped in DistributedDataParallel.
            With `optimizer`: it lacks a trained weight that is swapped, or `drop_dead_features` would drop what it
            trains. With `measure`: the model does not take the example.
        TypeError: `model` is not a module, or `blocksize` is not an int or a pair, or the optimizer's steps mix
            elements of a weight (Adafactor, Muon, LBFGS) or are not known.

    Example:
        >>> sparsifier.squash_mask()  # doctest: +SKIP
        >>> print(swap_to_bsr(model))  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_to_bsr: model must be an nn.Module, got {type(model).__name__}")
    if blocksize is not None:
        blocksize = parse_blocksize(blocksize)
    if min_sparsity is not None:
        if not isinstance(min_sparsity, Real):
            raise TypeError(f"swap_to_bsr: min_sparsity must be a number, got {min_sparsity!r}")
        if not 0.0 <= min_sparsity <= 1.0:
            raise ValueError(f"swap_to_bsr: min_sparsity must lie in [0, 1], got {min_sparsity}")
    if not isinstance(pad, bool):
        raise TypeError(f"swap_to_bsr: pad must be True or False, got {pad!r}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"swap_to_bsr: filter_fn must be callable, got {filter_fn!r}")
    if optimizer is not None:
        check_optimizer(optimizer)
        if drop_dead_features:
            raise ValueError(
                "swap_to_bsr: drop_dead_features drops weights that the optimizer trains; leave it out to train on, "
                "and swap for inference afterwards"
            )
    for fqn, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"swap_to_bsr: {without_compile_prefix(fqn) or 'the model'!r} is wrapped in "
                "DistributedDataParallel, which would go on reducing the dense weights; swap ddp.module and wrap it "
                "again"
            )
        if any(True for _ in block_masks_of(module)):
            raise RuntimeError(
                f"swap_to_bsr: the block mask of {without_compile_prefix(fqn) or 'the model'!r} is not squashed yet; "
                "call sparsifier.squash_mask(), or torchao_superblock.squash(model), first"
            )
    if isinstance(model, nn.Linear) or is_one_layer(model):
        bsr = bsr_type(model)
        call = "to_bsr_linear" if bsr is BSRLinear else f"{bsr.__name__}.from_dense"
        raise ValueError(
            f"swap_to_bsr: the model is itself an {bsr.DENSE} and cannot be replaced in place; use {call}(model), "
            "which returns the new layer"
        )

    report = SwapReport()
    candidates: list[_Candidate] = []
    owners = parameter_owners(model)
    places = Counter(child for module in model.modules() for child in module._modules.values())
    guesses: dict[str, float] = {}  # what nobody has measured -> the sparsity that is asked for

    def judge(
        linear: nn.Linear,
        fqn: str,
        tensor_fqn: str,
        obstacle: tuple[str, str] | None = None,
        pad: bool | None = None,
    ) -> SwapEntry:
        keep = None if optimizer is None else _kept(linear)
        wanted = blocksize, min_sparsity, filter_fn, owners, keep, measure is not None, pad
        entry = _judge(linear, fqn, tensor_fqn, obstacle, *wanted)
        if min_sparsity is None and measure is None and entry.sparsity:
            even = break_even(linear.weight.device.type, entry.blocksize, linear.weight.dtype)
            dtype = str(linear.weight.dtype).removeprefix("torch.")
            if not even.measured:
                guesses[f"{dtype} on {even.where}"] = even.sparsity
        return entry

    def convert(linear: nn.Linear, entry: SwapEntry, bsr: type[BSRLinear], names: Names) -> _Row:
        keep = None if optimizer is None else _kept(linear)
        try:
            layer = bsr.from_dense(linear, entry.blocksize, pad=entry.padded is not None, keep=keep)
            return _Row(entry, linear, layer, names, keep)
        except Exception as error:
            error.add_note(f"while swapping {entry.fqn!r}")
            raise

    judged: set[nn.Module] = set()  # with the attention that they are a part of
    for fqn, module in model.named_modules():
        name = without_compile_prefix(fqn)
        if module in judged:
            continue
        if isinstance(module, nn.MultiheadAttention):
            report.skipped += _other_weights(module, name)
            entries = judge_attention(
                module,
                name,
                judge,
                blocksize=blocksize,
                decide=min_sparsity is None and measure is None,
                is_shared=places[module.out_proj] > 1,
                parent=model.get_submodule(fqn.rpartition(".")[0]) if fqn else None,
            )
            rows = {}
            for projection in projections(module, name):
                entry = entries[projection.name]
                if projection.name == "out_proj":
                    judged.add(projection.linear)
                if entry.code == "swapped":
                    names = projection.tensor_fqn, projection.values_fqn
                    rows[projection.name] = convert(projection.linear, entry, projection.bsr, names)
                else:
                    report.skipped.append(entry)
            if rows and attention_obstacle(module) is None:
                layers = {name: row.layer for name, row in rows.items()}
                candidates.append(_Candidate(module, with_blocks(module, layers), [*rows.values()]))
            else:
                candidates += [_Candidate(r.linear, r.layer, [r]) for r in rows.values()]
            continue
        if not isinstance(module, nn.Linear) and not is_one_layer(module):
            report.skipped += _other_weights(module, name)
            continue
        names = f"{name}.weight", f"{name}.values"
        entry = judge(module, name, names[0], pad=pad)
        if entry.code == "swapped":
            row = convert(module, entry, bsr_type(module), names)
            candidates.append(_Candidate(module, row.layer, [row]))
        else:
            report.skipped.append(entry)
    report.notes += [
        f"nobody has measured all of these block sizes in {where}, and without that {sparsity:.1%} of a layer's blocks "
        "must be zero for a swap, which is cautious; measure=example_input times the layers on this machine"
        for where, sparsity in guesses.items()
    ]
    finish = Finish(fuse_activations, drop_dead_features)
    if measure is not None:
        _measure(model, candidates, measure, finish, train=optimizer is not None)
    for candidate in candidates:
        for row in candidate.rows:
            is_swapped = row.entry.code == "swapped"
            (report.swapped if is_swapped else report.skipped).append(row.entry)
    candidates = [candidate for candidate in candidates if candidate.is_swapped]
    moves = []
    if optimizer is not None:
        moves = [_move(row) for candidate in candidates for row in candidate.rows]
    with nullcontext() if optimizer is None else stored_blocks_in(optimizer, moves):
        _replace(model, candidates, report, finish)
    if optimizer is not None:
        report.notes += notes(optimizer, moves)
    return report


def is_one_layer(module: nn.Module) -> bool:
    """Whether a swap would replace this very module."""
    kind = parametrize.type_before_parametrizations(module)
    twin = twin_of(kind)
    is_ours = twin is not None and issubclass(twin.bsr, BSRLinear)
    return is_ours and module_obstacle(module, kind, "weight") is None


Names = tuple[str, str]
"""FQN of a weight, and of the stored blocks that take its place."""


@dataclass
class _Row:
    """One weight that may be swapped: its row of the report, the layer around it, and what takes its place."""

    entry: SwapEntry
    linear: nn.Linear
    layer: BSRLinear
    names: Names
    keep: KeptBlocks | None


@dataclass
class _Candidate:
    """A module that is swapped as a whole or not at all: a linear layer, or an attention and its projections."""

    module: nn.Module
    new: nn.Module
    rows: list[_Row]

    @property
    def is_swapped(self) -> bool:
        return self.rows[0].entry.code == "swapped"


def _measure(
    model: nn.Module,
    candidates: list[_Candidate],
    example_input: object,
    finish: Finish,
    *,
    train: bool,
) -> None:
    """Gives the entries their times; what is not faster, or not called, is swapped no more."""
    of_module = {candidate.module: candidate for candidate in candidates}
    replacements = {candidate.module: candidate.new for candidate in candidates}
    parts = find_parts(model, replacements, finish)
    for part, timing in time_parts(model, parts, example_input, finish, train=train).items():
        names = " and ".join(repr(fqn or "the model") for fqn in part.fqns)
        if timing is None:
            change: dict[str, Any] = {
                "code": "not_called",
                "reason": "the example that was measured with never reaches it",
            }
        else:
            change = {"dense_ms": timing.dense_ms, "bsr_ms": timing.bsr_ms}
        for module in part.replacements:
            candidate = of_module[module]
            if timing is not None and timing.bsr_ms >= timing.dense_ms:
                is_itself = part.entry is module and len(part.replacements) == 1
                what = "it takes" if is_itself and isinstance(candidate.new, BSRLinear) else names
                if what is names:
                    what += " takes" if len(part.fqns) == 1 else " together take"
                change["code"] = "slower_than_dense"
                change["reason"] = (
                    f"{what} {timing.bsr_ms:.3f} ms swapped and {timing.dense_ms:.3f} ms dense"
                )
            for row in candidate.rows:
                row.entry = replace(row.entry, **change)


def _kept(linear: nn.Module) -> KeptBlocks | None:
    """What the mask of this layer kept, if it was squashed in this process: of its `(N, K)` matrix."""
    weight = linear._parameters.get("weight")
    kept = None if weight is None else remembered_kept(weight)
    if kept is None:
        return None
    matrix_of = bsr_type(linear).matrix_of
    blocksize = tuple(matrix_of(torch.empty(kept.blocksize, device="meta")).shape)
    return KeptBlocks(matrix_of(kept.mask), blocksize, kept.gain)


def _move(row: _Row) -> Move:
    linear, layer, keep = row.linear, row.layer, row.keep
    if linear.weight.layout is not torch.strided:
        raise ValueError(
            f"swap_to_bsr: {row.names[0]!r} has the layout {linear.weight.layout}, and an optimizer has no state by "
            f"blocks for it; {WAY_OUT}"
        )
    index = layer.crow_indices, layer.col_indices, layer.blocksize
    return Move(
        *row.names,
        linear.weight,
        layer.values,
        lambda tensor: gather_blocks(layer.matrix_of(tensor), *index),
        1.0 if keep is None else keep.gain,
    )


def _judge(
    linear: nn.Linear,
    fqn: str,
    tensor_fqn: str,
    obstacle: tuple[str, str] | None,
    blocksize: tuple[int, int] | None,
    min_sparsity: float | None,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    owners: dict[tuple[object, int], list[str]],
    keep: KeptBlocks | None,
    measured: bool,
    pad: bool | None,
) -> SwapEntry:
    """Decide about one layer without touching it; `obstacle` is what its surroundings have against it.

    `pad` is None where the layer cannot be padded, whatever the caller asks for.
    """
    twin = bsr_type(linear)
    shape = twin.features_of(linear)

    def entry(code: str, reason: str, sparsity: float | None = None) -> SwapEntry:
        padded = padded_shape(shape, blocksize) if pad and blocksize is not None else None
        return SwapEntry(fqn, shape, blocksize, sparsity, reason, code, padded=padded)

    if filter_fn is not None and not filter_fn(linear, fqn):
        return entry("filtered_out", "filter_fn returned False for it")
    obstacle = obstacle or conversion_obstacle(linear)
    if obstacle is not None:
        return entry(*obstacle)
    others = [owner for owner in owners[storage_address(linear.weight)] if owner != tensor_fqn]
    if others:
        return entry("tied_weight", f"its weight is shared with {', '.join(others)}")
    if linear.weight.layout is torch.sparse_bsr:
        return _judge_stored(linear, fqn, blocksize, min_sparsity)
    weight = twin.matrix_of(linear.weight)
    if blocksize is None:
        blocksize = infer_blocksize(weight, pad=bool(pad)) if keep is None else keep.blocksize
    unfit = None if pad else shape_obstacle(shape, blocksize)
    if unfit is not None or blocksize is None:
        zeros = (weight.detach() == 0).double().mean().item()
        remark = f"; {zeros:.1%} of its elements are zero" if zeros else ""
        if zeros and pad is None:
            remark += ", and projections of attention are never padded"
        elif zeros:
            remark += ", and pad=True pads its last blocks"
        return entry("shape_not_multiple", f"{unfit}{remark}")
    stored = stored_blocks(weight, blocksize, keep)
    sparsity = 1.0 - stored.float().mean().item()
    with_padding, spared = "", sparsity
    if min_sparsity is None and not measured and padded_shape(shape, blocksize) is not None:
        # What the kernels are spared; less than nothing where there is more padding than zeros.
        spared = 1.0 - int(stored.sum()) * math.prod(blocksize) / weight.numel()
        with_padding = f" ({spared:.1%} with their padding counted)"
    if min_sparsity is not None:
        needed, code = min_sparsity, "too_few_zero_blocks"
        rule = f"min_sparsity is {needed:.1%}"
    elif sparsity == 0.0:
        return entry("too_few_zero_blocks", "no block of its weight is all zeros", sparsity)
    elif measured:
        needed, code, rule = 0.0, "too_few_zero_blocks", ""
    else:
        needed, measured, where = break_even(
            linear.weight.device.type, blocksize, linear.weight.dtype
        )
        loss = twin.loss_of(linear)
        if loss is not None:
            reason = f"{sparsity:.1%} of its blocks are zero, but {loss}"
            return entry("slower_than_dense", reason, sparsity)
        needed = max(needed, twin.LEAST_SPARSITY)
        code, rule = (
            "slower_than_dense",
            f"on {where} blocks of this size break even at {needed:.1%}",
        )
        if not measured:
            dtype = str(linear.weight.dtype).removeprefix("torch.")
            rule = (
                f"and nobody has measured from where on {dtype} blocks of this size are faster than dense on {where}: "
                f"{needed:.1%} is a cautious guess; measure=example_input times it here, min_sparsity decides"
            )
    if spared < needed:
        zeros = f"{sparsity:.1%} of its blocks are zero{with_padding}"
        return entry(code, f"{zeros}, {rule}", sparsity)
    return entry("swapped", f"{sparsity:.1%} of its blocks are zero", sparsity)


def _other_weights(module: nn.Module, fqn: str) -> Iterator[SwapEntry]:
    """The weights of a module that is no linear layer: no swap stores them as blocks."""
    is_attention = isinstance(module, nn.MultiheadAttention)
    if not is_attention and any(type(module) is twin.bsr for twin in TWINS.values()):
        return
    kind = parametrize.type_before_parametrizations(module)
    for name, tensor in other_weights(module):
        if is_attention and name in IN_PROJECTIONS:
            continue  # judged as the linear layers that they are
        blocksize = sparsity = None
        if tensor.layout is torch.strided and type(tensor.data) is Tensor and not tensor.is_meta:
            blocksize, sparsity = _zero_blocks(tensor.detach())
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and not sparsity:
            continue
        yield SwapEntry(
            f"{fqn}.{name}" if fqn else name,
            tuple(tensor.shape),
            blocksize,
            sparsity,
            module_obstacle(module, kind, name)
            or "it is not a weight that a swap stores as blocks",
            "no_twin",
        )


def _zero_blocks(weight: Tensor) -> tuple[tuple[int, int] | None, float | None]:
    """Block size and fraction of zero blocks of a matrix, or of several on top of each other."""
    matrix = weight.reshape(-1, weight.shape[-1]) if weight.dim() <= 3 else weight.flatten(1)
    blocksize = infer_blocksize(matrix)
    if blocksize is None:
        return None, None
    return blocksize, 1.0 - nonzero_blocks(matrix, blocksize).float().mean().item()


def _judge_stored(
    linear: nn.Linear, fqn: str, blocksize: tuple[int, int] | None, min_sparsity: float | None
) -> SwapEntry:
    """Decide about a layer whose weight is a `torch.sparse_bsr` tensor: there is no dense product to compare with."""
    shape = (linear.out_features, linear.in_features)
    values = linear.weight.values()
    size = tuple(values.shape[1:])
    R, C = block_grid(shape, size)
    sparsity = 1.0 - values.shape[0] / (R * C)

    def entry(code: str, reason: str) -> SwapEntry:
        return SwapEntry(fqn, shape, size, sparsity, reason, code)

    if blocksize not in (None, size):
        return entry(
            "other_blocksize", f"its weight is stored in blocks of {size}, not {blocksize}"
        )
    if min_sparsity is not None and sparsity < min_sparsity:
        return entry(
            "too_few_zero_blocks",
            f"{sparsity:.1%} of its blocks are not stored, min_sparsity is {min_sparsity:.1%}",
        )
    return entry("swapped", f"{sparsity:.1%} of its blocks are not stored")


def _replace(
    model: nn.Module,
    candidates: list[_Candidate],
    report: SwapReport,
    finish: Finish,
) -> None:
    """Put the new layers in place of the old ones."""
    with all_or_nothing(model):
        for row in (row for candidate in candidates for row in candidate.rows):
            row.layer.train(row.linear.training)  # a measurement is made in eval mode
        # Of an attention the layers that are registered as modules; the others are parameters of its own.
        owned = set(model.modules())
        replace_modules(
            model,
            {
                row.linear: row.layer
                for candidate in candidates
                for row in candidate.rows
                if row.linear in owned
            },
        )
        for candidate in candidates:
            if isinstance(candidate.module, nn.MultiheadAttention):
                layers = {
                    name: layer
                    for name, layer in candidate.new._modules.items()
                    if any(layer is row.layer for row in candidate.rows)
                }
                become_bsr(candidate.module, layers)
        report.notes += finish(model)
