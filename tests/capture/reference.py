"""A slow decoder of rows, written from docs/store.md: one bit, one number, one entry at a time."""

from __future__ import annotations

import math
import struct
from typing import Any


class Bits:
    """Bits of a stream, lowest first."""

    def __init__(self, data: bytes) -> None:
        self.bits = [byte >> i & 1 for byte in data for i in range(8)]
        self.at = 0

    def number(self, width: int) -> int:
        total = sum(bit << i for i, bit in enumerate(self.bits[self.at : self.at + width]))
        self.at += width
        return total

    def unary(self) -> int:
        zeros = 0
        while not self.bits[self.at]:
            zeros, self.at = zeros + 1, self.at + 1
        self.at += 1
        return zeros


class Blob:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def raw(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.raw(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    def signed(self) -> int:
        number = self.varint()
        return -(number + 1) // 2 if number % 2 else number // 2

    def fixed(self, widths: list[int]) -> list[int]:
        bits = Bits(self.raw((sum(widths) + 7) // 8))
        return [bits.number(width) for width in widths]

    def split(self, widths: list[int]) -> list[int]:
        unary = Bits(self.raw(self.varint()))
        high = [unary.unary() for _ in widths]
        return [(h << w) + low for h, w, low in zip(high, widths, self.fixed(widths), strict=True)]

    def rice(self, count: int) -> list[int]:
        if count == 0:
            return []
        lowest = self.signed()
        width = self.raw(1)[0]
        above = [0] * count if width == 255 else self.split([width] * count)
        return [lowest + number for number in above]


def logprob(depth: int, step: float) -> float:
    """The grid point of a depth: solve f(l) = -depth."""
    knee = 6 / step
    if depth <= knee:
        return 2 * math.log(1 - depth * step / 8)
    return -2 * math.log(4) - (depth - knee) * step


def float32(depth: int) -> float:
    return -float(struct.unpack("<f", struct.pack("<I", depth))[0])


def decode(data: bytes, vocabulary: int, max_error: float) -> dict[str, Any]:
    blob = Blob(data[:-4])
    assert blob.raw(1) == b"\x01"
    row: dict[str, Any] = {"key": blob.raw(16).hex(), "cross_entropy": struct.unpack("<d", blob.raw(8))[0]}
    row["dataset"] = blob.raw(blob.varint()).decode()
    T = blob.varint()
    row |= {"message": [], "part": [], "labels": [], "ends": [], "lows": []}
    if T:
        runs = blob.varint()
        lengths, steps, kinds = blob.rice(runs), blob.rice(runs), blob.rice(runs)
        message = 0
        for length, step, kind in zip(lengths, steps, kinds, strict=True):
            message += step
            row["message"] += [message] * length
            row["part"] += [kind // 2] * length
            row["labels"] += [kind % 2 == 1] * length
        end = 0
        for i, step in enumerate(blob.rice(T)):
            end = (end if i and row["message"][i] == row["message"][i - 1] else 0) + step
            row["ends"].append(end)
        row["lows"] = [end + offset for end, offset in zip(row["ends"], blob.rice(T), strict=True)]
    n = sum(row["labels"])
    counts = blob.rice(n)
    narrower = blob.raw(1)[0] if sum(counts) else 0
    widths = [max(((45426 * vocabulary) // (65536 * (c + 1))).bit_length() - 1 - narrower, 0) for c in counts]
    gaps = blob.split([w for w, c in zip(widths, counts, strict=True) for _ in range(c)]) if sum(counts) else []
    point = (lambda depth: logprob(depth, max_error)) if max_error else float32
    if max_error:
        some = iter(blob.rice(sum(c > 0 for c in counts)))
        deepest = [next(some) if c else 0 for c in counts]
        below = iter(blob.rice(sum(counts)))
        depths = [d - next(below) for d, c in zip(deepest, counts, strict=True) for _ in range(c)]
        relative = n and blob.raw(1)[0]
        tails = [d - t if relative else t for t, d in zip(blob.rice(n), deepest, strict=True)]
        tail = [0.0 if t < 0 else math.exp(point(t)) for t in tails]
    else:
        depths = [struct.unpack("<I", blob.raw(4))[0] for _ in range(sum(counts))]
        tail = [struct.unpack("<f", blob.raw(4))[0] for _ in range(n)]
    entries = []
    for c in counts:
        id_ = -1
        found = []
        for gap, depth in zip(gaps[:c], depths[:c], strict=True):
            id_ += gap + 1
            found.append((depth, id_))
        entries.append(sorted(found))
        gaps, depths = gaps[c:], depths[c:]
    ranks = blob.rice(n)
    others = [i for i in range(n) if ranks[i] == counts[i]]
    if max_error:
        lasts = [entries[i][-1][0] if entries[i] else 0 for i in others]
        explicit = dict(zip(others, [a + b for a, b in zip(blob.rice(len(others)), lasts, strict=True)], strict=True))
    else:
        explicit = {i: struct.unpack("<I", blob.raw(4))[0] for i in others}
    row["rows"], row["tail"], row["actual"], label_ids = [], [], [], []
    for i in range(n):
        mass = sum(math.exp(point(d)) for d, _ in entries[i]) + tail[i] if max_error else 1.0
        values = [point(d) - math.log(mass) for d, _ in entries[i]]
        row["rows"].append(list(zip([id_ for _, id_ in entries[i]], values, strict=True)))
        row["tail"].append(tail[i] / mass)
        row["actual"].append(point(explicit[i]) if i in explicit else values[ranks[i]])
        label_ids.append(None if i in explicit else entries[i][ranks[i]][1])
    waiting = iter(label_ids)
    ids = [next(waiting) if label else None for label in row["labels"]]
    written = iter(blob.fixed([(vocabulary - 1).bit_length()] * sum(id_ is None for id_ in ids)))
    row["ids"] = [next(written) if id_ is None else id_ for id_ in ids]
    assert blob.at == len(blob.data)
    return row
