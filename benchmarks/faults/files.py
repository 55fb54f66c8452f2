"""Mutated files: whatever is in them, `load_bsr` loads what was saved, or refuses and changes nothing."""

from __future__ import annotations

import copy
import json
import random
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.faults import models
from benchmarks.faults.case import Fault, Kind
from benchmarks.faults.portrait import Portrait, describe, differences, identities, portrait
from torchao_superblock import BSRLinear, load_bsr, save_bsr

TARGETS = ("dense", "swapped", "meta", "half", "unwritable")


@cache
def saved(variant: str) -> tuple[nn.Module, bytes]:
    """A swapped model and the file it is saved as."""
    model = models.swapped(variant, seed=1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        save_bsr(model, path)
        return model, path.read_bytes()


def target_model(variant: str, target: str) -> nn.Module:
    """A model to load into, with other numbers than the file."""
    if target == "swapped":
        return models.swapped(variant, seed=2)
    model = models.build(variant, seed=2, device="meta" if target == "meta" else "cpu")
    if target == "half":
        model.half()
    if target == "unwritable":
        # Its elements share one place, so that copying into it fails; the last tensor of the model to be written.
        last = list(model.modules())[-1]
        last._parameters["bias"] = nn.Parameter(torch.zeros(1).expand(last.out_features))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Mutations. Each takes the file's bytes and returns others.

Mutation = Callable[[bytes, random.Random], bytes]


def _header_end(blob: bytes) -> int:
    return 8 + struct.unpack("<Q", blob[:8])[0]


def _somewhere(blob: bytes, source: random.Random) -> int:
    """A position, as often in the header as in the tensors."""
    end = _header_end(blob)
    return source.randrange(end) if source.random() < 0.5 else source.randrange(end, len(blob))


def _flip_bit(blob: bytes, source: random.Random) -> bytes:
    at = _somewhere(blob, source)
    return blob[:at] + bytes([blob[at] ^ 1 << source.randrange(8)]) + blob[at + 1 :]


def _overwrite(blob: bytes, source: random.Random) -> bytes:
    at, data = _somewhere(blob, source), source.randbytes(source.choice([1, 2, 4, 16]))
    return blob[:at] + data + blob[at + len(data) :]


def _zero(blob: bytes, source: random.Random) -> bytes:
    at, size = _somewhere(blob, source), source.choice([8, 64, 512])
    return blob[:at] + bytes(min(size, len(blob) - at)) + blob[at + size :]


def _truncate(blob: bytes, source: random.Random) -> bytes:
    return blob[: source.choice([0, 4, 8, _header_end(blob), source.randrange(len(blob))])]


def _cut(blob: bytes, source: random.Random) -> bytes:
    at = _somewhere(blob, source)
    return blob[:at] + blob[at + source.choice([1, 4, 64]) :]


def _insert(blob: bytes, source: random.Random) -> bytes:
    at = _somewhere(blob, source)
    return blob[:at] + source.randbytes(source.choice([1, 4, 64])) + blob[at:]


def _repeat(blob: bytes, source: random.Random) -> bytes:
    at, size = _somewhere(blob, source), source.choice([4, 32, 256])
    return blob[:at] + blob[at : at + size] + blob[at:]


def _header_length(blob: bytes, source: random.Random) -> bytes:
    length = source.choice([0, 1, 2**63, 2**64 - 1, _header_end(blob) - 9, source.randrange(9999)])
    return struct.pack("<Q", length) + blob[8:]


def _with_header(change: Callable[[dict[str, Any], random.Random], None]) -> Mutation:
    """Changes the header; what follows stays."""

    def mutate(blob: bytes, source: random.Random) -> bytes:
        end = _header_end(blob)
        header = json.loads(blob[8:end])
        change(header, source)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + blob[end:]

    return mutate


def _entries(header: dict[str, Any]) -> list[str]:
    return [key for key in header if key != "__metadata__"]


def _offsets(header: dict[str, Any], source: random.Random) -> None:
    """Two tensors of one size change places."""
    a = source.choice(_entries(header))
    size = {
        key: header[key]["data_offsets"][1] - header[key]["data_offsets"][0]
        for key in _entries(header)
    }
    b = source.choice([key for key in size if size[key] == size[a]])
    offsets = header[a]["data_offsets"], header[b]["data_offsets"]
    header[b]["data_offsets"], header[a]["data_offsets"] = offsets


def _dtype(header: dict[str, Any], source: random.Random) -> None:
    """The same bytes as another type of the same width."""
    same = {
        "F32": ["I32", "U32"],
        "I32": ["F32", "U32"],
        "I64": ["F64", "U64"],
        "F16": ["BF16", "I16"],
    }
    entry = header[source.choice(_entries(header))]
    entry["dtype"] = source.choice(same.get(entry["dtype"], ["F32"]))


def _shape(header: dict[str, Any], source: random.Random) -> None:
    """The same bytes in another shape."""
    entry = header[source.choice(_entries(header))]
    entry["shape"] = source.choice([entry["shape"][::-1], [1, *entry["shape"]], [-1], [2**62, 4]])


def _renamed(header: dict[str, Any], source: random.Random) -> None:
    key = source.choice(_entries(header))
    header[source.choice([key + "x", "", "weight", "__metadata_", key.upper()])] = header.pop(key)


_JUNK = ("null", "[]", "{}", "3", '"x"', "[" * 100_000, '{"0": ' * 5000, "NaN", "1e999", "{")


def _metadata(header: dict[str, Any], source: random.Random) -> None:
    """One entry of the metadata is something else, or nothing."""
    metadata = header["__metadata__"]
    key = source.choice(list(metadata))
    if source.random() < 0.2:
        del metadata[key]
    else:
        metadata[key] = source.choice(_JUNK)


def _layer(header: dict[str, Any], source: random.Random) -> None:
    """One fact about one layer is something else."""
    metadata = header["__metadata__"]
    layers = json.loads(metadata["layers"])
    layer = layers[source.choice(list(layers))]
    key = source.choice(list(layer))
    other = [
        0,
        -1,
        1,
        10**30,
        1.5,
        True,
        None,
        [],
        "relu",
        "gelu",
        [8, 8],
        [4, 16],
        [0, 8],
        [8],
        {"a": 1},
    ]
    if key == "bias":
        other = [not layer[key], None, 3]
    if key == "activation" and layer[key] == "none":
        other = [
            "",
            None,
            3,
            [],
        ]  # an activation that nothing else in the file speaks of is a layer's own
    layer[key] = source.choice([value for value in other if value != layer[key]])
    metadata["layers"] = json.dumps(layers)


def _folded(header: dict[str, Any], source: random.Random) -> None:
    """Activations that the layers say nothing of, or that disagree with them."""
    metadata = header["__metadata__"]
    folded = json.loads(metadata["folded"])
    if folded and source.random() < 0.5:
        folded.pop(source.choice(list(folded)))
    else:
        folded[source.choice(["1", "3", "", "up", "nowhere"])] = source.choice(
            ["gelu", "relu", 3, None]
        )
    metadata["folded"] = json.dumps(folded)


def _aliases(header: dict[str, Any], source: random.Random) -> None:
    """A tensor of the file is said to be another one; or an alias leads nowhere."""
    metadata = header["__metadata__"]
    aliases = json.loads(metadata["aliases"])
    keys = _entries(header)
    aliases[source.choice(keys)] = source.choice([*keys, "nowhere", 3, None])
    metadata["aliases"] = json.dumps(aliases)


def _repacked(change: Callable[[dict[str, Tensor], random.Random], None]) -> Mutation:
    """Changes tensors and packs them as before: a file in which everything fits."""

    def mutate(blob: bytes, source: random.Random) -> bytes:
        tensors = safetensors.torch.load(blob)
        metadata = json.loads(blob[8 : _header_end(blob)])["__metadata__"]
        change(tensors, source)
        return safetensors.torch.save(tensors, metadata)

    return mutate


def _missing(tensors: dict[str, Tensor], source: random.Random) -> None:
    del tensors[source.choice(list(tensors))]


def _extra(tensors: dict[str, Tensor], source: random.Random) -> None:
    name = source.choice(["more", "0.weight", "up.weight", "0.plan"])
    tensors[name] = torch.zeros(source.choice([(), (3,), (32, 32)]))


def _cast(tensors: dict[str, Tensor], source: random.Random) -> None:
    key = source.choice(list(tensors))
    dtypes = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
    ]
    dtype = source.choice([dtype for dtype in dtypes if dtype != tensors[key].dtype])
    tensors[key] = tensors[key].to(dtype)


