"""Fine-tuning a swapped model in the ways people train: copies, checkpointing, two processes; and exported programs."""

import copy
import datetime
import gc
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from tests.bsr.common import prune_all
from torchao_superblock.bsr import swap_to_bsr

ROOT = Path(__file__).parents[2]


def make_model(hidden: int = 64) -> nn.Sequential:
    """Two swapped layers; padded where `hidden` is not a multiple of 16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, hidden), nn.GELU(), nn.Linear(hidden, 32))
    if hidden % 16 == 0:
        prune_all(model, 16)
    else:
        with torch.no_grad():
            model[0].weight[16:32].zero_()
            model[2].weight[:, :16].zero_()
    report = swap_to_bsr(model, 16, min_sparsity=0.25, pad=hidden % 16 != 0)
    assert len(report.swapped) == 2
    return model


def train(model: nn.Module, inputs: list[torch.Tensor], lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def batches(n: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 32, generator=generator) for _ in range(n)]


def test_an_averaged_model_follows_and_keeps_its_pattern():
    model = make_model()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    first = copy.deepcopy(averaged.module[0].values)
    train(model, batches())
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    x = torch.randn(3, 32)
    assert torch.equal(averaged.module[0].col_indices, model[0].col_indices)
    assert torch.allclose(averaged(x), averaged.module(x))
    assert not torch.equal(averaged.module[0].values, first)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    model = make_model()
    x = torch.randn(5, 32, requires_grad=True)
    model(x).sum().backward()
    expected = [x.grad, *(p.grad for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    for grad, reference in zip(
        [x.grad, *(p.grad for p in model.parameters())], expected, strict=True
    ):
        assert torch.equal(grad, reference)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_runs_in_a_new_process(strict, tmp_path):
    model = make_model().eval()
    x = torch.randn(4, 32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    more = torch.randn(9, 32)
    torch.save([(x, model(x).detach()), (more, model(more).detach())], tmp_path / "cases.pt")
    code = """
import sys, torch
import torchao_superblock
model = torch.export.load(sys.argv[1] + "/model.pt2").module()
for x, y in torch.load(sys.argv[1] + "/cases.pt"):
    assert torch.equal(model(x), y)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------------------------------------------------------------
# Two gloo processes.


def check_ddp(rank: int, hidden: int = 64) -> None:
    model = nn.parallel.DistributedDataParallel(make_model(hidden))
    data = batches()
    train(model, [x.chunk(2)[rank] for x in data])
    alone = make_model(hidden)
    train(alone, data)
    for ours, reference in zip(model.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, reference)


def check_fsdp2(rank: int, hidden: int = 64) -> None:
    from torch.distributed.fsdp import fully_shard

    model = make_model(hidden)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    data = batches()
    train(model, [x.chunk(2)[rank] for x in data])
    alone = make_model(hidden)
    train(alone, data)
    model.load_state_dict(model.state_dict())
    for ours, reference in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), reference)


CHECKS = {
    "ddp": check_ddp,
    "ddp_padded": partial(check_ddp, hidden=40),
    "fsdp2": check_fsdp2,
    "fsdp2_padded": partial(check_fsdp2, hidden=40),
}


def _on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    for name, check in CHECKS.items():
        try:
            check(rank)
            result = "passed"
        except Exception:
            result = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(result)
    # Wrapped models go before the group, and no rank while another still talks to it.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_on_rank, args=(str(folder),), nprocs=2, join=True)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_train_as_one(name, results):
    for rank in range(2):
        assert (results / f"{name}.{rank}").read_text() == "passed", f"rank {rank}"
