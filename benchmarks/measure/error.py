"""How far a result is from the right one."""

from __future__ import annotations

import torch


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """`||out - reference|| / ||reference||` in float64.

    Args:
        out: the result under test, any floating dtype.
        reference: the same shape, best computed in float64.

    Returns:
        The relative error; NaN if either holds one.
    """
    out, reference = out.detach().double(), reference.detach().double()
    scale = torch.linalg.vector_norm(reference)
    return float(torch.linalg.vector_norm(out - reference) / scale.clamp_min(1e-300))
