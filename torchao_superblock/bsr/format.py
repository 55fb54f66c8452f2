"""The BSR format: dense <-> BSR, its invariants, and reading the block size off a weight's zeros.

BSR (block compressed sparse row; see Saad, "Iterative Methods for Sparse Linear Systems", 2003, and
`torch.sparse_bsr`) stores the nonzero blocks of a matrix, block row after block row:

    crow_indices  int32 (R + 1,)     where each block row starts in col_indices and values
    col_indices   int32 (nnz,)       block column of each stored block, sorted and unique in each row
    values        (nnz, r, c)        the stored blocks, contiguous and row-major

The grid covers the matrix: where N or K is not a multiple of the block size, the blocks of the last block row or column
are stored whole, padded with zeros. Nothing that reads a matrix depends on what the padding holds, as long as it is
finite, and its gradient is zero.

Legend: N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks.
"""

import torch
from torch import Tensor

from torchao_superblock.common.blocks import block_grid, padded_shape
from torchao_superblock.common.kept_blocks import KeptBlocks
from torchao_superblock.common.sharding import is_dtensor
from torchao_superblock.common.swappable import CANDIDATE_SIZES

# A larger block may store this much more than the smallest one and still be taken for the real one: single blocks that
# training happened to leave at zero must not make the block size look smaller than it is.
STORED_TOLERANCE = 1.02


# So much larger a padded dimension may be where smaller blocks would fit it without padding.
MOST_PADDING = 1.125


