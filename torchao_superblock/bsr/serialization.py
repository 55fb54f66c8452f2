"""What the metadata of a saved model says: which layers are block-sparse, and what must hold for the file to be whole.

    format, version   "torchao_superblock.bsr"; "1", or "2" where features of some layers were dropped, or "3" where
                      there is a key of version 3, each of which is left out where it is empty, or the blocks of some
                      layer do not divide its features: the last ones are padded
    layers            JSON: FQN -> in_features, out_features, blocksize, activation, bias; dense_shape (version 2);
                      kind (version 3): what the layer stands for, where that is no nn.Linear: "nn.Conv2d", 1x1, or
                      what its library calls it
    attention         JSON: FQN -> embed_dim, kdim, vdim, num_heads and the names of its projections among the layers
                      (version 3)
    folded            JSON: FQN -> the activation that stood there and that the layer before it applies itself
    folded_by         JSON: FQN in `folded` -> FQN of that layer, where places are not numbered, or it is not the
                      nearest block-sparse one in front (version 3)
    gated             JSON: FQN of a gated MLP -> the activation that it computes at once with its layers (version 3)
    aliases           JSON: name -> name of the tensor that it shares its memory with
    checksums         JSON: name -> CRC-32 of the tensor's name, dtype, shape and bytes
    checksum          CRC-32 of all the others

Files of releases before there were checksums lack the last two.
"""

import itertools
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchao_superblock.bsr.attention import IN_PROJECTIONS, BSRMultiheadAttention
from torchao_superblock.bsr.folded_activation import FoldedActivation
from torchao_superblock.bsr.gated_mlp import GatedMLP
from torchao_superblock.bsr.linear import BSRLinear
from torchao_superblock.common.blocks import padded_shape, parse_blocksize
from torchao_superblock.ops import ACTIVATIONS

FORMAT = "torchao_superblock.bsr"
VERSIONS = ("1", "2", "3")
_KEYS = {"format", "version", "layers", "folded", "aliases"}
_NEW_KEYS = {"attention", "folded_by", "gated"}  # of version 3; left out where empty
_CHECKS = {"checksums", "checksum"}
_LAYER_KEYS = {"in_features", "out_features", "blocksize", "activation", "bias"}
ATTENTION_SIZES = ("embed_dim", "kdim", "vdim", "num_heads")


@dataclass
class Description:
    """What a file says about the model in it; the attributes are those of the module's description.

    `checksums` is None for a file that has none, and every layer has a `dense_shape`, a pair.
    """

    layers: dict[str, dict[str, Any]]
    folded: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, str] | None = None
    folded_by: dict[str, str] = field(default_factory=dict)
    gated: dict[str, str] = field(default_factory=dict)
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)

    def applies(self, place: str, siblings: Iterable[str]) -> str | None:
        """FQN of the layer that applies a folded activation.

        Args:
            place: FQN of the activation.
            siblings: names of the children of the module that it is in.
        """
        if place in self.folded_by:
            return self.folded_by[place]
        parent, _, name = place.rpartition(".")
        before = None
        for sibling in itertools.takewhile(lambda sibling: sibling != name, siblings):
            path = f"{parent}.{sibling}" if parent else sibling
            before = path if path in self.layers else before
        return before


