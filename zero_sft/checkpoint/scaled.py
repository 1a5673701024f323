"""A block-quantised tensor: 8-bit numbers, and a grid with one scale for each block of them.

The weight is seen as a matrix whose columns are its last dimension. Its element `(r, c)` is
`weight[r, c] * scales[r // block_rows, c // block_cols]`. Blocks at the bottom and right edges may be smaller.
A range of the weight needs only its own bytes and the rows of scales that cover it, so a rank can dequantise its shard alone.
"""

import math
from dataclasses import asdict, dataclass, replace

from zero_sft.checkpoint.header import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRows:
    """The scales that cover one range of a weight, and their position relative to it.

    The range begins `skip` elements into a row of `width` elements, which is row `first_row` of its block. The scales are rows
    of `columns` numbers, in `nbytes` bytes at `offset_bytes` of `file`.
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
    """A weight of one byte per element, and the scales that multiply it."""

    scales: StoredTensor
    block_rows: int
    block_cols: int

    @classmethod
    def join(cls, name: str, weight: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> "ScaledTensor":
        """Combine `weight` and `scales` into one source called `name`."""
        return cls(**asdict(replace(weight, name=name)), scales=scales, block_rows=block[0], block_cols=block[1])

    def scale_rows(self, start: int, count: int) -> ScaleRows:
        """Return the scales that cover elements `[start, start + count)` of the flat weight."""
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


def block_shape(weight: tuple[int, ...], scales: tuple[int, ...], configured: tuple[int, int] | None) -> tuple[int, int]:
    """Return the rows and columns of a block: `configured` if the grid of scales matches it, else the weight over the grid.

    Worked example: a weight (576, 7168) with scales (5, 56) matches blocks of (128, 128); the last blocks have 64 rows.

    Raises:
        ValueError: the grid matches neither.
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
