"""Align two tokenisations of one text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fusekit.alignment import dtw, spans
from fusekit.alignment.ends import tokenize_with
from fusekit.alignment.show import cells, side_by_side
from fusekit.alignment.surfaces import Surfaces, vocabulary_surfaces
from fusekit.errors import AlignmentError
from fusekit.types import IntArray, TokenizedText


@dataclass(frozen=True, eq=False)
class TokenAlignment:
    """Two tokenisations of one text and which of their tokens end at the same place.

    Attributes:
        text: the text.
        pivot, source: the tokens with their byte ends as intervals; the arrays below are taken from them.
        source_at: int64 [n], the source position that has consumed the same text as each pivot position, or -1. The
            last such source token; of several pivot tokens with one end only the last has one.
        method: ``span`` (exact) or ``dtw`` (the papers').
        path: for ``dtw`` the source positions ``[first, stop)`` that the path matches with each pivot position.
    """

    text: str
    pivot: TokenizedText
    source: TokenizedText
    source_at: IntArray
    method: str
    path: tuple[IntArray, IntArray] | None = field(default=None, repr=False)

    @property
    def pivot_ids(self) -> IntArray:
        """int64 [n]."""
        return self.pivot.ids

    @property
    def source_ids(self) -> IntArray:
        """int64 [m]."""
        return self.source.ids

    @property
    def pivot_ends(self) -> IntArray:
        """int64 [n]: bytes of ``text.encode("utf-8")`` consumed at each pivot token; the last is all of them."""
        return self.pivot.ends

    @property
    def source_ends(self) -> IntArray:
        """int64 [m], as ``pivot_ends``."""
        return self.source.ends

    @cached_property
    def matched(self) -> tuple[IntArray, IntArray]:
        """A(i) of the papers: the source positions ``[first, stop)`` of each pivot position, int64 [n] twice.

        For ``span`` the source tokens that share bytes with the pivot token.
        """
        return self.path if self.path is not None else spans.overlaps(self.pivot, self.source, self.source_at)

    @cached_property
    def groups(self) -> list[tuple[slice, slice]]:
        """The 1-1, 1-n, n-1 and m-n groups between common ends: ``(pivot slice, source slice)`` each, in order."""
        return spans.groups(self.source_at, len(self.source))

    @property
    def linked_share(self) -> float:
        """Share of pivot positions that are linked; 0 for an empty text."""
        return float(np.mean(self.source_at >= 0)) if len(self.source_at) else 0.0

    def __str__(self) -> str:
        """Both tokenisations over the text: a column per group, ``·`` between the tokens of one group."""
        head = (
            f"{self.method}: {len(self.pivot)} pivot and {len(self.source)} source tokens, "
            f"{int((self.source_at >= 0).sum())} linked, {len(self.groups)} groups"
        )
        return head + "\n" + side_by_side(cells(self), width=100)

    def __repr__(self) -> str:
        return f"TokenAlignment({self.method}, {len(self.pivot)} x {len(self.source)}, {self.linked_share:.3f} linked)"


def align(text: str, pivot_tokenizer: Any, source_tokenizer: Any, method: str = "span") -> TokenAlignment:
    """Align the tokens of two tokenizers over one text. No special tokens are added.

    Args:
        text: the text, as the user wrote it.
        pivot_tokenizer: of ``transformers`` or ``tokenizers``; any kind whose tokens' bytes can be known.
        source_tokenizer: likewise.
        method: ``span``: by equal ends in the text's bytes, exact, linear in time. ``dtw``: dynamic time warping over
            the token strings with a Levenshtein cost, as FuseLLM (arXiv 2401.10491) and FuseChat (arXiv 2408.07990) do;
            quadratic, and wrong for a few percent of the tokens, for fidelity studies.

    Returns:
        A :class:`TokenAlignment`; ``print`` it to see both tokenisations.

    Raises:
        AlignmentError: a tokenizer cannot be handled exactly (with its name and the reason), the text cannot be
            encoded, or the method is unknown.
    """
    if method not in METHODS:
        raise AlignmentError(f"unknown alignment method {method!r}: there are {', '.join(sorted(METHODS))}")
    pivot_surfaces, source_surfaces = vocabulary_surfaces(pivot_tokenizer), vocabulary_surfaces(source_tokenizer)
    pivot, source = tokenize_with(text, pivot_surfaces), tokenize_with(text, source_surfaces)
    source_at, path = METHODS[method](pivot, source, pivot_surfaces, source_surfaces)
    return TokenAlignment(text, pivot, source, source_at, method, path)


def align_tokens(text: str, pivot: TokenizedText, source: TokenizedText) -> TokenAlignment:
    """Align tokens whose ends are known, by equal ends: the exact method of :func:`align`.

    For tokens with special ones around the text: ``tokenize(text, tokenizer).opened(bos_id).closed(end_of_turn_id)``.
    They pair by their place, not by their strings.
    """
    return TokenAlignment(text, pivot, source, spans.link(pivot, source), "span")


_Found = tuple[IntArray, tuple[IntArray, IntArray] | None]


def _by_spans(pivot: TokenizedText, source: TokenizedText, *_: Surfaces) -> _Found:
    return spans.link(pivot, source), None


def _by_warping(pivot: TokenizedText, source: TokenizedText, p: Surfaces, s: Surfaces) -> _Found:
    n, m = len(pivot), len(source)
    if not n or not m:
        nothing = np.zeros(n, np.int64)
        return nothing - 1, (nothing, nothing)
    if n * m > dtw.MAX_CELLS:
        raise AlignmentError(
            f"dtw of {n} pivot by {m} source tokens needs a table of {n * m:,} cells, more than {dtw.MAX_CELLS:,}: "
            "cut the text, or use method='span'"
        )
    costs = dtw.cost_matrix([p.of[i] for i in pivot.ids.tolist()], [s.of[i] for i in source.ids.tolist()])
    matched = dtw.matches_of_path(*dtw.warp(costs), n)
    return dtw.links_of_path(*matched), matched


METHODS: dict[str, Callable[..., _Found]] = {
    "span": _by_spans,
    "dtw": _by_warping,
}
