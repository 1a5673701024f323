"""CRC-32 of files that several ranks write together, without reading them again.

A file's CRC-32 (the one of zlib, gzip and zip) is the XOR of one term for each of its pieces: `crc(piece) * x^(8 * bytes after
the piece)`, a product of polynomials over GF(2). So each rank adds up the terms of what it has written, and the ranks'
sums together are the CRC-32 of the whole file, which any tool can check. Source of the combination: `crc32_combine` of zlib,
https://zlib.net/manual.html.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_POLYNOMIAL = np.uint32(0xEDB88320)  # the lowest bit is the coefficient of x^31
_ONE = 1 << 31  # x^0
_READ_BYTES = 8 * 2**20


@dataclass(slots=True)
class PartialChecksum:
    """The CRC-32 of what one rank has written to a file, in pieces that do not overlap."""

    _ends: list[int] = field(default_factory=list[int])
    _crcs: list[int] = field(default_factory=list[int])

    def add(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Add a piece that was written at `offset_bytes` of the file."""
        end = offset_bytes + len(data)
        if self._ends and self._ends[-1] == offset_bytes:
            self._ends[-1], self._crcs[-1] = end, zlib.crc32(data, self._crcs[-1])
        else:
            self._ends.append(end)
            self._crcs.append(zlib.crc32(data))

    def of_file_with(self, nbytes: int) -> int:
        """Return this rank's term of the CRC-32 of a file of `nbytes` bytes."""
        bytes_after = nbytes - np.array(self._ends, dtype=np.int64)
        terms = _times_power(np.array(self._crcs, dtype=np.uint32), 8 * bytes_after)
        return int(np.bitwise_xor.reduce(terms)) if terms.size else 0


def combine(terms: Iterable[int]) -> int:
    """Return a file's CRC-32 from the terms of all ranks."""
    crc = 0
    for term in terms:
        crc ^= term
    return crc


def crc32_of_file(path: Path) -> int:
    """Read a file and return its CRC-32.

    Raises:
        OSError: it can't be read.
    """
    crc = 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_READ_BYTES))
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
    return crc


def _times_power(polynomials: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Return each of the polynomials times `x^exponent`, modulo the CRC's polynomial."""
    product, power, bit = polynomials, _ONE >> 1, 0  # power = x^(2^bit)
    while np.any(exponents >> bit):
        product = np.where((exponents >> bit) & 1, _times(power, product), product)
        power, bit = int(_times(power, np.array([power], dtype=np.uint32))[0]), bit + 1
    return product


def _times(factor: int, polynomials: np.ndarray) -> np.ndarray:
    product, shifted = np.zeros_like(polynomials), polynomials
    while factor:
        if factor & _ONE:
            product = product ^ shifted
        factor = (factor << 1) & 0xFFFFFFFF
        shifted = np.where(shifted & 1, (shifted >> np.uint32(1)) ^ _POLYNOMIAL, shifted >> np.uint32(1))
    return product
