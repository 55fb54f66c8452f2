"""Swapped models on disk: one safetensors file, checked in full before a model is touched.

The file holds the ``state_dict`` of the swapped model. Its metadata says which layers are block-sparse, so that a
freshly built dense model of the same architecture (also one on the meta device) can be loaded from it directly.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchao_superblock.bsr.folded_activation import FoldedActivation, activation_name
from torchao_superblock.bsr.linear import LINEAR_TYPES, BSRLinear
from torchao_superblock.bsr.swap import turn_off_nested_tensors
from torchao_superblock.common.all_or_nothing import all_or_nothing
from torchao_superblock.common.modules import replace_modules

FORMAT = "torchao_superblock.bsr"
# 2 says that features of some layers were dropped.
VERSIONS = ("1", "2")
_LAYER_KEYS = {"in_features", "out_features", "blocksize", "activation", "bias"}


def save_bsr(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model with :class:`BSRLinear` layers to one safetensors file.

    An existing file is replaced only once the new one is complete. Shared tensors are stored once.

    Args:
        model: a swapped model; a model without a BSRLinear is saved as well.
        path: the file to write, usually ``*.safetensors``.

    Raises:
        TypeError: the ``state_dict`` holds something that is not a tensor (safetensors stores tensors only).
        ValueError: a tensor is on the meta device, or the model is itself a BSRLinear.
        FileNotFoundError: the directory does not exist.

    Example:
        >>> save_bsr(model, "model.safetensors")  # doctest: +SKIP
        >>> load_bsr(build_model(), "model.safetensors")  # doctest: +SKIP
    """
    model = _unwrapped(model)
    if isinstance(model, BSRLinear):
        raise ValueError(
            "save_bsr: the model is itself a BSRLinear and has no name in the file; wrap it in nn.Sequential, or save "
            "its state_dict"
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_bsr: no such directory: {os.fspath(path.parent)!r}")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"save_bsr: {key!r} of the state dict is a {type(value).__name__}, not a tensor; "
                "use torch.save(model.state_dict(), path) for this model"
            )
        if value.is_meta:
            raise ValueError(f"save_bsr: {key!r} is on the meta device and has no content to save")
        identity = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and identity in first_name:
            aliases[key] = first_name[identity]
            continue
        first_name[identity] = key
        # A clone: views into one storage would be refused.
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    layers = {
        fqn: {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "blocksize": list(module.blocksize),
            "activation": module.activation,
            "bias": module.bias is not None,
        }
        | ({"dense_shape": list(module.dense_shape)} if module.is_narrowed else {})
        for fqn, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BSRLinear)
    }
    folded = {
        fqn: module.activation
        for fqn, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FoldedActivation)
    }
    metadata = {
        "format": FORMAT,
        "version": VERSIONS[any("dense_shape" in layer for layer in layers.values())],
        "layers": json.dumps(layers),
        "folded": json.dumps(folded),
        "aliases": json.dumps(aliases),
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_bsr(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a file written by :func:`save_bsr` into a model of the same architecture, in place.

    The model may be dense (its linear layers become :class:`BSRLinear` where the file says so), swapped already, or on
    the meta device (it then takes the tensors of the file as they are). Parameters keep the dtype and device of the
    model otherwise, and stay the same objects (for optimizers and ties) unless a layer gets another number of blocks or
    of features.
    The file is checked in full first: on any error the model is as it was.

    Args:
        model: the model to load into.
        path: the file to read.

    Returns:
        ``model``; of a compiled one, the module inside.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of :func:`save_bsr`, is damaged, belongs to another model (missing, unexpected
            or misshapen entries, all named), breaks a BSR invariant, or leaves a tensor of a meta-device model
            unfilled.

    Example:
        >>> with torch.device("meta"):  # doctest: +SKIP
        ...     model = build_model()
        >>> load_bsr(model, "model.safetensors")  # doctest: +SKIP
    """
    model = _unwrapped(model)
    tensors, layers, folded = _read(path)
    if isinstance(model, nn.Linear | BSRLinear):
        raise ValueError(
            "load_bsr: the model is itself a linear layer and cannot be replaced in place; wrap it in nn.Sequential"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    new_layers: dict[nn.Module, nn.Module] = _fold(modules, folded, path)
    for fqn, spec in layers.items():
        old = modules.get(fqn)
        if old in new_layers:
            continue
        new_layers[old] = _build_layer(fqn, old, spec, tensors, path)

    def belongs_to_layer(key: str) -> bool:
        return key.rpartition(".")[0] in layers

    rest = {key: tensor for key, tensor in tensors.items() if not belongs_to_layer(key)}
    _check_rest(model, rest, layers, path)
    _check_no_meta_left(model, rest, set(new_layers), path)

    # Nothing above has changed the model.
    own = model.state_dict()
    on_meta = {key: tensor for key, tensor in rest.items() if own[key].is_meta}
    in_place = {key: tensor for key, tensor in rest.items() if not own[key].is_meta}
    kept = list(_kept_parameters(new_layers))
    overwritten = [own[key] for key in in_place] + [parameter for *_, parameter in kept]
    with torch.inference_mode(False), all_or_nothing(model, overwritten):
        for layer, name, parameter in kept:
            with torch.no_grad():
                parameter.copy_(getattr(layer, name))
            setattr(layer, name, parameter)
        replace_modules(model, new_layers)
        turn_off_nested_tensors(model)
        # Each part is loaded with strict=False because it is only a part; the whole was compared above.
        if in_place:
            model.load_state_dict(in_place, strict=False)
        if on_meta:
            tied = _tied_parameters(model)
            model.load_state_dict(on_meta, strict=False, assign=True)
            for (first, first_name), *others in tied:
                for module, name in others:
                    setattr(module, name, getattr(first, first_name))
    return model


def _kept_parameters(
    new_layers: dict[nn.Module, nn.Module],
) -> Iterator[tuple[BSRLinear, str, nn.Parameter]]:
    """Parameters that can stay the same objects, for optimizers and ties: ``(layer, name, parameter)``."""
    for old, new in new_layers.items():
        if not isinstance(new, BSRLinear):
            continue
        for name in ("bias", "values"):
            parameter = old._parameters.get(name)
            if (
                parameter is not None
                and not parameter.is_meta
                and parameter.shape == getattr(new, name).shape
            ):
                yield new, name, parameter


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile`` wrapper: names in files do not depend on it."""
    return getattr(model, "_orig_mod", model)


def _tied_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Places of each Parameter that has several: loading by assignment would untie them."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    return [group for group in places.values() if len(group) > 1]


def _read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], dict[str, str]]:
    """All tensors of the file (aliases resolved), its block-sparse layers, and the activations folded into them."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_bsr: no such file: {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"load_bsr: {os.fspath(path)!r} was not written by save_bsr; load an ordinary checkpoint with "
                    "model.load_state_dict and swap the model afterwards"
                )
            if metadata.get("version") not in VERSIONS:
                raise ValueError(
                    f"load_bsr: {os.fspath(path)!r} has format version {metadata.get('version')}, this release reads "
                    f"versions {' and '.join(VERSIONS)}; upgrade torchao_superblock"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            layers = json.loads(metadata["layers"])
            folded = json.loads(metadata["folded"])
            aliases = json.loads(metadata["aliases"])
            tensors |= {key: tensors[target] for key, target in aliases.items()}
            for spec in layers.values():
                if not isinstance(spec, dict) or spec.keys() - {"dense_shape"} != _LAYER_KEYS:
                    raise KeyError(f"a layer is described by {spec}")
                shape = (spec["out_features"], spec["in_features"])
                spec["dense_shape"] = tuple(spec.get("dense_shape", shape))
                if not all(type(size) is int for size in (*shape, *spec["dense_shape"])):
                    raise TypeError(f"a layer is described by {spec}")
            folded = dict(folded.items())
    except (SafetensorError, KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"load_bsr: {os.fspath(path)!r} is damaged: {error}") from error
    return tensors, layers, folded


def _fold(
    modules: dict[str, nn.Module], folded: dict[str, str], path: str | os.PathLike[str]
) -> dict[nn.Module, FoldedActivation]:
    """What to put in place of the activations that the file's layers apply themselves, so that none runs twice."""
    replacements = {}
    for fqn, module in modules.items():
        if fqn in folded and activation_name(module) == folded[fqn]:
            replacements[module] = FoldedActivation(module)
        elif folded.get(fqn) != getattr(module, "activation", None) and (
            fqn in folded or isinstance(module, FoldedActivation)
        ):
            raise ValueError(
                f"load_bsr: at {fqn!r} {os.fspath(path)!r} has {_describe(folded.get(fqn))}, the model has {module}; "
                "build the model as it was when it was saved, or as it was before the swap"
            )
    missing = [fqn for fqn in folded if fqn not in modules]
    if missing:
        raise ValueError(
            f"load_bsr: {os.fspath(path)!r} belongs to another model: not in the model: {', '.join(missing)}"
        )
    return replacements


