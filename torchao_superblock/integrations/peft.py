"""peft: LoRA on the block-sparse layers of a swapped model.

Once this is imported, `get_peft_model`, `PeftModel.from_pretrained` and `model.add_adapter` take a :class:`BSRLinear`
for a target as they take an `nn.Linear`. The adapter is dense and runs beside the blocks. What it adds has a place in
the stored blocks only: merging asks first what would be lost.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.bsr import BSRConv1x1, BSRLinear
from torchao_superblock.bsr.format import in_blocks
from torchao_superblock.pruning import BlockMask

VERSIONS = ("0.21", "1.0")
"""The first release of peft that this works with, and the first that it does not."""

_INSTALL = f"pip install 'torchao_superblock[peft]' (peft>={VERSIONS[0]},<{VERSIONS[1]})"

try:
    import peft
except ImportError as error:
    raise ImportError(f"torchao_superblock.integrations.peft needs peft: {_INSTALL}") from error

_release = tuple(int(part) for part in re.findall(r"\d+", peft.__version__)[:2])
if (
    not tuple(map(int, VERSIONS[0].split(".")))
    <= _release
    < tuple(map(int, VERSIONS[1].split(".")))
):
    raise ImportError(
        f"torchao_superblock.integrations.peft works with peft from {VERSIONS[0]} to before {VERSIONS[1]}, whose LoRA "
        f"layers it follows; {peft.__version__} is installed: {_INSTALL}"
    )

from peft import LoraConfig, LoraModel, PeftModel  # noqa: E402
from peft.tuners import lora  # noqa: E402
from peft.tuners.tuners_utils import (  # noqa: E402
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
)

__all__ = ["BlockSparseLoraLinear", "load_adapter", "lost_by_merging"]


class BlockSparseLoraLinear(lora.Linear):
    """LoRA around a :class:`BSRLinear`; peft makes it for a target that is one.

    Plain LoRA only: variants that need all of the weight (DoRA, PiSSA, ...) are refused by name.

    Attributes:
        project: let :meth:`merge` keep what fits; False, as it is but during `merge_and_unload(project=True)`, makes it
            raise if anything would be lost.
    """

    project = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fan_in_fan_out = False  # blocks lie (out, in), those that stand for a Conv1D too

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds what the adapters add to the stored blocks.

        Args:
            safe_merge: refuse NaN and infinities.
            adapter_names: which; None for the active ones.

        Raises:
            ValueError: something would be added outside the stored blocks, or is not finite; nothing was merged then.
        """
        names = [
            name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A
        ]
        layer = self.get_base_layer()
        lost = self.lost(names)
        if lost and not self.project:
            raise ValueError(_refusal({"the layer": lost}))
        values = layer.values.detach().clone()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        for name in names:
            values += self._stored(name).to(values.dtype)
            if self.lora_bias[name]:
                if bias is None:
                    raise ValueError(
                        f"merge: the adapter {name!r} has a bias (lora_bias=True), and the layer has none to add it to"
                    )
                bias += self._bias(name)
        if safe_merge and not all(t.isfinite().all() for t in (values, bias) if t is not None):
            raise ValueError(f"merge: what {', '.join(names)} add up to is not finite")
        with torch.no_grad():
            layer.values.copy_(values)
            if bias is not None:
                layer.bias.copy_(bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Takes what was merged out of the stored blocks, to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer = self.get_base_layer()
        with torch.no_grad():
            while self.merged_adapters:
                name = self.merged_adapters.pop()
                layer.values -= self._stored(name).to(layer.values.dtype)
                if self.lora_bias[name]:
                    layer.bias -= self._bias(name)

    def lost(self, adapter_names: list[str]) -> float:
        """Fraction of what the adapters add that lies outside the stored blocks, in the Frobenius norm."""
        if not adapter_names:
            return 0.0
        added = sum(self.get_delta_weight(name).detach().float() for name in adapter_names)
        rest = self._grid(added).clone()
        rest[self._places()] = 0
        return float(rest.norm() / added.norm()) if bool(rest.any()) else 0.0

    def _grid(self, weight: Tensor) -> Tensor:
        """The blocks of an `(N, K)` weight, `(R, C, r, c)`."""
        return in_blocks(weight, self.get_base_layer().blocksize).transpose(1, 2)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Block row and block column of each stored block."""
        layer = self.get_base_layer()
        lengths = layer.crow_indices.diff()
        rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        return rows, layer.col_indices.long()

    def _stored(self, name: str) -> Tensor:
        """`(nnz, r, c)`: what an adapter adds to the stored blocks."""
        return self._grid(self.get_delta_weight(name).detach())[self._places()]

    def _bias(self, name: str) -> Tensor:
        return self.lora_B[name].bias.detach() * self.scaling[name]


def lost_by_merging(model: nn.Module, adapter_names: list[str] | None = None) -> dict[str, float]:
    """What merging could not keep: the part of adapters that lies outside the stored blocks.

    Args:
        model: with LoRA on block-sparse layers.
        adapter_names: which; None for those that are active and not merged yet.

    Returns:
        FQN of each layer that would lose something -> fraction of what is added there, in the Frobenius norm.
    """
    lost = {}
    for fqn, module in model.named_modules():
        if isinstance(module, BlockSparseLoraLinear):
            names = module.active_adapters if adapter_names is None else adapter_names
            names = [n for n in names if n in module.lora_A and n not in module.merged_adapters]
            fraction = module.lost(names)
            if fraction:
                lost[fqn] = fraction
    return lost


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> PeftModel:
    """`PeftModel.from_pretrained` that looks first whether the adapter fits the block-sparse layers.

    peft itself finds out when the model is wrapped already.

    Args:
        model: a swapped model, without adapters.
        folder: what `save_pretrained` of a `PeftModel` wrote.
        options: of `PeftModel.from_pretrained`.

    Raises:
        FileNotFoundError: the folder has no adapter in it.
        ValueError: the adapter is for layers that the model does not have, or for other shapes; nothing was changed.
    """
    from safetensors import safe_open

    path = os.path.join(folder, "adapter_model.safetensors")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"load_adapter: there is no {path!r}")
    modules = dict(model.named_modules())
    problems = []
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", key)
            if found is None:
                continue
            fqn, part = found.groups()
            layer, shape = modules.get(fqn), file.get_slice(key).get_shape()
            if layer is None:
                problems.append(f"{fqn!r} is not in the model")
                continue
            name, size = ("in_features", shape[1]) if part == "A" else ("out_features", shape[0])
            own = getattr(layer, name, size)
            if own != size:
                problems.append(f"{fqn!r} has {own} {name}, and the adapter is for {size}")
    if problems:
        raise ValueError(
            f"load_adapter: {os.fspath(folder)!r} is for another model: {'; '.join(problems)}"
        )
    return PeftModel.from_pretrained(model, folder, **options)


def _refusal(lost: dict[str, float]) -> str:
    return (
        f"merge: {_named(lost)} outside the stored blocks, where a block-sparse layer has no place for it. Keep the "
        "adapter beside the layers; or merge_and_unload(project=True) keeps what fits and drops the rest; or make the "
        "base dense with swap_to_dense before the adapter is loaded, and merge there"
    )


def _named(lost: dict[str, float]) -> str:
    parts = [f"{fraction:.1%} of what is added to {fqn}" for fqn, fraction in lost.items()]
    return f"{', '.join(parts)} {'is' if len(parts) == 1 else 'are'}"


# ---------------------------------------------------------------------------------------------------------------------
# peft's own methods. It has a table of layer types in each config, which is not saved with it, and no other way in.
# ---------------------------------------------------------------------------------------------------------------------


def _injecting(inject_adapter: Callable[..., None]) -> Callable[..., None]:
    """`BaseTuner.inject_adapter` that knows block-sparse layers."""

    @functools.wraps(inject_adapter)
    def inject(
        self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        if isinstance(config, LoraConfig):
            _refuse_all_linear(config, model)
            _refuse_masked(config, model)
            _refuse_convolutions(config, model)
            config._register_custom_module({BSRLinear: BlockSparseLoraLinear})
        with _saying_what_freezes(model):
            inject_adapter(self, model, adapter_name, *args, **kwargs)

    return inject


def _adding(add_adapter: Callable[..., None]) -> Callable[..., None]:
    """`PeftModel.add_adapter`, which freezes what learns prompts."""

    @functools.wraps(add_adapter)
    def add(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        with _saying_what_freezes(self):
            add_adapter(self, *args, **kwargs)

    return add


@contextlib.contextmanager
def _saying_what_freezes(model: nn.Module) -> Iterator[None]:
    """Warns if scores of masks were trained before the block and are not after it."""
    trained = [
        parameter
        for module in model.modules()
        if isinstance(module, BlockMask)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    yield
    if any(not parameter.requires_grad for parameter in trained):
        warnings.warn(
            f"peft trains and saves adapters alone: the scores of {len(trained)} block masks are frozen now, and so "
            "are the masks. To train them too, set requires_grad_(True) on the parameters of the masks and build the "
            "optimizer afterwards; peft does not save them. Or squash before adapters are added",
            stacklevel=4,
        )


def _refuse_all_linear(config: LoraConfig, model: nn.Module) -> None:
    """peft counts instances of `nn.Linear`, and would leave out what is block-sparse without a word."""
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != "all-linear":
        return
    linear = {
        fqn.rpartition(".")[2]
        for fqn, module in model.named_modules()
        if isinstance(module, BSRLinear) and not isinstance(module, BaseTunerLayer)
    }
    if linear:
        raise ValueError(
            "LoraConfig: target_modules='all-linear' finds no block-sparse layers; name them: target_modules="
            f"{sorted(linear)} and what else is wanted"
        )


def _refuse_masked(config: LoraConfig, model: nn.Module) -> None:
    """An adapter on a masked weight: no step of the sparsifier and no squash would go on."""
    for fqn, module in model.named_modules():
        masks = getattr(module, "parametrizations", nn.Module())
        is_masked = any(isinstance(mask, BlockMask) for mask in masks.modules())
        if is_masked and check_target_module_exists(config, fqn):
            raise RuntimeError(
                f"LoraConfig: {fqn!r} is a target and has a block mask. Merged into a weight that a mask computes at "
                "each read, the adapter would be lost; squash first (torchao_superblock.squash(model)), or leave it "
                "out of target_modules"
            )


def _refuse_convolutions(config: LoraConfig, model: nn.Module) -> None:
    """A block-sparse 1x1 convolution is a `BSRLinear`, but takes images; adapters of linear layers do not."""
    for fqn, module in model.named_modules():
        if isinstance(module, BSRConv1x1) and check_target_module_exists(config, fqn):
            raise ValueError(
                f"LoraConfig: {fqn!r} is a target and a BSRConv1x1, which has no adapter; leave it out of "
                "target_modules, or make it dense (torchao_superblock.swap_to_dense)"
            )


def _merging(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `LoraModel` that merges: all layers or none, and `project=True`."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def merge(self: LoraModel, *args: Any, project: bool = False, **kwargs: Any) -> Any:
        names = signature.bind(self, *args, **kwargs).arguments.get("adapter_names")
        lost = lost_by_merging(self.model, names)
        if lost and not project:
            raise ValueError(_refusal(lost))
        layers = [m for m in self.model.modules() if isinstance(m, BlockSparseLoraLinear)]
        for layer in layers:
            layer.project = project
        try:
            result = method(self, *args, **kwargs)
        finally:
            for layer in layers:
                layer.project = False
        if lost:
            warnings.warn(f"merge: {_named(lost)} outside the stored blocks and lost", stacklevel=2)
        return result

    return merge


PeftModel.add_adapter = _adding(PeftModel.add_adapter)
BaseTuner.inject_adapter = _injecting(BaseTuner.inject_adapter)
LoraModel.merge_and_unload = _merging(LoraModel.merge_and_unload)
LoraModel.merge_adapter = _merging(LoraModel.merge_adapter)
