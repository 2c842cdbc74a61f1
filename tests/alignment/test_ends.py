"""Where tokens end: by hand, for added tokens and normalisers, around special tokens, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from fusekit.alignment import align, tokenize, vocabulary_surfaces
from fusekit.alignment.ends import Mark, marked_ends
from fusekit.alignment.surfaces import Kind
from fusekit.errors import AlignmentError
from tests.alignment import reference
from tests.alignment.tokenizers import (
    EDGE_CASES,
    MADE,
    REAL,
    byte_fallback,
    deepseek,
    fast,
    legacy_llama,
    load,
    sharing,
)
from tests.capture.models import extended, tokenizer_for
from tests.helpers import refused


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
    if name in REAL:
        for id_ in range(0, len(surfaces), 97):
            if surfaces.kinds[id_] not in (Kind.HOLE, Kind.UNKNOWN):
                assert surfaces.of[id_] == reference.token_bytes(tokenizer, id_)


@pytest.mark.parametrize(
    ("name", "text", "strings", "lows", "ends"),
    [
        ("bert", "The  quick\tfox", "the quick fox", [3, 10, 14], [5, 11, 14]),  # dropped space: anywhere in the gap
        ("bert", "Café\x00 dog", "cafe dog", [5, 10], [7, 10]),  # controls and accents are dropped
        ("unigram", "日本 fox", "▁ <unk> ▁fox", [0, 6, 10], [0, 6, 10]),  # unknown: where its text ends
        ("lowercase", "The OX É", "the Ġ ox Ġ e Ìģ", [3, 4, 6, 7, 10, 9], [3, 4, 6, 7, 9, 9]),  # blurs inside É alone
        ("mistral", "日本", "▁ 日 本", [0, 3, 6], [0, 3, 6]),  # a dummy space has no width
        ("mistral", " 日本", "▁ 日 本", [1, 4, 7], [1, 4, 7]),  # and is not assumed
        ("legacy_llama", " fox", "▁▁ fox", [1, 4], [1, 4]),  # a normaliser prepends one before a space too
    ],
)
def test_ends_by_hand(name, text, strings, lows, ends):
    tokens = tokenize(text, load(name))
    assert load(name).convert_ids_to_tokens(tokens.ids.tolist()) == strings.split()
    assert (tokens.lows.tolist(), tokens.ends.tolist()) == (lows, ends)
    assert tokens.exact == (lows == ends)


def test_settings_of_a_tokenizer_are_neither_obeyed_nor_changed():
    backend = Tokenizer.from_str(load("lowercase").backend_tokenizer.to_str())
    text = "one two three four five six"
    free = tokenize(text, backend)
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    assert tokenize(text, backend).ids.tolist() == free.ids.tolist()
    assert backend.truncation["max_length"] == 3
    assert backend.padding["length"] == 64
    tokenizer = fast(sharing(load("qwen").backend_tokenizer), "qwen")
    ids = tokenize("a<|im_end|>", tokenizer).ids.tolist()
    tokenizer("a", split_special_tokens=True)  # transformers leaves that in the backend
    assert tokenize("a<|im_end|>", tokenizer).ids.tolist() == ids


def test_tokens_added_later_are_seen_and_may_swallow_the_space_around_them():
    tokenizer = legacy_llama()
    assert len(vocabulary_surfaces(tokenizer)) == 32000
    tokenizer.add_tokens(["zyxwv"])
    tokens = tokenize("a zyxwv b", tokenizer)
    assert 32000 in tokens.ids
    assert tokens.ends[-1] == 9
    tokenizer = deepseek()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    tokens = tokenize("one <mask>  two", tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.ids.tolist()) == ["one", "<mask>", "two"]
    assert tokens.ends.tolist() == [3, 12, 15]


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_of_byte_fallback_are_bytes_but_where_the_text_spells_them_out(special):
    tokenizer = byte_fallback(added=special)
    surfaces = vocabulary_surfaces(tokenizer)
    id_ = tokenizer.token_to_id("<0xC3>")
    assert (surfaces.of[id_], surfaces.kinds[id_]) == (b"\xc3", Kind.BYTE)
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
    assert tokenize(text, byte_fallback(*steps)).ends.tolist() == ends


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("aB n▁é\u0301ｆ<s>"), max_size=12))
@pytest.mark.parametrize("step", [LOWER, REPLACE, normalizers.NFC(), normalizers.NFD(), normalizers.NFKC()])
def test_a_prepended_space_takes_no_end_away(step, text):
    """Every end is where it is without the dummy space, for the same tokens."""
    bare, prepended = tokenize(text, byte_fallback(step)), tokenize(text, byte_fallback(PREPEND, step))
    assert (np.diff(prepended.ends) >= 0).all()
    without, certain = ({int(e) for e in t.ends[t.lows <= t.ends]} for t in (bare, prepended))
    if "<s>" not in text:
        assert without - certain <= {1, 3}  # of spaces that merge with the dummy one in front
        assert certain - without <= {0} | set(range(len(text.encode())))
    assert not text or max(certain) == len(text.encode())


MARKED = "<A>Hello  wörld 🤖 <B>  the quick<A><B>fox\n"


@pytest.mark.parametrize("base", ["mistral", "qwen", "unigram", "bert", "legacy_llama", "lowercase", "deepseek"])
def test_every_stretch_between_special_tokens_has_the_ends_of_its_own(base):
    tokenizer = extended(base, ["<A>", "<B>"])
    surfaces = vocabulary_surfaces(tokenizer)
    ids, spans = surfaces.encode_with_offsets(MARKED)
    of = {tokenizer.convert_tokens_to_ids(name): name for name in ("<A>", "<B>")}
    at = [i for i, id_ in enumerate(ids) if id_ in of]
    starts = [0, MARKED.index("<B>"), MARKED.rindex("<A>"), MARKED.rindex("<B>")]
    marks = [Mark(start, start + 3, ids[i]) for start, i in zip(starts, at, strict=True)]
    found = marked_ends(ids, at, MARKED, marks, surfaces, offsets=lambda: spans)
    assert found.ids.tolist() == ids
    assert (np.diff(found.ends) >= 0).all()
    for i, mark in zip(at, marks, strict=True):
        assert found.lows[i] == len(MARKED[: mark.stop].encode()) <= found.ends[i]
    if not surfaces.drops_space:
        assert found.ends[-1] == len(MARKED.encode())
    if found.exact and base in ("qwen", "deepseek", "mistral"):
        for id_, start, end in zip(ids, [0, *found.ends[:-1]], found.ends, strict=True):
            assert surfaces.of[id_].endswith(MARKED.encode()[start:end])


def test_special_tokens_that_swallow_space():
    surfaces = vocabulary_surfaces(tokenizer_for("phi-3"))
    text = "<|user|>\n  hello<|end|>\n"
    ids, spans = surfaces.encode_with_offsets(text)
    marks = [Mark(0, 8, ids[0]), Mark(16, 23, ids[-1])]
    found = marked_ends(ids, [0, len(ids) - 1], text, marks, surfaces, offsets=lambda: spans)
    assert (found.lows[0], found.ends[0]) == (8, 11)
    assert (found.lows[-1], found.ends[-1]) == (23, 24)


def word_level() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))


def test_words_without_pieces():
    """A word-level vocabulary over white space: words and unknowns end where their text ends."""
    backend = word_level()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = tokenize("a  zz b ", backend)
    assert tokens.ids.tolist() == [0, 2, 1]
    assert (tokens.lows.tolist(), tokens.ends.tolist()) == ([1, 5, 7], [3, 6, 8])


def suffixed() -> Tokenizer:
    return Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))


def squeezing() -> Tokenizer:
    """It changes a text beyond undoing."""
    backend = Tokenizer.from_str(load("lowercase").backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("aa", "b")
    return backend


def custom() -> Tokenizer:
    class Custom:
        def pre_tokenize(self, text):
            return None

    backend = word_level()
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Custom())
    return backend


def named(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.name_or_path = "some/model"
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda: named(suffixed()), ["some/model", "end-of-word suffix '</w>'"]),
        (lambda: named(squeezing()), ["some/model", "Replace"]),
        (custom, ["custom Python code"]),
        (CanineTokenizer, ["CanineTokenizer", "AutoTokenizer"]),
        (lambda: "mistral", ["str", "AutoTokenizer"]),
    ],
)
def test_tokenizers_that_cannot_be_handled_exactly_are_refused(tokenizer, words):
    with refused(AlignmentError, *words):
        tokenize("xaay", tokenizer())


def test_importing_loads_neither_torch_nor_transformers():
    modules = "fusekit.alignment.rows, fusekit.alignment.quality"
    code = f"import sys, {modules}; print({{'torch', 'transformers', 'mergekit'}} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
