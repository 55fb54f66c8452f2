"""Models from files alone: what lies on a disk becomes modules that a swap can look at.

A file of tensors names its layers but not their types. So a 2-D floating `NAME.weight` (with its `NAME.bias`)
stands for an `nn.Linear` here, and everything else is only carried along: the modules hold the tensors under the
right names and compute nothing. A transformers folder says what its model is, and that is built.
"""

import contextlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.bsr import BSRConv1x1, BSRLinear, load_bsr, save_bsr, tensor_file
from torchao_superblock.bsr.atomic_file import replacing
from torchao_superblock.bsr.folded_activation import activation_module
from torchao_superblock.bsr.load import load_saved, read_saved
from torchao_superblock.bsr.serialization import ATTENTION_SIZES, FORMAT, Description
from torchao_superblock.common.names import without_wrapper_prefixes

BSR_IN_FOLDER = "model.bsr.safetensors"
"""Not `model.safetensors`: `from_pretrained` would take it, and draw the missing weights at random."""

_WEIGHT_FILES = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.index.json",
)


@dataclass
class ModelFile:
    """What was read.

    Attributes:
        kind: what it is, for people.
        is_bsr: whether `save_bsr` wrote the weights.
        is_folder: whether it is a transformers folder.
        guesses: whether the types of its layers are read off names and shapes.
        model: the tensors under their names, linear layers as `nn.Linear` or `BSRLinear`.
    """

    kind: str
    is_bsr: bool
    is_folder: bool
    guesses: bool
    model: nn.Module


def read_model(path: str | os.PathLike[str], key: str | None = None) -> ModelFile:
    """Read a file of `save_bsr`, a plain safetensors file, a torch checkpoint or a transformers folder.

    Checkpoints are read with `weights_only=True`: nothing in them is run.

    Args:
        path: what to read.
        key: where in a checkpoint the state dict lies; None finds it if there is one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or holds no model that can be looked at; the message says why.
        ImportError: it is a transformers folder and transformers is not installed.
    """
    path = Path(path)
    if path.is_dir():
        if key is not None:
            raise ValueError(f"{str(path)!r} is a folder: a key finds nothing in it")
        return _read_folder(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is not a regular file")
    with open(path, "rb") as file:
        start = file.read(2)
    if zipfile.is_zipfile(path) or start in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        tensors = _read_checkpoint(path, key)
        return ModelFile("torch checkpoint", False, False, True, build_model(tensors))
    if key is not None:
        raise ValueError(f"{str(path)!r} is no torch checkpoint: a key finds nothing in it")
    with open(path, "rb") as file:
        try:
            metadata, entries = tensor_file.read_header(file)
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} is damaged, or neither a safetensors file nor a torch checkpoint: {error}"
            ) from error
        if metadata.get("format") != FORMAT:
            try:
                tensors = {
                    name: tensor_file.read_tensor(file, name, entry, None)
                    for name, entry in entries.items()
                }
            except ValueError as error:
                raise ValueError(f"{str(path)!r} is damaged: {error}") from error
            return ModelFile("safetensors file", False, False, True, build_model(tensors))
    saved = read_saved(str(path))
    places = {name: tensor.to("meta") for name, tensor in saved.tensors.items()}
    model = build_model(places, saved.description)
    load_saved(model, saved)
    return ModelFile("file of save_bsr", True, False, False, model)


