"""The bytes of a weight in 4 bits, and the parts that ranks keep of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zero_sft.four_bit.layout import FourBitLayout
from zero_sft.plan.partition import FlatRange


@pytest.mark.parametrize(
    ("shape", "double", "code_bytes", "scale_parts"),
    [
        ((4096, 4096), False, 8_388_608, (1_048_576,)),
        ((4096, 4096), True, 8_388_608, (262_144, 4096, 4)),  # 4.127 bits a weight
        ((5, 13), True, 33, (2, 4, 4)),  # an odd number of elements, and a second block of a single one
    ],
)
def test_sizes(shape, double, code_bytes, scale_parts):
    layout = FourBitLayout(shape=shape, double=double)
    assert (layout.code_bytes, layout.scale_parts) == (code_bytes, scale_parts)
    assert layout.nbytes == code_bytes + sum(scale_parts)


def test_the_worked_example():
    layout = FourBitLayout(shape=(16, 64), double=False)
    assert layout.numel(2) == 288
    assert [layout.own_bytes(rank, 2, 2) for rank in (0, 1)] == [FlatRange(start=0, stop=288), FlatRange(start=288, stop=576)]
    assert [layout.own_blocks(rank, 2, 2) for rank in (0, 1)] == [FlatRange(start=0, stop=9), FlatRange(start=9, stop=16)]


@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    double=st.booleans(),
    ranks=st.integers(1, 40),
    itemsize=st.sampled_from([2, 4]),
)
def test_ranks_keep_each_byte_once_and_have_the_elements_for_it(shape, double, ranks, itemsize):
    layout = FourBitLayout(shape=shape, double=double)
    kept = [layout.own_bytes(rank, ranks, itemsize) for rank in range(ranks)]
    assert [part.stop for part in kept[:-1]] == [part.start for part in kept[1:]]
    assert (kept[0].start, kept[-1].stop) == (0, layout.nbytes)
    seen = set()
    for rank, own in enumerate(kept):
        blocks = layout.own_blocks(rank, ranks, itemsize)
        elements = layout.elements_of(blocks)
        seen.update(range(blocks.start, blocks.stop))
        codes = [byte for byte in (own.start, own.stop - 1) if own.start < own.stop and byte < layout.code_bytes]
        assert all(elements.start <= 2 * byte < elements.stop for byte in codes)
    assert seen == set(range(layout.blocks))
