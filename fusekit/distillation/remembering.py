"""A vocabulary map that asks the pivot's tokenizer once about what is left of a token."""

from __future__ import annotations

import numpy as np

from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.types import IntArray

_MOST = 1 << 20  # remainders kept, some 100 MB


class RememberingMap(VocabularyMap):
    """As the map it is made from, and as exact: what a remainder maps to depends on its bytes alone.

    Where the pivot stands inside a source token, every entry that goes on the same way leaves a few bytes to be cut by
    the pivot's tokenizer; the same few come back row after row, and encoding them is a third of the alignment.
    """

    _known: dict[bytes, int]

    @classmethod
    def of(cls, vocabulary_map: VocabularyMap) -> RememberingMap:
        """A map that remembers, with nothing to remember yet."""
        if isinstance(vocabulary_map, RememberingMap):
            return vocabulary_map
        made = cls(vocabulary_map.matrix, vocabulary_map.method, vocabulary_map.pivot, vocabulary_map.source)
        made.__dict__["_known"] = {}
        return made

    def remainders(self, remains: list[bytes]) -> IntArray:
        """See :meth:`VocabularyMap.remainders`."""
        known = self._known
        new = [rest for rest in dict.fromkeys(remains) if rest not in known]
        if new:
            found = super().remainders(new).tolist()
            if len(known) + len(new) > _MOST:
                known.clear()
                new, found = list(dict.fromkeys(remains)), super().remainders(list(dict.fromkeys(remains))).tolist()
            known.update(zip(new, found, strict=True))
        return np.fromiter((known[rest] for rest in remains), np.int64, len(remains))
