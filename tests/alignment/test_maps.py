"""Vocabulary maps and projection against brute force and plain loops."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from scipy import sparse

from fusekit.alignment import MappingStatistics, build_vocabulary_map, count_mappings, vocabulary_surfaces
from fusekit.alignment.papers import mined, nearest
from fusekit.errors import AlignmentError
from tests.alignment import reference
from tests.alignment.tokenizers import EDGE_CASES, byte_fallback, fast, load, sharing, target, unigram, vocabulary_map
from tests.helpers import refused


def plain_vocabulary(name: str) -> dict[bytes, list[int]]:
    """Bytes -> ids of a tokenizer's entries that are not special, from its strings alone."""
    tokenizer = load(name)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {i for i in (tokenizer.unk_token_id,) if i is not None}
    found: dict[bytes, list[int]] = {}
    for id_ in sorted(set(tokenizer.get_vocab().values()) - special):
        found.setdefault(reference.token_bytes(tokenizer, id_), []).append(id_)
    return found


@pytest.mark.parametrize(("pivot", "source"), [("mistral", "qwen"), ("qwen", "mistral")])
def test_em_finds_the_same_strings_and_no_others(pivot, source):
    made = vocabulary_map(pivot, source, "em")
    theirs, ours = plain_vocabulary(pivot), plain_vocabulary(source)
    role_ids = set(vocabulary_surfaces(load(source)).roles.values())
    for surface, ids in ours.items():
        for id_ in set(ids) - role_ids:
            assert target(made, id_) in theirs.get(surface, [-1]), surface
    assert (made.targets >= 0).sum() > 20_000
    hello = {
        "mistral": load("mistral").convert_tokens_to_ids("▁Hello"),
        "qwen": load("qwen").convert_tokens_to_ids("ĠHello"),
    }
    assert target(made, hello[source]) == hello[pivot]


def test_of_several_ids_with_one_surface_the_emitted_one_is_taken():
    mistral = load("mistral")
    doubles = {surface: ids for surface, ids in plain_vocabulary("mistral").items() if len(ids) > 1}
    assert len(doubles) == 125
    id_of = vocabulary_surfaces(mistral).id_of
    for surface, ids in doubles.items():
        text = "x" + surface.decode() + "x"
        emitted = set(mistral(text, add_special_tokens=False)["input_ids"]) & set(ids)
        assert id_of[surface] in (emitted or ids), surface
    assert id_of[b"1"] == mistral.convert_tokens_to_ids("1")


@pytest.mark.parametrize("special", [True, False])
def test_a_byte_that_is_an_added_token_maps_as_the_byte(special):
    source, qwen = byte_fallback(added=special), load("qwen")
    made = build_vocabulary_map(qwen, source, "prefix", cache=False)
    assert target(made, source.token_to_id("<0xC3>")) == qwen.convert_tokens_to_ids("Ã")
    assert target(made, source.token_to_id("<0x3C>")) == qwen.convert_tokens_to_ids("<")
    back = build_vocabulary_map(source, qwen, "prefix", cache=False)
    assert target(back, qwen.convert_tokens_to_ids("Ã")) == source.token_to_id("<0xC3>")


def is_text(surface: bytes) -> bool:
    return surface.decode(errors="ignore").encode() == surface


def test_mined_is_the_brute_force_minimum():
    """Over all of a large vocabulary."""
    em, generator = vocabulary_map("qwen", "mistral", "em"), np.random.default_rng(7)
    ours, theirs = vocabulary_surfaces(load("mistral")), vocabulary_surfaces(load("qwen"))
    readable = [s.decode() for s in theirs.id_of if is_text(s)]
    unmatched = [s.decode() for s, i in ours.id_of.items() if target(em, i) < 0 and is_text(s)]
    sample = generator.choice(unmatched, 30, replace=False).tolist()
    for text, at, found in zip(sample, *(part.tolist() for part in nearest(sample, readable)), strict=True):
        brute = [Levenshtein.distance(text, other) for other in readable]
        assert (found, at) == (min(brute), brute.index(min(brute)))


def test_a_mined_map_is_the_first_minimum_over_a_small_pivot():
    """Over all of a vocabulary, with a textbook edit distance, entries that are no UTF-8 as bytes."""
    made = vocabulary_map("bert", "unigram", "mined")
    theirs = sorted((i, s) for s, i in vocabulary_surfaces(load("bert")).id_of.items())
    for surface, id_ in vocabulary_surfaces(load("unigram")).id_of.items():
        distances = [reference.levenshtein(surface.decode(), other.decode()) for _, other in theirs]
        assert target(made, id_) == theirs[distances.index(min(distances))][0], surface


