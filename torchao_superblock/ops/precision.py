"""What torch's switches say about the precision of float32 products."""

import torch

# What the attribute below calls; a call in eager mode cannot afford the three attributes on the way to it.
_getter = getattr(torch._C, "_get_fp32_precision_getter", None)


def allows_tf32() -> bool:
    """Whether torch lets float32 matrix products on CUDA use TF32.

    There are three ways to set it (`torch.backends.cuda.matmul.fp32_precision`, `.allow_tf32` and
    `torch.set_float32_matmul_precision`). The last two have getters that raise once the first was used; the first
    one's getter follows all three and never raises.
    """
    if _getter is None:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return _getter("cuda", "matmul") == "tf32"
