import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.bsr.common import prune
from torchao_superblock.bsr import BSRLinear, load_bsr, save_bsr, serialization, swap_to_bsr


class Model(nn.Module):
    def __init__(self, width: int = 32, extra_buffer: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Linear(width, 64)
        self.down = nn.Linear(64, width, bias=False)
        self.head = nn.Linear(width, 10)
        self.head.weight = self.embedding.weight
        if extra_buffer:
            self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        return self.head(self.down(torch.relu(self.up(x))))


@pytest.fixture
def swapped():
    torch.manual_seed(3)
    model = Model().eval()
    prune(model.up, 16)
    prune(model.down, (8, 16))
    swap_to_bsr(model, min_sparsity=0.25)
    return model


@pytest.fixture
def tokens():
    return torch.randint(10, (7,))


def test_round_trip_into_a_dense_model(swapped, tokens, tmp_path):
    save_bsr(swapped, tmp_path / "model.safetensors")
    seen = []
    fresh = Model().eval()
    fresh.up.register_forward_hook(lambda *_: seen.append("hook"))
    assert load_bsr(fresh, tmp_path / "model.safetensors") is fresh
    assert isinstance(fresh.up, BSRLinear)
    assert fresh.down.blocksize == (8, 16)
    assert fresh.head.weight is fresh.embedding.weight
    assert not fresh.up.training
    assert torch.equal(fresh(tokens), swapped(tokens))
    assert seen == ["hook"]


def test_round_trip_into_a_swapped_model_with_other_blocks(swapped, tokens, tmp_path):
    save_bsr(swapped, tmp_path / "model.safetensors")
    torch.manual_seed(9)
    other = Model().eval()
    prune(other.up, 32, 0.5)
    swap_to_bsr(other, min_sparsity=0.25)
    load_bsr(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(tokens), swapped(tokens))


def test_round_trip_into_a_meta_model_keeps_ties(swapped, tokens, tmp_path):
    save_bsr(swapped.double(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        fresh = Model().eval()
    load_bsr(fresh, tmp_path / "model.safetensors")
    assert fresh.up.values.dtype == torch.float64
    assert fresh.head.weight is fresh.embedding.weight
    assert torch.equal(fresh(tokens), swapped(tokens))


def test_parameters_keep_the_dtype_of_the_model(swapped, tmp_path):
    save_bsr(swapped, tmp_path / "model.safetensors")
    fresh = load_bsr(Model().bfloat16(), tmp_path / "model.safetensors")
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}


def test_activation_is_kept(tmp_path):
    layer = prune(nn.Linear(32, 32), 16)
    model = nn.Sequential(BSRLinear.from_dense(layer, 16))
    model[0].activation = "gelu"  # of the layer's own, nothing was folded
    save_bsr(model, tmp_path / "m.safetensors")
    fresh = load_bsr(nn.Sequential(nn.Linear(32, 32)), tmp_path / "m.safetensors")
    assert fresh[0].activation == "gelu"


class TestFoldedActivations:
    """Neither applied twice nor lost."""

    @staticmethod
    def build():
        torch.manual_seed(0)
        return nn.Sequential(prune(nn.Linear(32, 32), 16), nn.GELU(), nn.Linear(32, 4)).eval()

    @pytest.fixture
    def folded(self):
        model = self.build()
        swap_to_bsr(model, min_sparsity=0.25, fuse_activations=True)
        return model

    def test_into_a_dense_and_into_a_folded_model(self, folded, tmp_path):
        save_bsr(folded, tmp_path / "m.safetensors")
        x = torch.randn(3, 32)
        fresh = load_bsr(self.build(), tmp_path / "m.safetensors")
        assert torch.equal(fresh(x), folded(x))
        assert torch.equal(load_bsr(fresh, tmp_path / "m.safetensors")(x), folded(x))

    def test_mismatches_are_refused(self, folded, tmp_path):
        path = tmp_path / "m.safetensors"
        save_bsr(folded, path)
        other = self.build()
        other[1] = nn.ReLU()
        assert_load_fails(other, path, r"at '1' .* has a folded gelu, the model has ReLU")
        plain = self.build()
        swap_to_bsr(plain, min_sparsity=0.25)
        save_bsr(plain, path)
        assert_load_fails(folded, path, "at '1' .* an activation that runs on its own")


class TestDroppedFeatures:
    @staticmethod
    def build(hidden=96):
        torch.manual_seed(0)
        first, second = nn.Linear(32, hidden), nn.Linear(hidden, 32)
        with torch.no_grad():
            first.weight[:32] = 0
        return nn.Sequential(first, nn.GELU(), second).eval()

    @pytest.fixture
    def narrow(self):
        model = self.build()
        swap_to_bsr(model, 16, min_sparsity=0.0, drop_dead_features=True)
        assert model[0].out_features == 64
        return model

    def test_into_a_dense_a_swapped_and_a_narrowed_model(self, narrow, tmp_path):
        path = tmp_path / "m.safetensors"
        save_bsr(narrow, path)
        x = torch.randn(3, 32)
        swapped = self.build()
        swap_to_bsr(swapped, 16, min_sparsity=0.0)
        with torch.device("meta"):
            empty = self.build()
        for model in (self.build(), swapped, copy.deepcopy(narrow), empty):
            load_bsr(model, path)
            assert torch.equal(model(x), narrow(x))
            assert model[0].dense_shape == (96, 32) and model[2].dense_shape == (32, 96)

    def test_the_version_says_whether_features_were_dropped(self, narrow, tmp_path):
        swapped = self.build()
        swap_to_bsr(swapped, 16, min_sparsity=0.0)
        for model, version in ((narrow, "2"), (swapped, "1")):
            save_bsr(model, tmp_path / "m.safetensors")
            with safe_open(tmp_path / "m.safetensors", "pt") as file:
                assert file.metadata()["version"] == version

    def test_a_state_dict_of_another_width_is_refused_with_advice(self, narrow):
        swapped = self.build()
        swap_to_bsr(swapped, 16, min_sparsity=0.0)
        with pytest.raises(RuntimeError, match="0: crow_indices must have 7 entries.*load_bsr"):
            swapped.load_state_dict(narrow.state_dict())

    def test_a_model_with_all_features_replaces_a_narrowed_one(self, narrow, tmp_path):
        path = tmp_path / "m.safetensors"
        swapped = self.build()
        swap_to_bsr(swapped, 16, min_sparsity=0.0)
        save_bsr(swapped, path)
        x = torch.randn(3, 32)
        assert torch.equal(load_bsr(narrow, path)(x), swapped(x))
        assert not narrow[0].is_narrowed

    def test_mismatches_are_refused(self, narrow, tmp_path):
        path = tmp_path / "m.safetensors"
        save_bsr(narrow, path)
        assert_load_fails(
            self.build(64), path, r"'0' has shape \(96, 32\) in the file, but \(64, 32\)"
        )
        for damage in (3, "ab", [8, 8], None, [96.0, 32.0], [96]):
            save_bsr(narrow, path)

            def change(metadata, damage=damage):
                layers = json.loads(metadata["layers"])
                layers["0"]["dense_shape"] = damage
                metadata["layers"] = json.dumps(layers)

            rewrite(path, change_metadata=change)
            assert_load_fails(self.build(), path, "damaged|has shape")


def test_a_file_is_replaced_only_by_a_complete_one(swapped, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_bsr(swapped, path)
    before = path.read_bytes()

    def failing(tensors, filename, metadata):
        with open(filename, "w") as file:
            file.write("half of it")
        raise OSError("disk full")

    monkeypatch.setattr(serialization, "save_file", failing)
    with pytest.raises(OSError, match="disk full"):
        save_bsr(swapped, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_safetensors_cannot_store_is_named(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match=r"'0\._extra_state'.*dict, not a tensor"):
        save_bsr(nn.Sequential(Extra(4, 4)), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        save_bsr(nn.Linear(4, 4, device="meta"), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def assert_load_fails(model, path, words, error=ValueError):
    before = copy.deepcopy(model)
    identities = [id(module) for module in model.modules()]
    with pytest.raises(error, match=words):
        load_bsr(model, path)
    assert [id(module) for module in model.modules()] == identities
    for (key, tensor), expected in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert tensor.is_meta or torch.equal(tensor, expected), key


def rewrite(path, change_tensors=lambda t: None, change_metadata=lambda m: None):
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    change_tensors(tensors)
    change_metadata(metadata)
    save_file(tensors, path, metadata=metadata)


def test_a_missing_foreign_or_damaged_file_is_refused(swapped, tmp_path):
    path = tmp_path / "model.safetensors"
    assert_load_fails(Model(), path, "no such file", FileNotFoundError)
    save_file({"a": torch.zeros(1)}, path)
    assert_load_fails(Model(), path, "not written by save_bsr")
    path.write_bytes(b"nonsense")
    assert_load_fails(Model(), path, "damaged")
    save_bsr(swapped, path)
    path.write_bytes(path.read_bytes()[:-10])
    assert_load_fails(Model(), path, "damaged")
    save_bsr(swapped, path)
    rewrite(path, change_metadata=lambda metadata: metadata.update(version="99"))
    assert_load_fails(Model(), path, "version 99.*upgrade")
    save_bsr(swapped, path)
    for broken in ("{", "[]", "null", '{"up": {}}', '{"up": 3}'):
        save_bsr(swapped, path)
        rewrite(path, change_metadata=lambda metadata, text=broken: metadata.update(layers=text))
        assert_load_fails(Model(), path, "damaged")
    save_bsr(swapped, path)
    rewrite(path, lambda tensors: tensors.pop("up.values"))
    assert_load_fails(Model(), path, r"missing up\.values")


def test_a_file_that_breaks_the_format_is_refused(swapped, tmp_path):
    path = tmp_path / "model.safetensors"
    save_bsr(swapped, path)
    rewrite(path, lambda tensors: tensors["up.col_indices"].fill_(7))
    assert_load_fails(Model(), path, r"'up'.*col_indices must lie in \[0, 2\), .*got 7")


def test_a_file_of_another_model_is_refused(swapped, tmp_path):
    path = tmp_path / "model.safetensors"
    save_bsr(swapped, path)
    assert_load_fails(Model(width=48), path, r"'(up|down)' has shape")
    assert_load_fails(nn.Sequential(nn.Linear(4, 4)), path, "no such module")
    model = Model()
    model.up = nn.Identity()
    assert_load_fails(model, path, "'up' is block-sparse in the file, but a Identity")
    model = Model()
    model.down = nn.Linear(64, 32)
    assert_load_fails(model, path, "'down' has no bias in the file")
    model = Model()
    model.norm = nn.LayerNorm(16)
    assert_load_fails(
        model, path, r"not in the model: .*norm\.running_mean.*norm\.weight has shape"
    )
    model = Model()
    model.more = nn.Linear(2, 2)
    assert_load_fails(model, path, r"missing in the file: more\.weight, more\.bias")


def test_a_meta_buffer_that_no_file_can_fill_is_named(swapped, tmp_path):
    save_bsr(swapped, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = Model(extra_buffer=True)
    assert_load_fails(model, tmp_path / "m.safetensors", "does not hold scale.*meta device")


def test_a_failure_while_loading_is_undone(swapped, tmp_path, monkeypatch):
    save_bsr(swapped, tmp_path / "m.safetensors")
    model = Model()
    real = model.load_state_dict

    def failing(*args, **kwargs):
        real(*args, **kwargs)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "load_state_dict", failing)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="out of memory"):
        load_bsr(model, tmp_path / "m.safetensors")
    assert type(model.up) is nn.Linear
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_failure_while_filling_a_meta_model_is_undone(swapped, tmp_path):
    save_bsr(swapped, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = Model()

    def failing(module, incompatible_keys):
        raise RuntimeError("out of memory")

    model.norm.register_load_state_dict_post_hook(failing)
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="out of memory"):
        load_bsr(model, tmp_path / "m.safetensors")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert type(model.up) is nn.Linear


def test_parameters_stay_the_same_objects_for_the_optimizer(swapped, tokens, tmp_path):
    save_bsr(swapped, tmp_path / "m.safetensors")
    other = copy.deepcopy(swapped)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    before = dict(other.named_parameters())
    load_bsr(other, tmp_path / "m.safetensors")
    assert torch.equal(other(tokens), swapped(tokens))
    assert all(before[name] is parameter for name, parameter in other.named_parameters())
    fresh = Model()
    bias = fresh.up.bias
    load_bsr(fresh, tmp_path / "m.safetensors")
    assert fresh.up.bias is bias


def test_encoders_lose_their_nested_tensors_when_loaded_too(tmp_path):
    def build():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        prune(encoder.layers[1].linear1, 16)
        return encoder.eval()

    model = build()
    swap_to_bsr(model, min_sparsity=0.25)
    save_bsr(model, tmp_path / "m.safetensors")
    fresh = load_bsr(build(), tmp_path / "m.safetensors")
    assert not fresh.use_nested_tensor
    x, padding = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        assert torch.equal(fresh(x, src_key_padding_mask=padding)[~padding], expected[~padding])


def test_a_compiled_model_has_the_names_of_the_module_inside(swapped, tokens, tmp_path):
    save_bsr(torch.compile(swapped, backend="eager"), tmp_path / "m.safetensors")
    fresh = load_bsr(Model().eval(), tmp_path / "m.safetensors")
    assert torch.equal(fresh(tokens), swapped(tokens))
    again = load_bsr(torch.compile(Model().eval(), backend="eager"), tmp_path / "m.safetensors")
    assert torch.equal(again(tokens), swapped(tokens))


def test_a_root_layer_and_a_missing_directory_are_refused(swapped, tmp_path):
    with pytest.raises(ValueError, match="itself a BSRLinear.*nn.Sequential"):
        save_bsr(swapped.up, tmp_path / "m.safetensors")
    save_bsr(swapped, tmp_path / "m.safetensors")
    assert_load_fails(nn.Linear(32, 64), tmp_path / "m.safetensors", "itself a linear layer")
    with pytest.raises(FileNotFoundError, match="no such directory: '.*nowhere'"):
        save_bsr(swapped, tmp_path / "nowhere" / "m.safetensors")


def test_metadata_describes_the_layers(swapped, tmp_path):
    save_bsr(swapped, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["layers"])["down"] == {
        "in_features": 64,
        "out_features": 32,
        "blocksize": [8, 16],
        "activation": "none",
        "bias": False,
    }
