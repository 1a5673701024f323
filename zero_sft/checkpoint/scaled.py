"""A tensor that is stored as 8-bit numbers and a grid of scales, one for each block of it.

Element `(r, c)` of the weight, seen as a matrix of all its leading dimensions by the last one, is `weight[r, c] *
scales[r // block_rows, c // block_cols]`. The blocks at the lower and right edge may be cut short. A range of the weight needs
its own bytes and the rows of scales beside it, nothing else: that is what makes dequantising local.
"""

import math
from dataclasses import dataclass, fields

from zero_sft.checkpoint.header import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRows:
    """The scales of one range of a weight, and how they lie over it.

    The range begins `skip` elements into a row of `width` elements, which is row `first_row` of its block. The scales are rows
    of `columns` numbers in `nbytes` bytes from `offset_bytes` of `file`.
    """

    file: str
    dtype: str
    offset_bytes: int
    nbytes: int
    columns: int
    block_rows: int
    block_cols: int
    width: int
    skip: int
    first_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledTensor(StoredTensor):
    """A weight of one byte an element, and the scales that it is multiplied by."""

    scales: StoredTensor
    block_rows: int
    block_cols: int

    @classmethod
    def join(cls, name: str, weight: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> "ScaledTensor":
        """`weight` and `scales` as one source called `name`."""
        plain = {each.name: getattr(weight, each.name) for each in fields(weight)}
        return cls(**{**plain, "name": name}, scales=scales, block_rows=block[0], block_cols=block[1])

    def scale_rows(self, start: int, count: int) -> ScaleRows:
        """The scales of `count` elements from element `start` of the flat weight on."""
        width = self.shape[-1] if self.shape else 1
        columns = -(-width // self.block_cols)
        row, skip = divmod(start, width)
        first, last = row // self.block_rows, (start + count - 1) // width // self.block_rows
        itemsize = self.scales.itemsize
        return ScaleRows(
            file=self.scales.file,
            dtype=self.scales.dtype,
            offset_bytes=self.scales.offset_bytes + first * columns * itemsize,
            nbytes=(last - first + 1) * columns * itemsize,
            columns=columns,
            block_rows=self.block_rows,
            block_cols=self.block_cols,
            width=width,
            skip=skip,
            first_row=row - first * self.block_rows,
        )


def blocks(weight: tuple[int, ...], scales: tuple[int, ...], configured: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a block, from the shapes: as configured where the grid of scales is that one, else as it divides.

    Worked example: (576, 7168) with scales (5, 56) and blocks of (128, 128) is cut into those; the last ones have 64 rows.

    Raises:
        ValueError: a grid that fits neither.
    """
    *outer, rows, cols = (1, *weight) if len(weight) < 2 else weight
    matrices = math.prod(outer)
    if math.prod(scales) == 1:
        return matrices * rows, cols
    *_, grid_rows, grid_cols = (1, *scales)
    block, is_configured = (rows // max(grid_rows, 1), cols // max(grid_cols, 1)), False
    if configured is not None and (-(-rows // configured[0]), -(-cols // configured[1])) == (grid_rows, grid_cols):
        block, is_configured = configured, True
    is_even = rows == grid_rows * block[0] and cols == grid_cols * block[1]
    if math.prod(scales) != matrices * grid_rows * grid_cols or not (is_even or (is_configured and matrices == 1)):
        raise ValueError(f"scales of {list(scales)} don't divide a weight of {list(weight)}")
    return block
