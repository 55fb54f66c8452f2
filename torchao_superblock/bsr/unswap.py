"""The way back: the :class:`BSRLinear` layers of a model become `nn.Linear` again."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from torchao_superblock.bsr.attention import (
    IN_PROJECTIONS,
    BSRMultiheadAttention,
    become_dense,
)
from torchao_superblock.bsr.dataflow import Dataflow, dataflows
from torchao_superblock.bsr.dead_features import linear_pairs
from torchao_superblock.bsr.folded_activation import FoldedActivation, activation_module
from torchao_superblock.bsr.format import check_bsr
from torchao_superblock.bsr.gated_mlp import GatedMLP, unfuse_gate
from torchao_superblock.bsr.linear import BSRLinear, customisation
from torchao_superblock.bsr.packed_linear import PackedBSRLinear
from torchao_superblock.common.all_or_nothing import all_or_nothing
from torchao_superblock.common.modules import parameter_owners, replace_modules, storage_address
from torchao_superblock.common.names import without_compile_prefix
from torchao_superblock.common.sharding import is_dtensor
from torchao_superblock.common.swappable import TWINS


def swap_to_dense(model: nn.Module) -> list[str]:
    """Replace, in place, every :class:`BSRLinear` by the `nn.Linear` that it stands for: undoes `swap_to_bsr`.

    A :class:`BSRMultiheadAttention` becomes an `nn.MultiheadAttention` again; it stays the same object. A
    :class:`BSRConv1x1` becomes an `nn.Conv2d`. What was a subclass of `nn.Linear` is an `nn.Linear` now.

    Weights are exactly those that the blocks hold, with zeros elsewhere; `bias` Parameters, hooks, `training`,
    `requires_grad`, dtype and device carry over. An activation that a layer applies goes back to its place behind it.
    If anything fails, the model is as it was. An optimizer built before holds the blocks: build it again.

    Features that `drop_dead_features=True` removed come back as zeros, behind those that were kept: shapes and the
    model's output are those of the dense model, though not the order of these hidden features, nor the weights in them
    that had no influence. That needs both layers of the pair, in the module that calls them.

    `use_nested_tensor` of an `nn.TransformerEncoder`, which a swap turns off, becomes what a new one would have.

    Args:
        model: any module, not itself a :class:`BSRLinear`.

    Returns:
        FQNs of the layers that are dense now; of query, key and value in an attention the FQN of the weight, as in the
        report of the swap.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: something was put around a layer that applies an activation whose place is kept behind it.
        ValueError: a layer cannot be made dense; all of those are named, with the reason: its activation has no place
            to go back to, the other half of its narrowed pair is elsewhere, its tensors are sharded, parametrized or
            shared with another layer, its indices are no BSR pattern, or it has something of its own that would be
            lost. Or the model is itself a BSRLinear, or wrapped in DistributedDataParallel.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:32].zero_()
        >>> before = model[0].weight
        >>> report = swap_to_bsr(model, min_sparsity=0.5, fuse_activations=True)
        >>> swap_to_dense(model)
        ['0']
        >>> torch.equal(model[0].weight, before)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_to_dense: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, BSRLinear):
        raise ValueError(
            "swap_to_dense: the model is itself a BSRLinear and cannot be replaced in place; wrap it in nn.Sequential, "
            "or take its weight from layer.to_dense()"
        )
    layers: dict[BSRLinear, str] = {}
    attentions: dict[BSRMultiheadAttention, str] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"swap_to_dense: {without_compile_prefix(fqn) or 'the model'!r} is wrapped in DistributedDataParallel, "
                "which would go on reducing the blocks; make ddp.module dense and wrap it again"
            )
        if isinstance(module, BSRLinear):
            layers[module] = without_compile_prefix(fqn)
        if isinstance(module, BSRMultiheadAttention):
            attentions[module] = without_compile_prefix(fqn)
    kept_places = {
        module: without_compile_prefix(fqn)
        for fqn, module in model.named_modules()
        if isinstance(module, FoldedActivation)
    }
    is_fused = bool(kept_places) or any(layer.is_narrowed for layer in layers)
    flows = dataflows(model)[0] if is_fused else []
    activations = _folded(flows, kept_places)
    outputs, inputs = _dropped(model, flows)
    owners = parameter_owners(model)
    problems = [
        f"{fqn!r}: {reason}"
        for layer, fqn in layers.items()
        for reason in _obstacles(layer, owners, layer in activations, outputs, inputs)
    ]
    problems += [
        f"{fqn!r}: it is a {type(attention).__name__} (parametrized?), not exactly a BSRMultiheadAttention"
        for attention, fqn in attentions.items()
        if type(attention) is not BSRMultiheadAttention
    ]
    problems += [
        f"{fqn!r}: no layer right before it applies the {place.activation} that stood there"
        for place, fqn in kept_places.items()
        if place not in activations.values() and not place.is_left_to_itself
    ]
    if problems:
        raise ValueError(f"swap_to_dense: cannot make dense {'; '.join(problems)}")

    # Tensors made in inference mode could never be trained.
    with all_or_nothing(model), torch.inference_mode(False), torch.no_grad():
        replacements: dict[nn.Module, nn.Module] = {
            layer: _to_linear(layer, *outputs.get(layer, (0, 1)), inputs.get(layer, 0), cls)
            for layer, cls in _types(model, layers)
        }
        functions = {}
        for place in kept_places:
            original = place.original or activation_module(place.activation)
            if isinstance(original, nn.Module):
                replacements[place] = original.train(place.training)
            else:
                functions[place] = original
        encoders = [
            encoder
            for encoder in model.modules()
            if isinstance(encoder, nn.TransformerEncoder)
            and any(module in layers for module in encoder.layers.modules())
        ]
        replace_modules(model, replacements)
        for attention in attentions:
            become_dense(attention)
        _put_back(model, functions)
        for module in model.modules():
            if isinstance(module, GatedMLP):
                unfuse_gate(module)
        for encoder in encoders:
            encoder.use_nested_tensor = _takes_nested_tensors(encoder)
    names = {
        f"{fqn}.{child}".removeprefix("."): f"{fqn}.{tensor}".removeprefix(".")
        for fqn in attentions.values()
        for tensor, child in IN_PROJECTIONS.items()
    }
    return [names.get(fqn, fqn) for fqn in layers.values()]


