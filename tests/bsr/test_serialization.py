"""What a file's metadata says: which keys it has, and which combinations of them are read."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.bsr.common import prune_all
from tests.bsr.test_attention import prune_attention
from tests.bsr.test_gated_mlp import Gated
from tests.reference import relative_error
from torchao_superblock.bsr import (
    BSRMultiheadAttention,
    load_bsr,
    save_bsr,
    swap_to_bsr,
    swap_to_dense,
)
from torchao_superblock.bsr.gated_mlp import GatedMLP
from torchao_superblock.bsr.serialization import Description, from_metadata, to_metadata
from torchao_superblock.model_file import read_model


class Backwards(nn.Module):
    """Its activation is registered in front of the layer that comes to apply it."""

    def __init__(self):
        super().__init__()
        self.act = nn.GELU()
        self.fc1 = nn.Linear(64, 96)
        self.fc2 = nn.Linear(96, 64)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Forwards(Backwards):
    """Between the two layers, which a file alone could not tell by the names."""

    def __init__(self):
        super().__init__()
        self.act = self._modules.pop("act")
        self.fc2 = self._modules.pop("fc2")


class Block(nn.Module):
    def __init__(self, *parts: str):
        super().__init__()
        if "attention" in parts:
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        if "folded_by" in parts:
            self.mlp = Backwards()
            self.other = Forwards()
        if "gated" in parts:
            self.gated = Gated()

    def forward(self, x):
        if hasattr(self, "attention"):
            x = x + self.attention(x, x, x, need_weights=False)[0]
        for name in ("mlp", "other", "gated"):
            if hasattr(self, name):
                x = x + getattr(self, name)(x)
        return x


NEW_KEYS = ("attention", "folded_by", "gated")


@pytest.mark.parametrize(
    "parts", [(), *((key,) for key in NEW_KEYS), ("attention", "gated"), NEW_KEYS]
)
def test_each_new_key_is_written_where_it_says_something(parts, tmp_path):
    torch.manual_seed(0)
    model = Block(*parts).eval()
    model.last = nn.Linear(64, 64)
    prune_attention(prune_all(model, 16, 0.5), 0.5, blocksize=16)
    dense, fresh = copy.deepcopy(model), copy.deepcopy(model)
    swap_to_bsr(model, 16, min_sparsity=0.3, fuse_activations=True)
    path = tmp_path / "m.safetensors"
    save_bsr(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert {key for key in NEW_KEYS if key in metadata} == set(parts)
    assert metadata["version"] == ("3" if parts else "1")
    load_bsr(fresh, path)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
        assert relative_error(model(x), dense(x).double()) <= 1e-5
    if "attention" in parts:
        assert type(fresh.attention) is BSRMultiheadAttention
    if "gated" in parts:
        assert isinstance(fresh.gated, GatedMLP)
    alone = read_model(path).model  # as the command line has it, of nothing but the file
    for one in (fresh, alone):
        swap_to_dense(one)
        for key, tensor in dense.state_dict().items():
            assert torch.equal(one.state_dict()[key], tensor), key


def test_keys_of_version_3_belong_to_it_alone():
    description = Description({}, {}, gated={"mlp": "silu"})
    metadata = to_metadata(description, {})
    assert from_metadata(metadata).gated == {"mlp": "silu"}
    for version in ("1", "2"):
        with pytest.raises(ValueError, match="its metadata has the keys"):
            from_metadata(metadata | {"version": version})
    for key in ("folded_by", "attention"):  # whoever adds one must have known the checksum
        with pytest.raises(ValueError, match="checksum"):
            from_metadata(metadata | {key: "{}"})
