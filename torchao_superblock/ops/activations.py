"""The table of activations that the op can apply to its output: names, codes, plain PyTorch meaning, gradients."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, the approximation of GELU that CLIP was trained with.

    Args:
        x: any shape.
    """
    return x * torch.sigmoid(1.702 * x)


# The op's `activation` argument -> the function it stands for. Kernels must match these to rounding.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": quick_gelu,
}

# What compiled code calls them: their place in the table, which is that in `enum sb_activation` of csrc/superblock.h.
CODES: dict[str, int] = {name: code for code, name in enumerate(ACTIVATIONS)}


def activation_backward(activation: str, grad: Tensor, z: Tensor) -> Tensor:
    """Gradient of `activation(z)` with respect to `z`; differentiable again.

    Args:
        activation: a name of the table, not `"none"`.
        grad: gradient of `activation(z)`, in its shape.
        z: what the activation was applied to.

    Returns:
        A tensor in the shape of `z`.
    """
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, z, 0)
    if activation == "silu":
        if torch.is_grad_enabled():  # aten's silu_backward cannot be differentiated again
            sigmoid = torch.sigmoid(z)
            return grad * sigmoid * (1 + z * (1 - sigmoid))
        return torch.ops.aten.silu_backward(grad, z)
    if activation == "quick_gelu":
        sigmoid = torch.sigmoid(1.702 * z)
        # z times what is 0 where z is large: 1.702 z may overflow.
        return grad * (sigmoid + z * (1.702 * sigmoid * (1 - sigmoid)))
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, z, approximate=approximate)