def test_mined_bytes_that_the_pivot_cannot_begin_to_spell_go_to_the_nearest_bytes():
    pivot, strange = vocabulary_surfaces(load("bert")), [b"\xf0\x9f", b"\xc3", b"\x80the"]
    theirs = sorted((i, s.decode("latin-1")) for s, i in pivot.id_of.items())
    for surface, found in zip(strange, mined(strange, pivot).tolist(), strict=True):
        distances = [reference.levenshtein(surface.decode("latin-1"), other) for _, other in theirs]
        assert found == theirs[distances.index(min(distances))][0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queries=st.lists(st.text("abcé日 ", max_size=7), max_size=8),
    candidates=st.lists(st.text("abcé日 ", max_size=9), max_size=12),
)
def test_nearest_is_the_first_true_minimum(queries, candidates):
    index, distance = nearest(queries, candidates)
    for query, at, found in zip(queries, index.tolist(), distance.tolist(), strict=True):
        brute = [reference.levenshtein(query, candidate) for candidate in candidates]
        if brute:
            assert (at, found) == (brute.index(min(brute)), min(brute))
        else:
            assert at == -1


def test_nearest_of_very_long_strings():
    index, distance = nearest(["a" * 300, "b"], ["a" * 299 + "c", "a" * 10, "bb"])
    assert index.tolist() == [0, 2]
    assert distance.tolist() == [1, 1]


@pytest.mark.parametrize(("pivot", "source"), [("mistral", "qwen"), ("qwen", "mistral")])
def test_prefix_is_the_first_token_of_the_pivots_own_tokenisation(pivot, source):
    made, em = vocabulary_map(pivot, source), vocabulary_map(pivot, source, "em")
    ours, tokenizer = vocabulary_surfaces(load(source)), load(pivot)
    generator = np.random.default_rng(3)
    unmatched = [i for s, i in ours.id_of.items() if target(em, i) < 0 and is_text(s) and b"\n" not in s]
    for i in generator.choice(unmatched, 300, replace=False).tolist():
        # After a line break neither a dummy space nor a merge with what is before gets in the way.
        ids = tokenizer("\n" + ours.of[i].decode(), add_special_tokens=False)["input_ids"]
        spelled = [reference.token_bytes(tokenizer, k) for k in ids]
        begin = next(n for n in range(len(ids)) if b"".join(spelled[: n + 1]).lstrip(b" ") == b"\n")
        assert target(made, i) == ids[begin + 1], ours.of[i]


def test_surfaces_that_are_no_text_map_by_their_longest_prefix():
    source = load("qwen")
    theirs = plain_vocabulary("mistral")
    ours = vocabulary_surfaces(source)
    broken = [i for s, i in ours.id_of.items() if not is_text(s)]
    assert 773 <= len(broken) <= 1470
    for i in broken:
        surface = ours.of[i]
        longest = next(n for n in range(len(surface), 0, -1) if surface[:n] in theirs)
        assert target(vocabulary_map("mistral", "qwen"), i) in theirs[surface[:longest]]


def test_special_tokens_map_by_role():
    llama, mistral, deepseek = load("llama3"), load("mistral"), load("deepseek")
    made = vocabulary_map("llama3", "mistral")
    assert target(made, mistral.bos_token_id) == llama.bos_token_id
    assert target(made, mistral.eos_token_id) == llama.eos_token_id
    assert target(made, mistral.unk_token_id) == -1
    back = vocabulary_map("qwen", "deepseek", "em")
    assert target(back, deepseek.pad_token_id) == -1
    assert target(back, deepseek.bos_token_id) == -1  # Qwen has none
    assert target(back, deepseek.eos_token_id) == load("qwen").eos_token_id
    roles = {"eos": 151643, "end_of_turn": 151643}
    given_role = build_vocabulary_map(load("qwen"), mistral, "em", pivot_roles=roles)
    assert target(given_role, mistral.eos_token_id) == 151643