def write_dense(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the `state_dict` of a model to a plain safetensors file, in one step.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        tensor_file.write_tensors(file, model.state_dict(), lambda _: {"format": "pt"})


# ---------------------------------------------------------------------------------------------------------------------
# Names -> modules.


def build_model(tensors: Mapping[str, Tensor], description: Description | None = None) -> nn.Module:
    """Modules that hold these tensors under these names.

    Args:
        tensors: a `state_dict`.
        description: of a file of `save_bsr`: then its block-sparse layers are `nn.Linear` on the meta device, of
            the shape that they had before, and its folded activations stand in their places, for `load_bsr`.

    Raises:
        ValueError: there is a block mask in it that is not squashed, a swapped layer that nothing describes, or a name
            that is none of a module's.
    """
    layers = description.layers if description else {}
    folded = description.folded if description else {}
    attention = description.attention if description else {}
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if ".parametrizations." in f".{name}":
            raise ValueError(
                f"{name!r}: this is the state dict of a model whose masks are not folded; load it there, call "
                "squash_mask(), and save it again"
            )
        if last == "crow_indices" and prefix not in layers:
            raise ValueError(
                f"{name!r}: this is the state dict of a swapped model, which does not say how its layers are made; "
                "load it there, and save it with save_bsr"
            )
        own.setdefault(prefix, {})[last] = tensor
    tree: dict[str, Any] = {}
    for fqn in [*own, *layers, *folded]:
        node = tree
        for part in fqn.split(".") if fqn else ():
            node = node.setdefault(part, {})

    def build(fqn: str, children: dict[str, Any]) -> nn.Module:
        if fqn in folded:
            return activation_module(folded[fqn])
        if fqn in layers:
            return _dense_layer(fqn, layers[fqn])
        if fqn in attention:
            return _attention(attention[fqn], own.get(fqn, {}), own.get(f"{fqn}.out_proj", {}))
        module = _holder(own.get(fqn, {}), children, is_root=not fqn)
        for part in sorted(children, key=_in_order):
            module.add_module(part, build(f"{fqn}.{part}" if fqn else part, children[part]))
        return module

    try:
        return build("", tree)
    except KeyError as error:
        raise ValueError(f"its names are not those of a module: {error.args[0]}") from error


def _dense_layer(fqn: str, spec: dict[str, Any]) -> nn.Module:
    """The dense layer that a block-sparse one stands for, on the meta device; a convolution's stride is not known."""
    (N, K), kind = spec["dense_shape"], spec["kind"]
    if kind == BSRConv1x1.DENSE:
        return nn.Conv2d(K, N, 1, bias=spec["bias"], device="meta")
    if kind != BSRLinear.DENSE:
        raise ValueError(
            f"the layer {fqn!r} stands for a {kind}, which needs the library that it is from; load the file with "
            "load_bsr into the model"
        )
    return nn.Linear(K, N, bias=spec["bias"], device="meta")


def _attention(
    spec: dict[str, Any], own: dict[str, Tensor], out_proj: dict[str, Tensor]
) -> nn.MultiheadAttention:
    """An attention of these sizes on the meta device, with the biases that it had."""
    module = nn.MultiheadAttention(
        **{name: spec[name] for name in ATTENTION_SIZES},
        bias="in_proj_bias" in own,
        add_bias_kv="bias_k" in own,
        device="meta",
    )
    if "bias" in out_proj and module.out_proj.bias is None:
        module.out_proj.bias = nn.Parameter(out_proj["bias"])
    return module


def _in_order(name: str) -> tuple[bool, int, str]:
    """Sorts modules as an `nn.Sequential` runs them."""
    return (True, int(name), "") if name.isdecimal() else (False, 0, name)


def _holder(own: dict[str, Tensor], children: Iterable[str], is_root: bool) -> nn.Module:
    """A module with these tensors: an `nn.Linear` if they look like one's."""
    own = dict(own)
    weight, bias = own.get("weight"), own.get("bias")
    if (
        weight is not None
        and weight.dim() == 2
        and weight.is_floating_point()
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_floating_point()))
        and not is_root  # which a swap cannot replace
    ):
        N, K = weight.shape
        module: nn.Module = nn.Linear(K, N, bias=bias is not None, device="meta")
        for name in own.keys() & {"weight", "bias"}:
            setattr(module, name, nn.Parameter(own.pop(name), False))
    elif all(part.isdecimal() for part in children):
        module = nn.Sequential()
    else:
        module = nn.Module()
    for name, tensor in own.items():
        module.register_buffer(name, tensor)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Torch checkpoints.