def _describe(activation: str | None) -> str:
    return f"a folded {activation}" if activation else "an activation that runs on its own"


def _build_layer(
    fqn: str,
    old: nn.Module | None,
    spec: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str | os.PathLike[str],
) -> BSRLinear:
    """The BSRLinear that the file describes, with the dtype, device and mode of the layer it replaces."""
    if old is None:
        raise ValueError(
            f"load_bsr: {os.fspath(path)!r} has a block-sparse layer {fqn!r}, the model has no such module; "
            "it must have the architecture of the model that was saved"
        )
    if type(old) not in (*LINEAR_TYPES, BSRLinear):
        raise ValueError(
            f"load_bsr: {fqn!r} is block-sparse in the file, but a {type(old).__name__} in the model; "
            "it must be a plain nn.Linear or a BSRLinear"
        )
    dense_shape = spec["dense_shape"]
    own_shape = getattr(old, "dense_shape", (old.out_features, old.in_features))
    if own_shape != dense_shape:
        raise ValueError(
            f"load_bsr: {fqn!r} has shape {dense_shape} in the file, but {own_shape} in the model"
        )
    if (old.bias is not None) != spec["bias"]:
        raise ValueError(
            f"load_bsr: {fqn!r} has {'a' if spec['bias'] else 'no'} bias in the file, unlike in the model"
        )
    reference = old.values if isinstance(old, BSRLinear) else old.weight
    names = ["crow_indices", "col_indices", "values"] + (["bias"] if spec["bias"] else [])
    missing = [f"{fqn}.{name}" for name in names if f"{fqn}.{name}" not in tensors]
    if missing:
        raise ValueError(f"load_bsr: {os.fspath(path)!r} is damaged: missing {', '.join(missing)}")
    parts = {name: tensors[f"{fqn}.{name}"] for name in names}
    if not reference.is_meta:
        parts = {
            name: tensor.to(
                reference.device, reference.dtype if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in parts.items()
        }
    try:
        layer = BSRLinear(
            spec["in_features"],
            spec["out_features"],
            tuple(spec["blocksize"]),
            parts["crow_indices"],
            parts["col_indices"],
            nn.Parameter(parts["values"], reference.requires_grad),
            nn.Parameter(parts["bias"], old.bias.requires_grad) if spec["bias"] else None,
            activation=spec["activation"],
            dense_shape=dense_shape,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_bsr: {fqn!r} in {os.fspath(path)!r}: {error}") from error
    return layer.train(old.training)


def _check_rest(
    model: nn.Module,
    rest: dict[str, Tensor],
    layers: dict[str, dict[str, Any]],
    path: str | os.PathLike[str],
) -> None:
    """Compare all but the block-sparse layers with the model: names and shapes."""
    own = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if key.rpartition(".")[0] not in layers
    }
    problems = []
    missing = [key for key in own if key not in rest]
    if missing:
        problems.append(f"missing in the file: {', '.join(missing)}")
    unexpected = [key for key in rest if key not in own]
    if unexpected:
        problems.append(f"not in the model: {', '.join(unexpected)}")
    problems += [
        f"{key} has shape {tuple(rest[key].shape)} in the file, but {tuple(tensor.shape)} in the model"
        for key, tensor in own.items()
        if key in rest and isinstance(tensor, Tensor) and tensor.shape != rest[key].shape
    ]
    if problems:
        raise ValueError(
            f"load_bsr: {os.fspath(path)!r} belongs to another model: {'; '.join(problems)}"
        )


def _check_no_meta_left(
    model: nn.Module,
    rest: dict[str, Tensor],
    replaced: set[nn.Module],
    path: str | os.PathLike[str],
) -> None:
    """A buffer that no state dict holds cannot be filled from a file: name it rather than leave it empty."""
    left = []
    for prefix, module in model.named_modules():
        if module in replaced:
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            key = f"{prefix}.{name}" if prefix else name
            if tensor is not None and tensor.is_meta and key not in rest:
                left.append(key)
    if left:
        raise ValueError(
            f"load_bsr: {os.fspath(path)!r} does not hold {', '.join(left)}, which the model has on the meta device; "
            "build the model on a real device, or move these there and fill them, before loading"
        )
