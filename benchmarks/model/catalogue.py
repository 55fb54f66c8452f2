"""The models that benchmarks/models.py compares, built from configurations: nothing is downloaded.

Each has a tiny form beside the real one, which runs anywhere in a second.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.model.compare import COMPILED, COMPILED_GRAPH, EAGER, GRAPH
from benchmarks.model.vit import SCOPES, build_vit

TINY_VIT = {"image_size": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 128}
TINY_BLOCK = 16
Inputs = tuple[torch.Tensor, ...]


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself, as a child, so that a swap can replace it."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, features)` to the same."""
        return self.attention(x, x, x, need_weights=False)[0]


class Transformers(nn.Module):
    """A model of transformers that returns its first output alone and keeps no cache."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Images or token ids to logits or hidden states."""
        return self.model(inputs, **self.options)[0]


@dataclass(frozen=True)
class Entry:
    """A row of the table: a model, what of it is sparse, and how it is run.

    Attributes:
        title: what the row says it is.
        build: a model with random weights, tiny or real; called under a device.
        inputs: of a forward, tiny or real; called under a device, with the dtype.
        pattern: regular expression of the names of the weights that are made sparse.
        blocksize: of the real form.
        device_type: `"cuda"` or `"cpu"`: which machine it is about.
        dtype: of the real form; the tiny one is float32.
        ways: of running both sides; the fastest counts.
        trains: `""` for a forward, `"backward"` for forward and backward, `"step"` for a training step with AdamW under
            autocast to bfloat16 (weights and images are float32).
        needs: modules that must be installed.
    """

    title: str
    build: Callable[[bool], nn.Module]
    inputs: Callable[[bool, torch.dtype], Inputs]
    pattern: str
    blocksize: int
    device_type: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    ways: tuple[str, ...] = (EAGER, COMPILED)
    trains: str = ""
    needs: tuple[str, ...] = field(default=("torchvision",))

    def check(self) -> None:
        """Raises `ImportError` with the pip line if a package is missing."""
        for module in self.needs:
            if not importlib.util.find_spec(module):
                extra = "examples" if module == "torchvision" else module
                raise ImportError(
                    f"{self.title} needs {module}: pip install 'torchao_superblock[{extra}]'"
                )


def _attention(tiny: bool) -> nn.Module:
    return SelfAttention(64, 2) if tiny else SelfAttention(768, 12)


def _tokens_of_vit(tiny: bool, dtype: torch.dtype) -> Inputs:
    return (torch.randn(*((2, 5, 64) if tiny else (256, 197, 768)), dtype=dtype),)


def _images(batch: int) -> Callable[[bool, torch.dtype], Inputs]:
    def inputs(tiny: bool, dtype: torch.dtype) -> Inputs:
        return (torch.randn(*((2, 3, 32, 32) if tiny else (batch, 3, 224, 224)), dtype=dtype),)

    return inputs


def _vit(tiny: bool) -> nn.Module:
    return build_vit(**(TINY_VIT if tiny else {}))


def _timm(name: str) -> Callable[[bool], nn.Module]:
    def build(tiny: bool) -> nn.Module:
        import timm

        small = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}
        return timm.create_model(name, **(small if tiny else {}))

    return build


def _transformers_vit(tiny: bool) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    small: dict[str, int] = {"image_size": 32, **_TINY_ENCODER}
    return Transformers(ViTModel(ViTConfig(**(small if tiny else {}))))


