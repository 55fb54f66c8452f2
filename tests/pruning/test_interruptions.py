"""An exception at any line (no memory left, Ctrl-C): prepare changed nothing, squash can be called again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import torchao_superblock
from torchao_superblock.pruning import MagnitudeSparsifier, SpartanSparsifier, SupermaskSparsifier
from torchao_superblock.pruning import squash as squash_model

PACKAGE = str(Path(torchao_superblock.__file__).parent)
SAMPLES = 40

SPARSIFIERS: dict[str, Callable[[], Any]] = {
    "supermask": lambda: SupermaskSparsifier(0.5, 8),
    "factors": lambda: SpartanSparsifier(0.5, 8, freeze_step=100, final_sharpness=20, gain=0.5),
}
X = torch.linspace(-1, 1, 5 * 32).view(1, 5, 32)


class Double(nn.Module):
    """Somebody else's parametrization."""

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return 2 * bias


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 16)
        parametrize.register_parametrization(self.head, "bias", Double())
        self.register_load_state_dict_pre_hook(lambda *args: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def make() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def interrupt(call: Callable[[], object], at: int, error: type[BaseException]) -> tuple[int, bool]:
    """Raises at the `at`-th line that the package executes; says how many there were, and if it came out."""
    count = 0

    def line(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                raise error
        return line

    def enter(frame: Any, event: str, _: object) -> Any:
        return line if frame.f_code.co_filename.startswith(PACKAGE) else None

    previous = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    except error:
        return count, True
    finally:
        sys.settrace(previous)
    return count, False


def points(lines: int) -> Iterator[tuple[int, type[BaseException]]]:
    """Lines spread over the call, the first and the last ones among them."""
    step = max(1, lines // SAMPLES)
    for i, at in enumerate([*range(1, lines, step), *range(lines - 4, lines + 1)]):
        yield at, (MemoryError, KeyboardInterrupt)[i % 2]


def look(model: nn.Module) -> dict[str, Any]:
    """Which objects, classes, properties and hooks a model is made of."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[name] = (id(module), type(module), sorted(vars(type(module))), list(vars(module)))
        for key, value in vars(module).items():
            if isinstance(value, dict):
                seen[f"{name}.{key}"] = {k: id(v) for k, v in value.items()}
    return seen


def finished(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a squash changes of the modules, for comparison with another model."""
    return [
        (
            type(module).__name__,
            [base.__name__ for base in type(module).__mro__],
            list(vars(module)),
            len(module._load_state_dict_pre_hooks),
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("kind", list(SPARSIFIERS))
def test_prepare_happens_or_does_not(kind: str) -> None:
    def world() -> tuple[nn.Module, Any, Callable[[], None]]:
        model, sparsifier = make(), SPARSIFIERS[kind]()
        return model, sparsifier, lambda: sparsifier.prepare(model, [{"tensor_fqn": "*"}])

    expected_model, _, act = world()
    for _ in range(2):  # the first one imports
        expected_model, _, act = world()
        lines, _ = interrupt(act, 0, MemoryError)
    expected = expected_model(X)
    for at, error in points(lines):
        model, sparsifier, act = world()
        twin = copy.deepcopy(model)  # shares the class of its head
        before, settings, y = look(model), dict(vars(sparsifier)), model(X)
        random_state = torch.get_rng_state()
        _, raised = interrupt(act, at, error)
        assert raised, at
        assert look(model) == before, at
        assert vars(sparsifier) == settings, at
        assert torch.equal(torch.get_rng_state(), random_state), at
        assert torch.equal(model(X), y) and torch.equal(twin(X), y), at
        act()
        assert torch.equal(model(X), expected) and torch.equal(twin(X), y), at
        assert len(sparsifier.groups) == 5


@pytest.mark.parametrize("kind", list(SPARSIFIERS))
@pytest.mark.parametrize("way", ["squash", "squash_mask"])
def test_squash_can_be_called_again(kind: str, way: str) -> None:
    def world() -> tuple[nn.Module, Any, Callable[[], object]]:
        model, sparsifier = make(), SPARSIFIERS[kind]()
        sparsifier.prepare(model, [{"tensor_fqn": "*"}])
        if way == "squash":
            return model, sparsifier, lambda: squash_model(model)
        return model, sparsifier, lambda: sparsifier.squash_mask(("sparsity_level",))

    expected, _, act = world()
    y = expected(X)
    for _ in range(2):
        expected, _, act = world()
        lines, _ = interrupt(act, 0, MemoryError)
    for at, error in points(lines):
        model, sparsifier, act = world()
        _, raised = interrupt(act, at, error)
        assert raised, at
        torch.testing.assert_close(model(X), y)
        copied = copy.deepcopy(model)
        # Interrupted after its last change there is nothing left to do, and a repeat would say so.
        if finished(model) != finished(expected) or (sparsifier.groups and way == "squash_mask"):
            act()
        assert copied(X).isfinite().all()
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
        assert finished(model) == finished(expected), at
        if way == "squash_mask":
            assert sparsifier.groups == []
            assert model.head.sparse_params == {"sparsity_level": 0.5}
            with pytest.raises(RuntimeError, match="squashed already"):
                sparsifier.squash_mask()


def test_an_error_of_squash_mask_leaves_it_undecided() -> None:
    model, sparsifier = make(), MagnitudeSparsifier(0.5, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "head.weight"}])
    mask = model.head.parametrizations.weight[0]
    mask.scores.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        sparsifier.squash_mask()
    mask.scores.fill_(1)
    squash_model(model)
    with pytest.raises(RuntimeError, match="squashed already"):
        sparsifier.squash_mask()
