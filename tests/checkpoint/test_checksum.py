"""CRC-32 of files that are written in pieces, held against zlib's over the whole file."""

import itertools
import random
import zlib

import pytest

from zero_sft.checkpoint.checksum import PartialChecksum, combine, crc32_of_file


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_several_ranks_make_the_checksum_of_the_whole_file(seed):
    rng = random.Random(seed)
    content = rng.randbytes(rng.choice([1, 7, 4096, 100_003]))
    cuts = sorted({0, len(content), *(rng.randrange(len(content)) for _ in range(rng.randrange(40)))})
    pieces = list(itertools.pairwise(cuts))
    rng.shuffle(pieces)
    ranks = [PartialChecksum() for _ in range(rng.choice([1, 2, 5]))]
    for start, stop in pieces:
        rng.choice(ranks).add(start, content[start:stop])
    assert combine(rank.of_file_with(len(content)) for rank in ranks) == zlib.crc32(content)


def test_a_piece_in_a_file_of_many_gigabytes():
    """The exponent runs past the order of x, 2^32 - 1: its powers come around."""
    zeros, nbytes = bytes(2**20), 5 * 2**30
    expected = 0
    for _ in range(nbytes // len(zeros)):
        expected = zlib.crc32(zeros, expected)
    parts = PartialChecksum()
    for offset in (0, 2 * 2**30):  # two pieces; what is between them is other ranks'
        parts.add(offset, zeros)
    others = PartialChecksum()
    for start, stop in ((2**20, 2 * 2**30), (2 * 2**30 + 2**20, nbytes)):
        for offset in range(start, stop, 2**20):
            others.add(offset, zeros)
    assert parts.of_file_with(nbytes) ^ others.of_file_with(nbytes) == expected


def test_nothing_written():
    assert PartialChecksum().of_file_with(10) == 0
    assert combine([]) == zlib.crc32(b"") == 0


def test_a_file_on_disk(tmp_path):
    content = random.Random(0).randbytes(20_000_003)
    (tmp_path / "f").write_bytes(content)
    assert crc32_of_file(tmp_path / "f") == zlib.crc32(content)
    (tmp_path / "empty").touch()
    assert crc32_of_file(tmp_path / "empty") == 0