def describe(model: nn.Module, aliases: dict[str, str]) -> Description:
    """The description of a swapped model, without checksums."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {
        fqn: {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "blocksize": list(module.blocksize),
            "activation": module.activation,
            "bias": module.bias is not None,
        }
        | ({"dense_shape": list(module.dense_shape)} if module.is_narrowed else {})
        | ({"kind": module.DENSE} if module.DENSE != BSRLinear.DENSE else {})
        for fqn, module in modules.items()
        if isinstance(module, BSRLinear)
    }
    names = {module: fqn for fqn, module in modules.items()}
    description = Description(layers, {}, aliases)
    for fqn, module in modules.items():
        if isinstance(module, FoldedActivation) and not module.is_left_to_itself:
            description.folded[fqn] = module.activation
            layer = names.get(module.layer())
            parent, _, name = fqn.rpartition(".")
            # A file has no order of children but that of numbers.
            is_clear = name.isdecimal() and layer == description.applies(
                fqn, modules[parent]._modules
            )
            if layer is not None and not is_clear:
                description.folded_by[fqn] = layer
        elif isinstance(module, GatedMLP):
            description.gated[fqn] = module.fused_activation
        elif isinstance(module, BSRMultiheadAttention):
            description.attention[fqn] = _described_attention(module)
    return description


def _described_attention(module: BSRMultiheadAttention) -> dict[str, Any]:
    names = (*IN_PROJECTIONS.values(), "out_proj")
    return {size: getattr(module, size) for size in ATTENTION_SIZES} | {
        "projections": [name for name in names if isinstance(module._modules.get(name), BSRLinear)]
    }


def to_metadata(description: Description, checksums: dict[str, str]) -> dict[str, str]:
    """The metadata for a description; its length depends on the names of the checksums only."""
    layers = description.layers
    new = {key: json.dumps(getattr(description, key)) for key in _NEW_KEYS}
    new = {key: text for key, text in new.items() if text != "{}"}
    is_new = new or any("kind" in layer or _is_padded(layer) for layer in layers.values())
    is_narrowed = any("dense_shape" in layer for layer in layers.values())
    metadata = new | {
        "format": FORMAT,
        "version": "3" if is_new else "2" if is_narrowed else "1",
        "layers": json.dumps(layers),
        "folded": json.dumps(description.folded),
        "aliases": json.dumps(description.aliases),
        "checksums": json.dumps(checksums),
    }
    return metadata | {"checksum": _checksum(metadata)}


def from_metadata(metadata: dict[str, str]) -> Description:
    """The description that a file's metadata holds, every field checked.

    Args:
        metadata: of a known `format` and `version`.

    Raises:
        ValueError: it is not what :func:`to_metadata` or an earlier release makes; the message says how.
    """
    known = metadata.keys() - (_NEW_KEYS if metadata["version"] == "3" else set())
    whole = known == _KEYS | _CHECKS
    if not whole and known != _KEYS:
        raise ValueError(f"its metadata has the keys {', '.join(sorted(metadata))}")
    if whole and metadata["checksum"] != _checksum(metadata):
        raise ValueError("its metadata does not have the checksum of what was saved")
    try:
        layers, folded, aliases, checksums, folded_by, gated, attention = (
            json.loads(metadata.get(key, "{}"))
            for key in (
                "layers",
                "folded",
                "aliases",
                "checksums",
                "folded_by",
                "gated",
                "attention",
            )
        )
        for fqn, spec in layers.items():
            _check_layer(fqn, spec)
            if metadata["version"] != "3" and _is_padded(spec):
                raise ValueError(f"blocks of {spec['blocksize']} do not divide the layer {fqn!r}")
        for fqn, spec in attention.items():
            _check_attention(fqn, spec, layers)
        for texts in (folded, aliases, checksums, folded_by, gated):
            if not all(type(text) is str for text in texts.values()):
                raise TypeError(f"{texts} does not hold texts")
        for place, layer in folded_by.items():
            if place not in folded or layer not in layers:
                raise ValueError(f"{place!r} is said to be folded into {layer!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"its metadata cannot be read ({type(error).__name__}: {error})"
        ) from error
    return Description(
        layers, folded, aliases, checksums if whole else None, folded_by, gated, attention
    )


def _is_padded(spec: dict[str, Any]) -> bool:
    shape = spec["out_features"], spec["in_features"]
    return padded_shape(shape, tuple(spec["blocksize"])) is not None


def _check_layer(fqn: str, spec: dict[str, Any]) -> None:
    if spec.keys() - {"dense_shape", "kind"} != _LAYER_KEYS:
        raise KeyError(f"the layer {fqn!r} is described by {spec}")
    shape = (spec["out_features"], spec["in_features"])
    spec["dense_shape"] = tuple(spec.get("dense_shape", shape))
    spec["blocksize"] = parse_blocksize(spec["blocksize"])
    sizes = (*shape, *spec["dense_shape"])
    if len(sizes) != 4 or not all(type(size) is int and size > 0 for size in sizes):
        raise TypeError(f"the layer {fqn!r} is described by {spec}")
    if type(spec.setdefault("kind", BSRLinear.DENSE)) is not str:
        raise TypeError(f"the layer {fqn!r} is described by {spec}")
    if spec["activation"] not in ACTIVATIONS or type(spec["bias"]) is not bool:
        raise ValueError(f"the layer {fqn!r} is described by {spec}")


def _check_attention(fqn: str, spec: dict[str, Any], layers: dict[str, dict[str, Any]]) -> None:
    names, sizes = spec["projections"], [spec[size] for size in ATTENTION_SIZES]
    if spec.keys() != {"projections", *ATTENTION_SIZES} or not all(
        type(size) is int and size > 0 for size in sizes
    ):
        raise TypeError(f"the attention {fqn!r} is described by {spec}")
    E, K, V, heads = sizes
    packed = E == K == V
    known = ("in_proj",) if packed else ("q_proj", "k_proj", "v_proj")
    shapes = {"in_proj": (3 * E, E), "k_proj": (E, K), "v_proj": (E, V)}
    if E % heads or not names or len(names) != len(set(names)) or set(names) - {*known, "out_proj"}:
        raise ValueError(f"the attention {fqn!r} is described by {spec}")
    for name in names:
        layer = layers[f"{fqn}.{name}".removeprefix(".")]
        wanted = {"dense_shape": shapes.get(name, (E, E)), "activation": "none"}
        if name != "out_proj":
            wanted["bias"] = False
        if any(layer[key] != value for key, value in wanted.items()):
            raise ValueError(f"{name} of the attention {fqn!r} is described by {layer}")


def _checksum(metadata: dict[str, str]) -> str:
    """CRC-32 over the metadata without its own checksum, as eight hexadecimal digits."""
    text = json.dumps(sorted((key, text) for key, text in metadata.items() if key != "checksum"))
    return f"{zlib.crc32(text.encode()):08x}"