def _cast_indices(tensors: dict[str, Tensor], source: random.Random) -> None:
    for key in tensors:
        if key.endswith("indices"):
            tensors[key] = tensors[key].to(source.choice([torch.float32, torch.int64, torch.int16]))


def _indices(tensors: dict[str, Tensor], source: random.Random) -> None:
    key = source.choice([key for key in tensors if key.endswith("indices")])
    index = tensors[key]
    if source.random() < 0.5:
        tensors[key] = index.flip(0).contiguous()
    else:
        index[source.randrange(len(index))] = source.choice([-1, 2**31 - 1, 0, 3, len(index)])


def _values(tensors: dict[str, Tensor], source: random.Random) -> None:
    key = source.choice([key for key, tensor in tensors.items() if tensor.is_floating_point()])
    flat = tensors[key].view(-1)
    flat[source.randrange(len(flat))] = source.choice([0.0, 1e30, float("nan"), float("inf"), -1.0])


def _none(blob: bytes, source: random.Random) -> bytes:
    return blob


MUTATIONS: dict[str, Mutation] = {
    "nothing": _none,
    "a bit flipped": _flip_bit,
    "bytes overwritten": _overwrite,
    "bytes zeroed": _zero,
    "truncated": _truncate,
    "bytes cut out": _cut,
    "bytes inserted": _insert,
    "bytes repeated": _repeat,
    "another header length": _header_length,
    "offsets exchanged": _with_header(_offsets),
    "another dtype": _with_header(_dtype),
    "another shape": _with_header(_shape),
    "renamed": _with_header(_renamed),
    "other metadata": _with_header(_metadata),
    "another fact of a layer": _with_header(_layer),
    "other folded activations": _with_header(_folded),
    "other aliases": _with_header(_aliases),
    "a tensor missing": _repacked(_missing),
    "a tensor too many": _repacked(_extra),
    "a tensor cast": _repacked(_cast),
    "indices cast": _repacked(_cast_indices),
    "other indices": _repacked(_indices),
    "other values": _repacked(_values),
}