_TINY_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _bert(tiny: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    return Transformers(BertModel(BertConfig(**(_TINY_ENCODER if tiny else {}))))


def _llama(tiny: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    if tiny:
        sizes |= _TINY_ENCODER | {"vocab_size": 100}
    return Transformers(LlamaForCausalLM(LlamaConfig(**sizes)), use_cache=False)


def _ids(batch: int, length: int, vocabulary: int) -> Callable[[bool, torch.dtype], Inputs]:
    def inputs(tiny: bool, dtype: torch.dtype) -> Inputs:
        size = (min(batch, 2), min(length, 8)) if tiny else (batch, length)
        return (torch.randint(0, 100 if tiny else vocabulary, size),)

    return inputs


def _mlp(tiny: bool) -> nn.Module:
    width, hidden = (64, 128) if tiny else (768, 3072)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def _tokens_of_mlp(tiny: bool, dtype: torch.dtype) -> Inputs:
    return (torch.randn(*((10, 64) if tiny else (25216, 768)), dtype=dtype),)


_LAYERS = r"(^|\.)layers?\.\d+\."
_LLAMA = {"build": _llama, "needs": ("transformers",)}
_PREFILL = {**_LLAMA, "inputs": _ids(4, 2048, 32000), "blocksize": 128}
_TOKEN = {**_LLAMA, "inputs": _ids(1, 1, 32000), "pattern": _LAYERS, "blocksize": 64}
_TIMM = {"build": _timm("vit_base_patch16_224"), "inputs": _images(256), "needs": ("timm",)}

ENTRIES: dict[str, Entry] = {
    "attention": Entry(
        "nn.MultiheadAttention 768, batch 256 x 197, both projections, eager",
        _attention, _tokens_of_vit, "attention", 64, ways=(EAGER,), needs=(),
    ),
    "vit_b_16-mlp": Entry(
        "torchvision vit_b_16, batch 256, MLP", _vit, _images(256), SCOPES["mlp"], 64
    ),
    "vit_b_16-all": Entry(
        "torchvision vit_b_16, batch 256, all linears", _vit, _images(256), SCOPES["all"], 64
    ),
    "timm-vit_base-mlp": Entry(
        "timm vit_base, batch 256, MLP", pattern=r"\.mlp\.", blocksize=64, **_TIMM
    ),
    "timm-vit_base-all": Entry(
        "timm vit_base, batch 256, all linears", pattern=r"blocks\.", blocksize=64, **_TIMM
    ),
    "timm-vit_large_14-all": Entry(
        "timm vit_large_14, batch 128, all linears",
        _timm("vit_large_patch14_224"), _images(128), r"blocks\.", 64, needs=("timm",),
    ),
    "transformers-vit-all": Entry(
        "transformers ViT-B, batch 256, all linears",
        _transformers_vit, _images(256), _LAYERS, 64, needs=("transformers",),
    ),
    "bert-all": Entry(
        "transformers BERT-base, 64 x 512 tokens, all linears",
        _bert, _ids(64, 512, 30000), _LAYERS, 64, needs=("transformers",),
    ),
    "llama-prefill-mlp": Entry(
        "Llama-2-7B shapes, 4 layers, prefill of 8192 tokens, MLP", pattern=r"\.mlp\.", **_PREFILL
    ),
    "llama-prefill-all": Entry(
        "Llama-2-7B shapes, 4 layers, prefill of 8192 tokens, all linears", pattern=_LAYERS, **_PREFILL
    ),
    "llama-token": Entry(
        "Llama-2-7B shapes, 4 layers, one token, all linears, compiled", ways=(COMPILED,), **_TOKEN
    ),
    "llama-token-eager": Entry(
        "Llama-2-7B shapes, 4 layers, one token, all linears, eager", ways=(EAGER,), **_TOKEN
    ),
    "llama-token-graphs": Entry(
        "Llama-2-7B shapes, 4 layers, one token, all linears, CUDA graphs",
        ways=(GRAPH, COMPILED_GRAPH), **_TOKEN,
    ),
    "mlp-backward-64": Entry(
        "MLP (768, 3072), 25216 tokens, forward and backward",
        _mlp, _tokens_of_mlp, "weight", 64, trains="backward", needs=(),
    ),
    "mlp-backward-32": Entry(
        "MLP (768, 3072), 25216 tokens, forward and backward",
        _mlp, _tokens_of_mlp, "weight", 32, trains="backward", needs=(),
    ),
    "vit_b_16-step": Entry(
        "torchvision vit_b_16, batch 128, training step on a fixed pattern, all linears",
        _vit, _images(128), SCOPES["all"], 64, dtype=torch.float32, trains="step",
    ),
    "vit_b_16-cpu": Entry(
        "torchvision vit_b_16, batch 1, all linears", _vit, _images(1), SCOPES["all"], 32,
        device_type="cpu", dtype=torch.float32,
    ),
}  # fmt: skip
"""Rows by the name that picks them."""
