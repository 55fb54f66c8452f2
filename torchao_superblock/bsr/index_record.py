"""Which index tensors a plan was made from, and what they held then."""

from typing import Any

import torch
from torch import Tensor

_UNKNOWN = (-1, -1)


def _versions(crow_indices: Tensor, col_indices: Tensor) -> tuple[int, int] | None:
    """How often each was written in place; None where torch does not count (inference tensors)."""
    if crow_indices.is_inference() or col_indices.is_inference():
        return None
    return crow_indices._version, col_indices._version


class IndexRecord:
    """Says whether a layer's plan belongs to the index tensors it is about to use.

    A stale plan beside a new index gives a right forward and wrong gradients. So a plan is used only with the very
    tensors it was made from, while nobody has written to them. To ask that costs a tenth of a microsecond, and nothing
    of the device. If they were written to, what they hold is compared with a copy on the host, once after each write,
    for which a GPU is waited for.

    What torch does not count is not seen here: writes by DistributedDataParallel's broadcast of buffers, to inference
    tensors and through `.data`; and compiled code asks nothing. Kernels do not depend on it: those of the CPU use no
    plan for gradients, and CUDA's gradients are NaN if the plan is not of the index. What an average made of an index
    is used as it is there.

    Args:
        crow_indices: `(R + 1,)` int32.
        col_indices: `(nnz,)` int32.
    """

    __slots__ = ("col_indices", "crow_indices", "host", "versions")

    def __init__(self, crow_indices: Tensor, col_indices: Tensor) -> None:
        self.crow_indices, self.col_indices = crow_indices, col_indices
        self.versions = _versions(crow_indices, col_indices)
        self.host: tuple[Tensor, Tensor] | None = None
        if not crow_indices.is_meta:
            crow, col = crow_indices.detach(), col_indices.detach()
            self.host = crow.to("cpu", copy=True), col.to("cpu", copy=True)

    def matches(self, crow_indices: Tensor, col_indices: Tensor) -> bool:
        """Whether the plan made from the recorded tensors may be used with these.

        Raises:
            RuntimeError: these are the recorded tensors, but somebody wrote another pattern into them.
        """
        if crow_indices is not self.crow_indices or col_indices is not self.col_indices:
            return False
        versions = self.versions
        if versions is None or (
            crow_indices._version == versions[0] and col_indices._version == versions[1]
        ):
            return True
        return self._compare()

    def moved(self, crow_indices: Tensor, col_indices: Tensor) -> "IndexRecord":
        """The record of copies of the recorded tensors, on another device for instance."""
        return _rebuild(crow_indices, col_indices, self.host, self._is_known())

    def _is_known(self) -> bool:
        return self.versions == _versions(self.crow_indices, self.col_indices)

    def _compare(self) -> bool:
        crow, col = self.crow_indices, self.col_indices
        if self.host is None or type(crow) is not Tensor or type(col) is not Tensor or crow.is_meta:
            return False  # no content to look at
        if crow.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # nobody may wait for the device now
        versions = _versions(
            crow, col
        )  # before the look: who writes later is noticed the next time
        held = crow.cpu(), col.cpu()
        if not all(torch.equal(now, then) for now, then in zip(held, self.host, strict=True)):
            raise RuntimeError(
                f"BSRLinear: crow_indices and col_indices (of {col.numel()} stored blocks) were written in place and "
                "hold another pattern than before. They say where the blocks lie and cannot be averaged: leave buffers "
                "out (AveragedModel(use_buffers=False)), or load the right ones, together with values, with "
                "load_state_dict, which also takes a new pattern"
            )
        self.versions = versions
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy counts its own writes from the start, so it is told whether this one's are known.
        return _rebuild, (self.crow_indices, self.col_indices, self.host, self._is_known())


def _rebuild(
    crow_indices: Tensor,
    col_indices: Tensor,
    host: tuple[Tensor, Tensor] | None,
    is_known: bool,
) -> IndexRecord:
    record = IndexRecord.__new__(IndexRecord)
    record.crow_indices, record.col_indices, record.host = crow_indices, col_indices, host
    record.versions = _versions(crow_indices, col_indices) if is_known else _UNKNOWN
    return record
