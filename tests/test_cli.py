"""The command line: what it prints, writes and refuses."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import load_file, save_file
from torch import nn

from tests.bsr.common import Model, prune_all
from torchao_superblock import BSRLinear, SupermaskSparsifier, load_bsr, save_bsr, swap_to_bsr
from torchao_superblock.cli import main


def pruned() -> nn.ModuleDict:
    return prune_all(
        nn.ModuleDict(
            {
                "words": nn.Embedding(64, 32),
                "mlp": nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
                "head": nn.Linear(32, 10),
            }
        ),
        16,
        0.75,
    )


@pytest.fixture
def dense(tmp_path) -> Path:
    path = tmp_path / "dense.safetensors"
    save_file(pruned().state_dict(), path)
    return path


def run(*arguments: object) -> int:
    """The exit code, as a shell would see it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def run_json(capsys, *arguments: object) -> dict:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def assert_one_line(capsys, words: str) -> None:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (out, err)
    assert err.startswith("torchao_superblock: error: ") and words in err, err


def test_inspect_shows_every_layer(dense, capsys):
    options = ("--device", "cpu", "--min-sparsity", 0.7, "--blocksize", 16)
    assert run("inspect", dense, *options) == 0
    out = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert_expected_inline(
        out.replace(f"{dense.parent}/", ""),
        """\
dense.safetensors (safetensors file)
┏━━━━━━━┳━━━━━━━┳━━━━━━━┳━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃ layer ┃ shape ┃ block ┃ sparsity ┃  saved ┃ a swap here                                                      ┃
┡━━━━━━━╇━━━━━━━╇━━━━━━━╇━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ head  │ 10x32 │     - │        - │      - │ no: its shape (10, 32) is not a multiple of the block size 16x16 │
│ mlp.0 │ 64x32 │ 16x16 │    75.0% │ 6.1 kB │ yes: 75.0% of its blocks are zero                                │
│ mlp.2 │ 32x64 │ 16x16 │    75.0% │ 6.1 kB │ yes: 75.0% of its blocks are zero                                │
│ words │ 64x32 │     - │     0.0% │      - │ no: 0.0% of its blocks are zero, min_sparsity is 70.0%           │
└───────┴───────┴───────┴──────────┴────────┴──────────────────────────────────────────────────────────────────┘
2 of 4 linear layers would be swapped, which saves 12.2 kB
types are read off names and shapes: each 2-D weight counts as a linear layer, embeddings too (--exclude leaves out)""",
    )


def test_padded_layers_are_shown_converted_and_made_dense(tmp_path, capsys):
    head = nn.Linear(32, 50)
    with torch.no_grad():
        head.weight[16:].zero_()
    source, stored, back = (tmp_path / f"{name}.safetensors" for name in ("in", "bsr", "back"))
    save_file(nn.ModuleDict({"head": head}).state_dict(), source)
    options = ("--device", "cpu", "--blocksize", 16, "--min-sparsity", 0.5)
    assert run_json(capsys, "inspect", source, *options)["swapped"] == 0
    (layer,) = run_json(capsys, "inspect", source, *options, "--pad")["layers"]
    assert layer["reason"] == "75.0% of its blocks are zero; padded to 64x32"
    assert run("convert", source, stored, *options, "--pad") == 0
    capsys.readouterr()
    (layer,) = run_json(capsys, "inspect", stored, "--device", "cpu")["layers"]
    assert layer["shape"] == [50, 32] and "; padded to 64x32" in layer["reason"]
    assert run("convert", stored, back, "--device", "cpu") == 0
    assert torch.equal(load_file(back)["head.weight"], head.weight)
    capsys.readouterr()
    assert run("convert", stored, tmp_path / "no.safetensors", "--pad") == 2
    assert_one_line(capsys, "--pad cannot change it")


