"""Alignments of real tokenizers against what decoding prefixes token by token says; time warping against its table."""

from __future__ import annotations

import functools
import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusekit.alignment import align, align_tokens, tokenize, vocabulary_surfaces
from fusekit.alignment.papers import cost_matrix, warp
from fusekit.errors import AlignmentError
from tests.alignment import reference
from tests.alignment.tokenizers import EDGE_CASES, MADE, REAL, load
from tests.helpers import refused

# By default every tokenizer as pivot and as source, with two others.
SOME = [(a, list(REAL)[(n + step) % len(REAL)]) for n, a in enumerate(REAL) for step in (1, 3)]
PAIRS = [
    pytest.param(*pair, marks=[] if pair in SOME else pytest.mark.full) for pair in itertools.product(REAL, repeat=2)
]


@functools.cache
def true_ends(name: str, text: str) -> tuple[int | None, ...]:
    return tuple(reference.original_ends(load(name), text))


def assert_links(text: str, pivot: str, source: str) -> None:
    alignment = align(text, load(pivot), load(source))
    for name, tokens in ((pivot, alignment.pivot), (source, alignment.source)):
        assert tokens.ids.tolist() == load(name)(text, add_special_tokens=False)["input_ids"]
        ends = tokens.ends
        assert (np.diff(ends) >= 0).all()
        assert not len(ends) or ends[-1] == len(text.encode())
        certain = tokens.lows <= ends
        assert [e if c else None for e, c in zip(ends.tolist(), certain, strict=True)] == list(true_ends(name, text))
    expected = reference.links(list(true_ends(pivot, text)), list(true_ends(source, text)))
    assert alignment.source_at.tolist() == expected
    groups = alignment.groups
    assert [i for p, _ in groups for i in range(p.start, p.stop)] == list(range(len(alignment.pivot_ids)))
    assert [j for _, s in groups for j in range(s.start, s.stop)] == list(range(len(alignment.source_ids)))
    for p, s in groups:
        assert alignment.source_at[p.stop - 1] == s.stop - 1
        assert (alignment.source_at[p.start : p.stop - 1] == -1).all()


@pytest.mark.parametrize(("pivot", "source"), PAIRS)
def test_edge_cases_link_exactly_where_the_same_text_is_consumed(pivot, source):
    for text in EDGE_CASES.values():
        assert_links(text, pivot, source)


PARTS = st.sampled_from([*EDGE_CASES.values(), " ", "\n", "▁", "<s>", "é", "e\u0301", "🤖"])
RANDOM = ["mistral qwen", "anthropic mistral", "llama3 anthropic", "tekken anthropic", "deepseek cl100k"]


@pytest.mark.parametrize("pair", RANDOM)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(PARTS, max_size=4).map("".join))
def test_random_texts(pair, text):
    # Python's and the tokenizers' tables of Unicode are of different versions; unassigned characters may differ.
    if not any(unicodedata.category(c) in ("Cn", "Co") for c in text):
        assert_links(text, *pair.split())


@pytest.mark.parametrize("method", ["span", "dtw"])
def test_empty_text(method):
    alignment = align("", load("mistral"), load("qwen"), method)
    assert alignment.pivot_ids.shape == alignment.source_at.shape == alignment.matched[0].shape == (0,)
    assert alignment.groups == []


def test_a_hundred_thousand_characters():
    text = ("Zażółć gęślą jaźń 🤖 日本語 def f(x):\n\treturn x\n" * 2500)[:100_000]
    found = align(text, load("mistral"), load("deepseek"))
    sides = (("mistral", found.pivot_ids), ("deepseek", found.source_ids))
    ours, theirs = (np.cumsum([len(reference.token_bytes(load(name), i)) for i in ids.tolist()]) for name, ids in sides)
    ours -= 1  # the dummy space
    assert found.pivot.ends.tolist() == ours.tolist()
    assert found.source.ends.tolist() == theirs.tolist()
    assert ours[found.source_at >= 0].tolist() == sorted({*ours.tolist()} & {*theirs.tolist()})


