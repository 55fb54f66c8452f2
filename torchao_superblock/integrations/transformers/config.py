"""What `config.json` says of a block-sparse model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from torchao_superblock.bsr import BSRLinear, swap_to_bsr
from torchao_superblock.common.blocks import block_grid
from torchao_superblock.common.swappable import TWINS
from torchao_superblock.integrations.transformers.conv1d import BSRConv1D

METHOD = "torchao_superblock"
FORMAT_VERSION = 1


@register_quantization_config(METHOD)
class BlockSparseConfig(QuantizationConfigMixin):
    """How a model is block-sparse: the `quantization_config` of `from_pretrained` and of `config.json`.

    Given to `from_pretrained` with a folder of a dense model, it swaps the layers that have blocks of zeros while the
    model is loaded, as :func:`swap_to_bsr` does. `save_pretrained` writes it, with `layers`, for a swapped model.

    Args:
        blocksize: int or `(rows, cols)` for all layers; None reads each layer's off its zeros.
        min_sparsity: a layer with a smaller fraction of zero blocks stays dense; None means where it would be slower.
        modules_to_not_convert: names, or last parts of names, of modules to leave dense with all that is in them.
        pad: take layers whose shape is not a multiple of the block size, too, as :func:`swap_to_bsr` does.
        layers: written by `save_pretrained`: FQN -> `shape` `(out_features, in_features)`, `blocksize`,
            `stored_blocks` and `bias`.
        base: written by `save_pretrained`: what the saved model calls its part without a head.
        unsquashed: written into the checkpoints of a `Trainer`: the FQNs of masked weights.
        format_version: of what is written.

    Raises:
        ValueError: a value is out of range, a later release wrote the folder, or a layer is described in another way.
        TypeError: a value is of another type, or has no meaning here.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> config = BlockSparseConfig(min_sparsity=0.5)
        >>> load = AutoModelForCausalLM.from_pretrained
        >>> model = load("dense_with_zeros", quantization_config=config)  # doctest: +SKIP
        >>> print(model.hf_quantizer.report)  # doctest: +SKIP
    """

    def __init__(
        self,
        blocksize: int | tuple[int, int] | None = None,
        min_sparsity: float | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        base: str = "",
        unsquashed: Iterable[str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        pad: bool = False,
        **unknown: Any,
    ) -> None:
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"BlockSparseConfig: the model was saved in format version {format_version!r}, this release of "
                f"torchao_superblock reads version {FORMAT_VERSION}; upgrade torchao_superblock"
            )
        if quant_method != METHOD or unknown:
            what = ", ".join(unknown) or f"quant_method={quant_method!r}"
            raise TypeError(f"BlockSparseConfig: it has no setting {what}")
        if isinstance(modules_to_not_convert, str):
            raise TypeError(
                f"BlockSparseConfig: modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}"
            )
        if isinstance(blocksize, list):  # as JSON has it
            blocksize = tuple(blocksize)
        try:
            # Its own checks.
            swap_to_bsr(nn.Module(), blocksize, min_sparsity=min_sparsity, pad=pad)
        except (TypeError, ValueError) as error:
            raise type(error)(f"BlockSparseConfig: {error}") from error
        for fqn, layer in (layers or {}).items():
            _check_layer(fqn, layer)
        self.quant_method = METHOD
        self.format_version = format_version
        self.blocksize = blocksize
        self.min_sparsity = min_sparsity
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.layers = dict(layers or {})
        self.base = base
        self.unsquashed = list(unsquashed or ())
        self.pad = pad

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds: everything that is set."""
        return {
            key: value
            for key, value in super().to_dict().items()
            if value not in (None, [], "") and value is not False
        }

    def keeps_dense(self, fqn: str) -> bool:
        """Whether `modules_to_not_convert` names a module or one that it is in."""
        return any(f".{name}." in f".{fqn}." for name in self.modules_to_not_convert)


def _check_layer(fqn: str, layer: Any) -> None:
    """A layer is described as :func:`describe` does it."""
    try:
        (N, K), (r, c) = layer["shape"], layer["blocksize"]
        numbers = (N, K, r, c, layer["stored_blocks"])
        sound = all(type(number) is int for number in numbers) and type(layer["bias"]) is bool
        sound = sound and min(N, K, r, c) > 0 and len(layer) == 4
        sound = sound and 0 <= layer["stored_blocks"] <= math.prod(block_grid((N, K), (r, c)))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(
            f"BlockSparseConfig: the layer {fqn!r} is described by {layer!r}; it needs shape, blocksize, "
            "stored_blocks and bias"
        )


def describe(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """FQN -> description of each block-sparse layer.

    Raises:
        ValueError: one of them is more than a folder can say.
    """
    layers = {}
    for fqn, module in model.named_modules():
        if type(module) in (BSRLinear, BSRConv1D):
            if module.activation != "none" or module.is_narrowed:
                raise ValueError(
                    f"save_pretrained: {fqn!r} applies an activation or lost features, which a folder of transformers "
                    "cannot say; swap without fuse_activations and drop_dead_features, or use save_bsr"
                )
            layers[fqn] = {
                "shape": [module.out_features, module.in_features],
                "blocksize": list(module.blocksize),
                "stored_blocks": module.nnz,
                "bias": module.bias is not None,
            }
    others = {twin.bsr for twin in TWINS.values()} - {BSRLinear, BSRConv1D}
    for fqn, module in model.named_modules(remove_duplicate=False):
        has_blocks = type(module) in others or "crow_indices" in module._buffers
        if has_blocks and fqn not in layers:
            raise ValueError(
                f"save_pretrained: {fqn!r} is a {type(module).__name__}, or registered twice, and a folder of "
                "transformers can describe single layers of type BSRLinear and BSRConv1D only; use save_bsr"
            )
    return layers


def base_of(model: PreTrainedModel) -> str:
    """What a model with a head calls the model without; empty for one without."""
    return model.base_model_prefix if model.base_model is not model else ""
