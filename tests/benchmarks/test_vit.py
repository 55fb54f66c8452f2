"""The whole-model benchmark runs every section and compares the best of each side."""

import argparse

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmark needs torchvision (the `examples` extra)")

from benchmarks import vit
from benchmarks.measure.timings import Measurements, Timing

SMALL = {"image_size": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 128}


def test_the_fastest_of_a_side_is_chosen():
    measured = Measurements(
        {
            "dense, eager": Timing((3.0, 3.0)),
            "dense, compiled": Timing((2.0, 2.0)),
            "ours, eager": Timing((1.0, 1.0)),
        }
    )
    assert vit.fastest(measured, "dense") == "dense, compiled"
    assert vit.fastest(measured, "ours") == "ours, eager"


def test_a_whole_run_reports_every_section(tmp_path):
    arguments = argparse.Namespace(
        quick=True, batch=2, modes=None, batches=[1, 2], sparsities=[0.5, 0.9], blocksizes=[16, 32],
        sections=None, compile=False, no_max_autotune=True, no_pictures=False, budget=60.0,
        output_dir=tmp_path, label=None,
    )  # fmt: skip
    path = vit.run(arguments, torch.device("cpu"), SMALL)
    text = path.read_text()
    for section in ("Best against best", "Speedup over sparsity", "Speedup over batch size"):
        assert section in text
    pictures = {picture.name.removeprefix(path.stem) for picture in tmp_path.glob("*.png")}
    assert pictures == {"_sparsity_float32.png", "_batch_float32.png"}
