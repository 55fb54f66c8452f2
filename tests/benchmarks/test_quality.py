"""The judge of masks: methods keep as many blocks as they say, finished cells stay, limits hold, gaps are right."""

import csv
import math
import types

import pytest
import torch
from torch import nn

from benchmarks import quality
from benchmarks.cells.results import Results
from benchmarks.cells.workers import run_cells, seconds_needed
from benchmarks.judge import lm, minilm, mnist, packages, rivals
from benchmarks.judge.cells import Cell, sweep
from benchmarks.judge.digest import compare, points
from benchmarks.judge.methods import METHODS, ONE_SHOT
from benchmarks.judge.training import Optimization, pruned_blocks, train
from tests.benchmarks.toy_question import Toy

CONFIG = [{"tensor_fqn": "layers.*.weight"}]


class Small(nn.Module):
    """Two masked layers, one that is not, biases."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64)])
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def fit(model, method, *, level=0.75, block=16, steps=40, tick=lambda text: None):
    x = torch.randn(8, 64)
    batches = ((x, torch.arange(8) % 4) for _ in range(steps))
    return train(
        model, method, CONFIG, level, block, batches=batches, loss_fn=cross_entropy,
        total_steps=steps, optimization=Optimization(lr=1e-3, weight_decay=0.1, warmup=5),
        autocast=False, tick=tick,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Methods
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"dense"}))
@pytest.mark.parametrize(("level", "kept"), [(0.75, 6), (0.9, 2), (0.99, 1)])
@pytest.mark.parametrize("steps", [7, 40])
def test_a_method_leaves_exactly_the_blocks_of_its_level(name, level, kept, steps):
    model = Small()
    fit(model, METHODS[name], level=level, steps=steps)
    for layer in model.layers:  # a plain weight again, of 24 blocks
        assert isinstance(layer.weight, nn.Parameter)
        assert int((rivals.block_norms(layer.weight, 16) > 0).sum()) == kept
    assert pruned_blocks(model, CONFIG, level, 16) == 1 - kept / 24
    assert (model.head.weight != 0).all()


def test_the_dense_model_keeps_everything():
    model = Small()
    fit(model, METHODS["dense"])
    assert all((layer.weight != 0).all() for layer in model.layers)
    assert pruned_blocks(model, CONFIG, 0.0, 0) == 0.0


def test_more_blocks_than_the_level_allows_are_an_error():
    with pytest.raises(RuntimeError, match=r"48 of 48 blocks .* 0.9 leaves 4"):
        pruned_blocks(Small(), CONFIG, 0.9, 16)


def test_random_blocks_stay_the_same_and_come_from_the_seed():
    def pattern(steps):
        torch.manual_seed(3)
        model = Small()
        fit(model, METHODS["random"], steps=steps)
        return [rivals.block_norms(layer.weight, 16) > 0 for layer in model.layers]

    for short, long in zip(pattern(1), pattern(30), strict=True):
        assert torch.equal(short, long)
    torch.manual_seed(4)
    other = Small()
    fit(other, METHODS["random"], steps=1)
    assert not torch.equal(rivals.block_norms(other.layers[0].weight, 16) > 0, pattern(1)[0])


def test_gradual_magnitude_follows_the_cubic_and_keeps_the_largest():
    weight = nn.Parameter(torch.randn(64, 64))
    gradual = rivals.GradualMagnitude({"w": weight}, 0.75, 16, total_steps=100)
    assert (gradual.ramp_steps, gradual.every) == (60, 5)
    levels, zeros = [], []
    for _ in range(100):
        levels.append(gradual.level())
        gradual.step()
        zeros.append(int((rivals.block_norms(weight, 16) == 0).sum()))
    assert levels[0] == 0 and levels[30] == pytest.approx(0.75 * (1 - 0.5**3))
    assert levels[60] == levels[-1] == 0.75
    assert zeros == sorted(zeros) and zeros[0] == 0 and zeros[60] == 12
    assert zeros[30] == 16 - round(16 * (1 - levels[30]))

    weight = nn.Parameter(torch.arange(16.0).view(4, 4) + 1)
    gradual = rivals.GradualMagnitude({"w": weight}, 0.75, 1, total_steps=1)
    gradual.squash_mask()
    assert weight.flatten().nonzero().flatten().tolist() == [12, 13, 14, 15]


def test_steps_between_updates():
    assert [rivals.steps_between_updates(n) for n in (4800, 1200, 400, 10)] == [50, 50, 20, 1]


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(64, 96\) is not made of whole blocks of 24"):
        rivals.block_norms(torch.zeros(64, 96), 24)
    with pytest.raises(ValueError, match="no linear weight is called 'layer.*'"):
        rivals.masked_weights(Small(), [{"tensor_fqn": "layer.*"}])


@pytest.mark.parametrize("name", ["random", "block-norm", "torch-weight-norm"])
def test_a_rival_prunes_in_one_shot(name):
    model = Small()
    before = [layer.weight.detach().clone() for layer in model.layers]
    ONE_SHOT[name](model, CONFIG, 0.75, 16, [])
    assert pruned_blocks(model, CONFIG, 0.75, 16) == 0.75
    for layer, weight in zip(model.layers, before, strict=True):
        kept = rivals.block_norms(layer.weight, 16) > 0
        if name != "random":
            norms = rivals.block_norms(weight, 16)
            assert norms[kept].min() > norms[~kept].max()
        assert torch.equal(layer.weight, weight * rivals.expand(kept, 16))


def test_the_floor_keeps_biases_and_the_other_layers():
    model = Small()
    ONE_SHOT["floor"](model, CONFIG, 1.0, 16, [])
    assert all((layer.weight == 0).all() and (layer.bias != 0).all() for layer in model.layers)
    assert (model.head.weight != 0).all()


def test_nonzero_blocks_stay_while_the_others_stay_zero():
    model = Small()
    ONE_SHOT["block-norm"](model, CONFIG, 0.75, 16, [])
    zero = [layer.weight == 0 for layer in model.layers]

    def fixed(model, config, level, blocksize, total_steps, weight_decay):
        weights = rivals.masked_weights(model, config)
        return rivals.FixedBlocks.nonzero(weights, blocksize), [{"params": model.parameters()}]

    before = model.layers[0].weight.detach().clone()
    fit(model, fixed)
    assert all(
        torch.equal(layer.weight == 0, z) for layer, z in zip(model.layers, zero, strict=True)
    )
    assert not torch.equal(model.layers[0].weight, before)


# -------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_to_its_last():
    optimization = Optimization(lr=1.0, weight_decay=0.0, warmup=10, last=0.1)
    assert optimization.factor(0, 100) == pytest.approx(0.1)
    assert optimization.factor(50, 100) == pytest.approx(0.55)
    assert optimization.factor(100, 100) == pytest.approx(0.1)


def test_a_group_may_scale_the_learning_rate():
    def still(model, config, level, blocksize, total_steps, weight_decay):
        head = list(model.head.parameters())
        layers = list(model.layers.parameters())
        return None, [{"params": layers}, {"params": head, "lr_scale": 0.0}]

    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, still)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("layers")}


def test_a_loss_that_is_not_finite_ends_the_cell():
    model = Small()
    nn.init.constant_(model.head.bias, math.nan)
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        fit(model, METHODS["dense"])


# -------------------------------------------------------------------------------------------------
# Cells
# -------------------------------------------------------------------------------------------------

CELL = Cell("1200 steps, a", "random", 32, 0.9, 1)


def test_seeds_come_one_after_the_other_and_dense_once_each():
    cells = sweep(["a"], ["dense", "random"], [(16, 0.8), (32, 0.9), (16, 0.8)], 2)
    assert [cell.seed for cell in cells] == [0, 0, 0, 1, 1, 1]
    assert [cell.method for cell in cells[:3]] == ["dense", "random", "random"]
    assert len(set(cells)) == 6


def test_results_survive_in_the_file(tmp_path):
    path = tmp_path / "cells.csv"
    Results(path, Cell).add(CELL, {"score": 1.25, "steps": 3, "note": "a, b"})
    again = Results(path, Cell)
    assert again.rows == {CELL: {"score": 1.25, "steps": 3, "note": "a, b"}}
    other = Cell("b", "dense", 0, 0.0, 0)
    Results(path, Cell).add(other, {"score": 2.0})  # another process
    again.add(CELL, {"score": 1.5})
    assert Results(path, Cell).rows == {CELL: {"score": 1.5}, other: {"score": 2.0}}
    again.forget([CELL])
    assert list(Results(path, Cell).rows) == [other]
    assert [file.name for file in tmp_path.iterdir()] == ["cells.csv"]  # nothing half-written


def test_a_row_that_cannot_be_written_leaves_the_file(tmp_path):
    class Broken:
        def __str__(self):
            raise OSError("disk full")

    results = Results(tmp_path / "cells.csv", Cell)
    results.add(CELL, {"score": 1.0})
    with pytest.raises(OSError, match="disk full"):
        results.add(Cell("b", "dense", 0, 0.0, 0), {"score": Broken()})
    assert Results(tmp_path / "cells.csv", Cell).rows == {CELL: {"score": 1.0}}


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("section,ms\nForward,1.0\n")
    with pytest.raises(ValueError, match="is no file of cells"):
        Results(path, Cell)
    assert path.read_text() == "section,ms\nForward,1.0\n"


# -------------------------------------------------------------------------------------------------
# Workers
# -------------------------------------------------------------------------------------------------


def test_cells_that_fail_or_kill_their_worker_are_left_and_the_others_run(tmp_path):
    question = Toy(("fails", "works", "dies", "too"))
    results = Results(tmp_path / "cells.csv", Cell)
    left = run_cells(question, results, devices=["cpu"], threads=1)
    # A worker loads once, however many cells it runs.
    assert {(c.method, row["score"], row["loads"]) for c, row in results.rows.items()} == {
        ("works", 10, 1), ("too", 10, 1),
    }  # fmt: skip
    assert {row["left"].split()[1]: row["because"] for row in left} == {
        "fails": "ArithmeticError: no result",
        "dies": "the worker process ended with exit code 3",
    }


def test_a_finished_cell_is_not_run_again(tmp_path):
    question = Toy(("works",), seeds=2)
    results = Results(tmp_path / "cells.csv", Cell)
    for cell in question.cells():
        results.add(cell, {"score": 99.0})
    assert run_cells(question, results, devices=["cpu"], threads=1) == []
    assert {row["score"] for row in results.rows.values()} == {99.0}


def test_what_does_not_fit_into_the_budget_is_not_begun(tmp_path):
    question = Toy(("works",), seeds=2)
    results = Results(tmp_path / "cells.csv", Cell)
    left = run_cells(question, results, devices=["cpu"], threads=1, budget=-1.0)
    assert len(left) == 2 and not results.rows
    assert all("were spent" in row["because"] for row in left)

    from benchmarks.report.facts import device_name

    first, second = question.cells()
    results.add(first, {"score": 1.0, "seconds": 1000.0, "device": device_name("cpu")})
    # Settings that are not asked for now say nothing about those that are.
    results.add(Cell("b", "works", 16, 0.9, 0), {**results.rows[first], "seconds": 5000.0})
    assert seconds_needed(question, results.rows, second, device_name("cpu")) == 1000.0
    assert seconds_needed(question, results.rows, second, "another") == 0.0
    left = run_cells(question, results, devices=["cpu"], threads=1, budget=900.0)
    assert [row["left"] for row in left] == [str(second)]
    assert left[0]["because"].startswith("needs about 1000 s")


def test_what_runs_when_the_budget_ends_is_stopped(tmp_path):
    ticks = iter(range(10**9))
    left = run_cells(
        Toy(("endless", "works")),
        Results(tmp_path / "cells.csv", Cell),
        devices=["cpu"],
        threads=1,
        budget=200.0,
        clock=lambda: float(next(ticks)),
    )
    assert [row["left"].split()[1] for row in left] == ["endless", "works"]
    assert "the time was up" in left[0]["because"]


# -------------------------------------------------------------------------------------------------
# Digest
# -------------------------------------------------------------------------------------------------


def rows_of(scores):
    return {Cell("s", *key): {"bits_per_byte": value} for key, value in scores.items()}


def test_gaps_are_taken_seed_by_seed():
    scores = {
        ("dense", 0, 0.0, 0): 1.0, ("dense", 0, 0.0, 1): 2.0,
        ("random", 32, 0.9, 0): 1.4, ("random", 32, 0.9, 1): 2.4,
        ("gradual", 32, 0.9, 0): 1.2, ("gradual", 32, 0.9, 1): 2.2,
        ("new", 32, 0.9, 1): 2.1,
    }  # fmt: skip
    question = lm.LanguageModel("tiny", (1,), (), ("dense",))
    table = compare(question, points(question, rows_of(scores)), "s")
    by_method = {row["method"]: row for row in table}
    assert [row["method"] for row in table] == ["dense", "random", "gradual", "new"]
    assert by_method["dense"]["bits per byte"] == "1.5000" and by_method["dense"]["block"] is None
    assert by_method["random"]["gap to dense"] == "+0.4000"
    assert by_method["gradual"]["of random's gap"] == "0.50"
    # Of the seed that it has alone.
    assert by_method["new"]["gap to dense"] == "+0.1000"
    assert by_method["new"]["of gradual's gap"] == "0.50"
    # Spreads over seeds are 0.7 here, and one seed has none.
    assert by_method["gradual"]["beats random"] is False and "beats random" not in by_method["new"]


def test_the_way_from_the_floor_to_dense():
    question = minilm.OneShot({}, ())
    scores = {("dense", 0, 0.0, 0): 30.0, ("floor", 32, 1.0, 0): 10.0, ("random", 32, 0.5, 0): 15.0}
    rows = {Cell("s", *key): {"recall": value} for key, value in scores.items()}
    table = compare(question, points(question, rows), "s")
    assert table[-1]["floor to dense"] == "25 %" and table[-1]["gap to dense"] == "+15.0"


# -------------------------------------------------------------------------------------------------
# Questions
# -------------------------------------------------------------------------------------------------


def test_the_corpus_is_the_same_again_and_its_sides_share_no_file_name():
    import hashlib

    paths = list(lm.python_sources())
    assert paths == list(lm.python_sources()) and len(paths) > 1000
    assert not any("site-packages" in p.parts for p in paths if "torch" not in p.parts)
    held_out = {
        p.name for p in paths if int(hashlib.md5(p.name.encode()).hexdigest(), 16) % 20 == 0
    }
    assert 0.02 < len(held_out) / len({p.name for p in paths}) < 0.08


def test_windows_hold_inputs_and_the_bytes_after_them():
    window = lm.windows(torch.arange(100, dtype=torch.uint8), torch.tensor([0, 7]), 4)
    assert window.tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]


def test_the_language_model_is_causal_and_scores_eight_bits_without_knowledge():
    size = lm.SIZES["tiny"]
    model = lm.GPT(size)
    ids = torch.randint(256, (2, size.context))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    out, other = model(ids), model(changed)
    torch.testing.assert_close(out[:, :-1], other[:, :-1])
    assert not torch.allclose(out[:, -1], other[:, -1])
    nn.init.zeros_(model.head.weight)
    data = torch.randint(256, (5000,), dtype=torch.uint8)
    assert lm.bits_per_byte(model, data, size) == pytest.approx(8.0)


def test_sizes():
    parameters = {
        name: sum(p.numel() for p in lm.GPT(size).parameters()) for name, size in lm.SIZES.items()
    }
    assert 10.6e6 < parameters["gpu"] < 11e6 and parameters["small"] < 1e6


def test_methods_are_given_the_same_batches():
    question = lm.LanguageModel("tiny", (1,), (), ("dense",))
    question._train = torch.randint(256, (5000,), dtype=torch.uint8)
    for seed in (0, 1):
        first, again = next(question.batches(seed)), next(question.batches(seed))
        assert torch.equal(first, again)
    assert not torch.equal(next(question.batches(0)), next(question.batches(1)))


def test_the_vision_transformer_sees_every_pixel():
    model = mnist.ViT()
    images = torch.randn(2, 28, 28, requires_grad=True)
    model(images).sum().backward()
    assert (images.grad != 0).all()
    assert len(rivals.masked_weights(model, mnist.MASKED)) == 16


class Bag(nn.Module):
    """An encoder whose hidden state of a token is its embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 32)

    def forward(self, input_ids, attention_mask, output_hidden_states=False):
        hidden = self.table(input_ids)
        return types.SimpleNamespace(last_hidden_state=hidden, hidden_states=(hidden, hidden))


