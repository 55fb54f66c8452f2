"""One process, DDP or FSDP2: who this process is, and what wraps the model."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: from 0 on.
        size: how many processes there are.
        device: what this one computes on.
        fsdp: whether the model is sharded.
    """

    rank: int
    size: int
    device: torch.device
    fsdp: bool

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


@contextlib.contextmanager
def world_of(args: argparse.Namespace) -> Iterator[World]:
    """Joins the processes that `torchrun` started; alone without it.

    Raises:
        SystemExit: for options that need more than there is.
    """
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if args.fsdp and not launched:
        raise SystemExit("--fsdp: start it with torchrun, for example torchrun --nproc-per-node 2")
    if args.fsdp and args.opt.startswith("sgd") and not args.momentum:
        raise SystemExit("--fsdp: give SGD a --momentum; without it there is no state to save")
    if args.sync_bn and device.type != "cuda":
        raise SystemExit("--sync-bn: torch has it for GPUs only")
    if not launched:
        yield World(0, 1, device, False)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, args.fsdp)
    finally:
        if joined:
            dist.destroy_process_group()


def wrap(model: nn.Module, average: nn.Module | None, world: World) -> nn.Module:
    """What runs a training step: the model itself, or DDP around it. With FSDP2 model and average are sharded.

    Args:
        model: prepared already.
        average: an `AveragedModel` of it, or None.
        world: of this process.
    """
    if world.fsdp:
        mesh = init_device_mesh(world.device.type, (world.size,))
        for one in (model, None if average is None else average.module):
            for part in _blocks(one) if one is not None else ():
                fully_shard(part, mesh=mesh)
        return model
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that are gathered one after the other, and the whole model for the rest."""
    modules = dict(model.named_modules())
    blocks = [
        module
        for name, module in modules.items()
        if isinstance(modules.get(name.rpartition(".")[0]), nn.Sequential)
        and not isinstance(module, nn.Sequential)
        and type(module).__module__.startswith("torchvision.models.")
        and any(True for _ in module.parameters())
    ]
    return [*blocks, model]


@contextlib.contextmanager
def accumulating(run: nn.Module, last: bool, world: World) -> Iterator[None]:
    """Leaves gradients on their rank until the last batch of a step."""
    if world.fsdp:
        run.set_requires_gradient_sync(last)
        yield
    elif isinstance(run, DistributedDataParallel) and not last:
        with run.no_sync():
            yield
    else:
        yield


def agree_on_buffers(model: nn.Module, world: World) -> None:
    """Gives all ranks the running statistics of the first; masks agree anyway."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
