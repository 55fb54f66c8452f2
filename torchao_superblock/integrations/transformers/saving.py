"""Block-sparse models in `save_pretrained`, and those that are not squashed yet."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from torchao_superblock.integrations.transformers.config import (
    BlockSparseConfig,
    base_of,
    describe,
)
from torchao_superblock.integrations.transformers.loading import BlockSparseHfQuantizer
from torchao_superblock.integrations.transformers.masks import masks_of


def install() -> None:
    """Wraps `PreTrainedModel.save_pretrained`."""
    PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)


def _saving(save_pretrained: Any) -> Any:
    """`PreTrainedModel.save_pretrained` that sees what a model has become.

    transformers asks `model.hf_quantizer`, which only `from_pretrained` sets: a model that was prepared or swapped in
    this process would be written as if nothing had happened, and loaded again as random numbers.
    """

    @functools.wraps(save_pretrained)
    def save(
        self: PreTrainedModel,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        run = functools.partial(save_pretrained, self, save_directory, is_main_process)
        if getattr(self, "_hf_peft_config_loaded", False):  # adapters alone are saved
            return run(state_dict, *args, **kwargs)
        masked, layers = [fqn for fqn, _ in masks_of(self)], describe(self)
        folder = os.path.basename(os.path.normpath(save_directory))
        if masked and not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder):
            raise RuntimeError(
                f"save_pretrained: the block mask of {masked[0]!r} is not squashed yet, and from_pretrained could not "
                "load the model; call sparsifier.squash_mask(), or torchao_superblock.squash(model), first. (The "
                f"folders {PREFIX_CHECKPOINT_DIR}-STEP of a Trainer, from which training goes on, are exempt.)"
            )
        adapted = [fqn for fqn in layers if fqn.endswith(".base_layer")]
        if adapted:
            raise ValueError(
                f"save_pretrained: an adapter sits on {adapted[0].removesuffix('.base_layer')!r}, and from_pretrained "
                "could not load the model; save the adapter by itself (PeftModel.save_pretrained), or merge it first"
            )
        quantizer = getattr(self, "hf_quantizer", None)
        ours = isinstance(quantizer, BlockSparseHfQuantizer)
        if not masked and not layers and not ours:
            return run(state_dict, *args, **kwargs)
        if quantizer is not None and not ours:
            method = quantizer.quantization_config.quant_method
            raise ValueError(
                f"save_pretrained: the model is quantized with {getattr(method, 'value', method)} and block-sparse "
                f"({(masked or list(layers))[0]!r}), and config.json can say one of the two; use torch.save("
                "model.state_dict(), path)"
            )
        kinds = {
            fqn: type(parameter.data).__name__
            for fqn, parameter in self.named_parameters()
            if type(parameter.data) is not Tensor
        }
        if layers and kinds and state_dict is None:
            fqn, kind = next(iter(kinds.items()))
            raise TypeError(
                f"save_pretrained: {fqn!r} is a {kind}, and beside blocks safetensors can hold plain tensors only; use "
                "torch.save(model.state_dict(), path)"
            )
        config = new = None
        if _are_fused(self, layers) and kwargs.setdefault("save_original_format", False):
            raise ValueError(
                "save_pretrained: in its original format, weights of this model lie in one tensor, and blocks of "
                "several patterns do not; leave save_original_format out"
            )
        if masked or layers:
            config = BlockSparseConfig(layers=layers, base=base_of(self), unsquashed=masked)
            new = BlockSparseHfQuantizer(config, state_dict=state_dict)
        with (
            _attribute(self, "hf_quantizer", new),
            _attribute(self.config, "quantization_config", config),
        ):
            result = run(state_dict, *args, **kwargs)
        if masked and is_main_process:
            _hide_weights(save_directory)
        return result

    return save


def _hide_weights(folder: str | os.PathLike[str]) -> None:
    """Lets `config.json` name weights that are not there, for processes that know nothing of `quantization_config`.

    The masked weights have other names than dense ones: they would be missing, and random numbers in their place. A
    `Trainer` that goes on from the folder finds its weights by itself.
    """
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config["transformers_weights"] = (
        "none, since block masks are not squashed yet; import torchao_superblock.integrations.transformers"
    )
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, sort_keys=True)
    os.replace(f"{path}.part", path)


def _are_fused(model: PreTrainedModel, layers: Iterable[str]) -> bool:
    """Whether transformers would store some of these layers together with others."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    keys = [f"{fqn}.{name}" for fqn in layers for name in ("weight", "crow_indices", "bias")]
    return any(
        backwards.rename_source_key(key)[1] is not None
        for conversion in conversions
        if isinstance(conversion, WeightConverter)
        for backwards in [conversion.reverse_transform()]
        for key in keys
    )


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value, or with None is not there, while the block runs."""
    had, before = name in vars(owner), vars(owner).get(name)
    vars(owner).pop(name, None)
    if value is not None:
        setattr(owner, name, value)
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        if had:
            setattr(owner, name, before)