def test_what_inspect_says_is_what_convert_saves(dense, tmp_path, capsys):
    options = ("--device", "cpu", "--min-sparsity", 0.5, "--exclude", "mlp.2")
    shown = run_json(capsys, "inspect", dense, *options)
    converted = run_json(capsys, "convert", dense, tmp_path / "bsr.safetensors", *options)
    assert [layer["name"] for layer in shown["layers"] if layer["is_bsr"]] == ["mlp.0"]
    assert converted["layers"] == ["mlp.0"] and shown["swapped"] == 1
    shrunk = sum(tensor.nbytes for tensor in load_file(dense).values())
    shrunk -= sum(tensor.nbytes for tensor in load_file(tmp_path / "bsr.safetensors").values())
    assert shown["bytes_saved"] == converted["bytes_saved"] == shrunk > 0


def test_without_options_the_break_even_table_decides_as_in_a_swap(dense, capsys):
    shown = run_json(capsys, "inspect", dense, "--device", "cpu")
    report = swap_to_bsr(pruned())
    expected = {entry.fqn: entry.reason for entry in [*report.swapped, *report.skipped]}
    shown = {layer["name"]: layer["reason"] for layer in shown["layers"]}
    assert {name: shown[name] for name in expected} == expected


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested", "wrapped"])
def test_dense_to_bsr_and_back(kind, dense, tmp_path, capsys):
    state, source = load_file(dense), tmp_path / "source"
    if kind == "safetensors":
        source = dense
    elif kind == "pt":
        torch.save(state, source)
    elif kind == "nested":
        torch.save({"epoch": 3, "model": state, "optimizer": {"state": {}}}, source)
    else:  # by DistributedDataParallel and torch.compile
        torch.save({f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, source)
    bsr, back = tmp_path / "bsr.safetensors", tmp_path / "back.safetensors"
    assert run("convert", source, bsr, "--min-sparsity", 0.5) == 0
    assert "2 of 4 linear layers are BSR now, 12.3 kB less" in capsys.readouterr().out
    model = load_bsr(pruned(), bsr)
    assert isinstance(model["mlp"][0], BSRLinear) and isinstance(model["mlp"][2], BSRLinear)
    shown = run_json(capsys, "inspect", bsr)
    assert [layer["name"] for layer in shown["layers"] if layer["is_bsr"]] == ["mlp.0", "mlp.2"]
    assert run("convert", bsr, back) == 0
    returned = load_file(back)
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[name], state[name]) for name in state)


def test_fused_and_narrowed_layers_come_back_too(tmp_path, capsys):
    model = prune_all(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)), 16)
    with torch.no_grad():
        model[0].weight[:64] = 0
    x, before = torch.randn(3, 32), {name: t.shape for name, t in model.state_dict().items()}
    expected = model(x)
    swap_to_bsr(model, 16, min_sparsity=0, fuse_activations=True, drop_dead_features=True)
    assert model[0].is_narrowed and model[0].activation == "gelu"
    save_bsr(nn.ModuleDict({"a": model}), tmp_path / "m")
    shown = run_json(capsys, "inspect", tmp_path / "m")["layers"][0]
    assert shown["shape"] == [128, 32] and "narrowed to 64x32; applies gelu" in shown["reason"]
    assert run("convert", tmp_path / "m", tmp_path / "d") == 0
    back = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    nn.ModuleDict({"a": back}).load_state_dict(load_file(tmp_path / "d"))
    assert {name: tensor.shape for name, tensor in back.state_dict().items()} == before
    torch.testing.assert_close(back(x), expected, atol=1e-5, rtol=1e-5)


def test_tied_weights_stay_dense(tmp_path, capsys):
    model = prune_all(Model(), 16)
    with torch.no_grad():
        model.head.weight[:, :16] = 0
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert run("convert", tmp_path / "m.pt", tmp_path / "b", "--min-sparsity", 0) == 0
    loaded = load_bsr(Model(), tmp_path / "b")
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert isinstance(loaded.up, BSRLinear)


