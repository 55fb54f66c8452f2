"""transformers (5.24): folders of swapped models, in this process and in others, and what is refused."""

import importlib.util
import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.bsr.common import prune
from torchao_superblock import BSRLinear, SupermaskSparsifier, swap_to_bsr, swap_to_dense

transformers = pytest.importorskip("transformers", reason="needs the `transformers` extra")
pytest.importorskip("accelerate", reason="needs the `transformers` extra")

from tests.integrations.transformer_models import (  # noqa: E402
    MODELS,
    build,
    inputs_of,
    sparse,
    targets,
    train_and_squash,
)
from torchao_superblock.integrations.transformers import (  # noqa: E402
    BlockSparseConfig,
    BlockSparseHfQuantizer,
)

ROOT = Path(__file__).parents[2]
GENERATIVE = ("llama", "qwen3", "mistral", "gpt2", "t5")
WAYS = {  # of generating
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "static": {"do_sample": False, "cache_implementation": "static"},
}

LOADER = """
import sys
from pathlib import Path
import torch
import transformers
from tests.integrations.transformer_models import MODELS, SupermaskSparsifier, build, inputs_of, targets

folder = Path(sys.argv[1])
assert "torchao_superblock.integrations.transformers" not in sys.modules
try:
    transformers.LlamaForCausalLM.from_pretrained(folder / "llama")
except RuntimeError as error:
    (folder / "refusal.txt").write_text(str(error))
try:
    transformers.LlamaForCausalLM.from_pretrained(folder / "checkpoint-3")
except ValueError as error:
    (folder / "unsquashed.txt").write_text(str(error))
SupermaskSparsifier(0.5, 8).prepare(build("vit"), targets("vit"))
assert "torchao_superblock.integrations.transformers" in sys.modules
for name in MODELS:
    cls = getattr(transformers, MODELS[name][0])
    model, info = cls.from_pretrained(folder / name, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model(**inputs_of(name)).logits, folder / name / "logits.pt")
"""


def logits(name: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(name)).logits


def generated(name: str, model: nn.Module, **way: object) -> torch.Tensor:
    tokens = inputs_of(name)["input_ids"]
    return model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=4,
        pad_token_id=0,
        **way,
    )


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """Each model trained, squashed and swapped, with what its dense self said; saved in a folder of its name."""
    folder, models = tmp_path_factory.mktemp("swapped"), {}
    for name in MODELS:
        torch.manual_seed(0)
        model = build(name)
        train_and_squash(name, model)
        said = {"logits": logits(name, model)}
        if name in GENERATIVE:
            said |= {way: generated(name, model, **options) for way, options in WAYS.items()}
        swap = {"filter_fn": lambda _, fqn: fqn == "lm_head"} if name == "gpt2" else {}
        report = swap_to_bsr(model, 8, min_sparsity=0.5, **swap)
        assert report.swapped
        model.save_pretrained(folder / name, max_shard_size="40KB")
        models[name] = (model, said, report)
    prepared = build("llama")
    SupermaskSparsifier(0.5, 8).prepare(prepared, targets("llama"))
    prepared.save_pretrained(folder / "checkpoint-3")
    return folder, models


@pytest.fixture(scope="module")
def elsewhere(swapped):
    """The folders in a new process: first without the integration, then, once something was prepared, with it."""
    folder, _ = swapped
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stderr


@pytest.fixture(scope="module")
def llama(swapped):
    folder, models = swapped
    return folder / "llama", models["llama"][0]