@pytest.mark.parametrize("name", [*REAL, *MADE])
def test_a_tokenizer_links_to_itself_everywhere(name):
    for text in EDGE_CASES.values():
        alignment = align(text, load(name), load(name))
        certain = alignment.pivot.lows <= alignment.pivot.ends
        last = np.append(alignment.pivot.ends[1:] != alignment.pivot.ends[:-1], True)[: len(certain)]
        linked = np.flatnonzero(certain & last)
        assert alignment.source_at[linked].tolist() == linked.tolist()
        assert (alignment.source_at[~certain] == -1).all()


@pytest.mark.parametrize(
    ("text", "pivot", "source", "strings", "links"),
    [
        # The boundaries of WordPiece match anywhere in the text that it drops.
        ("The  quick\tfox", "bert", "qwen", "the quick fox", [1, 3, 4]),
        ("The  quick\tfox", "qwen", "bert", "The Ġ Ġquick ĉ fox", [-1, 0, -1, 1, 2]),
        # Of e and an accent NFC makes one character: a token that ends between them has no counterpart.
        ("cafe\u0301s", "mistral", "qwen", "▁ca fe \u0301 s", [-1, -1, -1, 1]),
    ],
)
def test_links_by_hand(text, pivot, source, strings, links):
    alignment = align(text, load(pivot), load(source))
    assert load(pivot).convert_ids_to_tokens(alignment.pivot_ids.tolist()) == strings.split()
    assert alignment.source_at.tolist() == links


def test_special_tokens_pair_by_place():
    """BOS on one side only; the end of the turn is another string on each side."""
    text = "Hello 世界"
    pivot, source = tokenize(text, load("mistral")).opened(1).closed(2), tokenize(text, load("qwen")).closed(151645)
    links = align_tokens(text, pivot, source).source_at.tolist()
    assert links[0] == -1  # nothing ends at 0 on the source's side
    assert links[-2:] == [len(source) - 2, len(source) - 1]  # the last token of text keeps its own link
    assert align_tokens(text, pivot, source.opened(5)).source_at[0] == 0


def test_print_shows_both_tokenisations():
    lines = str(align("Hello wörld 🤖", load("mistral"), load("qwen"))).splitlines()
    assert lines[0].startswith("span: ")
    assert "Hello│" in lines[2]
    assert [line[:6] for line in lines[1:4]] == ["text  ", "pivot ", "source"]
    assert "\\xf0" in "".join(lines)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_random_tables_with_ties(n, m, largest, seed):
    costs = np.random.default_rng(seed).integers(0, largest, (n, m))
    assert path_of(*warp(costs.astype(np.int64))) == reference.warp(costs.tolist())


def path_of(first, stop):
    return [(i, j) for i in range(len(first)) for j in range(first[i], stop[i])]


@pytest.mark.parametrize(("pivot", "source"), [("mistral", "qwen"), ("qwen", "anthropic"), ("tekken", "mistral")])
def test_real_rows(pivot, source):
    for text in EDGE_CASES.values():
        alignment = align(text, load(pivot), load(source), method="dtw")
        p = [vocabulary_surfaces(load(pivot)).of[i] for i in alignment.pivot_ids.tolist()]
        s = [vocabulary_surfaces(load(source)).of[i] for i in alignment.source_ids.tolist()]
        costs = [[reference.token_cost(a, b) for b in s] for a in p]
        assert cost_matrix(p, s).tolist() == costs
        path = reference.warp(costs)
        assert path_of(*alignment.matched) == path
        of = [[j for k, j in path if k == i] for i in range(len(p))]
        closed = [i for i in range(len(p)) if i == len(p) - 1 or not set(of[i]) & set(of[i + 1])]
        assert np.flatnonzero(alignment.source_at >= 0).tolist() == closed
        assert all(alignment.source_at[i] == of[i][-1] for i in closed)


@pytest.mark.parametrize(
    ("text", "method", "words"),
    [
        ("a\ud800b", "span", ["lone surrogate", "character 1"]),
        ("a", "dwt", ["'dwt'", "dtw", "span"]),
        ("a long enough text to align", "dtw", ["cells", "more than 10"]),
    ],
)
def test_what_cannot_be_aligned_is_refused(text, method, words, monkeypatch):
    monkeypatch.setattr("fusekit.alignment.alignment.MAX_CELLS", 10)
    with refused(AlignmentError, *words):
        align(text, load("mistral"), load("qwen"), method)
