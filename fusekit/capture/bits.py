"""Whole numbers in few bits, many at a time: fixed widths, unary numbers, Rice codes, and the bytes around them.

A bit stream is little-endian: its bit i is bit ``i % 8`` of byte ``i // 8``; the last byte is filled with zeros. A Rice
code of width b splits a number into its low b bits and the rest; the two parts are kept in separate streams, the rest
in unary (that many zeros, then a one), so that both are read without a loop over the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fusekit.errors import StorageError
from fusekit.types import IntArray

Bytes = npt.NDArray[np.uint8]

MAX_WIDTH = 56
"""A number of up to 56 bits lies within 8 bytes, wherever it starts."""

_CONSTANT = 255


def pack(values: IntArray, widths: int | IntArray) -> bytes:
    """The low ``widths`` bits of each value on end. values: int64 [n], none negative; widths: int64 [n] or one."""
    if not len(values):
        return b""
    widest = int(np.max(widths))
    columns = (widest + 7) // 8
    octets = np.ascontiguousarray(values, "<i8").view(np.uint8).reshape(-1, 8)[:, :columns]
    bits = np.unpackbits(octets, axis=1, count=widest, bitorder="little")
    kept = bits.ravel() if isinstance(widths, int) else bits[np.arange(widest) < widths[:, None]]
    return np.packbits(kept, bitorder="little").tobytes()


def pack_unary(values: IntArray) -> bytes:
    """Each value as that many zeros and a one. values: int64 [n], not negative."""
    ones = np.cumsum(values + 1) - 1
    bits = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
    bits[ones] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def rice_width(values: IntArray) -> tuple[int, int]:
    """The Rice width that takes the fewest bits, and how many. values: int64 [n], not negative."""
    best, fewest = 0, len(values) + int(values.sum())
    rest = values
    for width in range(1, int(values.max(initial=0)).bit_length() + 1):
        rest = rest >> 1
        total = len(values) * (width + 1) + int(rest.sum())
        if total < fewest:
            best, fewest = width, total
    return best, fewest


def rice_bits(values: IntArray) -> int:
    """Bits that :meth:`Writer.rice` takes for the values themselves."""
    if not len(values) or values.min() == values.max():
        return 0
    return rice_width(values - values.min())[1]


class Writer:
    """Bytes of a blob in the making."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def raw(self, data: bytes) -> None:
        self._parts.append(data)

    def varint(self, number: int) -> None:
        """A number that is not negative, seven bits a byte, the lowest first; the top bit says that more follow."""
        data = bytearray()
        while number > 0x7F:
            data.append(number & 0x7F | 0x80)
            number >>= 7
        data.append(number)
        self._parts.append(bytes(data))

    def signed(self, number: int) -> None:
        """0, -1, 1, -2, 2, ... as the varints 0, 1, 2, 3, 4, ..."""
        self.varint(2 * number if number >= 0 else -2 * number - 1)

    def rice(self, values: IntArray) -> None:
        """Numbers above their lowest: lowest (signed), width (a byte; 255: all equal, nothing follows), split codes."""
        if not len(values):
            return
        lowest = int(values.min())
        self.signed(lowest)
        if int(values.max()) == lowest:
            self.raw(bytes([_CONSTANT]))
            return
        above = values - lowest
        width, _ = rice_width(above)
        if width > MAX_WIDTH:
            raise StorageError(f"numbers from {lowest} to {int(values.max())} are too far apart to be stored")
        self.raw(bytes([width]))
        self.split(above, width)

    def split(self, values: IntArray, widths: int | IntArray) -> None:
        """Rice codes of given widths: the unary stream's bytes (varint), that stream, the stream of low bits."""
        rest = pack_unary(values >> widths)
        self.varint(len(rest))
        self.raw(rest)
        self.raw(pack(values, widths))

    def finish(self) -> bytes:
        return b"".join(self._parts)


class Reader:
    """Reads what a :class:`Writer` wrote. Raises StorageError where the bytes end too early or cannot be that."""

    def __init__(self, data: bytes) -> None:
        self._size = len(data)
        # Eight bytes more, so that the last number can be read through a window of eight.
        self._octets = np.frombuffer(data + bytes(8), np.uint8)
        self._windows = np.ndarray((self._size + 1,), "<u8", buffer=self._octets.data, strides=(1,))
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return self._size - self._at

    def raw(self, size: int) -> bytes:
        return self._take(size).tobytes()

    def _take(self, size: int) -> Bytes:
        if not 0 <= size <= self.left:
            raise StorageError(f"{size} bytes are needed where {self.left} are left")
        self._at += size
        return self._octets[self._at - size : self._at]

    def varint(self) -> int:
        number = 0
        for shift in range(0, 63, 7):
            octet = int(self._take(1)[0])
            number |= (octet & 0x7F) << shift
            if octet < 0x80:
                return number
        raise StorageError("a number is longer than nine bytes")

    def signed(self) -> int:
        number = self.varint()
        return -(number + 1 >> 1) if number & 1 else number >> 1

    def rice(self, count: int) -> IntArray:
        if not count:
            return np.zeros(0, np.int64)
        lowest = self.signed()
        width = int(self._take(1)[0])
        if width == _CONSTANT:
            return np.full(count, lowest, np.int64)
        return self.split(count, width) + lowest

    def split(self, count: int, widths: int | IntArray) -> IntArray:
        rest = self._unary(count)
        return (rest << widths) | self.fixed(count, widths)

    def _unary(self, count: int) -> IntArray:
        octets = self._take(self.varint())
        ones = np.unpackbits(octets, bitorder="little").nonzero()[0]
        if len(ones) != count:
            raise StorageError(f"{len(ones)} numbers stand where {count} should")
        rest: IntArray = ones.astype(np.int64)
        rest[1:] -= ones[:-1] + 1
        return rest

    def fixed(self, count: int, widths: int | IntArray) -> IntArray:
        """``count`` numbers of given widths."""
        masks: Any
        if isinstance(widths, int):
            if widths == 0 or not count:
                return np.zeros(count, np.int64)
            total, widest = count * widths, widths
            starts = np.arange(0, total, widths, dtype=np.int64)
            masks = np.uint64((1 << widths) - 1) if widths <= MAX_WIDTH else None
        else:
            starts = np.cumsum(widths)
            total, widest = int(starts[-1]) if count else 0, int(widths.max(initial=0))
            starts -= widths
            masks = (np.uint64(1) << widths.view(np.uint64)) - np.uint64(1)
        if widest > MAX_WIDTH:
            raise StorageError(f"numbers of {widest} bits are wider than {MAX_WIDTH}")
        base = self._at
        self._take((total + 7) // 8)
        windows = self._windows[base + (starts >> 3)]
        windows >>= (starts & 7).view(np.uint64)
        windows &= masks
        return np.asarray(windows.view(np.int64))
