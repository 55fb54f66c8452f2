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

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchao_superblock.pruning import Supermask, SupermaskSparsifier, squash

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


CHECKS: dict[str, Callable[[int], None]] = {
    "ddp": functools.partial(check_ddp, frozen=False),
    "ddp_frozen": functools.partial(check_ddp, frozen=True),
    "prepare_inside_ddp": check_prepare_inside_ddp,
    "fsdp_bfloat16": functools.partial(check_fsdp, bfloat16=True),
    "fsdp_float32": functools.partial(check_fsdp, bfloat16=False),
    "prepare_sharded": check_prepare_sharded,
    "gathered_state_dict": check_gathered_state_dict,
    "squash_at_once": check_squash_at_once,
}


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
