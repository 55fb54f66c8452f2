"""What torch's switches say about the precision of float32 products."""

import torch


def allows_tf32() -> bool:
    """Whether torch lets float32 matrix products on CUDA use TF32.

    There are three ways to set it (``torch.backends.cuda.matmul.fp32_precision``, ``.allow_tf32`` and
    ``torch.set_float32_matmul_precision``). The last two have getters that raise once the first was used; the first
    one's getter follows all three and never raises.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
