"""The example runs end to end, agrees with itself, and says what is wrong with its input."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", reason="the example needs torchvision (the `examples` extra)")

from PIL import Image

from examples.digits_vit import build_model, load_digits_data, main

SHORT = ["--device", "cpu", "--epochs", "2", "--latency-seconds", "0.1"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    return [main([*SHORT, "--output-dir", str(folder)]) for folder in folders]


def test_masked_squashed_and_swapped_model_score_the_same(two_runs):
    results = two_runs[0]
    assert results["masked_accuracy"] == results["squashed_accuracy"]
    assert results["squashed_accuracy"] == results["swapped_accuracy"]


def test_two_epochs_already_learn_the_digits(two_runs):
    assert two_runs[0]["swapped_accuracy"] > 0.6


def test_two_runs_agree(two_runs):
    first, second = two_runs
    assert first["curve"] == second["curve"]
    assert first["swapped_accuracy"] == second["swapped_accuracy"]


def test_exactly_the_mlp_layers_are_swapped_and_the_rest_is_accounted_for(two_runs):
    report = two_runs[0]["report"]
    assert len(report.swapped) == 8
    assert all(".mlp." in entry.fqn for entry in report.swapped)
    assert {entry.fqn for entry in report.skipped if "encoder" not in entry.fqn} == {
        "conv_proj.weight",
        "heads.head",
    }
    names = {entry.fqn.rpartition(".")[2] for entry in report.skipped if "encoder" in entry.fqn}
    assert names == {"in_proj_weight", "out_proj"}


def test_weights_shrink_as_the_sparsity_says(two_runs):
    before, after = two_runs[0]["bytes MLP layers"]
    # 80 % of the blocks are gone, and of the others those whose features have no use; biases and indices are not.
    assert 5 < before / after < 8
    assert sum("features are dropped" in note for note in two_runs[0]["report"].notes) >= 1


def test_pictures_are_saved(two_runs):
    for path in two_runs[0]["pictures"]:
        assert path.read_bytes().startswith(PNG)
        assert path.stat().st_size > 5000


def test_split_keeps_every_image_once_and_every_class_in_the_test():
    data = load_digits_data(seed=0)
    assert len(data.train) + len(data.test) == 1797
    assert set(data.test.tensors[1].tolist()) == set(range(10))
    assert tuple(data.train.tensors[0].shape[1:]) == (3, 8, 8)


def make_images(folder: Path, per_class: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for shade, name in ((40, "dark"), (220, "light")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = shade + torch.randint(-20, 20, (20, 24, 3), generator=generator)
            image = Image.fromarray(pixels.to(torch.uint8).numpy())
            image.save(folder / name / f"{i}.png")


FOLDER = [*SHORT, "--epochs", "1", "--image-size", "32", "--batch-size", "8", "--blocksize", "64"]


def test_a_folder_of_images_is_split_trained_on_and_compared_with_dense(tmp_path):
    make_images(tmp_path / "images", per_class=10)
    output = tmp_path / "out"
    arguments = ["--data-path", str(tmp_path / "images"), "--output-dir", str(output)]
    results = main([*FOLDER, *arguments, "--compare-dense", "--sparsity", "0.5"])
    assert results["accuracy_gap"] == results["dense_accuracy"] - results["swapped_accuracy"]
    assert results["report"].swapped[0].blocksize == (64, 64)
    assert (output / "accuracy.png").exists()


def test_a_folder_with_train_and_val_is_not_split(tmp_path, capsys):
    make_images(tmp_path / "images" / "train", per_class=6)
    make_images(tmp_path / "images" / "val", per_class=4)
    arguments = ["--data-path", str(tmp_path / "images"), "--output-dir", str(tmp_path / "out")]
    main([*FOLDER, *arguments])
    assert "12 training and 8 test images, 2 classes" in capsys.readouterr().out


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no such folder"):
        main(["--data-path", str(tmp_path / "nowhere")])


def test_a_folder_without_images_in_class_folders_is_explained(tmp_path):
    with pytest.raises(SystemExit, match="one folder for each class"):
        main(["--data-path", str(tmp_path)])


def test_less_than_one_epoch_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--epochs", "0"])
    assert "--epochs must be at least 1" in capsys.readouterr().err


def test_the_model_is_torchvisions_vision_transformer():
    from torchvision.models import VisionTransformer

    assert type(build_model(load_digits_data(seed=0))) is VisionTransformer
