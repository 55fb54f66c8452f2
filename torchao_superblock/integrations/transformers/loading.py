"""Block-sparse models in `from_pretrained`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantizer

from torchao_superblock.bsr import BSRLinear, SwapReport, swap_to_dense
from torchao_superblock.integrations.transformers.config import (
    METHOD,
    BlockSparseConfig,
    base_of,
    describe,
)
from torchao_superblock.integrations.transformers.layer import (
    bsr_type,
    empty_layer,
    finish,
    present,
)
from torchao_superblock.integrations.transformers.swapping import Swapping


class _BlocksRenaming(WeightRenaming):
    """Names in files become names in the model; remembers what a file had.

    Args:
        layers: FQNs of the block-sparse layers.
    """

    __slots__ = ("layers", "seen")

    def __init__(self, layers: set[str]) -> None:
        super().__init__(source_patterns="weight", target_patterns="values")
        self.layers = layers
        self.seen: set[str] = set()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        layer, _, name = source_key.rpartition(".")
        if layer not in self.layers:
            return source_key, None
        self.seen.add(source_key)
        if name != "weight":
            return source_key, None
        return f"{layer}.values", "weight"

    def was_used(self) -> bool:
        # What transformers takes as used is undone when the model is saved; `get_state_dict_and_metadata` does that.
        return False


@register_quantizer(METHOD)
class BlockSparseHfQuantizer(HfQuantizer):
    """What transformers calls to load and save block-sparse models; users meet it as `model.hf_quantizer`.

    Args:
        quantization_config: of the folder, or of the call of `from_pretrained`.
        state_dict: what to save; None for the model's own.
        kwargs: of `HfQuantizer`.

    Attributes:
        report: after `from_pretrained` swapped a dense model, the :class:`SwapReport`; else None.
    """

    requires_calibration = False

    def __init__(
        self,
        quantization_config: BlockSparseConfig,
        *,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: SwapReport | None = None
        self._state_dict = state_dict
        self._names: dict[str, str] = {}  # of each layer: in the files -> in this model
        self._renaming = _BlocksRenaming(set())
        self._swapping = Swapping(quantization_config)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # the stored blocks are ordinary parameters

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses before anything is loaded.

        Raises:
            RuntimeError: the folder is a checkpoint of a model that is not squashed yet.
            ValueError: there are no layers to load, or a part of a dense model is to be swapped and left on the disk.
        """
        config = self.quantization_config
        if config.unsquashed:
            raise RuntimeError(
                f"from_pretrained: the folder is a Trainer's checkpoint of a model whose block masks (of "
                f"{config.unsquashed[0]!r} and others) are not squashed yet. Resume its training, or prepare a model "
                "in the same way, load the weights with load_state_dict, squash it with torchao_superblock.squash"
                "(model) and save that"
            )
        if self.pre_quantized and not config.layers:
            raise ValueError(
                "from_pretrained: quantization_config in config.json describes no block-sparse layers; save the "
                "swapped model again"
            )
        if not self.pre_quantized and config.layers:
            raise ValueError(
                "from_pretrained: layers is for save_pretrained to write, and this folder holds a dense model; leave "
                "it out of BlockSparseConfig"
            )
        places = device_map.values() if isinstance(device_map, dict) else ()
        if not self.pre_quantized and "disk" in map(str, places):
            raise ValueError(
                "from_pretrained: parts of a dense model that are kept on the disk cannot be swapped while loading. "
                "Load and swap it without, save it, and load that with device_map"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Puts empty block-sparse layers in place, as `config.json` describes them."""
        folder = model.config.name_or_path
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                f"from_pretrained: blocks, as of {folder!r}, cannot be split over devices while loading; load it "
                "without tp_plan or distributed_config"
            )
        if not self.pre_quantized:
            return
        layers = self.quantization_config.layers
        self._names = _names_in(model, self.quantization_config)
        for saved, own in self._names.items():
            _check_fits(model.get_submodule(own), layers[saved], model, own, folder)
        _check_files(checkpoint_files or (), layers, folder)
        for saved, own in self._names.items():
            model.set_submodule(own, empty_layer(model.get_submodule(own), layers[saved]))
        self._renaming = _BlocksRenaming({*self._names, *self._names.values()})

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        return not self.pre_quantized and self._swapping.wants(model, param_name)

    def get_quantize_ops(self) -> Swapping:
        return self._swapping

    def get_weight_conversions(self) -> list[WeightRenaming]:
        return [self._renaming] if self.pre_quantized else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Checks what was loaded, and builds the plans."""
        config = self.quantization_config
        if self.pre_quantized:
            for saved, own in self._names.items():
                self._finish(model.get_submodule(own), saved, own, model.config.name_or_path)
        else:
            self.report = self._swapping.finish(model)
        config.layers, config.base = describe(model), base_of(model)
        # A layer of blocks can be cast and trained as any other can, which transformers refuses for "quantized" ones.
        model.is_quantized = False

    def _finish(self, layer: BSRLinear, saved: str, own: str, folder: str) -> None:
        names = ["weight", "crow_indices", "col_indices"] + ["bias"] * (layer.bias is not None)
        seen = self._renaming.seen
        missing = [n for n in names if f"{saved}.{n}" not in seen and f"{own}.{n}" not in seen]
        if missing:
            lost = ", ".join(f"{saved}.{name}" for name in missing)
            raise ValueError(f"from_pretrained: {folder!r} is damaged: it lacks {lost}")
        try:
            finish(layer)
        except RuntimeError as error:
            reason = str(error).partition("\n\t")[2]
            raise ValueError(
                f"from_pretrained: {folder!r} is damaged: {own!r}: {reason or error}"
            ) from error

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors under their names in files."""
        state = dict(model.state_dict() if self._state_dict is None else self._state_dict)
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters alone are saved
            return state, {}
        layers = describe(model)
        stored = {}
        for key, tensor in state.items():
            fqn, _, name = key.rpartition(".")
            if fqn in layers:
                layer = model.get_submodule(fqn)
                if tensor.is_meta:  # offloaded
                    with present(layer):
                        tensor = getattr(layer, name).detach().to("cpu", copy=True)
                if name == "values":
                    key = f"{fqn}.weight"
            stored[key] = tensor
        return stored, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        swap_to_dense(model)
        return model


def _names_in(model: PreTrainedModel, config: BlockSparseConfig) -> dict[str, str]:
    """Where each described layer is in this model, which may be the base of the saved one or have another head."""
    folder, modules = model.config.name_or_path, dict(model.named_modules())
    same_class = type(model).__name__ in (model.config.architectures or ())
    names, missing = {}, []
    for fqn in config.layers:
        in_base = not config.base or fqn.startswith(f"{config.base}.")
        own = _join(base_of(model), fqn.removeprefix(f"{config.base}.")) if in_base else fqn
        if own in modules:
            names[fqn] = own
        elif in_base or same_class:  # the head of another class is not looked for
            missing.append(fqn)
    if missing:
        raise ValueError(
            f"from_pretrained: {folder!r} belongs to another model: its config.json describes "
            f"{', '.join(map(repr, missing))}, and {type(model).__name__} has no such layer"
        )
    return names


def _join(prefix: str, fqn: str) -> str:
    return f"{prefix}.{fqn}" if prefix else fqn


def _check_fits(
    linear: nn.Module, layer: dict[str, Any], model: PreTrainedModel, fqn: str, folder: str
) -> None:
    """A described layer is a linear one of that shape in the model."""
    where = f"from_pretrained: {folder!r} belongs to another model: {fqn!r} is"
    bsr = bsr_type(linear)
    if bsr is None:
        raise ValueError(f"{where} a block-sparse linear layer, and here a {type(linear).__name__}")
    shape = bsr.features_of(linear)
    if shape != tuple(layer["shape"]):
        raise ValueError(f"{where} of shape {tuple(layer['shape'])}, and here of {shape}")
    if (linear.bias is not None) != layer["bias"]:
        raise ValueError(
            f"{where} saved with{'' if layer['bias'] else 'out'} a bias, unlike the one here"
        )
    ties = model.all_tied_weights_keys
    if f"{fqn}.weight" in {*ties, *ties.values()}:
        raise ValueError(
            f"{where} block-sparse, and here tied to another weight; load it with tie_word_embeddings=False"
        )


def _check_files(files: Iterable[str], layers: dict[str, dict[str, Any]], folder: str) -> None:
    """The tensors of the layers have the sizes that the config says, also where sizes are not to be compared."""
    from safetensors import safe_open

    shapes = {}
    for path in files:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    for fqn, layer in layers.items():
        (N, _), (r, c), nnz = layer["shape"], layer["blocksize"], layer["stored_blocks"]
        expected = {"weight": (nnz, r, c), "crow_indices": (-(-N // r) + 1,), "col_indices": (nnz,)}
        for name, shape in expected.items():
            held = shapes.get(f"{fqn}.{name}", shape)
            if held != shape:
                raise ValueError(
                    f"from_pretrained: {folder!r} is damaged: {fqn}.{name} has shape {held}, and config.json says "
                    f"{shape}"
                )
