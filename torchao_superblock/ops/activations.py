"""The activations that the op can apply to its output, and their plain PyTorch meaning."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

# The op's `activation` argument -> the function it stands for. Kernels must match these to rounding.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