@pytest.mark.parametrize("stored", [False, True])
def test_bench_times_each_layer(stored, dense, tmp_path, capsys):
    path = dense
    if stored:
        path = tmp_path / "bsr"
        assert run("convert", dense, path, "--min-sparsity", 0.5, "--json") == 0
        capsys.readouterr()
    arguments = ("bench", path, "--device", "cpu", "--tokens", 3, "--seconds", 1e-3)
    times = run_json(capsys, *arguments)
    assert [layer["name"] for layer in times["layers"]] == ["mlp.0", "mlp.2"]
    assert all(layer["dense_ms"] > 0 and layer["bsr_ms"] > 0 for layer in times["layers"])
    assert times["dense_ms"] == sum(layer["dense_ms"] for layer in times["layers"])
    assert times["tokens"] == 3 and times["torch"] == torch.__version__
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "3 tokens on cpu" in out and "speedup" in out and "mlp.2" in out


def test_convolutions_of_a_file(tmp_path, capsys):
    model = nn.ModuleDict({"conv": nn.Conv2d(32, 64, 1), "up": nn.Linear(32, 64)})
    for layer in model.values():
        with torch.no_grad():
            layer.weight[:48] = 0
    weight = model["conv"].weight.detach().clone()
    swap_to_bsr(model, 16, min_sparsity=0.5)
    save_bsr(model, tmp_path / "bsr")
    shown = run_json(capsys, "inspect", tmp_path / "bsr")["layers"]
    assert [layer["name"] for layer in shown if layer["is_bsr"]] == ["conv", "up"]
    options = ("--tokens", 4, "--seconds", 1e-3, "--device", "cpu")
    layers = run_json(capsys, "bench", tmp_path / "bsr", *options)["layers"]
    assert all(layer["dense_ms"] > 0 and layer["bsr_ms"] > 0 for layer in layers)
    assert run("convert", tmp_path / "bsr", tmp_path / "dense") == 0
    assert torch.equal(load_file(tmp_path / "dense")["conv.weight"], weight)


def test_nothing_to_do_is_one_line_and_code_1(tmp_path, capsys):
    save_file(nn.ModuleDict({"a": nn.Linear(32, 32)}).state_dict(), tmp_path / "m")
    before = files(tmp_path)
    assert run("convert", tmp_path / "m", tmp_path / "out") == 1
    assert_one_line(capsys, "nothing to convert")
    assert run("bench", tmp_path / "m") == 1
    assert_one_line(capsys, "nothing to measure")
    assert files(tmp_path) == before


