"""`load_bsr`: a model is loaded from a file of `save_bsr`, which is checked in full before the model is touched."""

import os
import stat
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.bsr import tensor_file
from torchao_superblock.bsr.attention import attention_obstacle, become_bsr, projections
from torchao_superblock.bsr.casting import cast_like
from torchao_superblock.bsr.dataflow import dataflows
from torchao_superblock.bsr.finish import turn_off_nested_tensors
from torchao_superblock.bsr.folded_activation import (
    FoldedActivation,
    activation_module,
    activation_name,
    fold_into,
)
from torchao_superblock.bsr.gated_mlp import fuse_gates
from torchao_superblock.bsr.linear import BSRLinear, bsr_type, customisation
from torchao_superblock.bsr.packed_linear import PackedBSRLinear
from torchao_superblock.bsr.serialization import (
    ATTENTION_SIZES,
    FORMAT,
    VERSIONS,
    Description,
    from_metadata,
)
from torchao_superblock.bsr.swap import is_one_layer
from torchao_superblock.common.all_or_nothing import all_or_nothing, overwrite
from torchao_superblock.common.modules import block_masks_of, hand_over_hooks, replace_modules
from torchao_superblock.common.swappable import TWINS, module_obstacle


def load_bsr(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a file written by :func:`save_bsr` into a model of the same architecture, in place.

    The model may be dense (its linear layers become :class:`BSRLinear` where the file says so), swapped already, or on
    the meta device (it then takes the tensors of the file as they are). Parameters keep the dtype and device of the
    model otherwise, and stay the same objects (for optimizers and ties) unless a layer gets another number of blocks or
    of features.

    The file is checked in full first, down to the checksum of each tensor: on any error the model is as it was. The
    loaded tensors own their memory; the file may change or go afterwards.

    Args:
        model: the model to load into.
        path: the file to read.

    Returns:
        `model`; of a compiled one, the module inside.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: the file is not one of :func:`save_bsr`, is damaged, belongs to another model (missing, unexpected
            or misshapen entries, all named), breaks a BSR invariant, holds a number that the model's dtype cannot, or
            leaves a tensor of a meta-device model unfilled; or the model is wrapped in DistributedDataParallel.
        RuntimeError: a block mask of the model is not squashed yet, or one of its tensors cannot be written.

    Example:
        >>> with torch.device("meta"):  # doctest: +SKIP
        ...     model = build_model()
        >>> load_bsr(model, "model.safetensors")  # doctest: +SKIP
    """
    model = getattr(model, "_orig_mod", model)
    name = os.fspath(path)
    _check_model(model, name)
    # Tensors made in inference mode could never be trained.
    with torch.inference_mode(False):
        load_saved(model, read_saved(name))
    return model


@dataclass
class Saved:
    """A file's content: all its tensors, each in memory of its own, and what it says about them."""

    path: str
    tensors: dict[str, Tensor]
    description: Description


@dataclass
class _Loading:
    """What is about to be done to a model, all of it checked."""

    new_modules: dict[nn.Module, nn.Module]
    attentions: dict[nn.MultiheadAttention, dict[str, BSRLinear]]
    places: list["_Place"]
    gated: dict[str, str]
    in_place: dict[str, Tensor]
    on_meta: dict[str, Tensor]
    ties: list[list[tuple[str, str]]]


@dataclass
class _Place:
    """Of an activation that a layer applies: where it is, what is there, and which layer that is."""

    parent: nn.Module
    name: str
    old: Any
    folded: FoldedActivation
    layer: str


def _check_model(model: nn.Module, path: str) -> None:
    if isinstance(model, nn.Linear | BSRLinear) or is_one_layer(model):
        raise ValueError(
            f"load_bsr: {path!r}: the model is itself a linear layer and cannot be replaced in place; wrap it in "
            "nn.Sequential"
        )
    for fqn, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"load_bsr: {path!r}: {fqn or 'the model'!r} is wrapped in DistributedDataParallel, which would go on "
                "reducing the dense weights; load into ddp.module and wrap it again"
            )
        if any(True for _ in block_masks_of(module)):
            raise RuntimeError(
                f"load_bsr: {path!r}: the block mask of {fqn or 'the model'!r} is not squashed yet; load into a dense "
                "or a swapped model"
            )


