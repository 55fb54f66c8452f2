"""examples/imagenet on one process: tiny images, tiny models, a few steps."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from tests.examples.imagenet_common import (
    FOLDER,
    SPARSE,
    TINY,
    losses,
    make_images,
    program,
    rows,
    train,
)
from torchao_superblock import squash

main = program("train").main
evaluate = program("evaluate").main

import torchvision  # noqa: E402
from recipe import arguments, checkpoint, data, models, optim, sparsity  # noqa: E402

EVALUATE = ["-j", "0", "--swap", "all", "--seconds", "0", "--device", "cpu"]
FULL = f"{SPARSE} --model-ema --model-ema-steps 1 --model-ema-decay 0.99 --lr-warmup-epochs 1"
FULL += " --lr-scheduler cosineannealinglr --epochs 3 --mixup-alpha 0.2 --cutmix-alpha 1.0"
FULL += " --auto-augment ra --random-erase 0.5 --label-smoothing 0.1 --clip-grad-norm 1.0"


def options(*argv: str) -> argparse.Namespace:
    return arguments.parse([*TINY.split(), *argv])


@pytest.fixture(autouse=True)
def _not_deterministic_for_others():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of three epochs with nearly everything on."""
    output = tmp_path_factory.mktemp("whole")
    train(output, FULL, "--keep-every 1")
    return output


# ------------------------------------------------------------------------------------------------
# Resume, and what a run leaves
# ------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_losses_to_the_last_bit(whole, tmp_path):
    assert len(losses(whole)) == 9
    for name in ("log.csv", "epochs.csv"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())  # of a run that was killed later
    train(tmp_path, FULL, f"--resume {whole / 'epoch_1.pth'}")
    assert losses(tmp_path) == losses(whole)
    ours, theirs = (torch.load(one / "last.pth", weights_only=True) for one in (tmp_path, whole))
    for part in ("model", "model_ema"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])


def test_a_run_leaves_logs_a_picture_checkpoints_and_a_squashed_model(whole):
    epochs = rows(whole / "epochs.csv")
    assert [row["epoch"] for row in epochs] == ["1", "2", "3"]
    assert [row["step"] for row in epochs] == ["3", "6", "9"]
    assert float(epochs[-1]["sparsity"]) == 0.75
    assert all(float(row["images_per_second"]) > 0 for row in epochs)
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
    last = checkpoint.read(whole / "last.pth")
    best = checkpoint.read(whole / "best.pth")
    assert last["epoch"] == 3
    assert best["best"] == max(float(row["ema_acc1"]) for row in epochs)
    squashed = checkpoint.read(whole / "squashed.pth")["model"]
    weight = squashed["encoder.layers.encoder_layer_0.mlp.0.weight"]
    blocks = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).abs().sum((1, 3))
    assert (blocks > 0).float().mean() == 0.25
    # It is the average that is squashed.
    average = last["model_ema"][
        "encoder.layers.encoder_layer_0.mlp.0.parametrizations.weight.original"
    ]
    factor = (weight[weight != 0] / average[weight != 0]).unique()
    assert len(factor.round(decimals=3).unique()) == 1


def test_the_average_begins_where_the_ramp_ends(whole):
    first, _, last = rows(whole / "epochs.csv")
    assert first["ema_loss"] == first["loss"]  # three of four steps up, and the warm-up
    assert last["ema_loss"] != last["loss"]
    # What it began from is two steps old: nothing of an earlier level is left in it.
    assert float(last["ema_loss"]) == pytest.approx(float(last["loss"]), rel=0.2)
    assert checkpoint.read(whole / "last.pth")["n_averaged"] == 5


def test_the_squashed_model_is_a_checkpoint_to_start_from(whole, tmp_path):
    train(tmp_path / "a", f"--weights-path {whole / 'squashed.pth'} --epochs 1")
    # Other classes: the head is new.
    train(tmp_path / "b", f"--weights-path {whole / 'squashed.pth'} --epochs 1 --fake-classes 4")