# ---------------------------------------------------------------------------------------------------------------------


def meaning(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, object]:
    """What a model computes with: its tensors, ties, block-sparse layers and activations."""
    result: dict[str, object] = {}
    first: dict[int, str] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            key = f"{fqn}.{name}"
            if tensor is not None:
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.detach().to(dtype)
                own = module._parameters.get(name)
                tie = first.setdefault(id(own), key) if own is not None else key
                # (requires_grad and the class belong to the model loaded into, not to the file)
                result[key] = (describe(tensor)[1:4], describe(tensor)[5], tie)
        result[f"{fqn}: class"] = type(module).__name__
        if hasattr(module, "activation"):
            result[f"{fqn}: activation"] = module.activation
        if isinstance(module, BSRLinear):
            result[f"{fqn}: shape"] = (module.dense_shape, module.blocksize)
    return result


@cache
def _expected(variant: str, half: bool) -> dict[str, object]:
    return meaning(saved(variant)[0], torch.float16 if half else None)


class Files(Kind):
    """One mutated file, loaded into one model."""

    name = "files"
    about = "files with bits, bytes, headers, metadata or tensors changed: loaded as saved, or refused unchanged"
    short, long = 600, 20_000

    def __init__(self) -> None:
        # A model that refused a file and is as it was can be loaded into again.
        self._unchanged: dict[tuple[str, str], tuple[nn.Module, Portrait, dict[str, int]]] = {}
        self._directory = tempfile.TemporaryDirectory()

    def run(self, index: int) -> str:
        source = self.random(index)
        variant, target = source.choice(models.VARIANTS), source.choice(TARGETS)
        name = list(MUTATIONS)[index % len(MUTATIONS)]
        blob = saved(variant)[1]
        mutated = MUTATIONS[name](blob, source)
        known = self._unchanged.pop((variant, target), None)
        if known is None:
            model = target_model(variant, target)
            known = model, portrait(model), identities(model)
        model, before, objects = known
        case = f"{name}, {variant} into {target}"
        path = Path(self._directory.name) / "model.safetensors"
        path.unlink(missing_ok=True)
        path.write_bytes(mutated)
        try:
            load_bsr(model, path)
        except Exception as error:
            now = portrait(model)
            if now != before or identities(model) != objects:
                text = differences(now, before) or "other objects"
                raise Fault("refused, but changed", f"{case}: {text}") from error
            self._unchanged[variant, target] = known
            if mutated == blob and target != "unwritable":
                raise Fault("a good file was refused", f"{case}: {error}") from error
            self._check_refusal(error, path, case)
            return "refused"
        expected, now = _expected(variant, target == "half"), meaning(model)
        if target == "unwritable":
            raise Fault("loaded what cannot be written", case)
        if now != expected:
            kind = (
                "a good file loaded as another model"
                if mutated == blob
                else "another model loaded in silence"
            )
            raise Fault(f"{kind} ({name})", f"{case}: {differences(now, expected)}")
        if target != "half":
            x = models.INPUTS[variant]()
            with torch.no_grad():
                if not torch.equal(model(x), saved(variant)[0](x)):
                    raise Fault("another forward", case)
        return "loaded"

    @staticmethod
    def _check_refusal(error: Exception, path: Path, case: str) -> None:
        text = f"{type(error).__name__}: {str(error)[:300]}"
        if type(error) is not ValueError and "unwritable" not in case:
            raise Fault(f"refused with {type(error).__name__}", f"{case}: {text}") from error
        if str(path) not in str(error):
            raise Fault("refused without naming the file", f"{case}: {text}") from error


