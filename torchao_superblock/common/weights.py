"""Which tensors of a model are weights that a reader of a report would look for, linear layers aside.

A report that leaves them out is read as if they were done: convolutions, the projections of attention,
experts in one 3-D tensor, matrices that a module holds itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

# What is narrower than the smallest block that a weight's zeros are searched for is a vector with a name.
MIN_SIZE = 8


def other_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of this module (children not counted) where it is no linear layer: `(tensor name, tensor)`.

    A 2-D Parameter counts, a 3-D one if its last two dimensions are matrices of several experts, and
    the weight of any convolution, however small. One that another parametrization computes is read.
    """
    if isinstance(module, nn.Linear | parametrize.ParametrizationList):
        return
    names = list(module._parameters)
    if parametrize.is_parametrized(module):
        names += list(module.parametrizations)
    for name in names:
        is_kernel = isinstance(module, _ConvNd) and name == "weight"
        tensor = getattr(module, name) if is_kernel else module._parameters.get(name)
        if tensor is None or is_lazy(tensor):
            continue
        if is_kernel or _holds_matrices(tensor):
            yield name, tensor


def _holds_matrices(tensor: Tensor) -> bool:
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point() or len(shape) not in (2, 3):
        return False
    return min(shape[-2:]) >= MIN_SIZE and (len(shape) == 2 or shape[0] > 1)


def is_hidden(linear: nn.Module) -> bool:
    """Whether the weight of a linear layer is a plain attribute, computed from other Parameters.

    So do `torch.nn.utils.prune` and the old `torch.nn.utils.weight_norm`, before each forward.
    """
    return isinstance(vars(linear).get("weight"), Tensor)