def _folded(
    flows: Sequence[Dataflow], places: Iterable[FoldedActivation]
) -> dict[BSRLinear, FoldedActivation]:
    """The layers whose activation has a place right behind them, each with the module that keeps that place."""
    folded = {}
    for place in places:
        # A module without a forward holds what a file alone says, and that which layer applies what.
        if type(place.owner) is nn.Module:
            layer = place.layer()
            if isinstance(layer, BSRLinear) and layer.activation == place.activation:
                folded[layer] = place
    for flow in flows:
        for path, steps in flow.chains.items():
            layer = flow.piece(path)
            behind = flow.piece(steps[0].path) if steps and steps[0].path else None
            if (
                isinstance(layer, BSRLinear)
                and isinstance(behind, FoldedActivation)
                and layer.activation == behind.activation
            ):
                folded[layer] = behind
    return folded


def _dropped(
    model: nn.Module, flows: Sequence[Dataflow]
) -> tuple[dict[BSRLinear, tuple[int, int]], dict[BSRLinear, int]]:
    """How many outputs and inputs each layer of a narrowed pair has lost, where all its layers agree on it.

    Outputs are lost in each part of a layer: `(outputs, parts)`.
    """
    outputs, inputs = {}, {}
    for pair in linear_pairs(model, flows):
        parts, second = 2 if pair.is_packed else 1, pair.last
        now, before = parts * second.in_features, parts * second.dense_shape[1]
        if all(
            (first.out_features, first.dense_shape[0]) == (now, before) for first in pair.firsts
        ):
            inputs[second] = second.dense_shape[1] - second.in_features
            outputs |= dict.fromkeys(pair.firsts, (inputs[second], parts))
    return outputs, inputs


