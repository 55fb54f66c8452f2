"""A small text model with masks, and what the tests of sparsifiers ask of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchao_superblock.pruning import SupermaskSparsifier


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    """A small text model with a bit of everything that a config can meet."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.table = nn.Parameter(torch.randn(32, 32) * 0.1)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 48, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) @ self.table
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens() -> torch.Tensor:
    return torch.randint(48, (2, 6), generator=torch.Generator().manual_seed(0))


def fqns(sparsifier: SupermaskSparsifier) -> list[str]:
    return [group["tensor_fqn"] for group in sparsifier.groups]


def prepared(config: Any = None, model: nn.Module | None = None, **kwargs: Any) -> tuple[Any, Any]:
    model = Model() if model is None else model
    sparsifier = SupermaskSparsifier(**{"sparsity_level": 0.5, "blocksize": 16, **kwargs})
    sparsifier.prepare(model, config)
    return model, sparsifier


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything an error must leave as it was."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "ids": {name: id(parameter) for name, parameter in model.named_parameters()},
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": [
            {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, state_before = after.pop("state"), before["state"]
    assert list(state) == list(state_before)
    assert all(torch.equal(state[key], state_before[key]) for key in state)
    assert after == {key: value for key, value in before.items() if key != "state"}


def train(model: nn.Module, optimizer: Any, sparsifier: Any, scheduler: Any, steps: range) -> None:
    for i in steps:
        torch.manual_seed(i)
        batch = torch.randint(48, (4, 6))
        nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def zero_blocks(weight: torch.Tensor, size: int) -> int:
    """How many blocks of a weight are all zeros."""
    rows, cols = (n // size for n in weight.shape)
    return int((weight.detach().view(rows, size, cols, size) == 0).all(3).all(1).sum())
