"""The CPU backend: the compiled kernel of `csrc/` if it is there and current, else PyTorch."""

from torchao_superblock.ops.gather_gemm import forward, grad_values, grad_x

__all__ = ["backend_info", "forward", "grad_values", "grad_x"]


def backend_info() -> dict[str, object]:
    """Say which kernel serves the CPU, and why.

    Returns:
        `name` and `reason`.

    Example:
        >>> backend_info()["name"]
        'pytorch'
    """
    return {"name": "pytorch", "reason": "no compiled kernel in this installation"}