def test_recall_counts_queries_that_find_their_document():
    documents = [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14, 15]]
    articles = minilm.Articles(
        [], [], [[1, 2], [5], [7, 8], [4]], torch.tensor([0, 1, 2, 0]), documents
    )
    assert minilm.recall(Bag(), articles, lambda text: None) == 75.0


def test_padding_changes_no_embedding():
    encoder = Bag()
    short, long = [1, 2, 3], list(range(1, 30))
    alone = minilm.embed(encoder, [short])
    together = minilm.embed(encoder, [long, short])
    torch.testing.assert_close(together[1], alone[0])


def test_a_student_like_its_teacher_has_no_loss():
    question = minilm.Distilled({}, ())
    question._encoder = Bag()
    batch = minilm.pad([[1, 2, 3], [4, 5]], torch.device("cpu"))
    assert question.loss(question._encoder, batch).item() == pytest.approx(0.0, abs=1e-6)
    assert question.loss(Bag(), batch) > 0.5


def test_methods_that_look_at_no_data_run_once():
    question = minilm.OneShot({"mlp": ((32, 0.5),)}, ("dense", "random", "block-norm"), seeds=3)
    methods = [cell.method for cell in question.cells()]
    assert {m: methods.count(m) for m in methods} == {"dense": 1, "random": 3, "block-norm": 1}


