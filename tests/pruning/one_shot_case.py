"""A one-shot prune in short, and what its tests compare."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchao_superblock import prune_one_shot
from torchao_superblock.pruning import OneShotReport


def prune(model, batches, level=0.5, blocksize=4, config=None, **options) -> OneShotReport:
    return prune_one_shot(model, batches, level, blocksize, config, progress=False, **options)


def correlated(*shape: int) -> Tensor:
    """Inputs with means and correlations, without which there is nothing to repair."""
    features = shape[-1]
    return torch.randn(*shape) @ torch.randn(features, features) / features**0.5 + 0.5


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def kept_of(weight: Tensor, rows: int, cols: int) -> Tensor:
    n, k = weight.shape
    padded = F.pad(weight != 0, (0, -k % cols, 0, -n % rows))
    return padded.unflatten(1, (-1, cols)).unflatten(0, (-1, rows)).any(dim=3).any(dim=1)


def reference(weight, bias, x_dense, x_pruned, level, blocksize, damping):
    """Mask, weight and bias, one block and one row of blocks at a time."""
    w, (rows, cols) = weight.double(), blocksize
    xd, xp = x_dense.double(), x_pruned.double()
    md = xd.mean(0) if bias is not None else torch.zeros(xd.shape[1], dtype=torch.double)
    mp = xp.mean(0) if bias is not None else torch.zeros(xd.shape[1], dtype=torch.double)
    h = (xp - mp).T @ (xp - mp) / len(xp)
    pull = damping * h.diagonal().mean()
    h = h + pull * torch.eye(len(h), dtype=torch.double)
    g = w @ ((xd - md).T @ (xp - mp) / len(xp)) + pull * w
    inverse = torch.linalg.inv(h)
    best = g @ inverse
    n, k = w.shape
    grid_rows, grid_cols = -(-n // rows), -(-k // cols)
    costs = torch.zeros(grid_rows, grid_cols, dtype=torch.double)
    for i in range(grid_rows):
        for j in range(grid_cols):
            c = slice(j * cols, min((j + 1) * cols, k))
            block = best[i * rows : (i + 1) * rows, c]
            costs[i, j] = torch.trace(block @ torch.linalg.inv(inverse[c, c]) @ block.T)
    kept = costs.flatten().topk(max(1, round(costs.numel() * (1 - level)))).indices
    mask = torch.zeros(costs.numel(), dtype=torch.bool).scatter(0, kept, True).view(costs.shape)
    out = torch.zeros_like(w)
    for i in range(grid_rows):
        r = slice(i * rows, (i + 1) * rows)
        s = mask[i].repeat_interleave(cols)[:k].nonzero().flatten()
        if len(s):
            out[r, s] = torch.linalg.solve(h[s][:, s], g[r, s].T).T
    return mask, out, None if bias is None else bias.double() + w @ md - out @ mp


def encoder(**options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


EVERY = [{"tensor_fqn": "*weight"}]
