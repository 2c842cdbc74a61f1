"""An example to the columns of docs/store.md, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fusekit.alignment.rows import MASS_TOLERANCE
from fusekit.capturing.manifest import key_bytes
from fusekit.capturing.settings import DEFAULT_MAX_ERROR
from fusekit.errors import StorageError
from fusekit.types import BoolArray, CapturedRow, FloatArray, IntArray, Part, TokenizedRow, TopK

# Steps grow as 1 / sqrt(p) from a quarter of the largest at p = 1, until p = 1/16.
_FINEST = 0.25
_KNEE = -2 * float(np.log(1 / _FINEST))
_TABLE = 1 << 16


class Grid:
    """Log-probabilities rounded to a companded grid.

    Between l and the next grid point lies about ``step(l) = min(s, s/4 * exp(-l/2))``, with s = ``max_error``. To the
    second order the KL divergence is the sum of p times the squared error, so a step that grows as 1/sqrt(p) gives
    every entry an equal share in it; below p = 1/16 the step stays at s, as errors of single entries count too.

    Depth d stands for the log-probability that solves f(l) = -d, with f the integral of 1/step and f(0) = 0:
    ``f(l) = -(8/s) (1 - exp(l/2))`` down to the knee l = -2 ln 4, where f = -6/s, and ``-6/s + (l + 2 ln 4)/s`` below.
    """

    def __init__(self, max_error: float) -> None:
        self.step = max_error
        self._knee_depth = 2 * (1 - _FINEST) / (_FINEST * max_error)

    def _position(self, logprobs: FloatArray) -> FloatArray:
        near = (1 - np.exp(np.maximum(logprobs, _KNEE) / 2)) * (2 / (_FINEST * self.step))
        far = np.minimum(logprobs, _KNEE) - _KNEE
        return near - far / self.step

    def _value(self, positions: FloatArray) -> FloatArray:
        near = 2 * np.log1p(-np.minimum(positions, self._knee_depth) * (_FINEST * self.step / 2))
        far = np.maximum(positions, self._knee_depth) - self._knee_depth
        return np.asarray(near - far * self.step)

    def depths(self, logprobs: FloatArray) -> IntArray:
        """The nearest grid points, int64, 0 for probability 1. logprobs: at most 0 (what is above counts as 0)."""
        return np.rint(self._position(np.minimum(logprobs, 0.0))).astype(np.int64)

    def logprobs(self, depths: IntArray) -> FloatArray:
        """The log-probabilities of grid points, float64."""
        deepest = int(depths.max(initial=0))
        if deepest > max(_TABLE, depths.size):
            return self._value(depths.astype(np.float64))
        return self._value(np.arange(deepest + 1, dtype=np.float64))[depths]

    def rounding(self, logprobs: FloatArray) -> FloatArray:
        """The largest error of rounding at these log-probabilities, at most half of ``max_error``."""
        logprobs = np.minimum(logprobs, 0.0)
        # The side away from 0 has the larger steps.
        return logprobs - self._value(self._position(logprobs) + 0.5)


class ExactGrid(Grid):
    """Every float32 a grid point of its own: the depth is the pattern of bits of minus the log-probability."""

    def __init__(self) -> None:
        self.step = 0.0

    def depths(self, logprobs: FloatArray) -> IntArray:
        return np.abs(np.minimum(logprobs, 0.0)).astype(np.float32).view(np.uint32).astype(np.int64)

    def logprobs(self, depths: IntArray) -> FloatArray:
        return -depths.astype(np.uint32).view(np.float32).astype(np.float64)

    def rounding(self, logprobs: FloatArray) -> FloatArray:
        return np.abs(logprobs) * 2.0**-24


LOWEST = -1e4
"""Log-probabilities below this are refused."""

Columns = dict[str, Any]
"""An example as it is stored: a value or an array per column of docs/store.md."""


class Codec:
    """Examples of one model to columns and back.

    Keys, ids, coordinates and cross-entropies come back exactly; log-probabilities and log of the tail within
    :meth:`error_bound`, at most ``max_error`` nats: half of it rounding, half normalisation, as decoded entries and
    tail sum to 1 (docs/store.md). A tail of 0 stays 0. Entries come back by falling decoded probability, equal ones by
    rising id. ``max_error=0``: float32, neither rounded further nor normalised.

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
        if max_error != 0 and not 1e-4 <= max_error <= 1:
            raise StorageError(f"max_error is {max_error}, but has to be 0 (exact) or between 0.0001 and 1 nats")
        self.vocabulary, self.top_k, self.max_error, self.exact = vocabulary, top_k, max_error, max_error == 0
        self._grid = ExactGrid() if self.exact else Grid(max_error)

    def error_bound(self, logprobs: FloatArray) -> FloatArray:
        """How far a decoded log-probability can be from the one given, nats: float64, shaped like ``logprobs``.

        Of rows whose given mass is not 1, besides the logarithm of that mass.
        """
        return self._grid.rounding(np.asarray(logprobs, np.float64)) + self.max_error / 2

    def encode(self, row: CapturedRow) -> Columns:
        """The columns of a row. Raises StorageError naming the row and what cannot be stored."""
        try:
            key_bytes(row.tokens.key)
            return self._places(row) | self._entries(row)
        except StorageError as error:
            raise StorageError(f"row {row.tokens.key}: {error}") from error

    def decode(self, columns: Columns) -> CapturedRow:
        """The row of its columns, as wide as the most entries of any label. Raises StorageError for other columns."""
        try:
            return self._decode(columns)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise StorageError(f"its columns do not fit together: {error}") from error

    def _places(self, row: CapturedRow) -> Columns:
        tokens = row.tokens
        T = len(tokens.ids)
        for name in ("message", "part", "ends", "lows", "labels"):
            if np.shape(getattr(tokens, name)) != (T,):
                raise StorageError(f"{T} ids, but {name} of shape {np.shape(getattr(tokens, name))}")
        if not math.isfinite(row.cross_entropy):
            raise StorageError(f"its cross-entropy is {row.cross_entropy}")
        ids = np.asarray(tokens.ids)
        if T and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            wrong = ids.max() if ids.max() >= self.vocabulary else ids.min()
            raise StorageError(f"token id {wrong} is outside the vocabulary of {self.vocabulary}")
        ends, lows = np.asarray(tokens.ends, np.int64), np.asarray(tokens.lows, np.int64)
        return {
            "key": tokens.key,
            "dataset": row.dataset,
            "cross_entropy": float(row.cross_entropy),
            "tokens": T,
            "labels": int(np.count_nonzero(tokens.labels)),
            "bytes": tokens.label_bytes,
            "token_ids": ids.astype(np.int32),
            "message": np.asarray(tokens.message, np.int32),
            "part": np.asarray(tokens.part, np.int8),
            "ends": ends,
            "lows": lows[:0] if np.array_equal(ends, lows) else lows,
            "is_label": np.asarray(tokens.labels, bool),
        }

    def _entries(self, row: CapturedRow) -> Columns:
        """The entries of each label by rising id, tails, and the labels' own log-probabilities."""
        n = int(np.count_nonzero(row.tokens.labels))
        rows = row.rows
        if rows.ids.shape != rows.logprobs.shape or not len(rows.ids) == len(rows.tail) == len(row.actual) == n:
            raise StorageError(
                f"{n} labels, but ids {rows.ids.shape}, logprobs {rows.logprobs.shape}, tail {rows.tail.shape} "
                f"and actual {row.actual.shape}"
            )
        ids = np.asarray(rows.ids, np.int64)
        logprobs, tail = np.asarray(rows.logprobs, np.float64), np.asarray(rows.tail, np.float64)
        actual = np.asarray(row.actual, np.float64)
        used = (ids >= 0) & (logprobs != -np.inf)
        counts = used.sum(axis=1)
        order = np.argsort(np.where(used, ids, self.vocabulary), axis=1)[:, : int(counts.max(initial=0))]
        used = np.arange(order.shape[1]) < counts[:, None]
        ids = np.where(used, np.take_along_axis(ids, order, 1), self.vocabulary)
        logprobs = np.where(used, np.take_along_axis(logprobs, order, 1), -np.inf)
        gaps = np.diff(ids, axis=1, prepend=-1) - 1
        if (highest := int(np.max(ids, where=used, initial=0))) >= self.vocabulary:
            raise StorageError(f"token id {highest} is outside the vocabulary of {self.vocabulary}")
        if ids.shape[1] > self.top_k:
            raise StorageError(f"{ids.shape[1]} entries for one label, more than top_k {self.top_k}")
        if len(repeated := np.argwhere(used & (gaps < 0))):
            label, at = repeated[0].tolist()
            raise StorageError(f"label {label} has the token id {ids[label, at]} twice")
        _check_values(logprobs, tail, np.concatenate([logprobs[used], actual]))
        found: Columns = {"entries": counts.astype(np.int32), "id_gaps": gaps[used].astype(np.int32)}
        if self.exact:
            return found | {
                "logprobs": np.minimum(logprobs[used], 0).astype(np.float32),
                "tail": tail.astype(np.float32),
                "label_logprob": np.minimum(actual, 0).astype(np.float32),
            }
        # The logarithm of a tail of 0 has no depth: it is kept as depth -1.
        tails = np.where(tail > 0, self._grid.depths(np.log(np.where(tail > 0, tail, 1))), -1)
        return found | {
            "depths": self._grid.depths(logprobs[used]).astype(np.int32),
            "tail_depth": tails.astype(np.int32),
            "label_depth": self._grid.depths(actual).astype(np.int32),
        }

    def _decode(self, columns: Columns) -> CapturedRow:
        is_label, ids = columns["is_label"], columns["token_ids"].astype(np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise StorageError(f"its token ids are outside the vocabulary of {self.vocabulary}")
        part = columns["part"].astype(np.int64)
        if len(part) and not 0 <= part.min() <= part.max() <= Part.END:
            raise StorageError(f"a token's part is {int(part.max())}")
        ends = columns["ends"]
        lows = columns["lows"] if len(columns["lows"]) else ends
        message = columns["message"].astype(np.int64)
        tokens = TokenizedRow(columns["key"], ids, message, part, ends, lows, is_label)
        if not all(len(column) == len(ids) for column in (message, part, ends, lows, is_label)):
            raise StorageError("its columns have different numbers of tokens")
        rows, actual = self._decode_entries(columns, ids[is_label])
        return CapturedRow(tokens, columns["dataset"], rows, actual, columns["cross_entropy"])

    def _decode_entries(self, columns: Columns, labels: IntArray) -> tuple[TopK, FloatArray]:
        """Rows of n labels with the ids ``labels`` [n], and their own log-probabilities [n]."""
        counts = columns["entries"]
        n, most = len(counts), int(counts.max(initial=0))
        if n != len(labels) or counts.min(initial=0) < 0 or most > self.top_k:
            raise StorageError(f"{n} labels with up to {most} entries, not {len(labels)} with up to {self.top_k}")
        if self.exact:
            depths = self._grid.depths(columns["logprobs"].astype(np.float64))
            own = self._grid.depths(columns["label_logprob"].astype(np.float64))
        else:
            depths, own = columns["depths"].astype(np.int64), columns["label_depth"].astype(np.int64)
        used = np.arange(most) < counts[:, None]
        ids = np.cumsum(_padded(columns["id_gaps"].astype(np.int64) + 1, used), axis=1) - 1
        keys = (_padded(depths, used) << 32) | ids  # by falling probability, then by rising id
        full = bool(used.all())
        if not full:
            keys[~used] = np.iinfo(np.int64).max
        keys.sort(axis=1)
        ids, depths = keys & 0xFFFFFFFF, keys >> 32
        if not full:
            ids, depths = np.where(used, ids, -1), np.where(used, depths, 0)
        if ids.max(initial=-1) >= self.vocabulary or min(depths.min(initial=0), own.min(initial=0)) < 0:
            raise StorageError(f"its entries are not of a vocabulary of {self.vocabulary}")
        logprobs, actual = self._grid.logprobs(depths), self._grid.logprobs(own)
        if not full:
            logprobs[~used] = -np.inf
        if self.exact:
            return TopK(ids, logprobs, columns["tail"].astype(np.float64)), actual
        tails = columns["tail_depth"]
        tail = np.where(tails < 0, 0.0, np.exp(self._grid.logprobs(np.maximum(tails, 0))))
        total = np.exp(logprobs).sum(axis=1) + tail
        if len(total) and not total.min() > 0:
            raise StorageError(f"label {int(total.argmin())} has no mass")
        shift = np.log(total)
        # A label that is an entry with the same value takes the entry's, which is normalised; another keeps its own.
        listed = ((ids == labels[:, None]) & (depths == own[:, None])).any(axis=1)
        rows = TopK(ids, logprobs - shift[:, None], tail / total)
        return rows, actual - np.where(listed, shift, 0.0)


def _padded(flat: IntArray, used: BoolArray) -> IntArray:
    """The entries of n labels, one after the other, as int64 [n, most], 0 where not ``used``."""
    if len(flat) == used.size:
        return flat.reshape(used.shape)
    wide = np.zeros(used.shape, np.int64)
    wide[used] = flat
    return wide


def _check_values(logprobs: FloatArray, tail: FloatArray, values: FloatArray) -> None:
    """logprobs: [n, most], -inf where there is no entry. values: all that are to be finite."""
    mass = np.exp(logprobs).sum(axis=1) + tail
    wrong = ~(np.abs(mass - 1) <= MASS_TOLERANCE) | ~(tail >= 0)
    if wrong.any():
        label = int(wrong.argmax())
        raise StorageError(
            f"label {label} has no distribution: its entries and its tail of {tail[label]:.6g} sum to "
            f"{mass[label]:.6g}, not 1"
        )
    unfit = values[~((values >= LOWEST) & (values <= MASS_TOLERANCE))]
    if len(unfit):
        raise StorageError(f"a log-probability is {unfit[0]:.6g}, but finite ones from {LOWEST:g} to 0 are stored")
