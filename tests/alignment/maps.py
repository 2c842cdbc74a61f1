"""Vocabulary maps that several tests look at, made once per process."""

from __future__ import annotations

import functools

from fusekit.alignment.vocabulary_map import VocabularyMap, build_vocabulary_map
from tests.alignment.tokenizers import load


@functools.cache
def vocabulary_map(pivot: str, source: str, method: str = "prefix") -> VocabularyMap:
    """The map between two of the tokenizers, not kept on disk."""
    return build_vocabulary_map(load(pivot), load(source), method, cache=False)


def target(mapping: VocabularyMap, source_id: int) -> int:
    """Where a source token maps, -1 for nowhere."""
    return int(mapping.entries[0][source_id, 0])
