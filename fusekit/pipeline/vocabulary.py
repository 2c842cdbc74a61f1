"""The vocabulary map of a pair, made when it is aligned, and read when it is distilled."""

from __future__ import annotations

from fusekit.alignment.vocabulary_map import VocabularyMap
from fusekit.distillation.vocabulary_maps import SAMPLED, make_map, roles_of
from fusekit.pipeline.layout import PIVOT
from fusekit.pipeline.stages import Context, alignment_of, ids_of
from fusekit.types import Row


def vocabulary_map(context: Context, source: str, rows: list[Row]) -> VocabularyMap | None:
    """Of a source into the pivot's vocabulary; None where the recipe wants none. It needs no captures.

    Raises AlignmentError, DataError.
    """
    method = alignment_of(context, source).map_method
    if method is None:
        return None
    pivot, theirs = context.readers.reader(PIVOT), context.readers.reader(source)
    sample = rows[:SAMPLED]
    return make_map(
        method,
        pivot.tokenizer,
        theirs.tokenizer,
        rows,
        pivot_roles=roles_of((row, pivot.tokenize(row)) for row in sample),
        source_roles=roles_of((row, theirs.tokenize(row)) for row in sample),
        size=ids_of(context, source),
    )