def read_saved(path: str) -> Saved:
    """Read a file of :func:`save_bsr` and check it without a model; raises as :func:`load_bsr` does."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"load_bsr: no such file: {path!r}") from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"load_bsr: {path!r} is a directory; name the file in it")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"load_bsr: {path!r} is not a regular file")
    with open(path, "rb") as file:
        _check_kind(file.read(16), path)
        file.seek(0)
        try:
            metadata, entries = tensor_file.read_header(file)
        except ValueError as error:
            raise ValueError(
                f"load_bsr: {path!r} is damaged, or no safetensors file: {error}"
            ) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"load_bsr: {path!r} was not written by save_bsr{_advice(entries)}")
        if metadata.get("version") not in VERSIONS:
            raise ValueError(
                f"load_bsr: {path!r} has format version {metadata.get('version')}, this release reads versions "
                f"{', '.join(VERSIONS)}; upgrade torchao_superblock"
            )
        try:
            description = from_metadata(metadata)
            checksums = description.checksums
            if checksums is not None and checksums.keys() != entries.keys():
                raise ValueError("its checksums are not those of its tensors")
            tensors = {
                key: tensor_file.read_tensor(file, key, entry, checksums and checksums[key])
                for key, entry in entries.items()
            }
            for key, target in description.aliases.items():
                if key in entries or target not in entries:
                    raise ValueError(f"{key!r} is said to be the same as {target!r}")
                # A copy, lest a model that does not tie the two shares their memory without knowing.
                tensors[key] = tensors[target].clone()
        except ValueError as error:
            raise ValueError(f"load_bsr: {path!r} is damaged: {error}") from error
    return Saved(path, tensors, description)


def _check_kind(start: bytes, path: str) -> None:
    # In a safetensors file these bytes are a length, below 4 GB.
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[4:8] != bytes(4):
        raise ValueError(
            f"load_bsr: {path!r} was written by torch.save, not by save_bsr; load it with torch.load. The state dict "
            "of a dense model goes into model.load_state_dict, and the model is swapped afterwards; that of a swapped "
            "model goes into one that was swapped in the same way"
        )


def _advice(entries: dict[str, Any]) -> str:
    """What to do with a safetensors file of somebody else."""
    if any(key.endswith(".crow_indices") for key in entries):
        return (
            ": it holds the state dict of a swapped model (as trainers of other libraries save it), which does not say "
            "how its layers are made. Swap the model first, in the same way or with swap_to_bsr(model, blocksize, "
            "min_sparsity=0, filter_fn=lambda module, fqn: fqn.removesuffix('_weight') + '.values' in state), where "
            "state = safetensors.torch.load_file(path), and call model.load_state_dict(state)"
        )
    return "; load an ordinary checkpoint with model.load_state_dict and swap the model afterwards"


def load_saved(model: nn.Module, saved: Saved) -> None:
    """Load what was read into a model, in place; raises as :func:`load_bsr` does."""
    loading = _plan(model, saved)
    try:
        _load(model, loading)
    except Exception as error:
        if type(error) is RuntimeError:
            raise RuntimeError(
                f"load_bsr: {saved.path!r} cannot be loaded into this model, which is as it was: {error}"
            ) from error
        error.add_note(f"while loading {saved.path!r}; the model is as it was")
        raise


def _plan(model: nn.Module, saved: Saved) -> _Loading:
    """Compare file and model; changes nothing."""
    layers = saved.description.layers
    modules = dict(model.named_modules(remove_duplicate=False))
    _check_names(modules, saved)
    places = _fold(modules, saved)
    new_modules: dict[nn.Module, nn.Module] = {}
    attentions, parts = _attentions(modules, saved)
    replaced = set()  # parameters of an attention itself
    for fqn, spec in layers.items():
        old = modules.get(fqn)
        attention, name, cls = parts.get(fqn, (None, "", None))
        if old is None:  # it has no module of its own before the swap
            dense = {projection.name: projection for projection in projections(attention)}[name]
            replaced.add(f"{fqn.removesuffix(name)}{dense.tensor_fqn}")
            if name not in attentions[attention]:
                layer = _build_layer(fqn, dense.linear, spec, saved, cls)
                attentions[attention][name] = layer
        elif old not in new_modules:
            new_modules[old] = _build_layer(fqn, old, spec, saved, cls)
    own = {key: value for key, value in model.state_dict().items() if key not in replaced}
    rest = {key: t for key, t in saved.tensors.items() if key.rpartition(".")[0] not in layers}
    ties = _ties(model)
    problems = [*_differences(own, rest, layers), *_untied(ties, saved.tensors)]
    if not problems:
        for key, tensor in rest.items():
            try:
                rest[key] = cast_like(tensor, own[key], key)
            except (TypeError, ValueError) as error:
                problems.append(str(error))
    if problems:
        raise ValueError(
            f"load_bsr: {saved.path!r} belongs to another model: {'; '.join(problems)}"
        )
    _check_no_meta_left(model, rest.keys() | replaced, set(new_modules), saved.path)
    return _Loading(
        new_modules,
        attentions,
        places,
        saved.description.gated,
        {key: tensor for key, tensor in rest.items() if not own[key].is_meta},
        {key: tensor for key, tensor in rest.items() if own[key].is_meta},
        ties,
    )


def _load(model: nn.Module, loading: _Loading) -> None:
    own = model.state_dict()
    kept = list(_kept_parameters(loading.new_modules))
    names = {parameter: fqn for fqn, parameter in model.named_parameters()}
    overwritten = [own[key] for key in loading.in_place] + [parameter for *_, parameter in kept]
    with all_or_nothing(model, overwritten):
        for layer, name, parameter in kept:
            try:
                overwrite(parameter, getattr(layer, name))
            except RuntimeError as error:
                raise RuntimeError(f"{names[parameter]!r} cannot be written: {error}") from error
            setattr(layer, name, parameter)
        replace_modules(model, loading.new_modules)
        for attention, layers in loading.attentions.items():
            become_bsr(attention, layers)
        for place in loading.places:
            if place.old is not place.folded:
                if isinstance(place.old, nn.Module):
                    hand_over_hooks(place.old, place.folded)
                setattr(place.parent, place.name, place.folded)
            fold_into(model.get_submodule(place.layer), place.folded)
        if loading.gated:
            fuse_gates([flow for flow in dataflows(model)[0] if flow.fqn in loading.gated])
        turn_off_nested_tensors(model)
        # Each part is loaded with strict=False because it is only a part; the whole was compared before.
        if loading.in_place:
            with torch.inference_mode(any(own[key].is_inference() for key in loading.in_place)):
                model.load_state_dict(loading.in_place, strict=False)
        if loading.on_meta:
            model.load_state_dict(loading.on_meta, strict=False, assign=True)
        for places in loading.ties:
            _tie(model, places)


def _kept_parameters(
    new_modules: dict[nn.Module, nn.Module],
) -> Iterator[tuple[BSRLinear, str, nn.Parameter]]:
    """Parameters that can stay the same objects, for optimizers and ties: `(layer, name, parameter)`."""
    for old, new in new_modules.items():
        if not isinstance(new, BSRLinear):
            continue
        for name in ("bias", "values"):
            parameter, loaded = old._parameters.get(name), getattr(new, name)
            if (
                parameter is not None
                and not parameter.is_meta
                and (parameter.shape, parameter.dtype) == (loaded.shape, loaded.dtype)
            ):
                yield new, name, parameter


def _ties(model: nn.Module) -> list[list[tuple[str, str]]]:
    """Places of each tensor that has several, `(FQN of the module, name)`: loading one by one would untie them."""
    places: dict[Tensor, list[tuple[str, str]]] = {}
    for fqn, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places.setdefault(tensor, []).append((fqn, name))
    return [group for group in places.values() if len(group) > 1]


def _tie(model: nn.Module, places: list[tuple[str, str]]) -> None:
    """Make one tensor of what was one before. Where a layer became block-sparse, its weight is gone."""
    shared: Tensor | None = None
    for fqn, name in places:
        module = model.get_submodule(fqn)
        if (module._parameters | module._buffers).get(name) is None:
            continue
        tensor = getattr(module, name)
        if shared is None:
            shared = tensor
        elif tensor is not shared:
            setattr(module, name, shared)


def _untied(ties: list[list[tuple[str, str]]], tensors: dict[str, Tensor]) -> Iterator[str]:
    """Say what is one tensor in the model and several in the file."""
    for places in ties:
        keys = [f"{fqn}.{name}" if fqn else name for fqn, name in places]
        first, *others = [key for key in keys if key in tensors] or [None]
        for key in others:
            if not _same(tensors[first], tensors[key]):
                yield f"{first} and {key} are one tensor in the model, but differ in the file"


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _check_names(modules: dict[str, nn.Module], saved: Saved) -> None:
    """Every module that the file describes is in the model."""
    description = saved.description
    parts = _parts(description)
    described = [
        *description.layers,
        *description.folded,
        *description.attention,
        *description.gated,
    ]
    described = [fqn for fqn in described if fqn not in parts]
    missing = [fqn for fqn in described if fqn not in modules and _at(modules, fqn) is None]
    if not missing:
        return
    way_out = "it must have the architecture of the model that was saved"
    for fqn in missing:
        longer = next((own for own in modules if own.endswith(f".{fqn}")), None)
        if longer is not None:
            prefix = longer.removesuffix(f".{fqn}")
            way_out = (
                f"it has {longer!r}: the file is of that part alone, load it with "
                f"load_bsr(model.get_submodule({prefix!r}), path)"
            )
            break
        shorter = next((own for own in modules if own and fqn.endswith(f".{own}")), None)
        if shorter is not None:
            prefix = fqn.removesuffix(f".{shorter}")
            way_out = f"it has {shorter!r}: a model around it was saved, which called it {prefix!r}"
            if "." not in prefix:
                way_out += f"; load_bsr(nn.ModuleDict({{{prefix!r}: model}}), path) loads it"
            break
    raise ValueError(
        f"load_bsr: {saved.path!r} belongs to another model: it describes {', '.join(map(repr, missing))}, the model "
        f"has no such module; {way_out}"
    )


def _parts(description: Description) -> dict[str, tuple[str, str]]:
    """Of each layer that is a projection of an attention, FQN of that and its name there."""
    return {
        f"{fqn}.{name}".removeprefix("."): (fqn, name)
        for fqn, spec in description.attention.items()
        for name in spec["projections"]
    }


def _attentions(
    modules: dict[str, nn.Module], saved: Saved
) -> tuple[
    dict[nn.MultiheadAttention, dict[str, BSRLinear]],
    dict[str, tuple[nn.MultiheadAttention, str, type[BSRLinear]]],
]:
    """The attentions of the model that become ours, and of each layer in one of them that, its name and its type."""
    parts = _parts(saved.description)
    for fqn, spec in saved.description.attention.items():
        where, attention = f"load_bsr: {saved.path!r}: {fqn!r}", modules[fqn]
        if not isinstance(attention, nn.MultiheadAttention):
            raise ValueError(
                f"{where} is an attention in the file, but a {type(attention).__name__} in the model"
            )
        obstacle = attention_obstacle(attention)
        if obstacle is not None:
            raise ValueError(f"{where} cannot become block-sparse in the model: {obstacle[1]}")
        for size in ATTENTION_SIZES:
            if spec[size] != getattr(attention, size):
                raise ValueError(
                    f"{where} has {size}={spec[size]} in the file, but {getattr(attention, size)} in the model"
                )
    # Earlier releases swapped the last layer of an attention only, and wrote no description of one.
    if not saved.description.attention:
        for fqn in saved.description.layers:
            owner, _, name = fqn.rpartition(".")
            attention = modules.get(owner)
            if name == "out_proj" and isinstance(attention, nn.MultiheadAttention):
                if attention_obstacle(attention) is None:
                    parts[fqn] = owner, name
    typed = {
        fqn: (modules[owner], name, PackedBSRLinear if name == "in_proj" else BSRLinear)
        for fqn, (owner, name) in parts.items()
    }
    return {attention: {} for attention, *_ in typed.values()}, typed


def _at(modules: dict[str, nn.Module], fqn: str) -> Any:
    """The module of this name, or the function that is an attribute; None if there is none."""
    parent, _, name = fqn.rpartition(".")
    found = getattr(modules.get(parent), name, None)
    return found if isinstance(found, nn.Module) or activation_name(found) is not None else None


def _fold(modules: dict[str, nn.Module], saved: Saved) -> list[_Place]:
    """The places of the activations that the file's layers apply themselves, so that none runs twice."""
    places = []
    folded = saved.description.folded
    own = {fqn for fqn, module in modules.items() if isinstance(module, FoldedActivation)}
    for fqn in [*folded, *sorted(own - folded.keys())]:
        old = _at(modules, fqn)
        is_own = isinstance(old, FoldedActivation)
        if fqn in folded:
            layer = _applied_by(fqn, modules, saved)
        activation = old.activation if is_own else activation_name(old)
        if activation != folded.get(fqn) and not (fqn not in folded and old.is_left_to_itself):
            raise ValueError(
                f"load_bsr: at {fqn!r} {saved.path!r} has {_name(folded.get(fqn))}, the model has {old}; "
                "build the model as it was when it was saved, or as it was before the swap"
            )
        if fqn not in folded:
            continue
        parent, _, name = fqn.rpartition(".")
        if not is_own or old.original is None:
            owner, path = _common_owner(fqn, layer)
            original = activation_module(activation) if is_own else old
            place = FoldedActivation(original, modules[owner], path)
        else:
            place = old
        places.append(_Place(modules[parent], name, old, place, layer))
    return places


