"""The bytes of a weight in 4 bits: where its codes and its scales are, and which elements a range of bytes needs. Pure.

bitsandbytes quantises a weight in blocks of `BLOCK` elements, in row-major order: each element becomes a code of 4 bits, and
each block gets a scale in fp32. With double quantisation the scales of `SCALE_BLOCK` blocks become codes of 8 bits with one
scale in fp32, around their mean.

One parameter holds all of it, so that ZeRO-3 partitions and gathers it as one:

| part | bytes |
| --- | --- |
| codes | half a byte for each element |
| scales | 4 bytes for each block |
| or, with double quantisation: scales, their scales, their mean | 1 byte for each block, 4 for each `SCALE_BLOCK` blocks, 4 |

The parameter has the engine's dtype, which DeepSpeed demands of each parameter. Its values have no meaning; no arithmetic is
done with them.
"""

import math
from dataclasses import dataclass

from zero_sft.plan.partition import FlatRange, shard_range

BLOCK = 64
"""Elements of a weight that share a scale."""

SCALE_BLOCK = 256
"""Scales that share a scale, with double quantisation."""

_BLOCK_BYTES = BLOCK // 2
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitLayout:
    """The bytes of one weight.

    Attributes:
        shape: the weight's shape, (out_features, in_features).
        double: whether the scales are quantised as well.
    """

    shape: tuple[int, ...]
    double: bool

    @property
    def weight_numel(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Number of blocks, the last of which may be shorter."""
        return -(-self.weight_numel // BLOCK)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes."""
        return -(-self.weight_numel // 2)

    @property
    def scale_parts(self) -> tuple[int, ...]:
        """Bytes of the parts of the scales."""
        if not self.double:
            return (_FP32_BYTES * self.blocks,)
        return self.blocks, _FP32_BYTES * -(-self.blocks // SCALE_BLOCK), _FP32_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.code_bytes + sum(self.scale_parts)

    def numel(self, itemsize: int) -> int:
        """Number of elements of the parameter that holds the bytes, of a dtype of `itemsize` bytes."""
        return -(-self.nbytes // itemsize)

    def own_bytes(self, rank: int, ranks: int, itemsize: int) -> FlatRange:
        """Return the range of the bytes that a rank keeps."""
        own = shard_range(self.numel(itemsize), rank, ranks)
        return FlatRange(start=min(own.start * itemsize, self.nbytes), stop=min(own.stop * itemsize, self.nbytes))

    def own_blocks(self, rank: int, ranks: int, itemsize: int) -> FlatRange:
        """Return the blocks whose codes are on a rank, in part or as a whole.

        Worked example: 1,024 elements in bf16 on 2 ranks without double quantisation are 512 bytes of codes and 64 of scales.
        Rank 0 keeps the bytes 0 to 288, so the blocks 0 to 9; rank 1 has the blocks 9 to 16 and all scales.
        """
        own = self.own_bytes(rank, ranks, itemsize)
        start, stop = min(own.start, self.code_bytes), min(own.stop, self.code_bytes)
        return FlatRange(start=start // _BLOCK_BYTES, stop=-(-stop // _BLOCK_BYTES))

    def elements_of(self, blocks: FlatRange) -> FlatRange:
        """Return the elements of the weight in a range of blocks."""
        return FlatRange(start=min(blocks.start * BLOCK, self.weight_numel), stop=min(blocks.stop * BLOCK, self.weight_numel))
