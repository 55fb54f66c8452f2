"""Block-sparse layers for the tests, and a count of the op's calls."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import block_mask, expand_mask


def prune(linear: nn.Linear, blocksize: int | tuple[int, int], sparsity: float = 0.5) -> nn.Linear:
    """Zero random blocks of a linear layer in place, as a squashed mask would leave it."""
    r, c = (blocksize, blocksize) if isinstance(blocksize, int) else blocksize
    mask = block_mask(linear.out_features // r, linear.in_features // c, sparsity)
    with torch.no_grad():
        mask = expand_mask(mask, (r, c)).to(linear.weight.device)
        linear.weight.copy_(torch.where(mask, linear.weight, 0.0))
        if linear.bias is not None:
            linear.bias.normal_()
    return linear


def prune_all(model: nn.Module, blocksize: int, sparsity: float = 0.5) -> nn.Module:
    """:func:`prune` every linear layer whose shape allows it."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not (
            module.out_features % blocksize or module.in_features % blocksize
        ):
            prune(module, blocksize, sparsity)
    return model


class CountCalls(TorchDispatchMode):
    """Counts the calls of the op, so that nothing runs dense unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.activations: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torchao_superblock.bsr_linear.default:
            self.count += 1
            self.activations.add(args[6] if len(args) > 6 else "none")
        return func(*args, **(kwargs or {}))


def snapshot(model):
    return (
        {key: tensor.clone() for key, tensor in model.state_dict().items()},
        [type(module) for module in model.modules()],
        [id(module) for module in model.modules()],
    )


def assert_unchanged(model, before):
    state, types, identities = before
    assert [type(module) for module in model.modules()] == types
    assert [id(module) for module in model.modules()] == identities
    assert model.state_dict().keys() == state.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


class Model(nn.Module):
    def __init__(self, width: int = 32, extra_buffer: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Linear(width, 64)
        self.down = nn.Linear(64, width, bias=False)
        self.head = nn.Linear(width, 10)
        self.head.weight = self.embedding.weight
        if extra_buffer:
            self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        return self.head(self.down(torch.relu(self.up(x))))


def rewrite(path, change_tensors=lambda tensors: None, change_metadata=lambda metadata: None):
    """Change a saved file, and leave it as releases before there were checksums wrote it."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        metadata = file.metadata()
    for key in ("checksums", "checksum"):
        metadata.pop(key, None)
    change_tensors(tensors)
    change_metadata(metadata)
    save_file(tensors, path, metadata=metadata)