def _read_checkpoint(path: Path, key: str | None) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} is damaged, or holds more than tensors and plain containers, which are not loaded from a "
            "file that may come from anywhere; save the model's state_dict"
        ) from error
    except Exception as error:  # of any kind: the unpickler meets what is there
        raise ValueError(
            f"{str(path)!r} is no readable torch checkpoint: {_first_line(error)}"
        ) from error
    for part in key.split(".") if key is not None else ():
        if not isinstance(content, Mapping) or part not in content:
            raise ValueError(f"{str(path)!r} has nothing at {key!r}{_keys(content)}")
        content = content[part]
    if not _is_state_dict(content):
        nested = content if isinstance(content, Mapping) and key is None else {}
        found = [str(name) for name, value in nested.items() if _is_state_dict(value)]
        if len(found) != 1:
            what = f"several ({', '.join(found)}); say which with --key" if found else "none"
            raise ValueError(
                f"{str(path)!r} should hold one state dict (names and tensors), it has {what}{_keys(content)}"
            )
        content = content[found[0]]
    tensors = {without_wrapper_prefixes(name): tensor for name, tensor in content.items()}
    return tensors if len(tensors) == len(content) else dict(content)


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
        )
    )


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"; it is a {type(content).__name__}"
    names = [str(name) for name in content]
    return f"; its keys: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Transformers folders.


def _read_folder(path: Path) -> ModelFile:
    cls, config = _model_class(path)
    where = repr(str(path))
    bsr = path / BSR_IN_FOLDER
    try:
        if bsr.is_file():
            model = cls(config)
            if isinstance(config.dtype, torch.dtype):
                model.to(config.dtype)
            return ModelFile("transformers folder", True, True, False, load_bsr(model, bsr))
        with _quiet_transformers():
            model, info = cls.from_pretrained(
                path, dtype="auto", local_files_only=True, output_loading_info=True
            )
    except OSError:
        raise
    except Exception as error:  # of many kinds, by what is wrong with the files
        raise ValueError(f"{where} cannot be loaded: {_first_line(error)}") from error
    wrong = [str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        raise ValueError(f"{where} does not hold (or not in this shape) {', '.join(wrong[:8])}")
    return ModelFile("transformers folder", False, True, False, model)


def _model_class(path: Path) -> tuple[type[nn.Module], Any]:
    where = repr(str(path))
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (name,) = config["architectures"]
    except FileNotFoundError:
        raise ValueError(f"{where} has no config.json, so it is no transformers folder") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: its config.json names no architecture") from error
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{where} is a transformers folder: pip install 'torchao_superblock[transformers]'"
        ) from error
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(
            f"{where}: transformers {transformers.__version__} has no {name}; code that comes with a model is not run"
        )
    return cls, cls.config_class.from_pretrained(path, local_files_only=True)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def write_folder(model: nn.Module, source: Path, target: Path, to_bsr: bool) -> None:
    """Write a transformers folder with the weights of a model and the other files of `source`, in one step.

    Args:
        model: a transformers model, swapped or dense.
        source: the folder it came from.
        target: what to write. One that exists is replaced as a whole.
        to_bsr: whether the weights are written by `save_bsr`, or by `save_pretrained`.

    Raises:
        OSError: it cannot be written.
    """
    target = target.resolve()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        new = Path(work, "new")
        new.mkdir()
        for file in source.iterdir():
            if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHT_FILES):
                shutil.copy2(file, new)
        if to_bsr:
            save_bsr(model, new / BSR_IN_FOLDER)
        else:
            with _quiet_transformers():
                model.save_pretrained(new)
        if not target.exists():
            new.rename(target)
            return
        old = target.rename(Path(work, "old"))
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
