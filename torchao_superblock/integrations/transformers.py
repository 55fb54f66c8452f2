"""Models of transformers: block sparsity in `from_pretrained`, `save_pretrained` and `Trainer`.

A folder of a swapped model is an ordinary one: `config.json`, whose `quantization_config` describes the block-sparse
layers, and safetensors, in shards where they are large. In the files

    LAYER.weight         (stored blocks, rows, cols), what a :class:`BSRLinear` calls `values`
    LAYER.crow_indices   int32 (block rows + 1,)
    LAYER.col_indices    int32 (stored blocks,)
    LAYER.bias           (out_features,), if the layer has one

`weight` is the name that a dense model looks for, and has three dimensions: a process that has not imported this module
knows nothing of `quantization_config`, finds that sizes differ, and raises, where a missing `weight` would be random
numbers and a warning.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.bsr import BSRLinear, SwapReport, swap_to_bsr, swap_to_dense
from torchao_superblock.pruning import BlockMask, BlockSparsifier

VERSIONS = ("5.22", "6")
"""The first release of transformers that this works with, and the first that it does not."""

_INSTALL = (
    f"pip install 'torchao_superblock[transformers]' (transformers>={VERSIONS[0]},<{VERSIONS[1]})"
)

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"torchao_superblock.integrations.transformers needs transformers: {_INSTALL}"
    ) from error

_release = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
if not tuple(map(int, VERSIONS[0].split("."))) <= _release < (int(VERSIONS[1]),):
    raise ImportError(
        f"torchao_superblock.integrations.transformers works with transformers from {VERSIONS[0]} to before "
        f"{VERSIONS[1]}, whose loading code it follows; {transformers.__version__} is installed: {_INSTALL}"
    )

from transformers import PreTrainedModel, TrainerCallback  # noqa: E402
from transformers.core_model_loading import WeightRenaming  # noqa: E402
from transformers.quantizers import (  # noqa: E402
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402
from transformers.utils import logging  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

__all__ = [
    "BlockSparseConfig",
    "BlockSparseHfQuantizer",
    "SparseTrainerMixin",
    "SparsifierCallback",
]

METHOD = "torchao_superblock"
FORMAT_VERSION = 1
SPARSIFIER_FILE = "sparsifier.pt"

logger = logging.get_logger(__name__)


@register_quantization_config(METHOD)
class BlockSparseConfig(QuantizationConfigMixin):
    """How a model is block-sparse: the `quantization_config` of `from_pretrained` and of `config.json`.

    Given to `from_pretrained` with a folder of a dense model, it swaps the layers that have blocks of zeros while the
    model is loaded, as :func:`swap_to_bsr` does. `save_pretrained` writes it, with `layers`, for a swapped model.

    Args:
        blocksize: int or `(rows, cols)` for all layers; None reads each layer's off its zeros.
        min_sparsity: a layer with a smaller fraction of zero blocks stays dense; None means where it would be slower.
        modules_to_not_convert: names, or last parts of names, of modules to leave dense with all that is in them.
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
            swap_to_bsr(nn.Module(), blocksize, min_sparsity=min_sparsity)  # its own checks
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

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds: everything that is set."""
        return {
            key: value for key, value in super().to_dict().items() if value not in (None, [], "")
        }

    def keeps_dense(self, fqn: str) -> bool:
        """Whether `modules_to_not_convert` names a module or one that it is in."""
        return any(f".{name}." in f".{fqn}." for name in self.modules_to_not_convert)


def _check_layer(fqn: str, layer: Any) -> None:
    """A layer is described as :func:`_describe` does it."""
    try:
        (N, K), (r, c) = layer["shape"], layer["blocksize"]
        numbers = (N, K, r, c, layer["stored_blocks"])
        sound = all(type(number) is int for number in numbers) and type(layer["bias"]) is bool
        sound = sound and min(N, K, r, c) > 0 and N % r == K % c == 0 and len(layer) == 4
        sound = sound and 0 <= layer["stored_blocks"] <= (N // r) * (K // c)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(
            f"BlockSparseConfig: the layer {fqn!r} is described by {layer!r}; it needs shape, blocksize that divides "
            "it, stored_blocks and bias"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


class _Loading(BSRLinear):
    """A layer that is being filled; transformers asks the weights of its modules whether they still need a start."""

    @property
    def weight(self) -> Tensor:
        weight = super().weight
        weight._is_hf_initialized = True
        return weight


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

    Attributes:
        report: after `from_pretrained` swapped a dense model, the :class:`SwapReport`; else None.
    """

    requires_calibration = False

    def __init__(self, quantization_config: BlockSparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: SwapReport | None = None
        self._state_dict: dict[str, Tensor] | None = None
        self._names: dict[str, str] = {}  # of each layer: in the files -> in this model
        self._renaming = _BlocksRenaming(set())

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
            ValueError: there are no layers to load, or a dense model is to be swapped and spread over devices.
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
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if not self.pre_quantized and (len(places) > 1 or "disk" in map(str, places)):
            raise ValueError(
                f"from_pretrained: a dense model that is spread over {', '.join(sorted(map(str, places)))} cannot be "
                "swapped while loading. Load and swap it on one device, save it, and load that with device_map"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Puts empty block-sparse layers in place, as `config.json` describes them."""
        if not self.pre_quantized:
            return
        folder = model.config.name_or_path
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                f"from_pretrained: {folder!r} is block-sparse, and its blocks cannot be split over devices while "
                "loading; load it without tp_plan or distributed_config"
            )
        layers = self.quantization_config.layers
        self._names = _names_in(model, self.quantization_config)
        for saved, own in self._names.items():
            _check_fits(model.get_submodule(own), layers[saved], model, own, folder)
        _check_files(checkpoint_files or (), layers, folder)
        for saved, own in self._names.items():
            model.set_submodule(own, _empty(model.get_submodule(own), layers[saved]))
        self._renaming = _BlocksRenaming({*self._names, *self._names.values()})

    def get_weight_conversions(self) -> list[WeightRenaming]:
        return [self._renaming] if self.pre_quantized else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Checks what was loaded and builds the plans; or swaps what is still dense."""
        config = self.quantization_config
        if self.pre_quantized:
            for saved, own in self._names.items():
                self._finish(model.get_submodule(own), saved, own, model.config.name_or_path)
        else:
            self.report = swap_to_bsr(
                model,
                config.blocksize,
                min_sparsity=config.min_sparsity,
                filter_fn=lambda module, fqn: not config.keeps_dense(fqn),
            )
            _log(self.report)
        config.layers, config.base = _describe(model), _base_of(model)
        # A layer of blocks can be cast and trained as any other can, which transformers refuses for "quantized" ones.
        model.is_quantized = False

    def _finish(self, layer: BSRLinear, saved: str, own: str, folder: str) -> None:
        names = ["weight", "crow_indices", "col_indices"] + ["bias"] * (layer.bias is not None)
        seen = self._renaming.seen
        missing = [n for n in names if f"{saved}.{n}" not in seen and f"{own}.{n}" not in seen]
        if missing:
            lost = ", ".join(f"{saved}.{name}" for name in missing)
            raise ValueError(f"from_pretrained: {folder!r} is damaged: it lacks {lost}")
        with _present(layer):
            try:  # its own checks of what it holds, and its plan
                layer.load_state_dict(layer.state_dict(keep_vars=True), assign=True)
            except RuntimeError as error:
                reason = str(error).partition("\n\t")[2]
                raise ValueError(
                    f"from_pretrained: {folder!r} is damaged: {own!r}: {reason or error}"
                ) from error
        layer.__class__ = BSRLinear

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors under their names in files."""
        state = dict(model.state_dict() if self._state_dict is None else self._state_dict)
        layers = _describe(model)
        stored = {}
        for key, tensor in state.items():
            fqn, _, name = key.rpartition(".")
            if fqn in layers:
                layer = model.get_submodule(fqn)
                if tensor.is_meta:  # offloaded
                    with _present(layer):
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
        own = _join(_base_of(model), fqn.removeprefix(f"{config.base}.")) if in_base else fqn
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


def _base_of(model: PreTrainedModel) -> str:
    """What a model with a head calls the model without; empty for one without."""
    return model.base_model_prefix if model.base_model is not model else ""


def _join(prefix: str, fqn: str) -> str:
    return f"{prefix}.{fqn}" if prefix else fqn


def _check_fits(
    linear: nn.Module, layer: dict[str, Any], model: PreTrainedModel, fqn: str, folder: str
) -> None:
    """A described layer is a linear one of that shape in the model."""
    where = f"from_pretrained: {folder!r} belongs to another model: {fqn!r} is"
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ValueError(f"{where} a block-sparse linear layer, and here a {type(linear).__name__}")
    shape = (linear.out_features, linear.in_features)
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
        expected = {"weight": (nnz, r, c), "crow_indices": (N // r + 1,), "col_indices": (nnz,)}
        for name, shape in expected.items():
            held = shapes.get(f"{fqn}.{name}", shape)
            if held != shape:
                raise ValueError(
                    f"from_pretrained: {folder!r} is damaged: {fqn}.{name} has shape {held}, and config.json says "
                    f"{shape}"
                )


def _empty(linear: nn.Linear, layer: dict[str, Any]) -> _Loading:
    """A block-sparse layer without content on the meta device, like a linear one that is there."""
    (N, K), (r, c), nnz = layer["shape"], layer["blocksize"], layer["stored_blocks"]
    dtype = linear.weight.dtype
    with torch.device("cpu"):  # from_pretrained has made meta the default one
        bias = torch.zeros(N, dtype=dtype) if layer["bias"] else None
        index, col = torch.zeros(N // r + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
        empty = _Loading(K, N, (r, c), index, col, torch.zeros(0, r, c, dtype=dtype), bias)
    empty = empty.to("meta")
    empty.values = nn.Parameter(torch.empty(nnz, r, c, dtype=dtype, device="meta"))
    empty.col_indices = torch.empty(nnz, dtype=torch.int32, device="meta")
    return empty.train(linear.training)


@contextlib.contextmanager
def _present(layer: nn.Module) -> Iterator[None]:
    """With the tensors of a layer there, although accelerate keeps them elsewhere between calls."""
    if not hasattr(layer, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        yield


def _log(report: SwapReport) -> None:
    """Says what stays dense although it has blocks of zeros, or that there were none."""
    lines = [f"{entry.fqn}: {entry.reason}" for entry in report.skipped if entry.sparsity]
    if not report.swapped:
        lines = lines or ["no weight has a block of zeros"]
        logger.warning(f"from_pretrained: BlockSparseConfig swapped no layer: {'; '.join(lines)}")
    elif lines:
        logger.warning(
            f"from_pretrained: {len(report.swapped)} layers are block-sparse now. These have blocks of zeros and stay "
            f"dense: {'; '.join(lines)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


def _describe(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """FQN -> description of each block-sparse layer.

    Raises:
        ValueError: one of them is more than a folder can say.
    """
    layers = {}
    for fqn, module in model.named_modules():
        if type(module) in (BSRLinear, _Loading):
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
    for fqn, module in model.named_modules(remove_duplicate=False):
        if "crow_indices" in module._buffers and fqn not in layers:
            raise ValueError(
                f"save_pretrained: {fqn!r} is a {type(module).__name__}, or registered twice, and a folder of "
                "transformers can describe single layers of type BSRLinear only; use save_bsr"
            )
    return layers


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
        masked, layers = [fqn for fqn, _ in _masks(self)], _describe(self)
        folder = os.path.basename(os.path.normpath(save_directory))
        if masked and not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder):
            raise RuntimeError(
                f"save_pretrained: the block mask of {masked[0]!r} is not squashed yet, and from_pretrained could not "
                "load the model; call sparsifier.squash_mask(), or torchao_superblock.squash(model), first. (The "
                f"folders {PREFIX_CHECKPOINT_DIR}-STEP of a Trainer, from which training goes on, are exempt.)"
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
        config = new = None
        if masked or layers:
            config = BlockSparseConfig(layers=layers, base=_base_of(self), unsquashed=masked)
            new = BlockSparseHfQuantizer(config)
            new._state_dict = state_dict
        with (
            _attribute(self, "hf_quantizer", new),
            _attribute(self.config, "quantization_config", config),
        ):
            return run(state_dict, *args, **kwargs)

    return save


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


PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)


# ---------------------------------------------------------------------------------------------------------------------
# Trainer
# ---------------------------------------------------------------------------------------------------------------------


def _masks(model: nn.Module) -> Iterator[tuple[str, BlockMask]]:
    """FQN and mask of each masked weight."""
    for fqn, module in model.named_modules():
        if isinstance(module, BlockMask):
            yield re.sub(r"(^|\.)parametrizations\.([^.]+)\.\d+$", r"\1\2", fqn), module


class SparseTrainerMixin:
    """A `Trainer` that decays no scores of block masks: `class SparseTrainer(SparseTrainerMixin, Trainer)`.

    Decay pulls all scores towards zero alike and says nothing about the blocks. A `Trainer` decides on its groups when
    it builds the optimizer, and a resumed one must find the same, so it cannot be left to a callback.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that are decayed."""
        scores = {id(parameter) for _, mask in _masks(model) for parameter in mask.parameters()}
        parameters = dict(model.named_parameters())
        names = super().get_decay_parameter_names(model)
        return [name for name in names if id(parameters.get(name)) not in scores]


class SparsifierCallback(TrainerCallback):
    """Steps a sparsifier with a `Trainer`, and saves it beside each checkpoint.

    Before training it looks whether the optimizer trains all scores and decays none (:class:`SparseTrainerMixin`). A
    training that is resumed finds the sparsifier in the checkpoint's folder, and goes on as if it had not stopped.

    Args:
        sparsifier: has prepared the model of the `Trainer`.
        squash: fold the masks when training ends (with `load_best_model_at_end`, those of the best model).
        resume_from: the folder that training is resumed from, if it is neither in `output_dir` nor
            `TrainingArguments.resume_from_checkpoint`.

    Raises:
        RuntimeError: at the start of a training: the model is not the one that the sparsifier has prepared, or the
            optimizer is not made for it.
        FileNotFoundError, ValueError: the checkpoint has no state of this sparsifier.

    Example:
        >>> from transformers import Trainer
        >>> class SparseTrainer(SparseTrainerMixin, Trainer):
        ...     pass
        >>> sparsifier.prepare(model, [{"tensor_fqn": "*layers*"}])  # doctest: +SKIP
        >>> callback = SparsifierCallback(sparsifier, squash=True)  # doctest: +SKIP
        >>> SparseTrainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        sparsifier: BlockSparsifier,
        *,
        squash: bool = False,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(sparsifier, BlockSparsifier):
            raise TypeError(
                f"SparsifierCallback: expected a sparsifier, got {type(sparsifier).__name__}"
            )
        self.sparsifier = sparsifier
        self.squash = squash
        self.resume_from = resume_from

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        modules = set(model.modules())
        groups = self.sparsifier.groups
        if not groups or any(group["module"] not in modules for group in groups):
            raise RuntimeError(
                "SparsifierCallback: the sparsifier has not prepared the model of this Trainer; call "
                "sparsifier.prepare(model) before the Trainer is made"
            )
        self._check_optimizer(model, optimizer)
        if state.global_step:
            self._restore(args, state)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        # Here gradients are still there. A step that the scaler of float16 skipped had none to go by.
        if not getattr(optimizer, "step_was_skipped", False):
            self.sparsifier.step()

    def on_save(self, args, state, control, **kwargs) -> None:
        content = {"global_step": state.global_step, "sparsifier": self.sparsifier.state_dict()}
        if not args.should_save:
            return
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"SparsifierCallback: there is no {folder!r} to save the sparsifier in (a search for hyperparameters "
                "saves elsewhere; set save_strategy='no' there)"
            )
        path = os.path.join(folder, SPARSIFIER_FILE)
        torch.save(content, f"{path}.part")
        os.replace(f"{path}.part", path)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.squash:
            self.sparsifier.squash_mask()

    def _check_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        way_out = (
            "leave the optimizer to class SparseTrainer(SparseTrainerMixin, Trainer), or build it from "
            "sparsifier.param_groups(model, weight_decay)"
        )
        for fqn, mask in _masks(model):
            is_trained = isinstance(mask.scores, nn.Parameter)
            parameter = mask.scores if is_trained else mask.carrier
            if parameter is None:  # neither gradients nor the optimizer matter to this kind
                continue
            if not parameter.requires_grad:
                raise RuntimeError(
                    f"SparsifierCallback: the scores of {fqn!r} do not require gradients, so its mask would never "
                    "change; call requires_grad_(True) on its mask (peft freezes what is no adapter), or hold the "
                    "masks with sparsifier.freeze()"
                )
            if is_trained and id(parameter) not in groups:
                raise RuntimeError(
                    f"SparsifierCallback: the optimizer does not train the scores of {fqn!r}. It was built before "
                    f"prepare(), or for another model: {way_out}"
                )
            if is_trained and groups[id(parameter)].get("weight_decay"):
                raise RuntimeError(
                    f"SparsifierCallback: the optimizer decays the scores of {fqn!r} by "
                    f"{groups[id(parameter)]['weight_decay']}, which says nothing about blocks: {way_out}"
                )

    def _restore(self, args, state) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folders = [os.path.join(args.output_dir, name)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, args.resume_from_checkpoint)
        if self.resume_from is not None:
            folders = [os.fspath(self.resume_from)]
        paths = [os.path.join(folder, SPARSIFIER_FILE) for folder in folders]
        path = next(filter(os.path.isfile, paths), None)
        if path is None:
            raise FileNotFoundError(
                f"SparsifierCallback: training goes on from step {state.global_step}, and there is no "
                f"{' or '.join(map(repr, paths))}; pass the checkpoint's folder as resume_from, or start anew"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
        try:
            step, saved = content["global_step"], content["sparsifier"]
            masks = {fqn: entry["mask"] for fqn, entry in saved["state"].items()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"SparsifierCallback: {path!r} holds no sparsifier") from error
        if step != state.global_step:
            raise ValueError(
                f"SparsifierCallback: {path!r} is of step {step}, training goes on from {state.global_step}; pass the "
                "right folder as resume_from"
            )
        own = self.sparsifier.state  # the masks of the model's next forward
        for fqn, mask in masks.items():
            if fqn in own and not torch.equal(own[fqn]["mask"].cpu(), mask.cpu()):
                raise ValueError(
                    f"SparsifierCallback: {path!r} has another mask for {fqn!r} than the model that was resumed, so "
                    "it is of another run; pass the right folder as resume_from"
                )
        self.sparsifier.load_state_dict(saved)
