"""examples/imagenet on two gloo processes of the CPU: DDP and FSDP2 follow one process with the same batches."""

from __future__ import annotations

import functools
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from tests.examples.imagenet_common import SPARSE, losses, program, rows, train

# Not Adam, which makes steps out of the rounding of gradients that are zero, such as those of a key's bias.
PLAIN = f"{SPARSE} --opt rmsprop --lr 2e-3"
ACCUMULATED = f"{PLAIN} -b 4 --accumulation-steps 2 --clip-grad-norm 0.5 --epochs 1"
LEARNED = "--opt rmsprop --lr 2e-3 --sparsifier supermask --sparsity 0.75 --blocksize 16 --ramp 1.0"
LEARNED += " --freeze 1.0 --epochs 1"
RUN = f"{PLAIN} --model-ema --model-ema-steps 1 --model-ema-decay 0.9 --keep-every 1"


def check_follows(layout: str, folder: Path) -> None:
    train(folder / layout, RUN, *(["--fsdp"] if layout == "fsdp" else []))


def check_accumulated(layout: str, folder: Path) -> None:
    output = folder / f"{layout}_accumulated"
    options = ["--fsdp"] if layout == "fsdp" else []
    train(output, ACCUMULATED, *options)


def check_learned(layout: str, folder: Path) -> None:
    options = ["--fsdp"] if layout == "fsdp" else []
    train(folder / f"{layout}_learned", LEARNED, *options)


def check_resumes(layout: str, source: str, folder: Path) -> None:
    options = ["--fsdp"] if layout == "fsdp" else []
    output = folder / f"{source}_in_{layout}"
    train(output, RUN, *options, f"--resume {folder / source / 'epoch_1.pth'}")


def check_scaler(folder: Path) -> None:
    train(folder / "fsdp_fp16", "--amp fp16 --fsdp --epochs 1", SPARSE)


def check_compiled(folder: Path) -> None:
    train(folder / "ddp_compiled", f"{PLAIN} --compile eager --epochs 1")
    train(folder / "fsdp_compiled", f"{PLAIN} --compile eager --epochs 1 --fsdp")


def check_batch(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"--batch-size 9 .*2 does not divide it"):
        train(folder / "odd", "-b 9")
    assert not (folder / "odd").exists()


CHECKS: dict[str, Callable[[Path], None]] = {
    "ddp": functools.partial(check_follows, "ddp"),
    "fsdp": functools.partial(check_follows, "fsdp"),
    "ddp_accumulated": functools.partial(check_accumulated, "ddp"),
    "fsdp_accumulated": functools.partial(check_accumulated, "fsdp"),
    "ddp_learned": functools.partial(check_learned, "ddp"),
    "fsdp_learned": functools.partial(check_learned, "fsdp"),
    "one_in_ddp": functools.partial(check_resumes, "ddp", "one"),
    "one_in_fsdp": functools.partial(check_resumes, "fsdp", "one"),
    "fsdp_fp16": check_scaler,
    "compiled": check_compiled,
    "odd": check_batch,
}


def _on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    for name, check in CHECKS.items():
        try:
            check(Path(folder))
            text = "passed"
        except BaseException:  # SystemExit too
            text = traceback.format_exc()
        Path(folder, f"{name}.{rank}.txt").write_text(text)
    torch.distributed.barrier()
    os._exit(0)  # a thread of gloo outlives its group and aborts a run now and then


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process first, then every check above in one pair of processes."""
    folder = tmp_path_factory.mktemp("layouts")
    train(folder / "one", RUN)
    train(folder / "one_accumulated", ACCUMULATED)
    train(folder / "one_learned", LEARNED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_on_rank, args=(port, str(folder)), nprocs=2, join=True)
    return folder


def passed(runs: Path, name: str) -> None:
    for rank in range(2):
        text = (runs / f"{name}.{rank}.txt").read_text()
        assert text == "passed", f"rank {rank}:\n{text}"


def assert_same_run(runs: Path, name: str, reference: str = "one") -> None:
    """The same losses and weights but for rounding, and the very same masks."""
    expected = [float(loss) for loss in losses(runs / reference)]
    got = [float(loss) for loss in losses(runs / name)]
    assert len(got) <= len(expected)
    assert got == pytest.approx(expected[-len(got) :], rel=1e-4)
    ours, theirs = (
        torch.load(runs / one / "last.pth", weights_only=True) for one in (name, reference)
    )
    assert list(ours["model"]) == list(theirs["model"])
    for part in ("model", "model_ema"):
        for key, value in theirs.get(part, {}).items():
            torch.testing.assert_close(ours[part][key], value, rtol=1e-3, atol=1e-4)
    for fqn, entry in theirs["sparsifier"]["state"].items():
        assert torch.equal(ours["sparsifier"]["state"][fqn]["mask"], entry["mask"])
    assert ours["step"] == theirs["step"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_follow_one_process(runs, layout):
    passed(runs, layout)
    assert_same_run(runs, layout)
    expected, got = (rows(runs / one / "epochs.csv")[-1] for one in ("one", layout))
    assert float(got["sparsity"]) == 0.75
    for key in ("loss", "acc1", "ema_loss", "ema_acc1", "sparsity"):
        assert float(got[key]) == pytest.approx(float(expected[key]), rel=1e-3), key
    assert (runs / layout / "curve.png").stat().st_size > 1000
    ours, theirs = (
        torch.load(runs / one / "squashed.pth", weights_only=True) for one in (layout, "one")
    )
    for key, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], value, rtol=1e-3, atol=1e-4)
        assert torch.equal(ours["model"][key] == 0, value == 0)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_gradients_accumulate_over_ranks_and_batches(runs, layout):
    passed(runs, f"{layout}_accumulated")
    assert_same_run(runs, f"{layout}_accumulated", "one_accumulated")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_scores_that_sum_gradients_are_those_of_one_process(runs, layout):
    passed(runs, f"{layout}_learned")
    assert_same_run(runs, f"{layout}_learned", "one_learned")


@pytest.mark.parametrize("name", ["one_in_ddp", "one_in_fsdp"])
def test_what_one_process_saved_resumes_on_two(runs, name):
    passed(runs, name)
    assert_same_run(runs, name)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_what_two_saved_resumes_on_one_process(runs, layout, tmp_path):
    passed(runs, layout)
    train(tmp_path, RUN, f"--resume {runs / layout / 'epoch_1.pth'}")
    (runs / f"{layout}_in_one").symlink_to(tmp_path)
    assert_same_run(runs, f"{layout}_in_one")
    results = program("evaluate").main(
        [str(runs / layout), *"-j 0 --swap all --seconds 0 --device cpu".split()]
    )
    assert results["swapped"]["loss"] == pytest.approx(results["trained"]["loss"], rel=1e-5)


def test_fp16_with_a_scaler_is_sharded(runs):
    passed(runs, "fsdp_fp16")
    assert len(losses(runs / "fsdp_fp16")) == 3


def test_ddp_and_fsdp2_compile(runs):
    passed(runs, "compiled")
    expected = [float(loss) for loss in losses(runs / "ddp_compiled")]
    assert [float(x) for x in losses(runs / "fsdp_compiled")] == pytest.approx(expected, rel=1e-4)


def test_ranks_that_cannot_share_a_batch_are_told(runs):
    passed(runs, "odd")
