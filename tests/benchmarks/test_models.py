"""Every row of the table of whole models runs in its tiny form, and a run goes on where it stopped."""

import pytest
import torch

pytest.importorskip("torchvision", reason="the benchmark needs torchvision (the `examples` extra)")
pytest.importorskip("timm", reason="the benchmark needs timm (the `timm` extra)")
pytest.importorskip("transformers", reason="the benchmark needs transformers (its extra)")

from benchmarks import models
from benchmarks.cells.results import Results
from benchmarks.model.catalogue import ENTRIES


def run(row, *ways, device="cpu"):
    question = models.Models((row,), tiny=True, seconds=0.001, ways=ways)
    question.check()
    question.load(torch.device(device))
    (cell,) = question.cells()
    return question.run(cell, lambda text: None)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_row_compares_the_same_function_on_both_sides(name):
    row = run(name, "eager")
    assert row["error"] < 1e-5 and row["ours x"] > 0 and row["failures"] == ""
    assert row["dense is"] == row["ours is"] == "eager"
    # Attention in torch's own module is taken by the versions that can.
    assert row["swapped"] == row["sparse weights"] or "attention" in name or "vit_b_16" in name
    assert 0 < row["swapped"] <= row["sparse weights"]


def test_both_sides_are_compiled_where_the_row_says_so():
    row = run("mlp-backward-64")
    assert row["compiled x"] > 0 and row["failures"] == ""


def test_only_names_of_the_row_become_sparse():
    names = {}
    for name in ("vit_b_16-mlp", "vit_b_16-all", "llama-prefill-mlp", "llama-prefill-all"):
        entry = ENTRIES[name]
        model = entry.build(True)
        names[name] = models.zero_blocks_of(model, entry.pattern, 16, 0.9)
    assert {n: len(found) for n, found in names.items()} == {
        "vit_b_16-mlp": 4, "vit_b_16-all": 8, "llama-prefill-mlp": 6, "llama-prefill-all": 14,
    }  # fmt: skip
    assert not any("embed" in name or "head" in name for found in names.values() for name in found)


def test_a_wrong_result_has_no_time(monkeypatch):
    monkeypatch.setattr(models, "relative_error", lambda out, reference: 0.5)
    with pytest.raises(ArithmeticError, match="5.0e-01 off the dense"):
        run("mlp-backward-64", "eager")


def test_a_run_goes_on_where_another_stopped(tmp_path, capsys):
    command = f"--quick --device cpu --threads 1 --output-dir {tmp_path} --budget 0 --rows".split()
    report = models.main([*command, "attention"])
    assert report.stem.endswith("_quick") and "Left over: 1 cells" in report.read_text()
    row = {"model": "an MLP", "ours x": 1.25, "ours is": "eager", "failures": "ours, compiled: no"}
    done = models.Cell("tiny mlp-backward-64", 16, 0.9)
    Results(report.with_suffix(".csv"), models.Cell).add(done, row)

    assert models.main([*command, "mlp-backward-64", "attention"]) == report
    text = report.read_text()
    assert "an MLP" in text and "ours, compiled: no" in text and "tiny attention, block 16" in text
    assert "1 cells finished, 1 left" in capsys.readouterr().out
    picture = report.with_name(f"{report.stem}_speedup.png")
    assert picture.name in text and picture.stat().st_size > 10_000
    picture.unlink()
    models.main([*command, "mlp-backward-64", "--no-pictures"])
    assert not picture.exists() and picture.name not in report.read_text()
    models.main([*command, "mlp-backward-64", "--redo", "mlp-backward-64"])
    assert "0 cells finished, 1 left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--rows vit_b_16-cpu --device cuda", "is about cpu: pass --device cpu"),
        ("--rows bert-all --device cpu", "is about cuda: pass --device cuda"),
    ],
)
def test_a_row_about_another_device_is_refused(command, message):
    options = models.parse(command.split())
    with pytest.raises(SystemExit, match=message):
        models.ask(options, torch.device(options.device))


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"BERT-base.* needs transformers: pip install .*\[transf"
    ):
        ENTRIES["bert-all"].check()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENTRIES)
def test_rows_run_on_a_gpu_in_every_way(name):
    ways = ("eager", "graph") if not ENTRIES[name].trains else ("eager",)
    row = run(name, *ways, device="cuda")
    assert row["error"] < 1e-3 and row["failures"] == ""
