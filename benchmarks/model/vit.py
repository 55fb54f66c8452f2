"""torchvision's vit_b_16 in the forms that are compared: dense, with zero blocks, swapped, narrow, torch's BSR."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.model import forms
from benchmarks.model.masks import zero_blocks_of

SCOPES = {"mlp": r"encoder\.layers\..*\.mlp\.", "all": r"encoder\.layers\."}
"""Names of the weights that are made sparse: those of the MLPs, or every linear of the encoder."""
HUGE = {
    "patch_size": 14,
    "num_layers": 32,
    "num_heads": 16,
    "hidden_dim": 1280,
    "mlp_dim": 5120,
}
"""What torchvision's vit_h_14 has other than vit_b_16."""


def build_vit(**overrides: Any) -> nn.Module:
    """vit_b_16 with random weights, the classifier included (torchvision starts it at zero)."""
    from torchvision.models import VisionTransformer

    settings: dict[str, Any] = {
        "image_size": 224,
        "patch_size": 16,
        "num_layers": 12,
        "num_heads": 12,
        "hidden_dim": 768,
        "mlp_dim": 3072,
    }
    torch.manual_seed(0)
    model = VisionTransformer(**(settings | overrides))
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.eval().requires_grad_(False)


def mlp_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The two linear layers of every MLP, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".mlp." in name:
            yield name, module


def zero_blocks(model: nn.Module, blocksize: int, sparsity: float) -> nn.Module:
    """Zeroes random blocks of every MLP weight, in place."""
    zero_blocks_of(model, SCOPES["mlp"], blocksize, sparsity)
    return model


def swapped(model: nn.Module, blocksize: int, *, narrow: bool = False) -> nn.Module:
    """A copy of `model` with the MLP layers as BSRLinear, each GELU in the layer before it.

    Args:
        model: dense, with zero blocks.
        blocksize: of the blocks.
        narrow: drop dead hidden features.

    Raises:
        RuntimeError: if a layer was skipped, so that nothing is timed dense by mistake.
    """
    from torchao_superblock import swap_to_bsr

    model = copy.deepcopy(model)
    report = swap_to_bsr(
        model,
        blocksize,
        min_sparsity=0.0,
        filter_fn=lambda module, fqn: ".mlp." in fqn,
        fuse_activations=True,
        drop_dead_features=narrow,
    )
    if any(mlp_linears(model)):
        raise RuntimeError(f"not every MLP layer was swapped:\n{report}")
    return model


def unswapped(model: nn.Module) -> nn.Module:
    """A dense copy of a swapped model: what dropping features alone gives. Activations run in their own places."""
    from torchao_superblock import BSRLinear

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, BSRLinear):
                continue
            linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
            linear.weight = nn.Parameter(layer.to_dense(), requires_grad=False)
            linear.bias = layer.bias
            setattr(parent, name, linear)
    return model.eval()


def hidden_features(model: nn.Module) -> int:
    """Features between the two layers of every MLP, all together."""
    return sum(block.mlp[0].out_features for block in model.encoder.layers)


def with_torch_bsr(model: nn.Module, blocksize: int) -> nn.Module:
    """A copy of `model` whose MLP weights are torch.sparse_bsr tensors."""
    names = [f"{name}.weight" for name, _ in mlp_linears(model)]
    return forms.with_torch_bsr(model, names, blocksize)


def compile_layers(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` whose encoder layers are compiled; twelve equal ones compile once."""
    model = copy.deepcopy(model)
    torch._dynamo.reset()  # every configuration is a recompilation otherwise, and the limit is 8
    for layer in model.encoder.layers:
        layer.compile(fullgraph=True, dynamic=False)
    return model
