"""Train a torchvision classifier with block masks, on one process, with DDP, or sharded with FSDP2.

    python train.py --data digits --model vit_micro --train-crop-size 16 --crop-scale 0.6 --hflip-prob 0 \\
        --opt adamw --lr 2e-3 -b 64 --epochs 15 \\
        --sparsifier supermask --sparsity 0.75 --blocksize 16 --ramp 0.4 --freeze 0.7
    torchrun --nproc-per-node 8 train.py --data-path imagenet --model vit_b_16 ...     # DDP
    torchrun --nproc-per-node 8 train.py --fsdp ...                                    # FSDP2

The options are those of torchvision's reference recipe, with its names; `--batch-size` is that of all processes
together. What is left in `--output-dir`: `last.pth` and `best.pth`, from which any layout resumes; `squashed.pth`, the
dense model with blocks of zeros; `log.csv`, `epochs.csv` and `curve.png`. `evaluate.py` goes on from there.

What sparsity adds to a training is in `main` and `train_epoch`: build, prepare, step, squash.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

try:
    import matplotlib  # noqa: F401
    import timm  # noqa: F401
    import torchvision  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"this example needs {error.name}: pip install 'torchao_superblock[imagenet]' "
        "(in a clone: pip install -e '.[imagenet]')"
    ) from error

from recipe import checkpoint, data, models, optim, parallel, sparsity
from recipe.arguments import parse
from recipe.progress import EPOCHS, STEPS, Bar, Log, memory_gib, save_curve
from recipe.testing import autocast, test
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from torchao_superblock import squash
from torchao_superblock.pruning import BlockSparsifier


@dataclass
class Training:
    """What takes part in a step."""

    model: nn.Module  # prepared; sharded under FSDP2
    run: nn.Module  # the same, inside DDP where there is one
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    sparsifier: BlockSparsifier | None
    taken: optim.StepsTaken
    step: int = 0  # of the optimizer, without those that the scaler skipped
    epoch: int = 0  # done
    best: float = -1.0

    @property
    def result(self) -> nn.Module:
        """What is tested, squashed and swapped in the end."""
        return self.model if self.average is None else self.average.module


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, and returns the last test's loss and accuracy."""
    args = parse(argv, description=__doc__)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with parallel.world_of(args) as world:
        return run(args, world)


