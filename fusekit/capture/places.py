"""What a blob says of a row besides probabilities: its key, where its tokens are, which of them are labels."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np

from fusekit.capture.bits import Reader, Writer
from fusekit.errors import StorageError
from fusekit.types import BoolArray, CapturedRow, IntArray, Part

KEY_BYTES = 16
MOST_TOKENS = 1 << 24
"""No row is longer, so that a damaged length cannot ask for more memory than there is."""


class Head(NamedTuple):
    """Fields of :class:`CapturedRow` and :class:`TokenizedRow` under their names."""

    key: str
    dataset: str
    cross_entropy: float
    message: IntArray
    part: IntArray
    ends: IntArray
    lows: IntArray
    labels: BoolArray


def key_bytes(key: str) -> bytes:
    """The 16 bytes of a row's key. Raises StorageError for anything but 32 lower-case hexadecimal digits."""
    try:
        data = bytes.fromhex(key)
    except ValueError:
        data = b""
    if len(data) != KEY_BYTES or data.hex() != key:
        raise StorageError(f"a row has the key {key!r}, but keys are 32 hexadecimal digits (Row.key)")
    return data


def write(writer: Writer, row: CapturedRow) -> None:
    """Key, cross-entropy, source of data; then runs of tokens of one message, part and role; then byte ends."""
    tokens = row.tokens
    T = len(tokens.ids)
    for name in ("message", "part", "ends", "lows", "labels"):
        if np.shape(getattr(tokens, name)) != (T,):
            raise StorageError(f"{T} ids, but {name} of shape {np.shape(getattr(tokens, name))}")
    if T > MOST_TOKENS:
        raise StorageError(f"it has {T} tokens, more than {MOST_TOKENS}")
    if not math.isfinite(row.cross_entropy):
        raise StorageError(f"its cross-entropy is {row.cross_entropy}")
    writer.raw(key_bytes(tokens.key) + struct.pack("<d", row.cross_entropy))
    dataset = row.dataset.encode()
    writer.varint(len(dataset))
    writer.raw(dataset)
    writer.varint(T)
    if not T:
        return
    message = np.asarray(tokens.message, np.int64)
    kind = 2 * np.asarray(tokens.part, np.int64) + np.asarray(tokens.labels, bool)
    starts = np.flatnonzero(np.r_[True, (message[1:] != message[:-1]) | (kind[1:] != kind[:-1])])
    writer.varint(len(starts))
    writer.rice(np.diff(starts, append=T))
    writer.rice(np.diff(message[starts], prepend=0))
    writer.rice(kind[starts])
    ends, lows = np.asarray(tokens.ends, np.int64), np.asarray(tokens.lows, np.int64)
    writer.rice(ends - _before(ends, message))
    writer.rice(lows - ends)


def read(reader: Reader) -> Head:
    """Raises StorageError where the bytes cannot be what :func:`write` wrote."""
    key = reader.raw(KEY_BYTES).hex()
    (cross_entropy,) = struct.unpack("<d", reader.raw(8))
    dataset = reader.raw(reader.varint()).decode()
    T = reader.varint()
    nothing = np.zeros(0, np.int64)
    if not T:
        return Head(key, dataset, cross_entropy, nothing, nothing, nothing, nothing, np.zeros(0, bool))
    runs = reader.varint()
    if not 0 < runs <= T <= MOST_TOKENS:
        raise StorageError(f"{runs} runs in {T} tokens are not possible")
    lengths = reader.rice(runs)
    if lengths.min() < 1 or lengths.max() > T or int(lengths.sum()) != T:
        raise StorageError(f"the runs of {T} tokens are {lengths.sum()} long")
    message, kind = np.cumsum(reader.rice(runs)), reader.rice(runs)
    if kind.min() < 0 or kind.max() > 2 * Part.END + 1:
        raise StorageError(f"a token's part is {int(kind.max()) // 2}")
    message, kind = np.repeat(message, lengths), np.repeat(kind, lengths)
    ends = _summed(reader.rice(T), message)
    offsets = reader.rice(T)
    lows = ends + offsets if offsets.any() else ends
    return Head(key, dataset, cross_entropy, message, kind >> 1, ends, lows, (kind & 1).astype(bool))


def _before(ends: IntArray, message: IntArray) -> IntArray:
    """The end of the token before, 0 at the start of a message."""
    before = np.zeros_like(ends)
    before[1:] = np.where(message[1:] == message[:-1], ends[:-1], 0)
    return before


def _summed(steps: IntArray, message: IntArray) -> IntArray:
    """Undoes the differences to :func:`_before`."""
    sums = np.cumsum(steps)
    starts = np.flatnonzero(np.r_[True, message[1:] != message[:-1]])
    base = sums[starts] - steps[starts]
    return np.asarray(sums - np.repeat(base, np.diff(starts, append=len(steps))))
