"""Alignments of real tokenizers against what decoding prefixes token by token says."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from fusekit.alignment import vocabulary_surfaces
from fusekit.alignment.alignment import align, align_tokens
from fusekit.alignment.ends import tokenize
from fusekit.alignment.surfaces import Kind
from fusekit.errors import AlignmentError
from tests.alignment import reference
from tests.alignment.texts import EDGE_CASES
from tests.alignment.tokenizers import MADE, REAL, byte_fallback, load

PAIRS = list(itertools.product(REAL, repeat=2))


@functools.cache
def true_ends(name: str, text: str) -> tuple[int | None, ...]:
    return tuple(reference.original_ends(load(name), text))


def check(text: str, pivot: str, source: str) -> None:
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
    check_groups(alignment)


def check_groups(alignment) -> None:
    groups = alignment.groups
    assert [i for p, _ in groups for i in range(p.start, p.stop)] == list(range(len(alignment.pivot_ids)))
    assert [j for _, s in groups for j in range(s.start, s.stop)] == list(range(len(alignment.source_ids)))
    for p, s in groups:
        assert alignment.source_at[p.stop - 1] == s.stop - 1
        assert (alignment.source_at[p.start : p.stop - 1] == -1).all()


@pytest.mark.parametrize(("pivot", "source"), PAIRS, ids="-".join)
def test_edge_cases_link_exactly_where_the_same_text_is_consumed(pivot, source):
    for text in EDGE_CASES.values():
        check(text, pivot, source)


@pytest.mark.parametrize(("pivot", "source"), [("mistral", "qwen"), ("anthropic", "mistral"), ("llama3", "anthropic")])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_random_unicode(pivot, source, text):
    if any(text_is_newer_than_a_table(c) for c in text):
        return
    check(text, pivot, source)


def text_is_newer_than_a_table(character: str) -> bool:
    """Python's and the tokenizers' tables of Unicode are of different versions; unassigned characters may differ."""
    import unicodedata

    return unicodedata.category(character) in ("Cn", "Co")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(parts=st.lists(st.sampled_from([*EDGE_CASES.values(), " ", "\n", "▁", "<s>", "é", "e\u0301", "🤖"]), max_size=4))
def test_joined_edge_cases(parts):
    text = "".join(parts)
    for pivot, source in (("qwen", "mistral"), ("tekken", "anthropic"), ("deepseek", "cl100k")):
        check(text, pivot, source)


@pytest.mark.parametrize("name", [*REAL, *MADE])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_ends_are_monotone_and_cover_any_text(name, text):
    tokens = tokenize(text, load(name))
    assert (np.diff(tokens.ends) >= 0).all()
    assert not len(tokens) or tokens.ends[-1] == len(text.encode())
    assert len(tokens) or not text.strip() or name == "bert"
    certain = np.flatnonzero(tokens.lows <= tokens.ends)
    assert (np.diff(tokens.lows[certain]) >= 0).all()


@pytest.mark.parametrize("name", [*REAL, "legacy_llama", "lowercase"])
def test_surfaces_concatenate_to_what_the_tokenizer_decodes(name):
    tokenizer = load(name)
    surfaces = vocabulary_surfaces(tokenizer)
    for text in EDGE_CASES.values():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        spelled = b"".join(surfaces.of[i] for i in ids).decode(errors="replace")
        assert spelled in (decoded, " " + decoded)


def test_empty_text():
    alignment = align("", load("mistral"), load("qwen"))
    assert alignment.pivot_ids.shape == alignment.source_at.shape == (0,)
    assert alignment.groups == []
    assert alignment.linked_share == 0.0


def test_a_hundred_thousand_characters():
    text = ("Zażółć gęślą jaźń 🤖 日本語 def f(x):\n\treturn x\n" * 2500)[:100_000]
    alignment = align(text, load("mistral"), load("deepseek"))
    ends = [
        np.cumsum([len(reference.token_bytes(load(name), i)) for i in ids.tolist()])
        for name, ids in (("mistral", alignment.pivot_ids), ("deepseek", alignment.source_ids))
    ]
    assert (alignment.pivot_ends == ends[0] - 1).all()  # the dummy space
    assert (alignment.source_ends == ends[1]).all()
    both = sorted(set(ends[0] - 1) & set(ends[1]))
    assert alignment.pivot_ends[alignment.source_at >= 0].tolist() == both


@pytest.mark.parametrize("name", [*REAL, *MADE])
def test_a_tokenizer_links_to_itself_everywhere(name):
    for text in EDGE_CASES.values():
        alignment = align(text, load(name), load(name))
        certain = alignment.pivot.lows <= alignment.pivot.ends
        last = np.append(alignment.pivot.ends[1:] != alignment.pivot.ends[:-1], True)[: len(certain)]
        expected = np.where(certain & last, np.arange(len(certain)), -1)
        wide = np.flatnonzero(certain & last)
        assert alignment.source_at[wide].tolist() == expected[wide].tolist()
        assert (alignment.source_at[~certain] == -1).all()


def test_wordpiece_boundaries_match_anywhere_in_dropped_text():
    text = "The  quick\tfox"
    alignment = align(text, load("bert"), load("qwen"))
    pivot = load("bert").convert_ids_to_tokens(alignment.pivot_ids.tolist())
    assert pivot == ["the", "quick", "fox"]
    assert alignment.pivot_ends.tolist() == [5, 11, 14]
    source = load("qwen").convert_ids_to_tokens(alignment.source_ids.tolist())
    assert source == ["The", "Ġ", "Ġquick", "ĉ", "fox"]
    assert alignment.source_at.tolist() == [1, 3, 4]
    back = align(text, load("qwen"), load("bert"))
    assert back.source_at.tolist() == [-1, 0, -1, 1, 2]


@pytest.mark.parametrize(
    ("name", "text", "strings", "lows", "ends"),
    [
        ("bert", "Café\x00 dog", "cafe dog", [5, 10], [7, 10]),  # controls and accents are dropped
        ("unigram", "日本 fox", "▁ <unk> ▁fox", [0, 6, 10], [0, 6, 10]),  # unknown: where its text ends
        ("lowercase", "The OX É", "the Ġ ox Ġ e Ìģ", [3, 4, 6, 7, 10, 9], [3, 4, 6, 7, 9, 9]),  # blurs inside É alone
        ("mistral", "日本", "▁ 日 本", [0, 3, 6], [0, 3, 6]),  # a dummy space has no width
        ("mistral", " 日本", "▁ 日 本", [1, 4, 7], [1, 4, 7]),  # and is not assumed
    ],
)
def test_ends_by_hand(name, text, strings, lows, ends):
    tokens = tokenize(text, load(name))
    assert load(name).convert_ids_to_tokens(tokens.ids.tolist()) == strings.split()
    assert (tokens.lows.tolist(), tokens.ends.tolist()) == (lows, ends)
    assert tokens.exact == (lows == ends)


def test_composed_characters_are_one_place():
    """Of ``e`` and an accent NFC makes one character: a token that ends between them has no counterpart."""
    alignment = align("cafe\u0301s", load("mistral"), load("qwen"))
    assert load("mistral").convert_ids_to_tokens(alignment.pivot_ids.tolist()) == ["▁ca", "fe", "\u0301", "s"]
    assert alignment.pivot_ends.tolist() == [2, 4, 6, 7]
    assert alignment.source_ends.tolist() == [3, 7]
    assert alignment.source_at.tolist() == [-1, -1, -1, 1]


def test_a_dummy_space_that_a_normaliser_prepends_comes_before_a_space_too():
    legacy = tokenize(" fox", load("legacy_llama"))
    assert "".join(load("legacy_llama").convert_ids_to_tokens(legacy.ids.tolist())) == "▁▁fox"
    assert legacy.ends[-1] == 4


def test_special_tokens_pair_by_place():
    """BOS on one side only; the end of the turn is another string on each side."""
    text = "Hello 世界"
    mistral, qwen = load("mistral"), load("qwen")
    pivot = tokenize(text, mistral).opened(1).closed(2)
    source = tokenize(text, qwen).closed(qwen.convert_tokens_to_ids("<|im_end|>"))
    alignment = align_tokens(text, pivot, source)
    n, m = len(alignment.pivot_ids), len(alignment.source_ids)
    assert alignment.source_at[0] == -1  # nothing ends at 0 on the source's side
    assert alignment.source_at[n - 1] == m - 1
    assert alignment.source_at[n - 2] == m - 2  # the last token of text keeps its own link
    both = align_tokens(text, pivot, source.opened(5))
    assert both.source_at[0] == 0


def test_a_seam_that_bpe_would_merge_across():
    """The content's first token is another one behind a template, yet it ends at the same content byte."""
    seam, content = "Assistant:", " Hi there"
    alone = tokenize(content, load("llama3"))
    inside = tokenize(seam + content, load("mistral"))
    content_ends = inside.ends[inside.ends > len(seam)] - len(seam)
    assert alone.ends.tolist() == content_ends.tolist()