class TestMistakes:
    def check(self, capsys, folder, words, *arguments):
        before = files(folder)
        assert run(*arguments) == 2
        assert_one_line(capsys, words)
        assert files(folder) == before

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["frob"], "invalid choice: 'frob'"),
            ([], "required: COMMAND"),
            (["inspect"], "required: FILE"),
            (["convert", "{dense}"], "required: OUT"),
            (["inspect", "{dense}", "--frob"], "unrecognized arguments: --frob"),
            (["inspect", "{dense}", "--blocksize", "0"], "'0' is no block size"),
            (["inspect", "{dense}", "--blocksize", "8x8x8"], "'8x8x8' is no block size"),
            (["inspect", "{dense}", "--min-sparsity", "2"], "'2' is no fraction"),
            (["bench", "{dense}", "--tokens", "0"], "'0' is no whole number above 0"),
            (["bench", "{dense}", "--seconds", "nan"], "'nan' is no number of seconds"),
            (["inspect", "{dense}", "--device", "abacus"], "'abacus' is no device here"),
            (["inspect", "{dense}", "--key", "model"], "no torch checkpoint: a key finds nothing"),
            (["inspect", "nowhere"], "No such file or directory: 'nowhere'"),
            (["convert", "nowhere", "{folder}/out"], "no such file: 'nowhere'"),
            (["inspect", "{folder}"], "has no config.json"),
            (["convert", "{dense}", "{dense}"], "exists; --force replaces it"),
            (["convert", "{dense}", "{folder}/no/out"], "does not exist"),
            (["convert", "{dense}", "{folder}", "--force"], "is a folder; name the file in it"),
            (["convert", "{dense}", "{folder}/out.pt"], "is a safetensors file; name it so"),
        ],
    )
    def test_in_the_call(self, arguments, words, dense, tmp_path, capsys):
        filled = [text.format(dense=dense, folder=tmp_path) for text in arguments]
        self.check(capsys, tmp_path, words, *filled)

    @pytest.mark.parametrize("command", ["inspect", "convert", "bench"])
    def test_in_a_file(self, command, dense, tmp_path, capsys):
        bsr, pt = tmp_path / "bsr", tmp_path / "pt"
        assert run("convert", dense, bsr, "--min-sparsity", 0.5, "--json") == 0
        capsys.readouterr()
        torch.save(pruned().state_dict(), pt)
        flipped = bytearray(bsr.read_bytes())
        flipped[-5] ^= 1
        linear = nn.ModuleDict({"a": nn.Linear(32, 32)})
        SupermaskSparsifier(0.5, blocksize=16).prepare(linear)
        swapped = prune_all(nn.ModuleDict({"a": nn.Linear(32, 32)}), 16)
        swap_to_bsr(swapped, 16, min_sparsity=0)
        contents = {
            "damaged, or neither": [
                b"",
                b"hello",
                dense.read_bytes()[:100],
                dense.read_bytes()[:-1],
                bsr.read_bytes()[:-1],
                pt.read_bytes()[: len(pt.read_bytes()) // 2],
            ],
            "does not have the checksum": [bytes(flipped)],
            "no readable torch checkpoint": [self.broken(pt), b"\x80\x02}q"],
            "holds more than tensors": [self.saved(tmp_path, pruned())],
            "masks are not folded": [self.saved(tmp_path, linear.state_dict())],
            "state dict of a swapped model": [self.saved(tmp_path, swapped.state_dict())],
            "should hold one state dict": [
                self.saved(tmp_path, {"epoch": 3}),
                self.saved(tmp_path, [1, 2]),
                self.saved(tmp_path, {}),
                self.saved(tmp_path, {"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}),
            ],
            "its names are not those of a module": [
                self.saved(tmp_path, {"a": torch.ones(1), "a.b": torch.ones(1)})
            ],
        }
        path = tmp_path / "bad"
        output = [tmp_path / "out"] if command == "convert" else []
        for words, cases in contents.items():
            for content in cases:
                path.write_bytes(content)
                self.check(capsys, tmp_path, words, command, path, *output)

    def saved(self, folder: Path, content: object) -> bytes:
        path = folder / "saved"
        torch.save(content, path)
        data = path.read_bytes()
        path.unlink()
        return data

    def broken(self, path: Path) -> bytes:
        """A zip archive, but without what torch looks for."""
        return path.read_bytes().replace(b"data.pkl", b"dada.pkl")

    def test_options_that_cannot_change_bsr(self, dense, tmp_path, capsys):
        bsr = tmp_path / "bsr"
        assert run("convert", dense, bsr, "--min-sparsity", 0.5, "--json") == 0
        capsys.readouterr()
        for options in (["--blocksize", 8], ["--min-sparsity", 0.5], ["--exclude", "a"]):
            words = f"is BSR already: {options[0]} cannot change it"
            self.check(capsys, tmp_path, words, "inspect", bsr, *options)

    def test_a_key_that_finds_nothing(self, tmp_path, capsys):
        torch.save({"model": pruned().state_dict()}, tmp_path / "m.pt")
        for key in ("ema", "model.words.weight.data"):
            self.check(
                capsys,
                tmp_path,
                f"has nothing at {key!r}",
                "inspect",
                tmp_path / "m.pt",
                "--key",
                key,
            )
        assert run("inspect", tmp_path / "m.pt", "--key", "model", "--json") == 0

    def test_a_fused_layer_without_a_place_for_its_activation(self, tmp_path, capsys):
        model = prune_all(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), 16)
        swap_to_bsr(model, 16, min_sparsity=0)
        model[0].activation = "relu"
        save_bsr(model, tmp_path / "m")
        words = "cannot make dense '0': it applies relu"
        self.check(capsys, tmp_path, words, "convert", tmp_path / "m", tmp_path / "out")

    def test_a_folder_without_write_permission(self, capsys):
        # Not pytest's own folder: nobody but its owner may enter that.
        with tempfile.TemporaryDirectory() as folder:
            path, locked = Path(folder, "m"), Path(folder, "locked")
            save_file(pruned().state_dict(), path)
            path.chmod(0o644)
            locked.mkdir(0o555)
            Path(folder).chmod(0o755)
            is_root = os.geteuid() == 0
            if is_root:  # who may write everywhere
                os.seteuid(65534)
            try:
                arguments = ["convert", path, locked / "out", "--min-sparsity", 0.5]
                words = "Permission denied" if is_root else "is not writable"
                self.check(capsys, Path(folder), words, *arguments)
            finally:
                if is_root:
                    os.seteuid(0)

    def test_without_rich_tables_are_refused_and_json_works(self, dense, tmp_path):
        script = "import sys; sys.modules['rich'] = None; from torchao_superblock.cli import main; sys.exit(main())"
        for options, code in (([], 2), (["--json"], 0)):
            done = subprocess.run(
                [sys.executable, "-c", script, "inspect", str(dense), *options],
                capture_output=True,
                text=True,
            )
            assert done.returncode == code, done.stderr
            assert ("pip install 'torchao_superblock[cli]'" in done.stderr) == (code == 2)


def test_force_replaces_and_a_failure_leaves_the_old_file(dense, tmp_path, capsys):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    torch.save([1], tmp_path / "bad")
    assert run("convert", tmp_path / "bad", target, "--force") == 2
    assert target.read_bytes() == b"old"
    assert run("convert", dense, target, "--force", "--min-sparsity", 0.5) == 0
    load_bsr(pruned(), target)
    assert run("convert", target, target, "--force") == 0  # onto itself
    assert load_file(target).keys() == load_file(dense).keys()


def test_as_a_module(dense):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "torchao_superblock", *map(str, arguments)],
            capture_output=True,
            text=True,
        )

    shown = command("inspect", dense)
    assert shown.returncode == 0 and "mlp.0" in shown.stdout and shown.stderr == ""
    wrong = command("inspect", dense.parent / "nowhere")
    assert wrong.returncode == 2 and wrong.stdout == "" and "Traceback" not in wrong.stderr
    usage = command("--help")
    assert usage.returncode == 0 and "Exit codes" in usage.stdout


