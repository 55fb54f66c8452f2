"""What is saved of a sparsifier continues the run, and what does not fit is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.pruning.text_model import Model, assert_same, prepared, tokens, train
from torchao_superblock.pruning import CubicSL, SupermaskSparsifier


def test_the_state_dict_of_the_model_alone_reproduces_its_output() -> None:
    model, sparsifier = prepared([{"tensor_fqn": "*"}])
    for group in sparsifier.groups:
        group["sparsity_level"] = 0.7
    sparsifier.step()
    other, _ = prepared([{"tensor_fqn": "*"}])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens()), model(tokens()))


RESUME = """
    import sys, torch
    sys.path.insert(0, {root!r})
    from tests.pruning.test_resume import make_run
    from tests.pruning.text_model import train

    model, sparsifier, optimizer, scheduler = make_run(seed=1)
    saved = torch.load({path!r}, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    sparsifier.load_state_dict(saved["sparsifier"])
    train(model, optimizer, sparsifier, scheduler, range(4, 8))
    torch.save({{"model": model.state_dict(), "sparsifier": sparsifier.state_dict()}}, {path!r} + ".out")
"""


def make_run(seed: int = 0) -> tuple[Model, SupermaskSparsifier, torch.optim.Optimizer, CubicSL]:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = Model()
    sparsifier = SupermaskSparsifier(0.8, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "*"}])
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.05), lr=1e-2)
    return model, sparsifier, optimizer, CubicSL(sparsifier, total_t=6, delta_t=1)


def test_a_run_resumed_in_a_new_process_continues_bit_for_bit(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        model, sparsifier, optimizer, scheduler = make_run()
        train(model, optimizer, sparsifier, scheduler, range(4))
        path = str(tmp_path / "run.pt")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "sparsifier": sparsifier.state_dict(),
            },
            path,
        )
        train(model, optimizer, sparsifier, scheduler, range(4, 8))
    finally:
        torch.set_num_threads(threads)
    root = str(Path(__file__).resolve().parents[2])
    code = textwrap.dedent(RESUME).format(root=root, path=path)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    resumed = torch.load(path + ".out", weights_only=True)
    assert_same(dict(resumed["model"]), dict(model.state_dict()))
    assert_same(resumed["sparsifier"], sparsifier.state_dict())


def test_state_dict_is_plain_and_loading_does_not_change_it() -> None:
    _, sparsifier = prepared()
    sparsifier.enable_mask_update = False
    state = sparsifier.state_dict()
    assert type(state) is dict and type(state["state"]) is dict
    settings = {"tensor_fqn", "sparsity_level", "blocksize", "gain", "scores_init"}
    assert set(state["groups"][0]) == settings
    frozen = copy.deepcopy(state)
    _, other = prepared(sparsity_level=0.7)
    other.load_state_dict(state)
    assert_same(state, frozen)
    assert_same(other.state_dict(), frozen)
    other.step()
    other.groups[0]["sparsity_level"] = 0.1
    other.enable_mask_update = True
    other.step()
    assert_same(state, frozen)


def test_a_sparsifier_and_its_model_can_be_copied_together() -> None:
    model, sparsifier = prepared()
    CubicSL(sparsifier)  # replaces sparsifier.step by a wrapper around this very object
    for model_2, sparsifier_2 in (
        copy.deepcopy((model, sparsifier)),
        pickle.loads(pickle.dumps((model, sparsifier))),
    ):
        for group in sparsifier_2.groups:
            group["sparsity_level"] = 0.9
        sparsifier_2.step()
        mask, mask_2 = (m.head.parametrizations.weight[0] for m in (model, model_2))
        assert int(mask.n_kept) != int(mask_2.n_kept) == max(1, round(mask.scores.numel() * 0.1))
        sparsifier_2.squash_mask()
        assert type(model_2.head) is nn.Linear and parametrize.is_parametrized(model.head)


def test_load_state_dict_refuses_other_models_and_shapes() -> None:
    _, sparsifier = prepared()
    state = sparsifier.state_dict()
    with pytest.raises(RuntimeError, match="load_state_dict: no model is prepared"):
        SupermaskSparsifier().load_state_dict(state)

    def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        copied = copy.deepcopy(state)
        change(copied)
        return copied

    cases = [
        (broken(lambda s: s.pop("groups")), r"needs 'state' and 'groups' \(KeyError: 'groups'\)"),
        (broken(lambda s: s["groups"].pop()), r"'head.weight' is masked here and not in the state"),
        (
            broken(lambda s: s["groups"].append({**s["groups"][0], "tensor_fqn": "tail.weight"})),
            r"'tail.weight' is not masked here",
        ),
        (
            broken(lambda s: s["groups"][4].update(blocksize=8)),
            r"'head.weight': saved with blocksize \(8, 8\)",
        ),
        (
            broken(lambda s: s["state"]["head.weight"].update(mask=torch.ones(2, 2).bool())),
            r"'head.weight': the saved mask has \(2, 2\) blocks and the weight here has \(3, 2\)",
        ),
        (
            broken(lambda s: s["groups"][4].update(sparsity_level=1.5)),
            r"'head.weight': sparsity_level=1.5",
        ),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            sparsifier.load_state_dict(wrong)
        assert_same(sparsifier.state_dict(), state)
    smaller = broken(lambda s: s["groups"].pop())
    smaller["groups"][0]["sparsity_level"] = 0.25
    sparsifier.load_state_dict(smaller, strict=False)
    assert sparsifier.groups[0]["sparsity_level"] == 0.25


@pytest.mark.parametrize("entry", [[1], {"mask": torch.full((2, 2), 0.3)}])
def test_a_state_that_is_none_is_refused(entry: object) -> None:
    model = nn.Linear(16, 16)
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model)
    saved = sparsifier.state_dict()
    before = copy.deepcopy(sparsifier.state_dict())
    with pytest.raises(ValueError, match="'weight': its state must be a dict with a bool tensor"):
        sparsifier.load_state_dict({**saved, "state": {"weight": entry}})
    assert sparsifier.state_dict().keys() == before.keys()
    assert torch.equal(sparsifier.state["weight"]["mask"], before["state"]["weight"]["mask"])


def test_pickles_that_name_the_modules_of_version_0_1_load() -> None:
    model, sparsifier = prepared()
    # Protocol 0 spells names out, so that they can be turned back into those of then.
    pickled = pickle.dumps((model, sparsifier), protocol=0)
    today = b"torchao_superblock.pruning.masks.supermask\n"
    assert today + b"Supermask\n" in pickled and today + b"SupermaskSparsifier\n" in pickled
    pickled = pickled.replace(
        today + b"SupermaskSparsifier\n",
        b"torchao_superblock.pruning.sparsifier\nSupermaskSparsifier\n",
    ).replace(today, b"torchao_superblock.pruning.supermask\n")
    other, other_sparsifier = pickle.loads(pickled)
    assert torch.equal(other(tokens()), model(tokens()))
    other_sparsifier.step()
    other_sparsifier.squash_mask()
    torch.testing.assert_close(other(tokens()), model(tokens()))