def test_settings_of_a_tokenizer_are_neither_obeyed_nor_changed():
    backend = load("deepseek").backend_tokenizer
    text = "one two three four five six"
    free = tokenize(text, backend)
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    try:
        assert tokenize(text, backend).ids.tolist() == free.ids.tolist()
        assert backend.truncation["max_length"] == 3
        assert backend.padding["length"] == 64
    finally:
        backend.no_truncation()
        backend.no_padding()


def test_tokens_added_later_are_seen():
    from tests.alignment.tokenizers import legacy_llama

    tokenizer = legacy_llama()
    assert len(vocabulary_surfaces(tokenizer)) == 32000
    tokenizer.add_tokens(["zyxwv"])
    tokens = tokenize("a zyxwv b", tokenizer)
    assert 32000 in tokens.ids
    assert tokens.ends[-1] == 9


def test_added_tokens_that_swallow_the_space_around_them():
    from tokenizers import AddedToken

    from tests.alignment.tokenizers import deepseek

    tokenizer = deepseek()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    tokens = tokenize("one <mask>  two", tokenizer)
    strings = tokenizer.convert_ids_to_tokens(tokens.ids.tolist())
    assert strings == ["one", "<mask>", "two"]
    assert tokens.ends.tolist() == [3, 12, 15]


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_of_byte_fallback_are_bytes_but_where_the_text_spells_them_out(special):
    tokenizer = byte_fallback(added=special)
    surfaces = vocabulary_surfaces(tokenizer)
    id_ = tokenizer.token_to_id("<0xC3>")
    assert surfaces.of[id_] == b"\xc3"
    assert surfaces.kinds[id_] == Kind.BYTE
    assert tokenize("naïve,", tokenizer).ends.tolist() == [2, 3, 4, 5, 6, 7]
    spelled = tokenize("na<0xC3>ï<0x61>a", tokenizer)
    assert spelled.ends.tolist() == [2, 8, 9, 10, 16, 17]
    assert spelled.exact
    alignment = align("na<0xC3>ï", tokenizer, load("qwen"))
    assert alignment.source_at[-1] == len(alignment.source_ids) - 1


