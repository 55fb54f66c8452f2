"""Small models with every feature that a file or a call has to deal with."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from torchao_superblock import BSRLinear, swap_to_bsr

BLOCK = 8


class Language(nn.Module):
    """Ties, buffers of several dtypes, a layer without bias, an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 16)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.relu(self.up(self.embedding(tokens))))))


def sequence() -> nn.Sequential:
    """Linears of one sequence: activations fold into them, dead features can be dropped."""
    return nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16)
    )


class SharedBias(nn.Module):
    """Two layers with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 32)
        self.right.bias = self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.right(torch.relu(self.left(x)))


class Attention(nn.Module):
    """Attention, whose projections are masked but not swapped, an encoder and hooks."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
        self.out = nn.Linear(32, 16)
        self.again = self.out
        self.out.register_forward_hook(_nothing)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x))


def _nothing(module: nn.Module, arguments: object, output: object) -> None:
    return None


def tokens() -> Tensor:
    """An input of :class:`Language`."""
    return torch.arange(24) % 16


def vectors() -> Tensor:
    """An input of the others."""
    return torch.linspace(-2, 2, 7 * 32).sin().mul(3).view(7, 32)


INPUTS = {"language": tokens, "sequence": vectors, "narrow": vectors, "shared": vectors}
_BUILDERS = {
    "language": Language, "sequence": sequence, "narrow": sequence, "shared": SharedBias
}  # fmt: skip
VARIANTS = tuple(_BUILDERS)


def build(variant: str, seed: int = 0, device: str = "cpu") -> nn.Module:
    """A dense model in evaluation mode."""
    torch.default_generator.manual_seed(seed)
    with torch.device(device):
        return _BUILDERS[variant]().eval()


def prune(model: nn.Module, seed: int = 0, sparsity: float = 0.5) -> nn.Module:
    """Zeroes random blocks of every linear layer, as a squashed mask leaves it."""
    choose = random.Random(seed)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.Linear):
                continue
            rows, cols = module.out_features // BLOCK, module.in_features // BLOCK
            for block in choose.sample(range(rows * cols), round(rows * cols * sparsity)):
                row, col = block // cols * BLOCK, block % cols * BLOCK
                module.weight[row : row + BLOCK, col : col + BLOCK] = 0
    return model


def swapped(variant: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A swapped model in evaluation mode."""
    model = prune(build(variant, seed), seed).to(dtype)
    if variant == "narrow":
        with torch.no_grad():
            model[0].weight[:16] = 0
            model[2].weight[:, 32:48] = 0
    swap_to_bsr(
        model,
        BLOCK,
        min_sparsity=0.0,
        fuse_activations=variant == "sequence",
        drop_dead_features=variant == "narrow",
    )
    return model


def bsr_layers(model: nn.Module) -> dict[str, BSRLinear]:
    """The block-sparse layers by FQN."""
    return {fqn: m for fqn, m in model.named_modules() if isinstance(m, BSRLinear)}
