"""An exception at every line of a call that changes something: all of it happens, or nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.faults import models
from benchmarks.faults.case import Fault, Kind
from benchmarks.faults.injection import ERRORS, PACKAGE, count_lines, interrupt, spread
from benchmarks.faults.portrait import (
    Portrait,
    differences,
    folder,
    identities,
    portrait,
    random_state,
)
from torchao_superblock import (
    BSRLinear,
    SupermaskSparsifier,
    load_bsr,
    save_bsr,
    squash,
    swap_to_bsr,
)


@dataclass
class World:
    """All that a call may touch.

    Attributes:
        model: what is changed.
        act: the call.
        x: an input; None where the model cannot run.
        sparsifier: whose groups belong to the state as well.
        directory: a folder whose files do.
    """

    model: nn.Module
    act: Callable[[], object]
    x: Tensor | None
    sparsifier: SupermaskSparsifier | None = None
    directory: Path | None = None
    generator: Tensor = field(default_factory=torch.get_rng_state)

    def look(self) -> Portrait:
        """All of it, for comparison."""
        seen = portrait(self.model) | random_state()
        if self.sparsifier is not None:
            groups = self.sparsifier.groups
            seen["the sparsifier's groups"] = tuple(group["tensor_fqn"] for group in groups)
        if self.directory is not None:
            seen |= folder(self.directory)
        return seen

    def forward(self) -> Tensor | None:
        """What the model computes."""
        if self.x is None:
            return None
        with torch.no_grad():
            return self.model(self.x)


class Interrupted(Kind):
    """One call, interrupted at a line that depends on the index.

    Args:
        call: a name.
        build: makes the same world at every call, given a folder of its own.
        restartable: the call may stop half-way, as long as the model computes the same and a repeat finishes it.
    """

    short = 24
    folder = PACKAGE

    def __init__(
        self, call: str, build: Callable[[Path], World], *, restartable: bool = False
    ) -> None:
        self.name = f"exception/{call.replace(' ', '-')}"
        half = ", or half done with the same forward" if restartable else ""
        self.about = (
            f"an exception at any line of {call}: as before or as after{half}; a repeat works"
        )
        self.build, self.restartable = build, restartable

    def count(self, long: bool) -> int:
        return len(ERRORS) * self.lines if long else self.short

    @cached_property
    def lines(self) -> int:
        """Lines that the call executes once everything is imported."""
        for _ in range(2):
            with tempfile.TemporaryDirectory() as directory:
                count = count_lines(self.build(Path(directory)).act, self.folder)
        return count

    @cached_property
    def after(self) -> tuple[Portrait, Tensor | None]:
        """What the world is like when nothing interrupts the call."""
        with tempfile.TemporaryDirectory() as directory:
            world = self.build(Path(directory))
            world.act()
            return world.look(), world.forward()

    def run(self, index: int) -> str:
        lines = self.lines
        at = 1 + spread(index % lines, lines)
        error = ERRORS[(index + index // lines) % len(ERRORS)]()
        return self.run_at(at, error)

    def run_at(self, at: int, error: BaseException) -> str:
        """Interrupts the call at a line.

        Raises:
            Fault: something was left half done.
        """
        after, y_after = self.after
        with tempfile.TemporaryDirectory() as directory:
            world = self.build(Path(directory))
            before, objects, y_before = world.look(), identities(world.model), world.forward()
            torch.set_rng_state(world.generator)
            lines = interrupt(world.act, at, error, self.folder)
            if lines.count < at:
                return "not reached"
            where = f"{type(error).__name__} at line {at} of {self.lines}"
            # torch's load_state_dict makes a RuntimeError of any error; of Ctrl-C nobody may make anything.
            if isinstance(error, KeyboardInterrupt) and isinstance(lines.raised, Exception):
                raise Fault("Ctrl-C became an error", f"{where}: {lines.raised!r}")
            now = world.look()
            if now == after:
                state = "as after"
            elif now == before and identities(world.model) == objects:
                state = "as before"
            elif self.restartable:
                state = "half done"
            else:
                raise Fault(
                    "neither as before nor as after", f"{where}: {_what(now, before, after)}"
                )
            if lines.raised is None and state != "as after":
                raise Fault("a swallowed exception", f"{where}: nothing raised, but {state}")
            try:
                y = world.forward()
            except Exception as broken:
                raise Fault("the forward raises", f"{where}, {state}: {broken!r}") from broken
            if y is not None and not any(_same(y, one) for one in (y_before, y_after)):
                raise Fault("another forward", f"{where}, {state}")
            if state != "as after":
                torch.set_rng_state(world.generator)
                try:
                    world.act()
                except Exception as broken:
                    raise Fault("a repeat raises", f"{where}, {state}: {broken!r}") from broken
                if (now := world.look()) != after:
                    text = differences(now, after)
                    raise Fault("a repeat does something else", f"{where}, {state}: {text}")
            return state


def _what(now: Portrait, before: Portrait, after: Portrait) -> str:
    to_before, to_after = differences(now, before), differences(now, after)
    return f"for before, {to_before or 'other objects'}; for after, {to_after}"


def _same(a: Tensor, b: Tensor | None) -> bool:
    # Folding a mask, or swapping, may change the order of sums; anything else changes more.
    return b is not None and a.shape == b.shape and torch.allclose(a, b, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# The calls. Each builder returns the same world every time.


def _masked() -> tuple[nn.Module, SupermaskSparsifier]:
    torch.default_generator.manual_seed(1)
    model = models.Attention().eval()
    sparsifier = SupermaskSparsifier(0.5, models.BLOCK)
    sparsifier.prepare(model, [{"tensor_fqn": "*"}])
    return model, sparsifier


def _x() -> Tensor:
    return models.vectors()[None]


def _prepare(directory: Path) -> World:
    torch.default_generator.manual_seed(1)
    model, sparsifier = models.Attention().eval(), SupermaskSparsifier(0.5, models.BLOCK)
    config = [{"tensor_fqn": "*"}]
    return World(model, lambda: sparsifier.prepare(model, config), _x(), sparsifier)


def _squash(directory: Path) -> World:
    model, _ = _masked()
    return World(model, lambda: squash(model), _x())


def _squash_mask(directory: Path) -> World:
    model, sparsifier = _masked()

    def act() -> None:
        # Interrupted after its last change, a repeat has nothing left to do and says so.
        if sparsifier.groups:
            sparsifier.squash_mask()

    return World(model, act, _x(), sparsifier)


def _swap(directory: Path) -> World:
    torch.default_generator.manual_seed(1)
    model = models.prune(models.Attention()).eval()
    return World(model, lambda: swap_to_bsr(model, models.BLOCK, min_sparsity=0.0), _x())


def _swap_and_change(directory: Path) -> World:
    model = models.prune(models.build("narrow"))
    with torch.no_grad():
        model[0].weight[:16] = 0

    def act() -> None:
        options = {"fuse_activations": True, "drop_dead_features": True}
        swap_to_bsr(model, models.BLOCK, min_sparsity=0.0, **options)

    return World(model, act, models.vectors())


def _layer(seed: int, sparsity: float) -> BSRLinear:
    torch.default_generator.manual_seed(seed)
    linear = models.prune(nn.Sequential(nn.Linear(32, 48)), seed, sparsity)[0]
    return BSRLinear.from_dense(linear, models.BLOCK)


def _load_state_dict(sparsity: float, assign: bool) -> Callable[[Path], World]:
    def build(directory: Path) -> World:
        layer, state = _layer(1, 0.5), _layer(2, sparsity).state_dict()
        x = models.vectors()
        return World(layer, lambda: layer.load_state_dict(state, assign=assign), x)

    return build


def _load_bsr(target: str) -> Callable[[Path], World]:
    def build(directory: Path) -> World:
        path = directory / "model.safetensors"
        saved = models.swapped("sequence", 2)
        save_bsr(saved, path)
        if target == "swapped":
            model = models.swapped("sequence", 1)
        else:
            model = models.build("sequence", 1, "meta" if target == "meta" else "cpu")
        x = None if target == "meta" else models.vectors()
        return World(model, lambda: load_bsr(model, path), x)

    return build


def _save_bsr(directory: Path) -> World:
    path = directory / "model.safetensors"
    save_bsr(models.swapped("sequence", 2), path)
    model = models.swapped("language", 1)
    return World(model, lambda: save_bsr(model, path), models.tokens(), directory=directory)


def _convert(directory: Path) -> World:
    torch.default_generator.manual_seed(1)
    model, sparsifier = models.build("sequence", 1), SupermaskSparsifier(0.5, models.BLOCK)
    sparsifier.prepare(model)
    sparsifier.squash_mask()
    return World(model, lambda: sparsifier.convert(model, inplace=True), models.vectors())


INTERRUPTED = [
    Interrupted("prepare", _prepare),
    Interrupted("squash", _squash, restartable=True),
    Interrupted("squash_mask", _squash_mask, restartable=True),
    Interrupted("convert", _convert),
    Interrupted("swap_to_bsr", _swap),
    Interrupted("swap_to_bsr with all options", _swap_and_change),
    Interrupted("load_state_dict of as many blocks", _load_state_dict(0.5, False)),
    Interrupted("load_state_dict of fewer blocks", _load_state_dict(0.8, False)),
    Interrupted("load_state_dict by assignment", _load_state_dict(0.5, True)),
    Interrupted("load_bsr into a dense model", _load_bsr("dense")),
    Interrupted("load_bsr into a swapped model", _load_bsr("swapped")),
    Interrupted("load_bsr into a meta model", _load_bsr("meta")),
    Interrupted("save_bsr", _save_bsr),
]