PREPEND, LOWER, REPLACE = normalizers.Prepend("▁"), normalizers.Lowercase(), normalizers.Replace(" ", "▁")


@pytest.mark.parametrize(
    ("steps", "text", "ends"),
    [
        ([PREPEND, LOWER], "hH \u0301", [0, 1, 2, 3, 4, 5]),
        ([LOWER, PREPEND], "hH \u0301", [0, 1, 2, 3, 4, 5]),
        ([PREPEND, REPLACE], "▁na\u0301", [3, 5, 6, 7]),
        ([PREPEND, REPLACE, normalizers.NFC()], " a b", [1, 2, 3, 4]),
        ([PREPEND, normalizers.NFD()], "má", [0, 1, 3, 3, 3]),
        ([normalizers.Strip(), PREPEND], "  hi ", [2, 3, 5]),
        ([PREPEND, normalizers.Strip()], "  hi ", [0, 1, 2, 3, 5]),
        ([PREPEND, LOWER], "A<s> B", [0, 1, 4, 4, 5, 6]),
        ([PREPEND, LOWER], "", []),
    ],
)
def test_a_prepended_space_is_a_dummy_beside_any_normaliser(steps, text, ends):
    tokens = tokenize(text, byte_fallback(*steps))
    assert tokens.ends.tolist() == ends


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("aB n▁é\u0301ｆ<s>"), max_size=12))
@pytest.mark.parametrize("step", [LOWER, REPLACE, normalizers.NFC(), normalizers.NFD(), normalizers.NFKC()])
def test_a_prepended_space_takes_no_end_away(step, text):
    """Every end is where it is without the dummy space, for the same tokens."""
    bare, prepended = tokenize(text, byte_fallback(step)), tokenize(text, byte_fallback(PREPEND, step))
    assert (np.diff(prepended.ends) >= 0).all()
    certain = {name: {int(e) for e in t.ends[t.lows <= t.ends]} for name, t in (("bare", bare), ("with", prepended))}
    if "<s>" not in text:
        assert certain["bare"] - certain["with"] <= {1, 3}  # of spaces that merge with the dummy one in front
        assert certain["with"] - certain["bare"] <= {0} | set(range(len(text.encode())))
    assert not text or max(certain["with"]) == len(text.encode())


def test_print_shows_both_tokenisations():
    shown = str(align("Hello wörld 🤖", load("mistral"), load("qwen")))
    lines = shown.splitlines()
    assert lines[0].startswith("span: ")
    assert "Hello│" in lines[2]
    assert lines[2].startswith("pivot ")
    assert lines[3].startswith("source")
    assert "\\xf0" in shown


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: align(b"bytes", load("mistral"), load("qwen")), ["bytes", "not str"]),
        (lambda: align("a\ud800b", load("mistral"), load("qwen")), ["lone surrogate", "character 1"]),
        (lambda: align("a", load("mistral"), load("qwen"), method="dwt"), ["'dwt'", "dtw", "span"]),
        (lambda: align("a", "mistral", load("qwen")), ["str", "AutoTokenizer"]),
        (lambda: align("a", object(), load("qwen")), ["object", "AutoTokenizer"]),
    ],
)
def test_what_cannot_be_aligned_is_refused(call, words):
    with pytest.raises(AlignmentError) as error:
        call()
    assert all(word in str(error.value) for word in words)