def test_the_end_of_turn_is_read_from_the_chat_template():
    tokenizer = fast(sharing(load("qwen").backend_tokenizer), "qwen", eos_token="<|endoftext|>")
    assert vocabulary_surfaces(tokenizer).roles["end_of_turn"] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    assert vocabulary_surfaces(tokenizer).roles["end_of_turn"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ messages }}"}
    assert vocabulary_surfaces(tokenizer).roles["end_of_turn"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_rows_sum_to_at_most_one_and_pads_get_nothing():
    size = len(vocabulary_surfaces(load("unigram"))) + 300
    made = build_vocabulary_map(load("bert"), load("unigram"), "prefix", source_size=size, cache=False)
    assert made.matrix.shape == (size, len(vocabulary_surfaces(load("bert"))))
    assert np.asarray(made.matrix.sum(axis=1)).max() <= 1.0
    assert (made.targets[-300:] == -1).all()


def random_rows(generator, rows: int, k: int, vocabulary: int):
    ids = np.stack([generator.choice(vocabulary, k, replace=False) for _ in range(rows)])
    mass = generator.dirichlet(np.full(k + 1, 0.3), rows)
    mass = np.maximum(mass, 1e-12)
    mass /= mass.sum(axis=1, keepdims=True)
    return ids, np.log(mass[:, :k]), mass[:, k]


@pytest.mark.parametrize("collisions", ["add", "max"])
@pytest.mark.parametrize("method", ["em", "prefix"])
def test_projection_equals_a_loop_and_conserves_mass(method, collisions):
    made = vocabulary_map("mistral", "qwen", method)
    generator = np.random.default_rng(0)
    ids, logprobs, tail = random_rows(generator, 40, 30, 3000)
    ids[5, 20:], logprobs[5, 20:] = -1, -np.inf
    before = np.exp(logprobs).sum(axis=1) + tail
    found = made.project(ids, logprobs, tail, collisions)
    np.testing.assert_allclose(np.exp(found.logprobs).sum(axis=1) + found.tail, before, atol=1e-6, rtol=0)
    mapped = made.targets[np.unique(ids[ids >= 0])]
    mapped = mapped[mapped >= 0]
    assert len(np.unique(mapped)) < len(mapped) or method == "em"
    for row in range(len(ids)):
        plain = (ids[row].tolist(), logprobs[row].tolist(), float(tail[row]))
        entries, rest = reference.project(made.targets, *plain, collisions == "max")
        listed = {int(i): math.exp(p) for i, p in zip(found.ids[row], found.logprobs[row], strict=True) if i >= 0}
        assert listed == pytest.approx(entries, abs=1e-9)
        assert found.tail[row] == pytest.approx(rest, abs=1e-9)
        assert (np.diff(found.logprobs[row][found.ids[row] >= 0]) <= 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[40_000]], [[-1.0]], [0.5]), ["40000", "32000", "source_size"]),
        (([[-2]], [[-1.0]], [0.5]), ["-2"]),
        (([[1]], [[math.nan]], [0.5]), ["row 0", "nan"]),
        (([[1], [2]], [[-1.0], [0.0]], [0.5, 0.5]), ["row 1", "1"]),
        (([[1]], [[-1.0]], [-0.5]), ["row 0"]),
        (([1], [-1.0], [0.5]), ["[T, k]", "(1,)"]),
        (([[1, 2]], [[-1.0]], [0.5]), ["(1, 2)", "(1, 1)"]),
    ],
)
def test_rows_that_are_no_distributions_are_refused(arguments, words):
    with refused(AlignmentError, *words):
        vocabulary_map("qwen", "mistral", "em").project(*arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "mind"}, ["'mind'", "mined"]),
        ({"method": "ms"}, ["statistics"]),
        ({"method": "ms", "statistics": MappingStatistics(sparse.csr_matrix((2, 2)))}, ["of other tokenizers", "qwen"]),
    ],
)
def test_what_cannot_be_mapped_is_refused(options, words):
    with refused(AlignmentError, *words):
        build_vocabulary_map(load("qwen"), load("mistral"), **{"cache": False, "method": "em", **options})