def run(args: argparse.Namespace, world: parallel.World) -> dict[str, float]:
    """The whole path of one process."""
    images = data.load(args)
    pin = world.device.type == "cuda"
    loader, draws = data.train_loader(images, args, world.rank, world.size, pin)
    val = data.val_loader(images, args, world.rank, world.size, pin)
    steps = len(loader) // args.accumulation_steps
    plan = sparsity.plan(args, args.epochs * steps)

    torch.manual_seed(args.seed)  # the same first weights on every rank
    model = models.build(args, len(images.classes))
    if args.sync_bn and world.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    sparsifier = sparsity.build(plan)
    if sparsifier is not None:
        sparsity.prepare(sparsifier, model, plan)
    saved = _checked_checkpoint(args, model, plan)
    whole = copy.deepcopy(model) if world.main else None  # to be squashed in the end
    model.to(world.device)

    average = optim.average_of(model, args)
    wrapped = parallel.wrap(model, average, world)
    optimizer = optim.optimizer_of(optim.parameter_groups(model, args, sparsifier), args)
    training = Training(
        model,
        wrapped,
        average,
        optimizer,
        optim.schedule_of(optimizer, args),
        torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16"),
        sparsifier,
        optim.StepsTaken(optimizer),
    )
    if saved is not None:
        load(training, saved, world)
    if args.test_only:
        tested = test(training.result, val, world, args.amp)
        if world.main:
            print(
                f"{tested['acc1']:.2f} % top-1, {tested['acc5']:.2f} % top-5, loss {tested['loss']:.4f}"
            )
        return tested

    say = print if world.main else (lambda *_: None)
    say(
        f"{len(images.train)} images, {len(images.classes)} classes, {steps} steps an epoch, {world}"
    )
    if sparsifier is not None:
        say(sparsifier.summary())
    per_step = args.batch_size * args.accumulation_steps
    bar = Bar(
        args.epochs * steps * per_step, training.epoch * steps * per_step, world.main, world.device
    )
    logs = None
    if world.main:
        logs = tuple(
            Log(args.output_dir / name, fields, training.epoch)
            for name, fields in (("log.csv", STEPS), ("epochs.csv", EPOCHS))
        )
    tested: dict[str, float] = {}
    forward = torch.compile(wrapped, backend=args.compile) if args.compile else wrapped
    for epoch in range(training.epoch, args.epochs):
        draws.set_epoch(epoch)
        torch.manual_seed(args.seed + 1_000_003 * (epoch + 1) + world.rank)
        row = train_epoch(training, forward, loader, steps, args, world, bar, logs and logs[0])
        training.epoch = epoch + 1
        row |= {"epoch": training.epoch, "step": training.step}
        training.schedule.step()
        parallel.agree_on_buffers(model, world)
        row |= test(model, val, world, args.amp)
        tested = {key: row[key] for key in ("loss", "acc1", "acc5")}
        if average is not None:
            parallel.agree_on_buffers(average.module, world)
            tested = test(average.module, val, world, args.amp)
            row |= {f"ema_{key}": value for key, value in tested.items()}
        if sparsifier is not None:
            row["sparsity"] = _sparsity(sparsifier)
        row["memory_gib"] = round(memory_gib(world.device), 2)
        bar.say(
            f"epoch {training.epoch}: loss {row['train_loss']:.4f}, test {tested['acc1']:.2f} %"
            + (f", {row['sparsity']:.1%} of the blocks pruned" if "sparsity" in row else "")
        )
        if logs is not None:
            logs[1].add(**row)  # before the checkpoint: a row too many is dropped at a resume
        save(training, tested["acc1"], plan, args, world)
        if logs is not None:
            save_curve(logs[1].rows(), args.output_dir / "curve.png")
    bar.close()

    # Fold the masks into the weights of what comes out: of the average, where there is one.
    state = checkpoint.model_state(training.result, world)
    if whole is not None:
        whole.load_state_dict(state)
        if sparsifier is not None:
            squash(whole)
        content = {
            "model": whole.state_dict(),
            "plan": {"sparsifier": "none"},
            "options": _plain(args),
        }
        checkpoint.write({**content, "epoch": training.epoch}, args.output_dir / "squashed.pth")
        print(f"squashed: {args.output_dir / 'squashed.pth'}; python evaluate.py {args.output_dir}")
    return tested


