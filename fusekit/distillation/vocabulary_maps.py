"""Vocabulary maps of a run: made from the rows that it trains on, and kept as a file beside the alignment's quality."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from scipy import sparse

from fusekit.alignment.surfaces import vocabulary_surfaces
from fusekit.alignment.vocabulary_map import VocabularyMap, build_vocabulary_map, count_mappings
from fusekit.errors import StorageError
from fusekit.types import Part, Row, TokenizedRow

NAME = "vocabulary_map.npz"
SAMPLED = 16
"""Rows that tell how a model ends a turn."""
COUNTED_TEXTS = 10_000  # of which the statistics of an MS map are made

Sample = Sequence[tuple[Row, TokenizedRow]]


def _roles(sample: Sample) -> dict[str, int]:
    """The tokens that end a turn and a text, as the model's template wrote them; a template may be foreign."""
    found: dict[str, Counter[int]] = {"end_of_turn": Counter(), "eos": Counter()}
    for row, tokens in sample:
        ending = (tokens.part == Part.END) & tokens.labels
        found["eos" if row.is_text else "end_of_turn"].update(tokens.ids[ending].tolist())
    return {role: ids.most_common(1)[0][0] for role, ids in found.items() if ids}


def make_map(
    method: str, pivot: Any, source: Any, rows: Sequence[Row], *, samples: tuple[Sample, Sample], size: int
) -> VocabularyMap:
    """The map of a ``method`` that a run trains with, of two tokenizers.

    rows: of the run; the statistics of ``ms`` are counted over their first texts. samples: some of them as each model
    reads them. size: ids of the source's model, which may be more than its tokenizer has.
    """
    statistics = None
    if method in ("ms", "ms_released"):
        texts = islice((message.content for row in rows for message in row.messages if message.content), COUNTED_TEXTS)
        statistics = count_mappings(texts, pivot, source)
    return build_vocabulary_map(
        pivot,
        source,
        method=method,
        statistics=statistics,
        pivot_roles=_roles(samples[0]),
        source_roles=_roles(samples[1]),
        source_size=max(size, len(vocabulary_surfaces(source))),
        cache=True,
    )


def map_hash(made: VocabularyMap) -> str:
    """xxh3-128 of a map's method, vocabularies and matrix."""
    matrix = made.matrix
    head = [made.method, made.pivot.fingerprint, made.source.fingerprint, repr(tuple(map(int, matrix.shape)))]
    digest = xxhash.xxh3_128("\0".join(head).encode())
    for array, dtype in ((matrix.indptr, np.int64), (matrix.indices, np.int64), (matrix.data, np.float64)):
        digest.update(np.ascontiguousarray(array, dtype).tobytes())
    return digest.hexdigest()


def write_map(folder: Path, made: VocabularyMap) -> None:
    """Write ``vocabulary_map.npz``: a matrix for ``scipy.sparse.load_npz``, and what it was made from."""
    matrix = made.matrix
    with (folder / NAME).open("wb") as file:
        np.savez(
            file,
            format=np.array(b"csr"),
            shape=np.array(matrix.shape, np.int64),
            data=matrix.data,
            indices=matrix.indices,
            indptr=matrix.indptr,
            method=np.array(made.method),
            xxh3=np.array(map_hash(made)),
        )


def read_map(folder: Path, method: str, pivot: Any, source: Any) -> VocabularyMap:
    """The map that :func:`write_map` wrote, of these tokenizers by this method. Raises StorageError where it is not."""
    path = folder / NAME
    redo = f"remove {folder}, and the stage `align` makes it again"
    try:
        with np.load(path, allow_pickle=False) as stored:
            shape = tuple(stored["shape"].tolist())
            matrix = sparse.csr_matrix((stored["data"], stored["indices"], stored["indptr"]), shape=shape)
            known, named = str(stored["xxh3"]), str(stored["method"])
        made = VocabularyMap(matrix, named, vocabulary_surfaces(pivot), vocabulary_surfaces(source))
    except FileNotFoundError:
        raise StorageError(f"{path} is not there: the stage `align` comes first") from None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path} is damaged: {error}; {redo}") from error
    if named != method:
        raise StorageError(f"{path} is a map by {named!r}, but the run asks for {method!r}: {redo}")
    if map_hash(made) != known:
        raise StorageError(f"{path} is damaged, or of other tokenizers than the run's: {redo}")
    return made