def test_maps_are_kept_on_disk_and_made_again_when_damaged(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("FUSEKIT_CACHE", str(tmp_path))
    pivot, source, folder = load("bert"), load("unigram"), tmp_path / "vocabulary-maps"
    made = build_vocabulary_map(pivot, source, "mined")
    (file,) = folder.iterdir()
    kept = file.read_bytes()
    assert (made.targets == build_vocabulary_map(pivot, source, "mined").targets).all()
    assert [f.name for f in folder.iterdir()] == [file.name]
    for damaged in (kept[: len(kept) // 2], b"", bytes([*kept[:200], kept[200] ^ 1, *kept[201:]])):
        file.write_bytes(damaged)
        assert (made.targets == build_vocabulary_map(pivot, source, "mined").targets).all()
        assert zipfile.is_zipfile(file)
    assert "made again" in caplog.text
    build_vocabulary_map(source, pivot, "mined")
    build_vocabulary_map(pivot, source, "prefix")
    assert len(list(folder.iterdir())) == 3


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FUSEKIT_CACHE", str(tmp_path / "file"))
    made = build_vocabulary_map(load("bert"), load("unigram"), "mined")
    assert (made.targets >= 0).sum() > 50
    assert "not kept" in caplog.text


def test_a_changed_tokenizer_has_another_fingerprint():
    prints = []
    for change in (lambda t: None, lambda t: t.add_tokens(["new"]), lambda t: setattr(t, "eos_token", "<s>")):
        tokenizer = unigram()
        change(tokenizer)
        prints.append(vocabulary_surfaces(tokenizer).fingerprint)
    assert len(set(prints)) == 3
    # Another one would have every store captured again.
    assert prints[0] == "c8442cc36ccefe63f3e7d880c00e6018c9112f4975939cff9f09463319c82ed0"


def counted_by_hand(pivot: str, source: str, texts: list[str]) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for text in texts:
        spans = []
        for name in (pivot, source):
            ids = load(name)(text, add_special_tokens=False)["input_ids"]
            ends = reference.original_ends(load(name), text)
            spans.append(list(zip(ids, [0, *ends[:-1]], ends, strict=True)))
        for p, p_start, p_end in spans[0]:
            for s, s_start, s_end in spans[1]:
                if max(p_start, s_start) < min(p_end, s_end):
                    counts[s, p] = counts.get((s, p), 0) + 1
    return counts


TEXTS = [EDGE_CASES[name] for name in ("plain", "code", "digits", "long word", "runs of spaces", "crlf")]


def test_statistics_count_tokens_that_share_bytes():
    statistics = count_mappings(TEXTS, load("deepseek"), load("cl100k"))
    found = statistics.counts.tocoo()
    counts = {(int(s), int(p)): int(c) for s, p, c in zip(found.row, found.col, found.data, strict=True)}
    assert counts == counted_by_hand("deepseek", "cl100k", TEXTS)


def test_ms_takes_the_most_frequent_and_the_released_form_its_formula():
    pivot, source = load("deepseek"), load("cl100k")
    statistics = count_mappings(TEXTS, pivot, source)
    paper = build_vocabulary_map(pivot, source, "ms", statistics=statistics, cache=False)
    released = build_vocabulary_map(pivot, source, "ms_released", statistics=TEXTS, cache=False)
    em = vocabulary_map("deepseek", "cl100k", "em")
    ours, theirs = vocabulary_surfaces(source).of, vocabulary_surfaces(pivot).of
    counts = counted_by_hand("deepseek", "cl100k", TEXTS)
    differ = 0
    for s in {s for s, _ in counts}:
        options = [(p, c) for (t, p), c in counts.items() if t == s]
        frequent = min(options, key=lambda o: (-o[1], reference.token_cost(ours[s], theirs[o[0]]), o[0]))
        assert target(paper, s) == frequent[0]

        def formula(option, s=s):
            a, b = ours[s].removeprefix(b" ") or ours[s], theirs[option[0]].removeprefix(b" ") or theirs[option[0]]
            if b" " in (ours[s], theirs[option[0]]):
                a, b = ours[s], theirs[option[0]]
            weight = 0.1 if a in b or b in a else 1.0
            sigmoid = 1 / (1 + math.exp(-option[1]))
            return reference.token_cost(ours[s], theirs[option[0]]) * weight * sigmoid, option[0]

        assert target(released, s) == min(options, key=formula)[0]
        differ += target(released, s) != target(paper, s)
    unseen = sorted(set(range(100_000)) - {s for s, _ in counts})[:500]
    assert [target(paper, s) for s in unseen] == [target(em, s) for s in unseen]


def test_a_corpus_is_several_texts_with_something_in_them():
    with pytest.raises(AlignmentError, match=r"\[text\]"):
        count_mappings("one text", load("bert"), load("unigram"))
    with pytest.raises(AlignmentError, match="empty"):
        count_mappings(["", ""], load("bert"), load("unigram"))