def test_passages_are_consecutive_sentences():
    sentences = [f"{i} " + "word " * 29 for i in range(5)]
    found = list(minilm.passages(sentences, words=60))
    assert " ".join(found) == " ".join(sentences) and len(found) == 3


def test_a_missing_package_is_named_with_the_command():
    with pytest.raises(ImportError, match=r"'toy' needs no-such-thing: pip install no-such-thing "):
        packages.needs("toy", torch="torch", no_such_module_here="no-such-thing")


# -------------------------------------------------------------------------------------------------
# The command
# -------------------------------------------------------------------------------------------------


def test_a_whole_run_goes_on_where_it_stopped(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need the `examples` extra")
    command = (
        "lm --size tiny --steps 2 --points 16:0.9 24:0.9 --methods dense random --seeds 1 "
        f"--device cpu --threads 1 --workers 2 --output-dir {tmp_path}"
    ).split()
    quality.main(command)
    (path,) = tmp_path.glob("*.csv")
    assert path.stem[10:].startswith("_quality_lm_cpu_")
    rows = list(csv.DictReader(path.open()))
    assert sorted(row["method"] for row in rows) == ["dense", "random"]
    assert {row["pruned"] for row in rows} == {"0.0", "0.8611"}  # 31 of 36, by whole blocks
    report = path.with_suffix(".md").read_text()
    assert "Left over: 1 cells" in report and "whole blocks of 24" in report
    assert [p.name for p in tmp_path.glob("*.png")] == [f"{path.stem}_sparsity.png"]

    # An earlier day's file is gone on with, and what it holds is not run again.
    earlier = path.with_name("2001-01-01" + path.name[10:])
    text = path.read_text().replace(rows[0]["bits_per_byte"], "1.2345")
    earlier.write_text(text)
    for file in tmp_path.glob("20[2-9]*"):
        file.unlink()
    command[command.index("24:0.9")] = "16:0.9"
    quality.main(command)
    assert earlier.read_text() == text
    assert "1.2345" in earlier.with_suffix(".md").read_text()
    assert "2 cells finished, 0 left" in capsys.readouterr().out

    quality.main([*command, "--redo", "random", "--budget", "0"])
    assert [row["method"] for row in csv.DictReader(earlier.open())] == ["dense"]
    assert "1 cells finished, 1 left" in capsys.readouterr().out


def test_time_is_not_shared():
    with pytest.raises(SystemExit, match="--minutes .* one worker a device"):
        quality.main("minilm-distilled --minutes 1 --workers 2 --device cpu".split())


@pytest.mark.gpu
@pytest.mark.parametrize("method", sorted(METHODS))
def test_cells_run_on_a_gpu(method):
    cell = Cell("tiny, 30 steps", method, 16 * (method != "dense"), 0.9 * (method != "dense"), 0)
    question = lm.LanguageModel("tiny", (30,), ((16, 0.9),), (method,))
    question.load(torch.device("cuda"))
    row = question.run(cell, lambda text: None)
    assert 0 < row["bits_per_byte"] < 8
    assert row["pruned"] == (0.0 if method == "dense" else 0.8611)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("lm --methods no-such", "lm has no method 'no-such'; it has dense"),
        ("minilm --redo gradual", "minilm has no method 'gradual'"),
        ("mnist --size gpu", "--size is an option of lm, not of mnist"),
        ("minilm --steps 3", "minilm has no steps"),
        ("minilm-distilled --steps 3 --minutes 1", "exclude each other"),
    ],
)
def test_options_that_do_not_fit_are_refused(command, message):
    with pytest.raises(SystemExit, match=message):
        quality.ask(quality.parse(command.split()), torch.device("cpu"))


@pytest.mark.parametrize("point", ["32", "0:0.9", "16:1.0", "a:0.5"])
def test_a_point_is_a_block_and_a_sparsity(point, capsys):
    with pytest.raises(SystemExit):
        quality.parse(["lm", "--points", point])
    assert point in capsys.readouterr().err


def test_each_question_has_its_rivals_and_goals():
    cpu = torch.device("cpu")
    for name, devices in {"lm": cpu, "mnist": cpu, "minilm": cpu, "minilm-distilled": cpu}.items():
        question = quality.ask(quality.parse([name]), devices)
        methods = {cell.method for cell in question.cells()}
        assert {"dense", "random", "torch-weight-norm"} < methods
        assert all(question.work(cell) > 0 for cell in question.cells())
        assert len(set(question.cells())) == len(question.cells())
    question = quality.ask(quality.parse(["lm"]), torch.device("cuda"))
    settings = {cell.setting for cell in question.cells()}
    assert settings == {"gpu, 1200 steps", "gpu, 4800 steps"}
