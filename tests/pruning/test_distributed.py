"""Data-parallel and sharded training: two gloo processes on the CPU."""

from __future__ import annotations

import copy
import datetime
import functools
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.pruning.masks.kinds import KINDS
from torchao_superblock.pruning import (
    MagnitudeSparsifier,
    RigLSparsifier,
    SpartanSparsifier,
    Supermask,
    SupermaskSparsifier,
    squash,
)

WORLD = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """Runs every check below in one pair of processes (starting them is what takes time).

    Returns:
        A function that fails the test if the named check failed on a rank.
    """
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_on_rank, args=(port, str(folder)), nprocs=WORLD, join=True)

    def report(name: str) -> None:
        for rank in range(WORLD):
            text = (folder / f"{name}.{rank}").read_text()
            assert text == "passed", f"rank {rank}:\n{text}"

    return report


def _on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    for name, check in CHECKS.items():
        try:
            check(rank)
            text = "passed"
        except Exception:
            text = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(text)
    dist.barrier()
    dist.destroy_process_group()
    # Everything is written. Leaving the usual way, two runs in twelve were aborted ("terminate called without an active
    # exception"), presumably by a thread of gloo that outlives its group; none of 25 this way.
    os._exit(0)


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24), nn.Linear(24, 4))


def masks_of(model: nn.Module) -> list[torch.Tensor]:
    return [m.block_mask() for m in model.modules() if isinstance(m, Supermask)]


def same_on_all_ranks(tensor: torch.Tensor) -> bool:
    others = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(others, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in others)


def check_ddp(rank: int, frozen: bool) -> None:
    model = make_model(seed=rank)  # DDP broadcasts rank 0's parameters, scores included
    sparsifier = SupermaskSparsifier(0.5, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "[02].weight"}])
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(ddp, weight_decay=0.1), lr=3e-2)
    if frozen:
        sparsifier.freeze()
    before = masks_of(model)
    torch.manual_seed(100 + rank)  # every rank sees its own data
    for _ in range(20):
        ddp(torch.randn(8, 24)).square().mean().backward()
        scores = [m.scores for m in model.modules() if isinstance(m, Supermask)]
        assert all(s.grad is not None for s in scores)
        assert all(bool(s.grad.any()) != frozen for s in scores)
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    after = masks_of(model)
    assert all(same_on_all_ranks(mask.to(torch.uint8)) for mask in after)
    held = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(held) if frozen else not all(held)


RAMPED: dict[str, Callable[[], Any]] = {
    "supermask": lambda: SupermaskSparsifier(0.75, (8, 3), ramp_steps=6, freeze_step=9),
    "magnitude": lambda: MagnitudeSparsifier(0.75, (8, 3), ramp_steps=6, update_every=2),
    "weighted": lambda: MagnitudeSparsifier(
        0.75, (8, 3), ramp_steps=6, update_every=2, gradient_weighted=True
    ),
    "rigl": lambda: RigLSparsifier(0.75, (8, 3), freeze_step=9, update_every=2, drop_fraction=0.5),
    "spartan": lambda: SpartanSparsifier(0.75, (8, 3), ramp_steps=6, freeze_step=9, update_every=2),
}
"""Five block rows on two ranks: uneven shards."""


def check_kind(rank: int, kind: str, shard: bool) -> None:
    """Two ranks with half a batch each do what one process does with the whole."""
    results = []
    for alone in (True, False):
        model = make_model()
        torch.manual_seed(1)
        sparsifier = RAMPED[kind]()
        sparsifier.prepare(model, [{"tensor_fqn": "[02].weight"}])
        run = model
        if not alone and shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (WORLD,))
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif not alone:
            run = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(sparsifier.param_groups(run, weight_decay=0.1), lr=1e-2)
        for i in range(10):
            optimizer.zero_grad()
            x = torch.randn(16, 24, generator=torch.Generator().manual_seed(i))
            x = x if alone else x.chunk(WORLD)[rank]
            run(x).square().mean().backward()
            optimizer.step()
            sparsifier.step()
        states = [entry["mask"] for entry in sparsifier.state.values()]
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(99))
        results.append((states, run(x).detach(), [int(mask.sum()) for mask in states]))
    (masks, out, counts), (other_masks, other_out, other_counts) = results
    assert all(same_on_all_ranks(mask.to(torch.uint8)) for mask in other_masks)
    assert same_on_all_ranks(other_out)
    assert counts == other_counts
    if kind not in (
        "weighted",
        "rigl",
    ):  # squares are averaged over ranks, not taken of the average
        assert all(torch.equal(a, b) for a, b in zip(masks, other_masks, strict=True))
        torch.testing.assert_close(out, other_out, rtol=1e-3, atol=1e-4)