def _common_owner(fqn: str, layer: str) -> tuple[str, str]:
    """FQN of the innermost module that both are in, and the layer's path in it."""
    owner, path = "", layer
    while (name := path.partition(".")[0]) != path and fqn.startswith(f"{owner}{name}."):
        owner, path = f"{owner}{name}.", path.partition(".")[2]
    return owner.removesuffix("."), path


def _name(activation: str | None) -> str:
    return f"a folded {activation}" if activation else "an activation that runs on its own"


def _applied_by(fqn: str, modules: dict[str, nn.Module], saved: Saved) -> str:
    """FQN of the block-sparse layer that applies a folded activation."""
    description = saved.description
    layer = description.applies(fqn, modules[fqn.rpartition(".")[0]]._modules)
    applied = description.layers[layer]["activation"] if layer is not None else None
    if applied != description.folded[fqn]:
        raise ValueError(
            f"load_bsr: {saved.path!r} is damaged: {fqn!r} is {_name(description.folded[fqn])}, but the layer in front "
            f"of it ({layer}) applies {applied}"
        )
    return layer


def _build_layer(
    fqn: str, old: nn.Module, spec: dict[str, Any], saved: Saved, cls: type[BSRLinear] | None
) -> BSRLinear:
    """The layer that the file describes, with the dtype, device and mode of the layer it replaces."""
    where = f"load_bsr: {saved.path!r}: {fqn!r}"
    known = {twin.bsr for twin in TWINS.values()}
    is_dense = type(old) not in known and module_obstacle(old, type(old), "weight") is None
    if cls is None:
        cls = bsr_type(old) if is_dense else type(old) if type(old) in known else BSRLinear
    kind = spec["kind"]
    if (not is_dense and type(old) is not cls) or getattr(cls, "DENSE", None) != kind:
        names = [bsr.__name__ for bsr in known if getattr(bsr, "DENSE", None) == kind]
        raise ValueError(
            f"{where} is block-sparse in the file, but a {type(old).__name__} in the model; "
            f"it must be a plain {kind}{''.join(f' or a {name}' for name in names)}"
        )
    obstacle = customisation(old)
    if obstacle is not None:
        raise ValueError(f"{where} cannot be replaced in the model: {obstacle}")
    dense_shape = spec["dense_shape"]
    own_shape = cls.features_of(old) if is_dense else old.dense_shape
    if own_shape != dense_shape:
        raise ValueError(
            f"{where} has shape {dense_shape} in the file, but {own_shape} in the model"
        )
    if (old.bias is not None) != spec["bias"]:
        raise ValueError(
            f"{where} has {'a' if spec['bias'] else 'no'} bias in the file, unlike in the model"
        )
    reference = old.values if isinstance(old, BSRLinear) else old.weight
    names = ["crow_indices", "col_indices", "values"] + (["bias"] if spec["bias"] else [])
    missing = [f"{fqn}.{name}" for name in names if f"{fqn}.{name}" not in saved.tensors]
    if missing:
        raise ValueError(f"load_bsr: {saved.path!r} is damaged: missing {', '.join(missing)}")
    more = [key for key in saved.tensors if key.rpartition(".")[0] == fqn]
    if len(more) > len(names):
        raise ValueError(f"load_bsr: {saved.path!r} is damaged: {fqn!r} has {', '.join(more)}")
    parts = {name: saved.tensors[f"{fqn}.{name}"] for name in names}
    try:
        for name in names:
            if name in ("values", "bias"):
                parts[name] = cast_like(parts[name], reference, name)
            if not reference.is_meta:
                parts[name] = parts[name].to(reference.device)
        return cls(
            spec["in_features"],
            spec["out_features"],
            spec["blocksize"],
            parts["crow_indices"],
            parts["col_indices"],
            nn.Parameter(parts["values"], reference.requires_grad),
            nn.Parameter(parts["bias"], old.bias.requires_grad) if spec["bias"] else None,
            activation=spec["activation"],
            dense_shape=dense_shape,
            **cls.settings_of(old),
        ).train(old.training)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _differences(
    own: dict[str, Any], rest: dict[str, Tensor], layers: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """Say where a file's tensors outside its block-sparse layers differ from those of the model."""
    own = {key: value for key, value in own.items() if key.rpartition(".")[0] not in layers}
    missing, unexpected = own.keys() - rest.keys(), rest.keys() - own.keys()
    if missing:
        yield f"missing in the file: {', '.join(key for key in own if key in missing)}"
    if unexpected:
        yield f"not in the model: {', '.join(key for key in rest if key in unexpected)}"
    for key, value in own.items():
        if key not in rest:
            continue
        if not isinstance(value, Tensor):
            yield f"{key} is a tensor in the file, but a {type(value).__name__} in the model"
        elif value.shape != rest[key].shape:
            yield f"{key} has shape {tuple(rest[key].shape)} in the file, but {tuple(value.shape)} in the model"


def _check_no_meta_left(
    model: nn.Module, filled: Set[str], replaced: set[nn.Module], path: str
) -> None:
    """A buffer that no state dict holds cannot be filled from a file: name it rather than leave it empty."""
    left = []
    for prefix, module in model.named_modules():
        if module in replaced:
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = f"{prefix}.{name}" if prefix else name
            if tensor is not None and tensor.is_meta and key not in filled:
                left.append(key)
    if left:
        raise ValueError(
            f"load_bsr: {path!r} does not hold {', '.join(left)}, which the model has on the meta device; "
            "build the model on a real device, or move these there and fill them, before loading"
        )