def test_evaluation_as_trained_squashed_and_swapped(whole, tmp_path, capsys):
    trace, weights = tmp_path / "trace.json", tmp_path / "weights"
    more = ["--profile", str(trace), "--export", str(weights)]
    results = evaluate([str(whole), *EVALUATE, *more])
    for name in ("squashed", "swapped"):
        assert results[name]["loss"] == pytest.approx(results["trained"]["loss"], rel=1e-5)
        assert results[name]["acc1"] == results["trained"]["acc1"]
    assert results["swapped"]["mib"] < results["squashed"]["mib"]
    assert "4 of 10 weights swapped" in capsys.readouterr().out
    assert '"traceEvents"' in trace.read_text()
    (dense,) = weights.glob("vit_micro-*.pth")
    assert re.fullmatch(r"vit_micro-[0-9a-f]{8}\.pth", dense.name)
    assert dense.with_name(f"{dense.stem}.bsr.safetensors").exists()
    state = torch.load(dense, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert not any("parametrizations" in key for key in state)
    own = evaluate([str(whole / "last.pth"), "--no-ema", *EVALUATE])
    last = rows(whole / "epochs.csv")[-1]
    assert own["trained"]["loss"] == pytest.approx(float(last["loss"]), rel=1e-5)


def test_what_cannot_be_evaluated_is_named(whole, tmp_path):
    with pytest.raises(SystemExit, match=r"best\.pth: no readable checkpoint"):
        evaluate([str(tmp_path), *EVALUATE])
    with pytest.raises(SystemExit, match=r"last\.pth: saved from another model: 'heads\.head"):
        evaluate([str(whole / "last.pth"), *EVALUATE, "--fake-classes", "5"])
    with pytest.raises(SystemExit, match="there is no folder"):
        evaluate([str(whole), *EVALUATE, "--data", "folder", "--data-path", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_published_checkpoint_is_evaluated(tmp_path):
    model = models.vit_micro(8, 3)
    state = model.state_dict()
    state["heads.head.scores"] = torch.rand(1, 4)
    state["encoder.layers.encoder_layer_0.mlp.0.scores"] = torch.rand(16, 4)
    saved = argparse.Namespace(sparsity_linear=0.7, sp_linear_tile_size=16)
    torch.save({"model": state, "args": saved}, tmp_path / "c.pth")
    tiny = [word for word in TINY.split() if word not in ("--device", "cpu", "-j", "0")]
    results = evaluate([str(tmp_path / "c.pth"), "--superblock", *EVALUATE, *tiny])
    assert results["trained"]["loss"] == pytest.approx(results["swapped"]["loss"], rel=1e-5)
    with pytest.raises(SystemExit, match="has no 'model_ema'"):
        evaluate([str(tmp_path / "c.pth"), "--superblock", "model_ema", *EVALUATE, *tiny])


# ------------------------------------------------------------------------------------------------
# Killed
# ------------------------------------------------------------------------------------------------


def _write_on_and_on(path: Path) -> None:
    for i in range(1, 10_000):
        checkpoint.write({"number": i, "tensor": torch.full((200_000,), float(i))}, path)


@pytest.mark.parametrize("writes", range(6))
def test_killed_while_it_writes_the_previous_checkpoint_loads(tmp_path, writes):
    path = tmp_path / "last.pth"
    draft = tmp_path / ".last.pth.draft"
    checkpoint.write({"number": 0, "tensor": torch.zeros(200_000)}, path)
    child = multiprocessing.get_context("fork").Process(target=_write_on_and_on, args=(path,))
    child.start()
    caught = 0
    while caught <= writes:  # in the middle of a draft, each time of another one
        try:
            caught += draft.stat().st_size > 0
        except FileNotFoundError:
            continue
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    content = torch.load(path, weights_only=True)
    assert (content["tensor"] == content["number"]).all()
    checkpoint.write({"number": -1}, path)  # a draft that was left is in nobody's way
    assert torch.load(path, weights_only=True) == {"number": -1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_was_killed_goes_on(whole, tmp_path):
    arguments = [*TINY.split(), *FULL.split(), "--output-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, str(FOLDER / "train.py"), *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "last.pth").exists() and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert child.returncode == -signal.SIGKILL
    train(tmp_path, FULL, "--resume")
    assert losses(tmp_path) == losses(whole)


# ------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [False, True])
def test_ramp_and_average_follow_the_optimizer(tmp_path, overflow, monkeypatch):
    scale = 2.0**126 if overflow else 1.0
    original = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled: original(device, init_scale=scale, enabled=enabled),
    )
    train(
        tmp_path,
        SPARSE,
        "--amp fp16 --accumulation-steps 2 -b 4 --epochs 1 --model-ema --model-ema-steps 1",
    )
    last = checkpoint.read(tmp_path / "last.pth")
    assert len(losses(tmp_path)) == 3  # of six batches
    assert last["step"] == last["sparsifier"]["step"]
    assert last["n_averaged"] == max(0, last["step"] - 2)  # the ramp has two steps
    assert last["step"] == (0 if overflow else 3)


@pytest.mark.parametrize("sparsifier", [*sparsity.SPARSIFIERS, "none"])
def test_every_sparsifier_trains_and_comes_out_squashed(tmp_path, sparsifier):
    more = "--ramp 0.5 --freeze 1.0" if sparsifier != "none" else ""
    train(tmp_path, f"--sparsifier {sparsifier} --blocksize 16 --epochs 1 --amp bf16 {more}")
    squashed = checkpoint.read(tmp_path / "squashed.pth")["model"]
    zeros = (squashed["encoder.layers.encoder_layer_0.mlp.0.weight"] == 0).float().mean()
    assert zeros == (0 if sparsifier == "none" else pytest.approx(0.8, abs=0.02))


@pytest.mark.parametrize(
    "more",
    [
        "--opt sgd_nesterov --lr-scheduler exponentiallr --compile eager",
        "--opt rmsprop --lr-warmup-epochs 1 --lr-warmup-method constant",
        "--auto-augment augmix --ra-sampler --deterministic",
        "--auto-augment ta_wide -j 1",
    ],
)
def test_other_options_run(tmp_path, more):
    train(tmp_path, more)
    assert all(float(loss) > 0 for loss in losses(tmp_path))


def test_a_convolutional_network_with_masked_convolutions(tmp_path):
    more = "--model resnet18 --train-crop-size 32 --epochs 1 --layers conv head --sparsity 0.5"
    train(
        tmp_path, f"{more} --sparsifier magnitude --blocksize 32 --exclude conv1.weight fc.weight"
    )
    squashed = checkpoint.read(tmp_path / "squashed.pth")["model"]
    assert (squashed["layer1.0.conv1.weight"] == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert (squashed["conv1.weight"] != 0).all()
    assert (squashed["fc.weight"] != 0).all()


def test_only_testing_writes_nothing(whole, tmp_path, capsys):
    results = train(tmp_path / "none", FULL, f"--resume {whole / 'last.pth'} --test-only")
    assert results["loss"] == pytest.approx(float(rows(whole / "epochs.csv")[-1]["ema_loss"]))
    assert "% top-1" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------


def test_weight_decay_by_kind_and_never_of_scores():
    args = options(
        *"--wd 0.1 --norm-weight-decay 0.2 --bias-weight-decay 0.3".split(),
        *"--transformer-embedding-decay 0.4 --sparsifier supermask --blocksize 16".split(),
    )
    model = models.vit_micro(8, 3)
    plan = sparsity.plan(args, 10)
    sparsifier = sparsity.build(plan)
    sparsity.prepare(sparsifier, model, plan)
    decay = {
        id(p): group["weight_decay"]
        for group in optim.parameter_groups(model, args, sparsifier)
        for p in group["params"]
    }
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    layer = "encoder.layers.encoder_layer_0."
    assert found[f"{layer}mlp.0.parametrizations.weight.original"] == 0.1
    assert found[f"{layer}mlp.0.parametrizations.weight.0.scores"] == 0.0
    assert found[f"{layer}ln_1.weight"] == found[f"{layer}ln_1.bias"] == 0.2
    assert found[f"{layer}mlp.0.bias"] == found[f"{layer}self_attention.in_proj_bias"] == 0.3
    assert found["class_token"] == found["encoder.pos_embedding"] == 0.4
    # What has no value of its own takes that of the weights, as in torchvision's recipe.
    plain = optim.parameter_groups(models.vit_micro(8, 3), options("--wd", "0.1"), None)
    assert [group["weight_decay"] for group in plain] == [0.1]


def test_augmentation_depends_on_the_place_and_not_on_the_process():
    args = options("--auto-augment", "ra", "--mixup-alpha", "0.5")
    images = data.load(args)

    def batches(rank: int, size: int, workers: int = 0) -> list[torch.Tensor]:
        args.workers = workers
        loader, draws = data.train_loader(images, args, rank, size, False)
        draws.set_epoch(1)
        return [x for x, _ in loader]

    first = batches(0, 1)
    torch.rand(7)  # the run's own generator has no part in it
    assert all(torch.equal(a, b) for a, b in zip(first, batches(0, 1), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, batches(0, 1, 1), strict=True))
    args.mixup_alpha = 0.0
    alone = {tuple(image.flatten().tolist()) for x in batches(0, 1) for image in x}
    shared = [batches(rank, 2) for rank in range(2)]
    together = {tuple(image.flatten().tolist()) for one in shared for x in one for image in x}
    assert alone == together
    assert len(alone) == 24


def test_the_digits_are_images_of_ten_classes():
    images = data.load(options("--data", "digits"))
    assert len(images.train) + len(images.val) == 1797
    image, label = images.train[3]
    assert image.shape == (3, 8, 8)
    assert label in range(10)


def test_repeated_augmentation_shows_an_image_in_several_ways():
    args = options("--ra-sampler", "--ra-reps", "3")
    loader, _ = data.train_loader(data.load(args), args, 0, 1, False)
    labels = torch.cat([labels for _, labels in loader])
    images = torch.cat([x for x, _ in loader])
    assert len(images) == 24
    assert (labels.view(-1, 3) == labels[::3, None]).all()
    assert len({tuple(image.flatten().tolist()) for image in images}) == 24


def test_a_gain_is_for_optimizers_with_steps_of_a_size_of_their_own():
    for opt, gain in (("adamw", 0.5), ("sgd", 0.0), ("sgd_nesterov", 0.0)):
        args = options(*f"{SPARSE} --opt {opt}".split())
        assert sparsity.build(sparsity.plan(args, 10)).defaults["gain"] == gain


def targets(*argv: str) -> set[str]:
    """What the options mask, without the common beginning."""
    plan = sparsity.plan(options("--sparsifier", "magnitude", "--blocksize", "4", *argv), 10)
    sparsifier = sparsity.build(plan)
    sparsity.prepare(sparsifier, models.vit_micro(8, 4), plan)
    return {
        group["tensor_fqn"].replace("encoder.layers.encoder_layer_", "")
        for group in sparsifier.groups
    }


def test_layers_by_name_by_glob_and_without_some():
    mlp = {f"{i}.mlp.{j}.weight" for i in range(2) for j in (0, 3)}
    out = {f"{i}.self_attention.out_proj.weight" for i in range(2)}
    into = {f"{i}.self_attention.in_proj_weight" for i in range(2)}
    assert targets() == mlp
    assert targets("--layers", "mlp", "attention-out", "head") == mlp | out | {"heads.head.weight"}
    assert targets("--layers", "attention-in") == into
    assert targets("--layers", "linear") == mlp | out | into | {"heads.head.weight"}
    assert targets("--layers", "linear", "--skip-last-layer") == mlp | out | into
    assert targets("--layers", "conv") == {"conv_proj.weight"}
    assert targets("--layers", "conv", "mlp") == {"conv_proj.weight", *mlp}
    assert targets("--skip-first-block") == {name for name in mlp if name[0] == "1"}
    assert targets("--exclude", "*.mlp.3.*") == {name for name in mlp if ".0." in name}
    assert targets("--layers", "*_layer_1.mlp.*") == {name for name in mlp if name[0] == "1"}


def test_a_fine_tuned_model_may_have_another_image_size():
    small, large = models.vit_micro(8, 3), models.vit_micro(8, 3)
    large.image_size, large.seq_length = 16, 65
    large.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 65, 64))
    models.load_weights(large, small.state_dict(), 3, "here")
    assert large.encoder.pos_embedding.abs().sum() > 0


# ------------------------------------------------------------------------------------------------
# Bad input: a message before the first step, and nothing overwritten
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("--model vit_b_61", r"--model vit_b_61: torchvision has none; near: .*vit_b_16"),
        ("--layers *.mpl.*", r"--layers \*\.mpl\.\*: no weight of the model.*names are mlp"),
        ("--exclude nothing.*", r"--exclude nothing\.\*: no weight"),
        ("--layers head --skip-last-layer", "all of it is skipped or excluded"),
        (
            "--sparsifier rigl --freeze 1.0 --ramp 1.0 --blocksize 4096",
            r"--layers mlp: nothing to prune",
        ),
        ("--batch-size 64", r"the 24 images of an epoch do not make one optimizer step"),
        ("--val-crop-size 12", r"has one image size: --train-crop-size 8 and --val-crop-size 12"),
        ("--weights IMAGENET1K_V9 --model resnet18", "torchvision has no such weights"),
        ("--fsdp", "--fsdp: start it with torchrun"),
        ("--sync-bn", "--sync-bn: torch has it for GPUs only"),
        ("--resume nowhere.pth", r"nowhere\.pth: no readable checkpoint"),
        ("--weights-path nowhere.pth", r"nowhere\.pth: no readable checkpoint"),
        ("--ramp 1.0 --freeze 0.5", "--sparsifier magnitude: .*freeze"),
    ],
)
def test_bad_options_are_refused(tmp_path, more, match):
    with pytest.raises(SystemExit, match=match):
        train(tmp_path / "out", SPARSE, more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("--sparsity 1.0", "must be in"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--ramp 1.5", "it is a fraction of the training"),
        ("--lr-warmup-epochs 2", "leave nothing of --epochs 2"),
        ("--data folder", "--data-path is needed"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, more, match, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path, more)
    assert re.search(match, capsys.readouterr().err)


def test_folders_of_images(tmp_path):
    root, output = tmp_path / "images", tmp_path / "out"
    here = f"--data folder --data-path {root} --epochs 1"
    with pytest.raises(SystemExit, match=r"there is no folder .*train"):
        train(output, here)
    (root / "train").mkdir(parents=True)
    with pytest.raises(SystemExit, match="train needs one folder for each class"):
        train(output, here)
    make_images(root / "train", 8)
    with pytest.raises(SystemExit, match=r"there is no folder .*val"):
        train(output, here)
    make_images(root / "val", 3, ("dark", "dim"))
    with pytest.raises(SystemExit, match=r"2 classes and val 2.*in one of them only: dim, light"):
        train(output, here)
    (root / "val" / "dim").rename(root / "val" / "light")
    assert not output.exists()
    train(output, here)
    assert len(losses(output)) == 2


def test_resume_refuses_what_is_not_the_same_run(whole, tmp_path):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    for more, match in (
        ("--sparsity 0.5", r"sparsity is 0\.5 here and 0\.75 there"),
        ("--layers linear", r"layers is \['linear'\] here and \['mlp'\] there"),
        ("--epochs 4", r"ramp_steps is 6 here and 4 there"),
        ("--sparsifier none", r"sparsifier is 'none' here and 'magnitude' there"),
        ("--fake-classes 5", r"saved from another model: 'heads\.head\."),
    ):
        with pytest.raises(SystemExit, match=match):
            train(whole, FULL, "--resume", more)
    with pytest.raises(SystemExit, match="has the checkpoints of another run"):
        train(whole, FULL)
    with pytest.raises(SystemExit, match="no checkpoint of this recipe: it lacks"):
        torch.save({"model": {}}, tmp_path / "other.pth")
        train(tmp_path / "out", f"--resume {tmp_path / 'other.pth'}")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes((whole / "last.pth").read_bytes()[:5000])
    with pytest.raises(SystemExit, match=r"truncated\.pth: no readable checkpoint"):
        train(whole, FULL, f"--resume {truncated}")
    with pytest.raises(SystemExit, match="holds weights only"):
        train(tmp_path / "out", f"--resume {whole / 'squashed.pth'}")
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_torchvisions_weights_are_fine_tuned_on_other_classes(tmp_path, request, capsys):
    before = torch.hub.get_dir()
    request.addfinalizer(lambda: torch.hub.set_dir(before))
    torch.hub.set_dir(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    weights = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    model = torchvision.models.squeezenet1_1()
    file = tmp_path / "checkpoints" / weights.url.rpartition("/")[2]
    torch.save(model.state_dict(), file)  # as if it had been downloaded
    args = options("--model", "squeezenet1_1", "--weights", "DEFAULT", "--train-crop-size", "32")
    tuned = models.build(args, 3)
    assert "the head is new, for 3 classes: classifier.1.weight" in capsys.readouterr().out
    assert torch.equal(tuned.features[0].weight, model.features[0].weight)
    args.test_only = True
    assert type(data.val_transform(args)) is type(weights.transforms())


def test_weights_of_another_model_are_refused(whole, tmp_path):
    with pytest.raises(SystemExit, match="not of this ResNet.*Nothing was loaded"):
        train(tmp_path, f"--model resnet18 --weights-path {whole / 'squashed.pth'}")


def test_a_training_that_diverges_stops_and_keeps_its_checkpoint(whole, tmp_path):
    train(tmp_path, "--epochs 1")
    (tmp_path / "last.pth").rename(tmp_path / "kept.pth")
    with pytest.raises(SystemExit, match=r"the loss is .*diverged"):
        train(tmp_path, "--opt sgd --lr 1e30 --epochs 1")
    assert (tmp_path / "kept.pth").exists()


def test_the_squashed_checkpoint_needs_no_masks(whole):
    saved = checkpoint.read(whole / "squashed.pth")
    model = models.vit_micro(8, 3)
    model.load_state_dict(saved["model"])
    with pytest.raises(RuntimeError, match="no block mask"):
        squash(model)


def test_the_commands_of_the_guide_have_options_that_exist():
    page = (FOLDER.parents[1] / "docs" / "recipe.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    commands = [line.split() for block in blocks for line in block.splitlines()]
    programs = []
    for words in commands:
        (place,) = [i for i, word in enumerate(words) if word.endswith(".py")]
        programs.append(words[place])
        rest = words[place + 1 :]
        if programs[-1].endswith("evaluate.py"):
            _, rest = program("evaluate").parse(rest)
            args = arguments.parse([*rest, "--data", "fake"])
        else:
            args = arguments.parse(rest)
            assert sparsity.build(sparsity.plan(args, 1000)) is not None
        assert "--nproc-per-node" not in words or args.batch_size % 8 == 0
    assert sorted(set(programs)) == ["examples/imagenet/evaluate.py", "examples/imagenet/train.py"]
    assert len(commands) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("more", ["--amp bf16 --compile", "--amp fp16", "--deterministic"])
def test_it_trains_and_is_evaluated_on_a_gpu(tmp_path, more):
    train(tmp_path, FULL, "--device cuda", more)
    assert float(rows(tmp_path / "epochs.csv")[-1]["memory_gib"]) > 0
    options = [*"-j 0 --swap measured --seconds 0.1 --device cuda".split()]
    results = evaluate([str(tmp_path), *options])
    assert results["swapped"]["loss"] == pytest.approx(results["trained"]["loss"], rel=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_follow_one(tmp_path):
    """Over NCCL, and started as a user starts them."""
    more = f"{SPARSE} --opt rmsprop --lr 2e-3 --device cuda".split()
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
    for name, launcher, last in (
        ("one", [], []),
        ("ddp", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []),
        (
            "fsdp",
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
            ["--fsdp"],
        ),
    ):
        words = [str(FOLDER / "train.py"), *TINY.split(), *more, *last]
        words += ["--output-dir", str(tmp_path / name)]
        subprocess.run([sys.executable, *launcher, *words], env=environment, check=True)
    expected = [float(loss) for loss in losses(tmp_path / "one")]
    for name in ("ddp", "fsdp"):
        assert [float(x) for x in losses(tmp_path / name)] == pytest.approx(expected, rel=1e-3)