class TestTransformersFolders:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=48,
        )
        model = prune_all(transformers.BertForMaskedLM(config), 16, 0.75)
        model.save_pretrained(tmp_path / "dense")
        (tmp_path / "dense" / "vocab.txt").write_text("[PAD]\n")
        return tmp_path / "dense"

    def test_there_and_back(self, folder, tmp_path, capsys):
        from transformers import BertForMaskedLM

        options = ("--min-sparsity", 0.5, "--exclude", "cls.*")
        shown = run_json(capsys, "inspect", folder, *options)
        names = [layer["name"] for layer in shown["layers"]]
        assert "bert.encoder.layer.0.intermediate.dense" in names
        assert not any("embeddings" in name for name in names)  # the model says that they are none
        bsr, back = tmp_path / "bsr", tmp_path / "back"
        converted = run_json(capsys, "convert", folder, bsr, *options)
        assert len(converted["layers"]) == shown["swapped"] >= 12
        assert {"config.json", "vocab.txt", "model.bsr.safetensors"} == set(os.listdir(bsr))
        assert run_json(capsys, "inspect", bsr)["swapped"] == shown["swapped"]

        dense = BertForMaskedLM.from_pretrained(folder).eval()
        loaded = load_bsr(
            BertForMaskedLM.from_pretrained(folder).eval(), bsr / "model.bsr.safetensors"
        )
        tokens = torch.arange(10)[None]
        expected = dense(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-5, rtol=1e-5)

        assert run("convert", bsr, back) == 0
        returned = BertForMaskedLM.from_pretrained(back).eval()
        assert torch.equal(returned(tokens).logits, expected)
        assert (back / "vocab.txt").exists()

    def test_projections_that_an_attention_holds_itself(self, tmp_path, capsys):
        transformers = pytest.importorskip("transformers")
        config = transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
        model = transformers.SiglipVisionModel(config)
        attention = next(m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
        with torch.no_grad():
            attention.in_proj_weight[:, :16] = 0
        model.save_pretrained(tmp_path / "dense")
        options = ("--blocksize", 16, "--min-sparsity", 0.5)
        shown = run_json(capsys, "inspect", tmp_path / "dense", *options)
        saved = {
            layer["name"]: layer["bytes_saved"] for layer in shown["layers"] if layer["is_bsr"]
        }
        (name,) = saved
        assert name.endswith("attention.in_proj_weight") and saved[name] > 0
        assert run("convert", tmp_path / "dense", tmp_path / "bsr", *options) == 0
        assert run("convert", tmp_path / "bsr", tmp_path / "back") == 0
        for file in ("dense", "back"):
            state = transformers.SiglipVisionModel.from_pretrained(tmp_path / file).state_dict()
            for key, tensor in model.state_dict().items():
                assert torch.equal(state[key], tensor), key

    def test_mistakes(self, folder, tmp_path, capsys):
        target = tmp_path / "out"
        target.mkdir()
        (target / "thesis.tex").write_text("")
        options = ("--min-sparsity", 0.5)
        before = files(tmp_path)
        for arguments, words in (
            (("convert", folder, target), "exists; --force replaces it"),
            (
                ("convert", folder, target, "--force"),
                "is no transformers folder and is not replaced",
            ),
        ):
            assert run(*arguments, *options) == 2
            assert_one_line(capsys, words)
        config = json.loads((folder / "config.json").read_text())
        for architecture, words in (
            ("Frob", "has no Frob"),
            ("BertConfig", "has no BertConfig"),
            (None, "names no architecture"),
        ):
            (folder / "config.json").write_text(
                json.dumps(config | {"architectures": architecture and [architecture]})
            )
            assert run("inspect", folder) == 2
            assert_one_line(capsys, words)
        (folder / "config.json").write_text(json.dumps(config))
        assert files(tmp_path).keys() == before.keys()
        weights = folder / "model.safetensors"
        whole = load_file(weights)
        save_file(
            {n: t for n, t in whole.items() if "layer.1.output" not in n}, weights, {"format": "pt"}
        )
        assert run("inspect", folder) == 2
        assert_one_line(capsys, "does not hold (or not in this shape) bert.encoder.layer.1.output")
        weights.write_bytes(weights.read_bytes()[:500])
        assert run("inspect", folder) == 2
        assert_one_line(capsys, "")

    def test_force_replaces_a_folder_as_a_whole(self, folder, tmp_path, capsys):
        for name in ("one", "two"):
            assert run("convert", folder, tmp_path / name, "--min-sparsity", 0.5) == 0
        (tmp_path / "two" / "left").write_text("")
        assert run("convert", folder, tmp_path / "two", "--min-sparsity", 0.5, "--force") == 0
        assert files(tmp_path / "one") == files(tmp_path / "two")
        assert sorted(os.listdir(tmp_path)) == ["dense", "one", "two"]
