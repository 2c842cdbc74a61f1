"""A captured row as a blob of bytes, and back. The format is written out in docs/store.md.

What a row costs is mostly the ids of its entries: a set of k of V ids takes log2(V choose k) bits, 81 bytes for 50 of
152 thousand. Entries are kept by rising id, so that their order costs nothing and the gaps between them take within
0.3 bits of that each; the order by probability comes back from the values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xxhash

from fusekit.alignment.projection import MASS_TOLERANCE
from fusekit.capture import places as coordinates
from fusekit.capture.bits import Reader, Writer, pack, rice_bits
from fusekit.capture.grid import ExactGrid, grid
from fusekit.capture.settings import DEFAULT_MAX_ERROR
from fusekit.errors import StorageError
from fusekit.types import BoolArray, CapturedRow, FloatArray, IntArray, TokenizedRow, TopK

FORMAT = 1
LOWEST = -1e4
"""Log-probabilities below this are refused."""

_CHECKSUM_BYTES = 4
_LN2 = 45426  # of 65536; a gap's best Rice width in whole numbers, so that every machine finds the same
_MOST_NARROWING = 8


def checksum(data: bytes) -> bytes:
    """The last four bytes of a blob: the low half of the xxh3-64 of what is before them, little-endian."""
    return (xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF).to_bytes(_CHECKSUM_BYTES, "little")


class Codec:
    """Rows of one model to bytes and back.

    What comes back: keys, ids, coordinates and cross-entropies exactly; log-probabilities ``l`` and log of the tail
    within :meth:`error_bound` of what was given, which is at most ``max_error`` nats. Half of that is rounding (finer
    for probable entries). The other half at most is normalisation: decoded entries and tail sum to 1, and what rounding
    made of the sum, which is divided out, lies between the errors of the entries. A tail of 0 stays 0. The KL
    divergence of a decoded row from the one given is at most ``max_error ** 2 / 8`` nats (Hoeffding's lemma, for
    errors within ``max_error / 2``). Entries come back by falling decoded probability, equal ones by rising id.

    ``max_error=0``: log-probabilities and tails as float32, neither rounded further nor normalised.

    Args:
        vocabulary: ids are below it.
        top_k: no label has more entries.
        max_error: nats.

    Raises:
        StorageError: arguments out of range.
    """

    def __init__(self, vocabulary: int, top_k: int, max_error: float = DEFAULT_MAX_ERROR) -> None:
        if not 1 <= top_k <= vocabulary < 1 << 31:
            raise StorageError(
                f"top_k is {top_k} and the vocabulary {vocabulary}, but 1 <= top_k <= vocabulary < 2^31 is needed"
            )
        self.vocabulary, self.top_k, self.max_error = vocabulary, top_k, max_error
        self._grid = grid(max_error)
        self._exact = isinstance(self._grid, ExactGrid)
        self._id_width = (vocabulary - 1).bit_length()
        # Rice widths of gaps by number of entries.
        self._gap_widths = np.array(
            [max((_LN2 * vocabulary // ((n + 1) << 16)).bit_length() - 1, 0) for n in range(top_k + 1)], np.int64
        )

    def error_bound(self, logprobs: FloatArray) -> FloatArray:
        """How far a decoded log-probability can be from the one given, nats: float64, shaped like ``logprobs``.

        Entries and tails: rounding there plus ``max_error / 2`` for normalisation (rows whose given mass is not 1 are
        off by the logarithm of that mass besides).
        """
        return self._grid.rounding(np.asarray(logprobs, np.float64)) + self.max_error / 2

    def encode(self, row: CapturedRow) -> bytes:
        """One blob. Raises StorageError naming the row and what cannot be stored."""
        try:
            entries = self._entries(row)
            writer = Writer()
            writer.raw(bytes([FORMAT]))
            coordinates.write(writer, row)
            self._write_entries(writer, entries)
            in_list = self._write_actual(writer, row, entries)
            kept = np.ones(len(row.tokens), bool)
            kept[row.tokens.label_positions] = ~in_list
            writer.raw(pack(row.tokens.ids[kept], self._id_width))
        except StorageError as error:
            raise StorageError(f"row {row.tokens.key}: {error}") from error
        data = writer.finish()
        return data + checksum(data)

    def decode(self, blob: bytes) -> CapturedRow:
        """The row of a blob; its ``rows`` are as wide as the most entries of any label.

        Raises StorageError where the blob is damaged or of another format.
        """
        data = bytes(blob[:-_CHECKSUM_BYTES])
        if len(blob) <= _CHECKSUM_BYTES or checksum(data) != bytes(blob[-_CHECKSUM_BYTES:]):
            raise StorageError(f"a row of {len(blob)} bytes is damaged: its checksum is another")
        try:
            return self._decode(Reader(data))
        except (ValueError, IndexError, OverflowError, MemoryError) as error:
            raise StorageError(f"a row of {len(blob)} bytes is damaged: {error}") from error

    def _decode(self, reader: Reader) -> CapturedRow:
        if (found := reader.raw(1)[0]) != FORMAT:
            raise StorageError(f"a row has format {found}, but this version of fusekit reads format {FORMAT}")
        head = coordinates.read(reader)
        labels = head.labels
        n = int(np.count_nonzero(labels))
        counts, depths, tail = self._read_entries(reader, n)
        rows = self._rows(counts, depths, tail)
        ids, actual = self._read_actual(reader, head.labels, rows, counts, depths)
        if reader.left:
            raise StorageError(f"a row has {reader.left} bytes more than it should")
        tokens = TokenizedRow(head.key, ids, head.message, head.part, head.ends, head.lows, labels)
        return CapturedRow(tokens, head.dataset, rows, actual, head.cross_entropy)

    def _entries(self, row: CapturedRow) -> _Entries:
        """The entries of a row by rising id, checked."""
        tokens, rows = row.tokens, row.rows
        n = int(np.count_nonzero(tokens.labels))
        if rows.ids.shape != rows.logprobs.shape or not len(rows.ids) == len(rows.tail) == len(row.actual) == n:
            raise StorageError(
                f"{n} labels, but ids {rows.ids.shape}, logprobs {rows.logprobs.shape}, tail {rows.tail.shape} "
                f"and actual {row.actual.shape}"
            )
        ids = np.asarray(rows.ids, np.int64)
        logprobs, tail = np.asarray(rows.logprobs, np.float64), np.asarray(rows.tail, np.float64)
        used = (ids >= 0) & (logprobs != -np.inf)
        counts = used.sum(axis=1)
        ids = np.where(used, ids, self.vocabulary)
        order = np.argsort(ids, axis=1)
        ids = np.take_along_axis(ids, order, 1)[:, : int(counts.max(initial=0))]
        logprobs = np.take_along_axis(logprobs, order, 1)[:, : ids.shape[1]]
        used = np.arange(ids.shape[1]) < counts[:, None]
        depths = self._grid.depths(np.where(used, logprobs, 0.0))
        entries = _Entries(ids, depths, used, counts, tail)
        self._check(row, entries, np.where(used, logprobs, -np.inf))
        return entries

    def _check(self, row: CapturedRow, entries: _Entries, logprobs: FloatArray) -> None:
        ids, _, used, counts, tail = entries
        highest = max(int(row.tokens.ids.max(initial=0)), int(np.max(ids, where=used, initial=0)))
        if highest >= self.vocabulary or row.tokens.ids.min(initial=0) < 0:
            wrong = highest if highest >= self.vocabulary else int(row.tokens.ids.min())
            raise StorageError(f"token id {wrong} is outside the vocabulary of {self.vocabulary}")
        if counts.max(initial=0) > self.top_k:
            raise StorageError(f"{counts.max()} entries for one label, more than top_k {self.top_k}")
        repeated = np.argwhere((ids[:, 1:] == ids[:, :-1]) & used[:, 1:])
        if len(repeated):
            label, at = repeated[0].tolist()
            raise StorageError(f"label {label} has the token id {ids[label, at]} twice")
        mass = np.exp(logprobs).sum(axis=1) + tail
        wrong_rows = ~(np.abs(mass - 1) <= MASS_TOLERANCE) | ~(tail >= 0)
        if wrong_rows.any():
            label = int(np.flatnonzero(wrong_rows)[0])
            raise StorageError(
                f"label {label} has no distribution: its entries and its tail of {tail[label]:.6g} sum to "
                f"{mass[label]:.6g}, not 1"
            )
        values = np.concatenate([logprobs[used], row.actual])
        unfit = values[~((values >= LOWEST) & (values <= MASS_TOLERANCE))]
        if len(unfit):
            raise StorageError(f"a log-probability is {unfit[0]:.6g}, but finite ones from {LOWEST:g} to 0 are stored")

    def _write_entries(self, writer: Writer, entries: _Entries) -> None:
        ids, depths, used, counts, tail = entries
        writer.rice(counts)
        gaps = np.diff(ids, axis=1, prepend=-1)[used] - 1
        if gaps.size:
            narrower, widths = self._narrowed(gaps, counts)
            writer.raw(bytes([narrower]))
            writer.split(gaps, widths)
        flat = depths[used]
        # Log-probabilities of -inf have no depth: a tail of 0 is kept as depth -1.
        some = tail > 0
        tails = np.full(len(tail), -1, np.int64)
        tails[some] = self._grid.depths(np.log(tail[some]))
        if self._exact:
            writer.raw(flat.astype("<u4").tobytes() + tail.astype("<f4").tobytes())
            return
        deepest = entries.deepest
        writer.rice(deepest[counts > 0])
        writer.rice((deepest[:, None] - depths)[used])
        if not len(tail):
            return
        # Beside full rows the tail is about as deep as the deepest entry.
        relative = bool(some.all()) and rice_bits(deepest - tails) < rice_bits(tails)
        writer.raw(bytes([relative]))
        writer.rice(deepest - tails if relative else tails)

    def _narrowed(self, gaps: IntArray, counts: IntArray) -> tuple[int, int | IntArray]:
        """How much narrower than for evenly spread ids the codes of gaps are best, and the widths of all gaps.

        Tokenizers give the common tokens low ids, so most gaps are smaller than they would be.
        """
        best: tuple[int, int | IntArray] = 0, 0
        fewest = None
        for narrower in range(_MOST_NARROWING):
            widths = self._widths(counts, narrower)
            bits = int((gaps >> widths).sum()) + (widths * len(gaps) if isinstance(widths, int) else int(widths.sum()))
            if fewest is not None and bits >= fewest:
                break
            best, fewest = (narrower, widths), bits
        return best

    def _widths(self, counts: IntArray, narrower: int) -> int | IntArray:
        widths = np.maximum(self._gap_widths[counts] - narrower, 0)
        if len(counts) and counts.min() == counts.max():
            return int(widths[0])
        return np.repeat(widths, counts)

    def _read_entries(self, reader: Reader, n: int) -> tuple[IntArray, IntArray, FloatArray]:
        """Entries per label [n], their order: depth * 2^32 + id [n, most], rising, and the tails [n]."""
        counts = reader.rice(n)
        total = int(counts.sum())
        if n and (counts.min() < 0 or counts.max() > self.top_k or total > 8 * reader.left):
            raise StorageError(f"{counts.max()} entries for a label are not possible")
        used = np.arange(int(counts.max(initial=0))) < counts[:, None]
        keys = np.full(used.shape, np.iinfo(np.int64).max)
        ids = np.zeros(0, np.int64)
        if total:
            narrower = reader.raw(1)[0]
            ids = reader.split(total, self._widths(counts, narrower)) + 1
            # Running sums within each label: over all of them, less what the labels before add up to.
            ids = np.cumsum(ids)
            last = np.cumsum(counts) - 1
            before = np.where(last >= 0, ids[last], 0)[:-1]
            ids -= np.repeat(np.concatenate([[0], before]), counts) + 1
            if ids.min() < 0 or ids.max() >= self.vocabulary:
                raise StorageError(f"token ids from {ids.min()} to {ids.max()} in a vocabulary of {self.vocabulary}")
        if self._exact:
            depths = np.frombuffer(reader.raw(4 * total), "<u4").astype(np.int64)
            tail = np.frombuffer(reader.raw(4 * n), "<f4").astype(np.float64)
        else:
            deepest = np.zeros(n, np.int64)
            deepest[counts > 0] = reader.rice(int(np.count_nonzero(counts)))
            depths = np.repeat(deepest, counts) - reader.rice(total)
            tail = self._read_tail(reader, deepest)
        if total and not 0 <= depths.min() <= depths.max() < 1 << 31:
            raise StorageError(f"depths from {depths.min()} to {depths.max()} are not possible")
        keys[used] = (depths << 32) | ids
        keys.sort(axis=1)
        return counts, keys, tail

    def _read_tail(self, reader: Reader, deepest: IntArray) -> FloatArray:
        if not len(deepest):
            return np.zeros(0)
        relative = reader.raw(1)[0]
        tails = reader.rice(len(deepest))
        if relative:
            tails = deepest - tails
        if tails.min() < -1 or tails.max() >= 1 << 31:
            raise StorageError(f"depths of tails from {tails.min()} to {tails.max()} are not possible")
        return np.where(tails < 0, 0.0, np.exp(self._grid.logprobs(np.maximum(tails, 0))))

    def _rows(self, counts: IntArray, keys: IntArray, tail: FloatArray) -> TopK:
        used = np.arange(keys.shape[1]) < counts[:, None]
        depths = np.where(used, keys >> 32, 0)
        logprobs = np.where(used, self._grid.logprobs(depths), -np.inf)
        ids = np.where(used, keys & 0xFFFFFFFF, -1)
        if self._exact:
            return TopK(ids, logprobs, tail)
        mass = np.exp(logprobs).sum(axis=1) + tail
        if len(mass) and not mass.min() > 0:
            raise StorageError(f"label {int(mass.argmin())} has no mass")
        return TopK(ids, logprobs - np.log(mass)[:, None], tail / mass)

    def _write_actual(self, writer: Writer, row: CapturedRow, entries: _Entries) -> BoolArray:
        """The labels' log-probabilities; returns bool [n], whether a label is an entry of its row with that value.

        The rank of the label among the entries, their number for none; then the depths of those, below the deepest.
        """
        ids, depths, used, counts, _ = entries
        labels = np.asarray(row.tokens.ids[row.tokens.label_positions], np.int64)
        actual = self._grid.depths(np.asarray(row.actual, np.float64))
        keys = np.where(used, (depths << 32) | ids, np.iinfo(np.int64).max)
        own = (actual << 32) | labels
        in_list = np.asarray((keys == own[:, None]).any(axis=1))
        writer.rice(np.where(in_list, (keys < own[:, None]).sum(axis=1), counts))
        others = ~in_list
        if self._exact:
            writer.raw(actual[others].astype("<u4").tobytes())
        else:
            writer.rice((actual - entries.deepest)[others])
        return in_list

    def _read_actual(
        self, reader: Reader, labels: BoolArray, rows: TopK, counts: IntArray, keys: IntArray
    ) -> tuple[IntArray, FloatArray]:
        """Token ids [T] and the labels' log-probabilities [n]."""
        n = len(counts)
        rank = reader.rice(n)
        if n and not (rank.min() >= 0 and (rank <= counts).all()):
            raise StorageError("a label has a rank that its row does not have")
        others = rank == counts
        listed = np.flatnonzero(~others)
        actual = np.zeros(n)
        actual[listed] = rows.logprobs[listed, rank[listed]]
        missing = int(np.count_nonzero(others))
        if self._exact:
            depths = np.frombuffer(reader.raw(4 * missing), "<u4").astype(np.int64)
        else:
            at = np.flatnonzero(others)
            last = keys[at, np.maximum(counts[at] - 1, 0)] >> 32 if keys.shape[1] else np.zeros(missing, np.int64)
            depths = reader.rice(missing) + np.where(counts[at] > 0, last, 0)
        if missing and not 0 <= depths.min() <= depths.max() < 1 << 31:
            raise StorageError(f"depths of labels from {depths.min()} to {depths.max()} are not possible")
        actual[others] = self._grid.logprobs(depths)
        ids = np.zeros(len(labels), np.int64)
        kept = np.ones(len(labels), bool)
        kept[np.flatnonzero(labels)[listed]] = False
        ids[kept] = reader.fixed(int(np.count_nonzero(kept)), self._id_width)
        ids[~kept] = rows.ids[listed, rank[listed]]
        if len(ids) and ids.max() >= self.vocabulary:
            raise StorageError(f"token id {ids.max()} is outside the vocabulary of {self.vocabulary}")
        return ids, actual


class _Entries(NamedTuple):
    """Entries of n labels, at most ``most`` each, by rising id, the ones that are used first.

    ids: int64 [n, most]. depths: int64 [n, most], 0 where not used. used: bool [n, most]. counts: int64 [n].
    tail: float64 [n].
    """

    ids: IntArray
    depths: IntArray
    used: BoolArray
    counts: IntArray
    tail: FloatArray

    @property
    def deepest(self) -> IntArray:
        """int64 [n], the depth of the least probable entry, 0 without one."""
        return np.asarray(self.depths.max(axis=1, initial=0))
