"""`PackedBSRLinear`: several linear layers of one input on top of each other, of which some can be asked alone."""

from torch import Tensor

from torchao_superblock.bsr.linear import BSRLinear
from torchao_superblock.ops import build_plan


class PackedBSRLinear(BSRLinear):
    """The projections of query, key and value of an attention, stored as one weight `(3 * E, E)`.

    One product serves where the three have one input. Where they do not, :meth:`part` gives what the op needs for one
    of them or for two neighbours: views of the same blocks, and indices and plans that are worked out when the indices
    are set, since a forward must not wait for a GPU to learn where a part begins.

    Args and attributes are those of :class:`BSRLinear`.

    Raises:
        ValueError: `out_features / 3` is not a multiple of the block's rows, so that no part begins at a block row.
    """

    PARTS = 3
    _RANGES = ((0, 1), (1, 2), (2, 3), (0, 2), (1, 3))
    DERIVED = BSRLinear.DERIVED + tuple(
        f"{kind}_{first}{last}" for first, last in _RANGES for kind in ("crow", "plan")
    )

    def _check(
        self,
        crow_indices: Tensor,
        col_indices: Tensor,
        values: Tensor,
        bias: Tensor | None,
        name: str,
    ) -> None:
        if self.out_features % (self.PARTS * self.blocksize[0]):
            raise ValueError(
                f"{name}: {self.out_features} rows are {self.PARTS} projections of {self.out_features / self.PARTS:g}, "
                f"which is not a multiple of the {self.blocksize[0]} rows of a block"
            )
        super()._check(crow_indices, col_indices, values, bias, name)

    def _set_indices(self, crow_indices: Tensor, col_indices: Tensor) -> None:
        super()._set_indices(crow_indices, col_indices)
        self._bounds = self._starts(crow_indices)
        n_block_cols = -(-self.in_features // self.blocksize[1])
        for first, last in self._RANGES:
            crow = self._rows(crow_indices, self._bounds, first, last)
            col = col_indices[self._bounds[first] : self._bounds[last]]
            # Without groups: these take as long to find as those of the whole, and most layers are not asked in parts.
            plan = build_plan(crow, col, n_block_cols)
            self.register_buffer(f"crow_{first}{last}", crow, persistent=False)
            self.register_buffer(f"plan_{first}{last}", plan, persistent=False)

    def _starts(self, crow_indices: Tensor) -> list[int]:
        """Where the blocks of each part start, and where those of the last one end."""
        return crow_indices[:: (crow_indices.shape[0] - 1) // self.PARTS].tolist()

    def _rows(self, crow_indices: Tensor, starts: list[int], first: int, last: int) -> Tensor:
        rows = (crow_indices.shape[0] - 1) // self.PARTS
        return crow_indices[first * rows : last * rows + 1] - starts[first]

    def part(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the op needs for the parts from `first` up to, not including, `last`.

        Args:
            first: 0, 1 or 2.
            last: 1, 2 or 3.

        Returns:
            `(crow_indices, col_indices, values, plan)`; `col_indices` and `values` are views.
        """
        crow, col, values, plan = self.blocks()
        if (first, last) == (0, self.PARTS):
            return crow, col, values, plan
        if plan is None:  # other indices than those that were set
            starts, part_plan = self._starts(crow), None
            part_crow = self._rows(crow, starts, first, last)
        else:
            starts, part_plan = self._bounds, getattr(self, f"plan_{first}{last}")
            part_crow = getattr(self, f"crow_{first}{last}")
        begin, end = starts[first], starts[last]
        return part_crow, col[begin:end], values[begin:end], part_plan
