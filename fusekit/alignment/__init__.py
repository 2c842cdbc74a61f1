"""Exact alignment of any two tokenizers, and maps between their vocabularies.

>>> from fusekit.alignment import align, build_vocabulary_map
>>> alignment = align("Hello world", pivot_tokenizer, source_tokenizer)
>>> alignment.source_at             # per pivot position the source position with the same text consumed, or -1
>>> vocabulary_map = build_vocabulary_map(pivot_tokenizer, source_tokenizer, method="prefix")
>>> vocabulary_map.project(ids, logprobs, tail)         # top-k rows of the source in the pivot's vocabulary

Needs numpy, scipy, rapidfuzz and tokenizers; imports neither torch nor transformers.
"""

from fusekit.alignment.alignment import TokenAlignment, align, align_tokens
from fusekit.alignment.ends import TokenizedText, tokenize
from fusekit.alignment.policies import source_positions
from fusekit.alignment.projection import Rows
from fusekit.alignment.row_cases import Case, plan_rows
from fusekit.alignment.rows import AlignedRows, project_rows, project_rows_by_rule
from fusekit.alignment.statistics import MappingStatistics, count_mappings
from fusekit.alignment.surfaces import Surfaces, vocabulary_surfaces
from fusekit.alignment.vocabulary_map import VocabularyMap, build_vocabulary_map

__all__ = [
    "AlignedRows",
    "Case",
    "MappingStatistics",
    "Rows",
    "Surfaces",
    "TokenAlignment",
    "TokenizedText",
    "VocabularyMap",
    "align",
    "align_tokens",
    "build_vocabulary_map",
    "count_mappings",
    "plan_rows",
    "project_rows",
    "project_rows_by_rule",
    "source_positions",
    "tokenize",
    "vocabulary_surfaces",
]
