"""Modules that others put in the place of masked ones: followed, or refused by name."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchao_superblock.pruning import BlockMask, SupermaskSparsifier, squash


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def prepared(config: Any = None) -> tuple[nn.Sequential, SupermaskSparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Sequential(Block()), nn.Linear(16, 16))
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model, config)
    return model, sparsifier


def zero_blocks(weight: torch.Tensor) -> int:
    rows, cols = (n // 8 for n in weight.shape)
    return int((weight.detach().view(rows, 8, cols, 8) == 0).all(3).all(1).sum())


METHODS: dict[str, Callable[[SupermaskSparsifier], object]] = {
    "step": lambda sparsifier: sparsifier.step(),
    "squash_mask": lambda sparsifier: sparsifier.squash_mask(),
    "summary": lambda sparsifier: sparsifier.summary(),
    "freeze": lambda sparsifier: sparsifier.freeze(),
    "state_dict": lambda sparsifier: sparsifier.state_dict(),
}

REPLACE: dict[str, Callable[[nn.Sequential], None]] = {
    "a new head": lambda model: model.__setitem__(2, nn.Linear(16, 4)),
    "a whole block": lambda model: model.__setitem__(1, nn.Sequential(Block())),
    "nothing": lambda model: model.__delitem__(2),
}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("way", list(REPLACE))
@pytest.mark.parametrize("method", list(METHODS))
def test_a_module_without_a_mask_in_the_place_of_a_masked_one_is_an_error(
    method: str, way: str, stepped: bool
) -> None:
    model, sparsifier = prepared()
    if stepped:
        sparsifier.step()
    REPLACE[way](model)
    groups = list(sparsifier.groups)
    name, found = {
        "a new head": ("2.weight", "a Linear without"),
        "a whole block": ("1.0.up.weight", "a Linear without"),
        "nothing": ("2.weight", "nothing stands"),
    }[way]
    with pytest.raises(
        RuntimeError, match=rf"{method}: '{name}' was prepared, and {found}.*squash\("
    ):
        METHODS[method](sparsifier)
    assert sparsifier.groups == groups
    squash(model)  # the way out that the error names
    assert zero_blocks(model[0].up.weight) == 4
    SupermaskSparsifier(0.5, 8).prepare(model)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_masked_module_in_the_place_of_a_masked_one_is_followed(method: str) -> None:
    model, sparsifier = prepared()
    sparsifier.step()
    model[1] = copy.deepcopy(model[1])
    old = [group["module"] for group in sparsifier.groups]
    METHODS[method](sparsifier)
    if method == "squash_mask":
        assert type(model[1][0].up) is nn.Linear and zero_blocks(model[1][0].up.weight) == 4
        return
    new = [group["module"] for group in sparsifier.groups]
    assert [a is b for a, b in zip(old, new, strict=True)] == [True, True, False, False, True]
    sparsifier.unfreeze()
    for group in sparsifier.groups:
        group["sparsity_level"] = 0.75
    sparsifier.step()
    mask = model[1][0].up.parametrizations.weight[0]
    assert int(mask.block_mask().sum()) == 2


def test_quantization_aware_training_is_followed() -> None:
    model, sparsifier = prepared()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is on its way out
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        torch.ao.quantization.prepare_qat(model.train(), inplace=True)
    head = model[2]
    assert type(head).__mro__[1] is torch.ao.nn.qat.Linear
    optimizer = torch.optim.SGD(sparsifier.param_groups(model), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        sparsifier.step()
    assert sparsifier.groups[-1]["module"] is head
    head.reset_parameters()
    sparsifier.squash_mask()
    assert type(head) is torch.ao.nn.qat.Linear and zero_blocks(head.weight) == 2
    assert not any(isinstance(module, BlockMask) for module in model.modules())


def test_wrapped_and_moved_modules_are_still_there() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, sparsifier = prepared()
    sparsifier.step()
    model[0] = checkpoint_wrapper(model[0])
    model[1] = nn.Sequential(nn.Identity(), model[1])
    for _ in range(2):
        sparsifier.step()
    assert sparsifier.summary().groups[0].fqn == "0.up.weight"
    sparsifier.squash_mask()
    assert not any(isinstance(module, BlockMask) for module in model.modules())


def test_a_folded_part_may_be_replaced() -> None:
    model, sparsifier = prepared()
    squash(model[1])
    model[1] = nn.Identity()
    sparsifier.step()
    assert len(sparsifier.summary().groups) == 3
    sparsifier.squash_mask()


def test_a_copied_or_pickled_sparsifier_finds_its_own_model() -> None:
    model, sparsifier = prepared()
    sparsifier.step()
    for way in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model_2, sparsifier_2 = way((model, sparsifier))
        sparsifier_2.step()
        model_2[2] = nn.Linear(16, 4)
        sparsifier.step()
        with pytest.raises(RuntimeError, match=r"'2\.weight' was prepared"):
            sparsifier_2.step()


# -------------------------------------------------------------------------------------------------
# Adapters
# -------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """What peft's layers look like from outside."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.delta = nn.Parameter(torch.zeros(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.delta

    def merge(self) -> None:
        self.base_layer.weight.data += self.delta


@pytest.mark.parametrize("method", list(METHODS))
def test_adapters_on_masked_layers_are_refused(method: str) -> None:
    model, sparsifier = prepared()
    sparsifier.step()
    base = model[2]
    model[2] = Adapter(base)
    message = r"'2\.weight' is the base of an adapter \(Adapter\).*unload\(\)"
    with pytest.raises(RuntimeError, match=rf"{method}: {message}"):
        METHODS[method](sparsifier)
    with pytest.raises(
        RuntimeError, match=r"squash: '2\.base_layer\.weight' is the base of an adap"
    ):
        squash(model)
    model[2] = base
    METHODS[method](sparsifier)


def test_preparing_the_base_of_an_adapter_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Adapter(nn.Linear(16, 16)))
    with pytest.raises(RuntimeError, match=r"prepare: '1\.base_layer\.weight' is the base of an"):
        SupermaskSparsifier(0.5, 8).prepare(model)
    assert type(model[0]) is nn.Linear
    config = [{"tensor_fqn": "*base_layer*", "exclude": True}]
    SupermaskSparsifier(0.5, 8).prepare(model, config)


def test_a_base_layer_that_is_no_adapter_is_an_ordinary_name() -> None:
    model = nn.ModuleDict({"base_layer": nn.Linear(16, 16)})
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model)
    sparsifier.step()
    sparsifier.squash_mask()


def lora_of_peft_is_refused_and_its_removal_is_the_way_out() -> None:
    import peft

    model, sparsifier = prepared()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up", "down"]))
    for call in (
        sparsifier.step,
        sparsifier.summary,
        sparsifier.squash_mask,
        lambda: squash(model),
    ):
        with pytest.raises(RuntimeError, match=r"'0\.up\..*weight' is the base of an adapter"):
            call()
    adapted.unload()
    sparsifier.step()
    sparsifier.squash_mask()
    assert zero_blocks(model[0].up.weight) == 4


def test_lora_of_peft_is_refused_and_its_removal_is_the_way_out() -> None:
    pytest.importorskip("peft")
    # In a process of its own: where our integration with peft is loaded, peft refuses it at once.
    name = lora_of_peft_is_refused_and_its_removal_is_the_way_out.__name__
    code = f"from {__name__} import {name}; {name}()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