def train_epoch(
    training: Training,
    forward: Any,
    loader: DataLoader[Any],
    steps: int,
    args: argparse.Namespace,
    world: parallel.World,
    bar: Bar,
    log: Log | None,
) -> dict[str, float]:
    """Trains for one epoch; returns its mean loss, last learning rate and images per second."""
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    micro = args.accumulation_steps
    lr = optimizer.param_groups[0]["lr"]
    warming_up = training.epoch < args.lr_warmup_epochs
    # An average over changing levels is a model of none of them: it begins where the ramp ends.
    ramp_steps = 0 if training.sparsifier is None else training.sparsifier.ramp.ramp_steps or 0
    recent = torch.zeros((), device=world.device)  # losses since the last row, summed
    total, rows_from, started = 0.0, 0, time.perf_counter()
    model.train()
    for i, (x, labels) in enumerate(loader, start=1):
        if i > steps * micro:
            break  # what does not make a whole step
        x = x.to(world.device, non_blocking=True)
        labels = labels.to(world.device, non_blocking=True)
        with parallel.accumulating(training.run, i % micro == 0, world):
            with autocast(args.amp, world.device):
                loss = criterion(forward(x), labels)
            scaler.scale(loss / micro).backward()
        recent += loss.detach()
        if i % micro:
            bar.update(args.batch_size)
            continue
        if args.clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        before = training.taken.count
        scaler.step(optimizer)
        scaler.update()
        if training.taken.count > before:  # steps that the scaler skips do not count
            training.step += 1
            if training.sparsifier is not None:
                training.sparsifier.step()
            if training.average is not None and training.step % args.model_ema_steps == 0:
                training.average.update_parameters(model)
                if warming_up or training.step <= ramp_steps:
                    training.average.n_averaged.fill_(0)  # it still copies
        optimizer.zero_grad()
        done = i // micro
        if done % args.print_freq and done != steps:
            bar.update(args.batch_size)
            continue
        batches = i - rows_from
        mean = world.sum(recent).item() / (batches * world.size)
        if not math.isfinite(mean):
            raise SystemExit(
                f"the loss is {mean} at step {training.step}: the training diverged. Take a smaller --lr, or "
                "--clip-grad-norm; the checkpoint of the epoch before is kept"
            )
        total += mean * batches
        rows_from = i
        recent.zero_()
        rate = i * args.batch_size / (time.perf_counter() - started)
        bar.update(args.batch_size, epoch=training.epoch + 1, loss=f"{mean:.3f}", lr=f"{lr:.2e}")
        if log is not None:
            row = {"step": training.step, "epoch": training.epoch + 1, "lr": lr, "loss": mean}
            log.add(**row, images_per_second=round(rate, 1))
    return {"train_loss": total / (steps * micro), "lr": lr, "images_per_second": round(rate, 1)}


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def save(
    training: Training,
    accuracy: float,
    plan: dict[str, Any],
    args: argparse.Namespace,
    world: parallel.World,
) -> None:
    """Writes the last checkpoint, and the best where it is that. Call it on every rank."""
    better = accuracy > training.best
    training.best = max(accuracy, training.best)
    content = {
        "model": checkpoint.model_state(training.model, world),
        "optimizer": checkpoint.optimizer_state(training.model, training.optimizer, world),
        "schedule": training.schedule.state_dict(),
        "scaler": training.scaler.state_dict(),
        "epoch": training.epoch,
        "step": training.step,
        "best": training.best,
        "plan": plan,
        "options": _plain(args),
    }
    if training.average is not None:
        content["model_ema"] = checkpoint.model_state(training.average.module, world)
        content["n_averaged"] = int(training.average.n_averaged)
    if training.sparsifier is not None:
        content["sparsifier"] = training.sparsifier.state_dict()
    if not world.main:
        return
    last = args.output_dir / checkpoint.LAST
    checkpoint.write(content, last)
    if better:
        checkpoint.copy(last, args.output_dir / checkpoint.BEST)
    if args.keep_every and training.epoch % args.keep_every == 0:
        checkpoint.copy(last, args.output_dir / f"epoch_{training.epoch}.pth")


def load(training: Training, saved: dict[str, Any], world: parallel.World) -> None:
    """Goes on from a checkpoint: model, optimizer, schedule, sparsifier, in this order."""
    checkpoint.load_model(training.model, saved["model"], world)
    if training.average is not None:
        checkpoint.load_model(
            training.average.module, saved.get("model_ema", saved["model"]), world
        )
        training.average.n_averaged.fill_(saved.get("n_averaged", 0))
    checkpoint.load_optimizer(training.model, training.optimizer, saved["optimizer"], world)
    training.schedule.load_state_dict(saved["schedule"])
    training.scaler.load_state_dict(saved["scaler"])
    if training.sparsifier is not None:
        training.sparsifier.load_state_dict(saved["sparsifier"])
    training.epoch, training.step, training.best = saved["epoch"], saved["step"], saved["best"]


def _checked_checkpoint(
    args: argparse.Namespace, model: nn.Module, plan: dict[str, Any]
) -> dict[str, Any] | None:
    """What to resume from; whatever is wrong with it, or with the output folder, is said before anything is written."""
    last = args.output_dir / checkpoint.LAST
    saved = None
    if args.resume is not None:
        path = last if args.resume == "last" else args.resume
        saved = checkpoint.read(path)
        sparsity.check_plan(plan, saved["plan"], path)
        checkpoint.check_model(model, saved["model"], f"--resume {path}")
        if not args.test_only and "optimizer" not in saved:
            raise SystemExit(
                f"--resume {path}: holds weights only; start from them with --weights-path"
            )
    elif last.exists() and not args.test_only:
        raise SystemExit(
            f"--output-dir {args.output_dir}: has the checkpoints of another run; go on with --resume, or give "
            "another folder"
        )
    if not args.test_only:
        try:
            args.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--output-dir {args.output_dir}: {error}") from error
    return saved


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    """The options without types that `torch.load(weights_only=True)` refuses."""
    plain = (str, int, float, bool, list, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in vars(args).items()}


def _sparsity(sparsifier: BlockSparsifier) -> float:
    """The fraction of blocks that is pruned now, over all masked weights."""
    masks = [entry["mask"] for entry in sparsifier.state.values()]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


if __name__ == "__main__":
    main()