def nonzero_blocks(weight: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """Bool `(R, C)`: which blocks of a `(N, K)` weight hold anything but zeros (NaN counts, -0.0 does not)."""
    return in_blocks(weight.detach() != 0, blocksize).any(3).any(1)


def in_blocks(matrix: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """`(R, r, C, c)`: a view of a `(N, K)` matrix, or of a copy padded with zeros where it ends in a block."""
    (R, C), (r, c) = block_grid(tuple(matrix.shape), blocksize), blocksize
    N, K = matrix.shape
    if (N, K) != (R * r, C * c):
        matrix = torch.nn.functional.pad(matrix, (0, C * c - K, 0, R * r - N))
    return matrix.reshape(R, r, C, c)


def stored_blocks(weight: Tensor, blocksize: tuple[int, int], keep: KeptBlocks | None) -> Tensor:
    """Bool `(R, C)`: the blocks that hold anything but zeros, and those that `keep` names (of any block size)."""
    mask = nonzero_blocks(weight, blocksize)
    if keep is None:
        return mask
    kept = keep.mask.to(mask.device)
    if keep.blocksize != tuple(blocksize):
        rows, cols = keep.blocksize
        elements = kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        kept = nonzero_blocks(elements[: weight.shape[0], : weight.shape[1]], blocksize)
    return mask | kept


def gather_blocks(
    weight: Tensor, crow_indices: Tensor, col_indices: Tensor, blocksize: tuple[int, int]
) -> Tensor:
    """The `(nnz, r, c)` blocks of a dense `(N, K)` tensor that an index names, padded; a copy, detached."""
    row = torch.repeat_interleave(crow_indices.diff())
    blocks = in_blocks(weight.detach(), blocksize)
    return blocks[row, :, col_indices.long(), :].contiguous()


def dense_to_bsr(
    weight: Tensor, blocksize: tuple[int, int], keep: KeptBlocks | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Store the blocks of a dense weight that hold anything but zeros, the last ones padded with zeros.

    Args:
        weight: `(N, K)`, any dtype.
        blocksize: `(r, c)`.
        keep: blocks to store whatever they hold.

    Returns:
        `(crow_indices, col_indices, values)` on the device of the weight; a copy, detached.
    """
    mask = stored_blocks(weight, blocksize, keep)
    crow_indices = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=weight.device)
    crow_indices[1:] = mask.sum(1).cumsum(0)
    col_indices = mask.nonzero(as_tuple=True)[1].to(torch.int32)
    return (
        crow_indices,
        col_indices,
        gather_blocks(weight, crow_indices, col_indices, blocksize),
    )


def bsr_parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of a weight with the layout `torch.sparse_bsr`.

    Args:
        weight: `(N, K)`, with indices of int32 or int64.

    Returns:
        `(crow_indices, col_indices, values)` with int32 indices; a copy, detached. Whether the indices are sorted,
        unique and within the shape is for :func:`check_bsr`.

    Raises:
        ValueError: an index does not fit into int32.
    """
    with torch.inference_mode(False):
        weight = weight.detach()
        parts = []
        for label, index in (
            ("crow_indices", weight.crow_indices()),
            ("col_indices", weight.col_indices()),
        ):
            narrow = index.clone().to(torch.int32)
            if not torch.equal(narrow.to(index.dtype), index):
                raise ValueError(f"BSR weight: {label} hold numbers that do not fit into int32")
            parts.append(narrow)
        return parts[0], parts[1], weight.values().clone(memory_format=torch.contiguous_format)


def bsr_to_dense(
    crow_indices: Tensor, col_indices: Tensor, values: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The dense `(N, K)` weight of a BSR one; differentiable in `values`.

    Args:
        crow_indices: `(R + 1,)` int32.
        col_indices: `(nnz,)` int32.
        values: `(nnz, r, c)`.
        shape: `(N, K)`.
    """
    _, r, c = values.shape
    R, C = block_grid(shape, (r, c))
    position = torch.arange(values.shape[0], device=values.device, dtype=torch.int32)
    row = torch.searchsorted(crow_indices, position, right=True) - 1
    blocks = values.new_zeros(R, C, r, c).index_put((row, col_indices.long()), values)
    N, K = shape
    return blocks.transpose(1, 2).reshape(R * r, C * c)[:N, :K].contiguous()


def check_bsr(
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    name: str = "BSR weight",
) -> None:
    """Check every invariant of the format, contents of the indices included (reads them: a host synchronisation).

    Args:
        crow_indices: `(R + 1,)`.
        col_indices: `(nnz,)`.
        values: `(nnz, r, c)`.
        shape: `(N, K)` of the weight.
        blocksize: `(r, c)`.
        name: what error messages call the weight, for example a layer's FQN.

    Raises:
        TypeError: indices that are not int32, or values that are not floating point.
        ValueError: any other broken invariant; the message says which.
    """
    R, C = block_grid(shape, blocksize)
    for label, tensor in (
        ("crow_indices", crow_indices),
        ("col_indices", col_indices),
        ("values", values),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(tensor).__name__}")
    for label, index in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if index.dtype != torch.int32:
            raise TypeError(
                f"{name}: {label} must be int32, got {index.dtype}; convert it with .to(torch.int32)"
            )
        if index.dim() != 1:
            raise ValueError(f"{name}: {label} must be 1-D, got shape {tuple(index.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"{name}: values must be floating point, got {values.dtype}")
    nnz = col_indices.shape[0]
    if tuple(values.shape) != (nnz, *blocksize):
        raise ValueError(
            f"{name}: values must have shape (nnz, rows, cols) = {(nnz, *blocksize)} to match "
            f"col_indices and the block size, got {tuple(values.shape)}"
        )
    if crow_indices.shape[0] != R + 1:
        raise ValueError(
            f"{name}: crow_indices must have {R + 1} entries, one more than the {R} block rows of "
            f"shape {tuple(shape)} in blocks of {blocksize[0]}x{blocksize[1]}, got {crow_indices.shape[0]}"
        )
    if not crow_indices.device == col_indices.device == values.device:
        raise ValueError(
            f"{name}: crow_indices, col_indices and values must be on one device, got "
            f"{crow_indices.device}, {col_indices.device} and {values.device}"
        )
    if values.is_meta:
        raise ValueError(f"{name}: on the meta device the indices have no content to check")
    crow, col = crow_indices.detach().cpu().long(), col_indices.detach().cpu().long()
    if crow[0] != 0:
        raise ValueError(f"{name}: crow_indices must start with 0, got {crow[0].item()}")
    if crow[-1] != nnz:
        raise ValueError(
            f"{name}: crow_indices must end with nnz = {nnz}, the number of col_indices, got {crow[-1].item()}"
        )
    lengths = crow.diff()
    if (lengths < 0).any():
        row = int((lengths < 0).nonzero()[0])
        raise ValueError(
            f"{name}: crow_indices must not decrease, got {crow[row].item()} then {crow[row + 1].item()} "
            f"at block row {row}"
        )
    if nnz == 0:
        return
    outside = (col < 0) | (col >= C)
    if outside.any():
        raise ValueError(
            f"{name}: col_indices must lie in [0, {C}), the block columns of shape {tuple(shape)}, "
            f"got {col[outside][0].item()}"
        )
    row = torch.repeat_interleave(torch.arange(R, device=lengths.device), lengths)
    unsorted = (row[1:] == row[:-1]) & (col[1:] <= col[:-1])
    if unsorted.any():
        at = int(unsorted.nonzero()[0])
        raise ValueError(
            f"{name}: col_indices must be sorted and unique in each block row, got {col[at].item()} then "
            f"{col[at + 1].item()} in block row {row[at].item()}"
        )
    padded = padded_shape(shape, blocksize)
    if padded is not None and not is_dtensor(values):  # of which each rank has other blocks
        rows, cols = (whole - n for whole, n in zip(padded, shape, strict=True))
        below, beside = (
            values[crow[-2] :, blocksize[0] - rows :],
            values[(col == C - 1).to(values.device), :, blocksize[1] - cols :],
        )
        if not (below.isfinite().all() and beside.isfinite().all()):
            raise ValueError(
                f"{name}: what the last blocks hold beyond the shape {tuple(shape)} must be finite, best zero: it is "
                "multiplied with zeros"
            )


def infer_blocksize(weight: Tensor, *, pad: bool = False) -> tuple[int, int] | None:
    """Read the block size off the zeros of a weight.

    Rows and columns are looked at separately, over the powers of two from 8 to 256 that divide the shape. With `pad`,
    others come in where they make a dimension at most 1.125x as large, or where no size divides it and they are not
    larger than it. The largest size that stores at most 1.02x the elements of the smallest one is taken; padding does
    not count as an element.

    Args:
        weight: `(N, K)`.
        pad: whether the last blocks may be padded.

    Returns:
        `(r, c)`, or None where no candidate divides the shape. A weight without a block of zeros gives the largest
        candidates. With `pad`, dimensions below 8 are cut in blocks of 8.
    """
    row_sizes, col_sizes = (_candidates(n, pad) for n in weight.shape)
    if not row_sizes or not col_sizes or weight.numel() == 0:
        return None
    # What is counted is small, and not every device counts in float64.
    smallest = nonzero_blocks(weight, (row_sizes[0], col_sizes[0])).cpu().double()
    heights, widths = (
        _sums(torch.ones(n, dtype=torch.float64, device="cpu"), sizes[0])
        for n, sizes in zip(weight.shape, (row_sizes, col_sizes), strict=True)
    )
    limit = STORED_TOLERANCE * float(heights @ smallest @ widths)

    def largest(sizes: list[int], mask: Tensor, lengths: Tensor, others: Tensor) -> int:
        """Merge blocks along the first dimension of `mask` while that stores hardly more."""
        best = sizes[0]
        for size in sizes[1:]:
            factor = size // sizes[0]
            merged = (_sums(mask, factor) > 0).double()
            if float(_sums(lengths, factor) @ merged @ others) <= limit:
                best = size
        return best

    rows = largest(row_sizes, smallest, heights, widths)
    return rows, largest(col_sizes, smallest.t(), widths, heights)


def _candidates(n: int, pad: bool) -> list[int]:
    """Sizes that a dimension of n may be cut in."""
    whole = [size for size in CANDIDATE_SIZES if n % size == 0]
    if not pad:
        return whole
    if not whole:
        return [size for size in CANDIDATE_SIZES if size <= max(n, CANDIDATE_SIZES[0])]
    return [size for size in CANDIDATE_SIZES if -(-n // size) * size <= MOST_PADDING * n]


def _sums(tensor: Tensor, size: int) -> Tensor:
    """Sums of `size` neighbours along the first dimension; of fewer at its end."""
    missing = -tensor.shape[0] % size
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor.reshape(-1, size, *tensor.shape[1:]).sum(1)