def _put_back(model: nn.Module, functions: dict[FoldedActivation, Callable]) -> None:
    """Functions that were attributes are attributes again."""
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child in functions:
                delattr(parent, name)
                setattr(parent, name, functions[child])


def _obstacles(
    layer: BSRLinear,
    owners: dict[tuple[object, int], list[str]],
    has_place: bool,
    outputs: dict[BSRLinear, tuple[int, int]],
    inputs: dict[BSRLinear, int],
) -> Iterator[str]:
    """Why a layer cannot become an `nn.Linear`."""
    if type(layer) not in {PackedBSRLinear, *(twin.bsr for twin in TWINS.values())}:
        yield f"it is a {type(layer).__name__} (parametrized? sharded?), not exactly a BSRLinear"
        return
    if is_dtensor(layer.values):
        yield "it is sharded (DTensor); gather the model first"
        return
    own = customisation(layer)
    if own is not None:
        yield own
    others = owners[storage_address(layer.values)]
    if len(others) > 1:
        yield f"its blocks are shared: {', '.join(sorted(others))} are one tensor"
    shape = (layer.out_features, layer.in_features)
    if not layer.values.is_meta:
        try:
            indices = layer.crow_indices, layer.col_indices
            check_bsr(*indices, layer.values, shape, layer.blocksize, "the layer")
        except (TypeError, ValueError) as error:
            yield str(error)
    if layer.activation != "none" and not has_place:
        yield (
            f"it applies {layer.activation}, which an nn.Linear does not, and no place is kept for it behind it; "
            "set layer.activation to 'none' and put the activation behind it"
        )
    restored = (shape[0] + math.prod(outputs.get(layer, (0,))), shape[1] + inputs.get(layer, 0))
    if restored != layer.dense_shape:
        yield (
            f"features were dropped from {layer.dense_shape} to {shape}, and the layer that shares them does not "
            "follow in the same module, with nothing but activations and dropout between them and no hooks or ties; "
            "convert the whole model that was swapped"
        )


def _types(
    model: nn.Module, layers: Iterable[BSRLinear]
) -> Iterator[tuple[BSRLinear, type[nn.Linear]]]:
    """Each layer with the type that it had: torch gives one of its own to the last layer of an attention."""
    attention = {
        module._modules.get("out_proj")
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    for layer in layers:
        yield layer, NonDynamicallyQuantizableLinear if layer in attention else nn.Linear


def _to_linear(
    layer: BSRLinear, outputs: int, parts: int, inputs: int, cls: type[nn.Linear]
) -> nn.Module:
    """The dense twin, with as many inputs of zeros behind its own, and as many outputs behind each part of its own."""
    weight, bias = layer.matrix_of(layer.to_dense()), layer.bias
    if outputs or inputs:
        weight = weight.view(parts, -1, weight.shape[1])
        weight = F.pad(weight, (0, inputs, 0, outputs)).flatten(0, 1)
    if outputs and bias is not None:
        padded = F.pad(bias.view(parts, -1), (0, outputs)).flatten()
        bias = nn.Parameter(padded, bias.requires_grad)
    dense = layer.dense_module(weight, bias)
    if type(dense) is nn.Linear:
        dense.__class__ = cls  # the types differ in name alone
    return dense


def _takes_nested_tensors(encoder: nn.TransformerEncoder) -> bool:
    """What torch itself decides for such an encoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the reasons why not
        return nn.TransformerEncoder(
            encoder.layers[0], 0, enable_nested_tensor=encoder.enable_nested_tensor
        ).use_nested_tensor