def check_prepare_inside_ddp(rank: int) -> None:
    ddp = DistributedDataParallel(make_model())
    with pytest.raises(RuntimeError, match=r"(?s)'0\.weight' is wrapped in Distributed.*first"):
        SupermaskSparsifier(0.5, 8).prepare(ddp, [{"tensor_fqn": "*.weight"}])
    assert type(ddp.module[0]) is nn.Linear


def check_fsdp(rank: int, bfloat16: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model()
    sparsifier = SupermaskSparsifier(0.5, (8, 3))  # 5 block rows on 2 ranks: uneven shards
    sparsifier.prepare(model, [{"tensor_fqn": "[02].weight"}])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Supermask):  # in bfloat16 all of these are 1
                module.scores.copy_(
                    1 + 1e-5 * torch.randperm(module.scores.numel()).view_as(module.scores)
                )
    dense_twin = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bfloat16 else None)
    fully_shard(model[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model), lr=1e-5)

    used: dict[int, torch.Tensor] = {}
    original = nn.functional.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        used[weight.shape[0]] = weight.detach().float() != 0
        assert weight.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        return original(x, weight, bias)

    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        nn.functional.linear = spy
        out = model(x)
        nn.functional.linear = original
        out.float().square().mean().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"cannot mask a sharded weight.*unshard"):
        _ = model[0].weight
    nn.functional.linear = spy
    last = model(x).detach()
    nn.functional.linear = original
    assert sparsifier.summary().groups[0].kept == 20
    states = [sparsifier.state[fqn]["mask"] for fqn in ("0.weight", "2.weight")]
    assert all(same_on_all_ranks(mask.to(torch.uint8)) for mask in states)
    moved = [not torch.equal(a, b) for a, b in zip(states, masks_of(dense_twin), strict=True)]
    assert any(moved), "training never changed a mask, the test would prove nothing"

    for squashing in (sparsifier.squash_mask, lambda: squash(model)):
        with pytest.raises(RuntimeError, match=r"(?s)'0\.weight' is sharded.*full_state_dict=True"):
            squashing()
    torch.testing.assert_close(model(x).detach(), last, rtol=0, atol=0)
    assert len(sparsifier.groups) == 2

    # The public way: gather, load into a prepared copy that is not sharded, squash that.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(model, options=options)
    set_model_state_dict(dense_twin, state, options=options)
    squash(dense_twin)
    for i, width in ((0, 40), (2, 24)):
        assert torch.equal(dense_twin[i].weight != 0, used[width])
    out = dense_twin.to(torch.bfloat16 if bfloat16 else torch.float32)(x.to(last.dtype))
    torch.testing.assert_close(out.to(last.dtype), last)


def check_prepare_sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(RuntimeError, match=r"'0\.weight' is sharded.*before fully_shard"):
        SupermaskSparsifier(0.5, 8).prepare(model, [{"tensor_fqn": "0.weight"}])


