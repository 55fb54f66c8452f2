"""Other dtypes for tensors that are about to be loaded: what would change their meaning is refused."""

import torch
from torch import Tensor


def cast_like(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    """A tensor with the dtype of another one.

    Args:
        tensor: what was read.
        like: what it is to be loaded into; on the meta device only its kind of dtype matters.
        name: what error messages call the tensor.

    Returns:
        The tensor itself where nothing needs to change.

    Raises:
        TypeError: one of the two is not floating point, and the dtypes differ.
        ValueError: a finite number would become infinite.
    """
    floating = tensor.is_floating_point() and like.is_floating_point()
    if tensor.dtype != like.dtype and not floating:
        needed = "floating point" if like.is_floating_point() else like.dtype
        raise TypeError(f"{name} is {tensor.dtype}, it must be {needed} as in the model")
    if like.is_meta:
        return tensor
    cast = tensor.to(like.dtype)
    if floating and torch.finfo(like.dtype).max < torch.finfo(tensor.dtype).max:
        lost = tensor.isfinite() & ~cast.to(tensor.dtype).isfinite()
        if lost.any():
            raise ValueError(
                f"{name} holds {tensor[lost][0].item():g}, which {like.dtype} cannot; "
                "load it into a model of another dtype"
            )
    return cast