class Overflow(Kind):
    """Finite numbers that the model's dtype cannot hold."""

    name = "files/overflow"
    about = "finite values that are infinite in the model's dtype: refused, nothing changed"
    short, long = 12, 200

    def run(self, index: int) -> str:
        source = self.random(index)
        variant = source.choice(models.VARIANTS)
        model = copy.deepcopy(saved(variant)[0])
        tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
        flat = source.choice(tensors).view(-1)
        flat[source.randrange(len(flat))] = source.choice([1e6, -7e4, 3e38])
        target = target_model(variant, "half")
        before = portrait(target)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.safetensors"
            save_bsr(model, path)
            try:
                load_bsr(target, path)
            except ValueError as error:
                if portrait(target) != before:
                    raise Fault("refused, but changed", variant) from error
                return "refused"
        raise Fault("finite values became infinite", variant)


class Mapped(Kind):
    """The file changes, or goes, after it was loaded."""

    name = "files/owned"
    about = "the file overwritten or truncated in place after loading: the model keeps its numbers"
    short, long = 8, 100

    def run(self, index: int) -> str:
        source = self.random(index)
        variant, target = (
            source.choice(models.VARIANTS),
            source.choice(["dense", "swapped", "meta"]),
        )
        model = target_model(variant, target)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.safetensors"
            path.write_bytes(saved(variant)[1])
            load_bsr(model, path)
            before = portrait(model)
            with open(path, "r+b") as file:
                if index % 2:
                    file.truncate(0)
                else:
                    file.write(bytes(path.stat().st_size))
            now = portrait(model)  # after truncating, reading a mapped page ends the process
        if now != before:
            raise Fault("the model changes with its file", f"{variant} into {target}")
        return "kept"


class Identical(Kind):
    """Two saves of one model."""

    name = "files/identical"
    about = "two saves of one model: the same bytes, and loaded and saved again the same"
    short, long = 8, 100

    def run(self, index: int) -> str:
        variant = models.VARIANTS[index % len(models.VARIANTS)]
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.safetensors"
            model = load_bsr(target_model(variant, "dense"), _written(path, saved(variant)[1]))
            save_bsr(model, path)
            if path.read_bytes() != saved(variant)[1]:
                with safe_open(path, "pt") as file:
                    keys = len(file.keys())
                raise Fault("another file for the same model", f"{variant}, {keys} tensors")
        return "identical"


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


FILES = [Files(), Overflow(), Mapped(), Identical()]
