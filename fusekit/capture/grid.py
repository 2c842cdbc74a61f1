"""Log-probabilities as whole numbers: how deep below certainty, on a scale that is finer where it matters."""

from __future__ import annotations

import numpy as np

from fusekit.errors import StorageError
from fusekit.types import FloatArray, IntArray

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
        """The largest error that rounding makes at these log-probabilities, at most half of ``max_error``."""
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


def grid(max_error: float) -> Grid:
    """The grid that keeps an error bound: of steps ``max_error``, exact for 0. Raises StorageError for a bound outside
    [0.0001, 1] that is not 0."""
    if max_error == 0:
        return ExactGrid()
    if not 1e-4 <= max_error <= 1:
        raise StorageError(f"max_error is {max_error}, but has to be 0 (exact) or between 0.0001 and 1 nats")
    return Grid(max_error)