@pytest.mark.parametrize("name", MODELS)
def test_a_swapped_model_says_the_same_here_and_in_a_new_process(name, swapped, elsewhere):
    folder, models = swapped
    model, said, _ = models[name]
    ours = logits(name, model)
    torch.testing.assert_close(ours, said["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.load(elsewhere[0] / name / "logits.pt"), ours)
    assert len(list((folder / name).glob("*.safetensors"))) > 1  # in shards


@pytest.mark.parametrize("name", GENERATIVE)
@pytest.mark.parametrize("way", WAYS)
def test_a_swapped_model_generates(name, way, swapped):
    model, said, _ = swapped[1][name]
    assert torch.equal(generated(name, model, **WAYS[way]), said[way])


def test_a_process_without_us_refuses_to_load(elsewhere):
    folder, said = elsewhere
    assert "ignore_mismatched_sizes" in (folder / "refusal.txt").read_text()
    assert "Unknown quantization type, got torchao_superblock" in said
    assert "mlp.up_proj.weight" in said and "MISMATCH" in said
    assert "block masks are not squashed yet" in (folder / "unsquashed.txt").read_text()


PLACES = {
    "cpu": {"device_map": "cpu"},
    "auto": {"device_map": "auto"},
    "disk": {
        "device_map": {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        }
    },
    "small": {"device_map": "auto", "max_memory": {"cpu": "60KB"}},
    "buffers": {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_buffers": True},
}


@pytest.mark.parametrize("place", PLACES)
def test_device_maps(place, llama, tmp_path):
    folder, model = llama
    options = {"offload_folder": tmp_path / "offload", **PLACES[place]}
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values())
    ours = logits("llama", model)
    assert torch.equal(logits("llama", loaded), ours)
    assert torch.equal(logits("llama", loaded), ours)  # fetched again
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(logits("llama", again), ours)


def test_what_is_loaded_has_its_plan_and_trains(llama):
    folder, model = llama
    loaded = type(model).from_pretrained(folder)
    for fqn, layer in loaded.named_modules():
        if isinstance(layer, BSRLinear):
            theirs = model.get_submodule(fqn)
            assert type(layer) is BSRLinear
            assert torch.equal(layer.plan, theirs.plan)
            assert layer.weight.plan is layer.plan  # in use
    loaded.train()
    loaded(**inputs_of("llama")).loss.backward()
    assert loaded.model.layers[1].mlp.up_proj.values.grad.abs().sum() > 0
    assert loaded.half().float().model.layers[0].mlp.up_proj.values.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(dtype, llama):
    folder, model = llama
    layer = type(model).from_pretrained(folder, dtype=dtype).model.layers[1].mlp.down_proj
    theirs = model.model.layers[1].mlp.down_proj
    assert layer.values.dtype == dtype and layer.col_indices.dtype == torch.int32
    assert torch.equal(layer.values, theirs.values.to(dtype))


def test_layers_that_stay_in_float32(tmp_path):
    model = sparse("t5")  # transformers keeps its `wo` in float32 beside float16
    model.save_pretrained(tmp_path)
    block = type(model).from_pretrained(tmp_path, dtype=torch.float16).encoder.block[0].layer[1]
    assert block.DenseReluDense.wo.values.dtype == torch.float32
    assert block.DenseReluDense.wi.values.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", {"model": 0, "lm_head": "cpu"}])
def test_on_a_gpu(device_map, tmp_path):
    model = build("llama")
    train_and_squash("llama", model, blocksize=16)
    swap_to_bsr(model, 16, min_sparsity=0.5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
    layer = loaded.model.layers[0].mlp.up_proj
    assert layer.values.is_cuda and layer.weight.plan is layer.plan
    inputs = {key: tensor.cuda() for key, tensor in inputs_of("llama").items()}
    with torch.no_grad():
        out = loaded(**inputs).logits.cpu()
    torch.testing.assert_close(out, logits("llama", model), rtol=1e-3, atol=1e-3)
    if device_map == "cuda":
        with torch.no_grad():
            assert torch.equal(model.cuda()(**inputs).logits.cpu(), out)
        loaded.generate(input_ids=inputs["input_ids"], max_new_tokens=4, **WAYS["static"])


def test_size_on_disk(tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
    model = build("llama", **wide)
    train_and_squash("llama", model, steps=1, blocksize=16)
    needed = sum(4 * int(parameter.count_nonzero()) for parameter in model.parameters())
    swap_to_bsr(model, 16, min_sparsity=0.5)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert needed <= file.stat().st_size <= 1.1 * needed


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5"])
def test_a_dense_model_is_swapped_while_loading(name, tmp_path):
    model = build(name)
    train_and_squash(name, model)
    model.save_pretrained(tmp_path / "dense")
    config = BlockSparseConfig(min_sparsity=0.5, modules_to_not_convert=["layers.1.mlp", "o_proj"])
    loaded = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    report = swap_to_bsr(
        model, min_sparsity=0.5, filter_fn=lambda _, fqn: not config.keeps_dense(fqn)
    )
    assert loaded.hf_quantizer.report.swapped == report.swapped != []
    assert torch.equal(logits(name, loaded), logits(name, model))
    loaded.save_pretrained(tmp_path / "sparse")
    again = type(model).from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(name, again), logits(name, model))


def test_dense_weights_are_gone_before_others_are_read(tmp_path):
    """One weight after the other, while all that follows is still on the meta device."""
    model = build("bert")
    train_and_squash("bert", model)
    quantizer = BlockSparseHfQuantizer(BlockSparseConfig(min_sparsity=0.5), pre_quantized=False)
    with torch.device("meta"):
        empty = build("bert")
    fqn = "bert.encoder.layer.0.intermediate.dense"
    missing = set(model.state_dict())
    weight = model.get_submodule(fqn).weight.detach()
    assert quantizer.param_needs_quantization(empty, f"{fqn}.weight")
    swap = quantizer.get_quantize_ops()
    assert swap.convert({f"{fqn}.weight": [weight]}, model=empty, missing_keys=missing) == {}
    layer = empty.get_submodule(fqn)
    assert isinstance(layer, BSRLinear) and torch.equal(layer.to_dense(), weight)
    assert layer.bias.is_meta and f"{fqn}.weight" not in missing
    for name in (
        f"{fqn}.bias",
        "cls.predictions.decoder.weight",
    ):  # no weight, and one that is tied
        assert not quantizer.param_needs_quantization(empty, name)


def test_weights_of_other_shapes_are_named(tmp_path):
    model = build("llama")
    train_and_squash("llama", model)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.intermediate_size = 256
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(RuntimeError):
            type(model).from_pretrained(
                tmp_path, config=config, quantization_config=BlockSparseConfig(8, 0.5), **options
            )


def test_nothing_to_swap_is_said(tmp_path, caplog):
    build("llama").save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    load = transformers.LlamaForCausalLM.from_pretrained
    load(tmp_path, quantization_config=BlockSparseConfig())
    assert "swapped no layer: no weight has a block of zeros" in caplog.text


def test_the_base_of_a_model_and_a_model_around_a_base(llama, tmp_path):
    folder, model = llama
    tokens = inputs_of("llama")["input_ids"]
    with torch.no_grad():
        said = model.model(tokens).last_hidden_state
        base = transformers.LlamaModel.from_pretrained(folder)
        assert torch.equal(base(tokens).last_hidden_state, said)
        base.save_pretrained(tmp_path)
        whole = type(model).from_pretrained(tmp_path)
        assert torch.equal(whole.model(tokens).last_hidden_state, said)


def test_a_swapped_head_is_not_looked_for_in_other_heads(tmp_path):
    model = build("llama")
    train_and_squash("llama", model)
    with torch.no_grad():
        model.lm_head.weight[:48] = 0
    swap_to_bsr(model, 8, min_sparsity=0.5)
    model.save_pretrained(tmp_path)
    assert isinstance(model.lm_head, BSRLinear)
    assert torch.equal(
        logits("llama", type(model).from_pretrained(tmp_path)), logits("llama", model)
    )
    other = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(other.model.layers[0].mlp.up_proj, BSRLinear)


def test_a_model_that_is_dense_again_is_saved_as_such(llama, tmp_path):
    folder, model = llama
    loaded = type(model).from_pretrained(folder)
    swap_to_dense(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits("llama", again), logits("llama", model), rtol=1e-4, atol=1e-5)
    dense = type(model).from_pretrained(folder).dequantize()
    assert not any(isinstance(module, BSRLinear) for module in dense.modules())


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = sparse()
    model.save_pretrained(tmp_path)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    state = model.state_dict()
    assert "model.layers.0.mlp.up_proj.values" in state
    # What was saved is also a state dict of the swapped model.
    from safetensors.torch import load_file

    (file,) = tmp_path.glob("*.safetensors")
    other = sparse()
    other.load_state_dict(load_file(file))
    assert all(torch.equal(state[key], tensor) for key, tensor in other.state_dict().items())


def test_a_given_state_dict_is_saved(tmp_path):
    model = sparse()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["model.layers.0.mlp.up_proj.values"] += 1
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(
        loaded.model.layers[0].mlp.up_proj.values, model.model.layers[0].mlp.up_proj.values + 1
    )


def test_layers_that_transformers_stores_in_one_tensor(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        use_swiglu_ffn=True,
    )
    model = transformers.Dinov2Model(config).eval()
    for fqn, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            prune(linear, 8, 0.3 if "up" in fqn else 0.6)
    model.save_pretrained(tmp_path / "dense")
    assert len(swap_to_bsr(model, 8, min_sparsity=0.2).swapped) == 7
    with pytest.raises(
        ValueError, match="in its original format, weights of this model lie in one"
    ):
        model.save_pretrained(tmp_path / "model", save_original_format=True)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
    pixels, config = torch.randn(1, 3, 16, 16), BlockSparseConfig(8, 0.2)
    for folder, options in (("model", {}), ("dense", {"quantization_config": config})):
        loaded, info = type(model).from_pretrained(
            tmp_path / folder, output_loading_info=True, **options
        )
        assert not any(info.values())
        with torch.no_grad():
            said, expected = loaded(pixels).last_hidden_state, model(pixels).last_hidden_state
        assert torch.equal(said, expected)
    assert len(loaded.hf_quantizer.report.swapped) == 7


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_a_prepared_model_is_not_saved(tmp_path):
    model = build("llama")
    SupermaskSparsifier(0.5, 8).prepare(model, targets("llama"))
    rule = (
        r"block mask of 'model.layers.0.self_attn.q_proj.weight' is not squashed yet.*squash_mask"
    )
    with pytest.raises(RuntimeError, match=rule):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "checkpoint-3")  # from which a Trainer goes on
    with pytest.raises(RuntimeError, match="checkpoint of a model whose block masks.*not squashed"):
        type(model).from_pretrained(tmp_path / "checkpoint-3")


def edited(folder: Path, where: Path, change) -> Path:
    """A copy of a folder with another quantization_config."""
    where.mkdir()
    for file in folder.iterdir():
        (where / file.name).write_bytes(file.read_bytes())
    config = json.loads((where / "config.json").read_text())
    change(config["quantization_config"])
    (where / "config.json").write_text(json.dumps(config))
    return where


UP = "model.layers.0.mlp.up_proj"
EDITS = {
    "no such layer": (
        lambda c: c["layers"].update({"model.layers.7.mlp.up_proj": c["layers"][UP]}),
        "belongs to another model.*'model.layers.7.mlp.up_proj'.*no such layer",
    ),
    "no linear layer": (
        lambda c: c["layers"].update({"model.norm": c["layers"][UP]}),
        "'model.norm' is a block-sparse linear layer, and here a LlamaRMSNorm",
    ),
    "another shape": (
        lambda c: c["layers"][UP].update(shape=[256, 64]),
        rf"'{UP}' is of shape \(256, 64\), and here of \(128, 64\)",
    ),
    "a bias": (lambda c: c["layers"][UP].update(bias=True), "saved with a bias"),
    "another number of blocks": (
        lambda c: c["layers"][UP].update(stored_blocks=3),
        rf"damaged: {UP}.weight has shape .*config.json says \(3, 8, 8\)",
    ),
    "blocks that do not fit": (
        lambda c: c["layers"][UP].update(blocksize=[7, 8]),
        rf"damaged: {UP}.weight has shape .*config.json says \(\d+, 7, 8\)",
    ),
    "no layers": (lambda c: c.update(layers={}), "describes no block-sparse layers"),
    "a newer format": (
        lambda c: c.update(format_version=2),
        "format version 2.*reads version 1; upgrade",
    ),
    "an unknown setting": (lambda c: c.update(order="columns"), "no setting order"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_folder_that_does_not_fit_is_refused(edit, llama, tmp_path):
    change, rule = EDITS[edit]
    folder = edited(llama[0], tmp_path / "edited", change)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises((ValueError, TypeError), match=rule):
            transformers.LlamaForCausalLM.from_pretrained(folder, **options)


def test_padded_layers_come_back(tmp_path):
    model = build("llama", intermediate_size=50)
    train_and_squash("llama", model, steps=1)
    report = swap_to_bsr(model, 8, min_sparsity=0.5, pad=True)
    assert (56, 64) in [entry.padded for entry in report.swapped]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    layer = loaded.get_submodule(UP)
    assert isinstance(layer, BSRLinear) and layer.out_features == 50
    assert torch.equal(logits("llama", loaded), logits("llama", model))
    assert "pad" not in _config_of(tmp_path)  # earlier releases know no such setting


def test_layers_are_padded_while_a_dense_model_is_loaded(tmp_path):
    model = build("llama", intermediate_size=50)
    train_and_squash("llama", model, steps=1)
    model.save_pretrained(tmp_path)
    config = BlockSparseConfig(8, 0.5, pad=True)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert loaded.get_submodule(UP).out_features == 50
    assert (56, 64) in [entry.padded for entry in loaded.hf_quantizer.report.swapped]
    torch.testing.assert_close(logits("llama", loaded), logits("llama", model))
    loaded.save_pretrained(tmp_path / "swapped")
    again = type(model).from_pretrained(tmp_path / "swapped")
    assert torch.equal(logits("llama", again), logits("llama", loaded))


def test_the_folder_of_another_model_is_refused(llama):
    with pytest.raises(ValueError, match="belongs to another model.*BertForMaskedLM has no such"):
        transformers.BertForMaskedLM.from_pretrained(
            llama[0], config=transformers.BertConfig(quantization_config=_config_of(llama[0]))
        )


def _config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", ["weight", "col_indices"])
def test_a_lost_tensor_is_named(name, tmp_path):
    model = sparse()
    state = dict(model.state_dict())
    del state[f"{UP}.{'values' if name == 'weight' else name}"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=f"damaged: it lacks {UP}.{name}"):
        type(model).from_pretrained(tmp_path)


def test_broken_indices_are_named(tmp_path):
    model = sparse()
    state = dict(model.state_dict())
    state[f"{UP}.col_indices"] = state[f"{UP}.col_indices"].clone().fill_(1000)
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=rf"damaged: '{UP}'.*col_indices must lie in"):
        type(model).from_pretrained(tmp_path)


def test_what_a_folder_cannot_say_is_not_saved(tmp_path):
    model = sparse()
    model.model.layers[0].mlp.up_proj.activation = "relu"
    with pytest.raises(ValueError, match=f"'{UP}' applies an activation.*use save_bsr"):
        model.save_pretrained(tmp_path / "model")
    model = sparse()
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj[0]
    with pytest.raises(ValueError, match="registered twice"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_that_are_no_plain_tensors_are_not_saved(tmp_path):
    class Quantized(torch.Tensor):
        pass

    model = sparse()
    weight = model.lm_head.weight.detach().as_subclass(Quantized)
    model.lm_head.weight = nn.Parameter(weight)
    with pytest.raises(TypeError, match="'lm_head.weight' is a Quantized.*use torch.save"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_under_an_adapter_is_not_saved(tmp_path):
    model = sparse()
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.ModuleDict({"base_layer": up})
    with pytest.raises(ValueError, match=f"an adapter sits on '{UP}'.*merge it first"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_blocks_are_not_split_over_devices(llama):
    config = transformers.AutoConfig.from_pretrained(llama[0])
    config.distributed_config = {}
    with pytest.raises(ValueError, match="cannot be split over devices while loading"):
        transformers.LlamaForCausalLM.from_pretrained(llama[0], config=config)


def test_two_methods_in_one_model_are_refused(tmp_path):
    model = sparse()
    model.hf_quantizer = type(
        "Other", (BlockSparseHfQuantizer.__base__,), {"is_serializable": None, "is_trainable": None}
    )(transformers.TorchAoConfig.__new__(transformers.TorchAoConfig))
    model.hf_quantizer.quantization_config.quant_method = "torchao"
    with pytest.raises(ValueError, match="quantized with torchao and block-sparse.*torch.save"):
        model.save_pretrained(tmp_path / "model")


def test_a_dense_model_is_not_swapped_on_the_disk(tmp_path):
    build("llama").save_pretrained(tmp_path)
    places = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="on the disk cannot be swapped while loading"):
        transformers.LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=BlockSparseConfig(), device_map=places
        )
    with pytest.raises(ValueError, match="layers is for save_pretrained to write"):
        layer = {"shape": [8, 8], "blocksize": [8, 8], "stored_blocks": 1, "bias": False}
        transformers.LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=BlockSparseConfig(layers={"lm_head": layer})
        )


@pytest.mark.parametrize(
    "settings, rule",
    [
        ({"blocksize": 0}, "blocksize"),
        ({"min_sparsity": 2.0}, r"min_sparsity must lie in \[0, 1\]"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names"),
        ({"format_version": "1"}, "format version '1'"),
    ],
)
def test_settings_are_checked(settings, rule):
    with pytest.raises((ValueError, TypeError), match=f"BlockSparseConfig: .*{rule}"):
        BlockSparseConfig(**settings)


def test_a_config_survives_json():
    config = BlockSparseConfig((8, 16), 0.5, ["lm_head"])
    again = BlockSparseConfig.from_dict(json.loads(config.to_json_string()))
    assert vars(again) == vars(config)


@pytest.mark.parametrize("library", ["transformers", "peft"])
@pytest.mark.parametrize(
    "present, rule",
    [
        (None, r"needs {0}: pip install 'torchao_superblock\[{0}\]'"),
        (
            types.SimpleNamespace(__version__="0.13.2"),
            r"works with {0} from .* 0.13.2 is installed",
        ),
        (types.SimpleNamespace(__version__="6.1.0.dev0"), "6.1.0.dev0 is installed: pip install"),
    ],
)
def test_a_missing_or_another_release_is_named(library, present, rule, monkeypatch):
    file = Path(importlib.util.find_spec(f"torchao_superblock.integrations.{library}").origin)
    monkeypatch.setitem(sys.modules, library, present)
    with pytest.raises(ImportError, match=rule.format(library)):
        runpy.run_path(str(file))