def check_gathered_state_dict(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, plain = make_model(), make_model(1)
    config = [{"tensor_fqn": "[02].weight"}]
    SupermaskSparsifier(0.5, 8).prepare(model, config)
    SupermaskSparsifier(0.5, 8).prepare(plain, config)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    x = torch.randn(2, 24)
    expected = model(x).detach()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        plain.load_state_dict(state)
        squash(plain)
        torch.testing.assert_close(plain(x), expected)


def check_squash_at_once(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    sparsifier = SupermaskSparsifier(0.5, 8, scores_init="weight_norm")
    sparsifier.prepare(model, [{"tensor_fqn": "[02].weight"}])
    expected = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    x = torch.randn(2, 24)
    for _ in range(2):  # after a forward the root's weights look like plain ones
        with pytest.raises(RuntimeError, match=r"(?s)weight' is sharded.*Nothing was folded"):
            squash(model)
        sparsifier.freeze()
        torch.testing.assert_close(model(x), expected(x))


def check_fsdp_1(rank: int, use_orig_params: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, plain = make_model(), make_model(1)
    config = [{"tensor_fqn": "[02].weight"}]
    # Levels alone: the scores are those that the optimizer trains.
    sparsifier = SupermaskSparsifier(0.5, 8, scores_init="kaiming_uniform")
    sparsifier.prepare(model, config)
    SupermaskSparsifier(0.5, 8, scores_init="kaiming_uniform").prepare(plain, config)
    # Without a device FSDP refuses by itself; with a CPU it frees what it shards.
    wrapped = FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for level in (0.5, 0.75, 0.8):
        for group in sparsifier.groups:
            group["sparsity_level"] = level
        wrapped(torch.randn(4, 24)).square().sum().backward()
        optimizer.step()
        sparsifier.step()
    kept = [max(1, round(15 * (1 - 0.8)))] * 2
    for read in (
        sparsifier.summary,
        sparsifier.freeze,
        sparsifier.state_dict,
        sparsifier.squash_mask,
        lambda: squash(model),
        lambda: squash(wrapped),
    ):
        with pytest.raises(RuntimeError, match=r"0\.weight' is sharded"):
            read()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        assert [entry.kept for entry in sparsifier.summary().groups] == kept
        state = sparsifier.state_dict()["state"]
        assert all(same_on_all_ranks(entry["mask"].to(torch.uint8)) for entry in state.values())
        for fold in (sparsifier.squash_mask, lambda: squash(model)):
            with pytest.raises(RuntimeError, match=r"(?s)'0\.weight' is sharded.*full_state_dict"):
                fold()
    x = torch.randn(2, 24)
    expected = wrapped(x).detach()
    # The way out that the error names.
    gathered = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        plain.load_state_dict(gathered)
        squash(plain)
        torch.testing.assert_close(plain(x), expected)
        assert [int((m != 0).sum()) for m in block_norms(plain)] == kept


def block_norms(model: nn.Sequential) -> list[torch.Tensor]:
    weights = [model[i].weight.detach() for i in (0, 2)]
    return [
        weight.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).square().sum(3).sum(1)
        for weight in weights
    ]


CHECKS: dict[str, Callable[[int], None]] = {
    "ddp": functools.partial(check_ddp, frozen=False),
    "ddp_frozen": functools.partial(check_ddp, frozen=True),
    "prepare_inside_ddp": check_prepare_inside_ddp,
    "fsdp_bfloat16": functools.partial(check_fsdp, bfloat16=True),
    "fsdp_float32": functools.partial(check_fsdp, bfloat16=False),
    "prepare_sharded": check_prepare_sharded,
    "gathered_state_dict": check_gathered_state_dict,
    "squash_at_once": check_squash_at_once,
    "fsdp_1": functools.partial(check_fsdp_1, use_orig_params=False),
    "fsdp_1_orig_params": functools.partial(check_fsdp_1, use_orig_params=True),
    **{
        f"{kind}_{'fsdp' if shard else 'ddp'}": functools.partial(
            check_kind, kind=kind, shard=shard
        )
        for kind in RAMPED
        for shard in (False, True)
    },
}


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", list(RAMPED))
def test_every_kind_of_mask_is_the_same_on_every_rank(
    run: Callable[[str], None], kind: str, way: str
) -> None:
    run(f"{kind}_{way}")


@pytest.mark.parametrize("name", ["ddp", "ddp_frozen"])
def test_ddp_ranks_have_the_same_masks_after_20_steps(
    run: Callable[[str], None], name: str
) -> None:
    run(name)


def test_preparing_a_ddp_model_is_refused(run: Callable[[str], None]) -> None:
    run("prepare_inside_ddp")


@pytest.mark.parametrize("name", ["fsdp_bfloat16", "fsdp_float32"])
def test_fsdp2_gathered_and_squashed_has_the_mask_of_the_last_forward(
    run: Callable[[str], None], name: str
) -> None:
    run(name)


def test_preparing_a_sharded_model_is_refused(run: Callable[[str], None]) -> None:
    run("prepare_sharded")


def test_fsdp2_state_dict_serves_an_unsharded_model(run: Callable[[str], None]) -> None:
    run("gathered_state_dict")


def test_fsdp2_squash_is_refused_before_and_after_a_forward(run: Callable[[str], None]) -> None:
    run("squash_at_once")


@pytest.mark.parametrize("name", ["fsdp_1", "fsdp_1_orig_params"])
def test_fsdp1_steps_and_refuses_by_name_what_it_has_released(
    run: Callable[[str], None], name: str
) -> None:
    run(name)


@pytest.mark.parametrize("released", ["scores", "weight"])
def test_zero_3_leaves_parameters_of_no_elements(released: str) -> None:
    model = make_model()
    sparsifier = SupermaskSparsifier(0.5, 8, scores_init="kaiming_uniform")
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    parametrizations = model[0].parametrizations.weight
    parameter = parametrizations[0].scores if released == "scores" else parametrizations.original
    parameter.data = torch.empty(0)
    sparsifier.groups[0]["sparsity_level"] = 0.75
    sparsifier.step()
    assert int(parametrizations[0].n_kept) == 4
    reads = [sparsifier.squash_mask, lambda: squash(model)]
    if released == "scores":
        reads += [sparsifier.summary, sparsifier.freeze, sparsifier.state_dict]
    for read in reads:
        with pytest.raises(RuntimeError, match=r"'0\.weight' is sharded and released from memory"):
            read()


def test_a_kind_that_measures_weights_refuses_to_step_without_them() -> None:
    model = make_model()
    sparsifier = KINDS["example"](0.5, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    model[0].parametrizations.weight.original.data = torch.empty(0)
    with pytest.raises(
        RuntimeError, match=r"step: '0\.weight' is sharded and released from memory"
    ):
        sparsifier.step()
