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

from fusekit.alignment import vocabulary_surfaces
from fusekit.alignment.papers import nearest
from fusekit.alignment.surfaces import Kind
from fusekit.alignment.vocabulary_map import VocabularyMap, build_vocabulary_map, count_mappings
from fusekit.errors import AlignmentError
from tests.alignment import maps, reference
from tests.alignment.maps import target
from tests.alignment.texts import EDGE_CASES
from tests.alignment.tokenizers import REAL, byte_fallback, load


def plain_vocabulary(name: str) -> dict[bytes, list[int]]:
    """Bytes -> ids of a tokenizer's entries that are not special, from its strings alone."""
    tokenizer = load(name)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {i for i in (tokenizer.unk_token_id,) if i is not None}
    found: dict[bytes, list[int]] = {}
    for id_ in sorted(set(tokenizer.get_vocab().values()) - special):
        found.setdefault(reference.token_bytes(tokenizer, id_), []).append(id_)
    return found


@pytest.mark.parametrize(("pivot", "source"), [("mistral", "qwen"), ("qwen", "mistral"), ("deepseek", "anthropic")])
def test_em_finds_the_same_strings_and_no_others(pivot, source):
    vocabulary_map = build_vocabulary_map(load(pivot), load(source), "em")
    theirs, ours = plain_vocabulary(pivot), plain_vocabulary(source)
    role_ids = set(vocabulary_surfaces(load(source)).view.roles.values())
    for surface, ids in ours.items():
        for id_ in ids:
            if id_ in role_ids:
                continue
            assert target(vocabulary_map, id_) in theirs.get(surface, [-1]), surface
    assert vocabulary_map.matrix.nnz > 20_000
    hello = load(source).convert_tokens_to_ids("▁Hello" if source == "mistral" else "ĠHello")
    expected = load(pivot).convert_tokens_to_ids("▁Hello" if pivot == "mistral" else "ĠHello")
    assert target(vocabulary_map, hello) == expected


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


@pytest.mark.parametrize(("pivot", "source"), [("qwen", "mistral"), ("mistral", "anthropic")])
def test_mined_is_the_brute_force_minimum(pivot, source):
    generator = np.random.default_rng(7)
    em = build_vocabulary_map(load(pivot), load(source), "em")
    ours, theirs = vocabulary_surfaces(load(source)), vocabulary_surfaces(load(pivot))
    readable = [s for s in theirs.id_of if is_text(s)]
    unmatched = [i for s, i in ours.id_of.items() if target(em, i) < 0 and is_text(s)]
    sample = generator.choice(unmatched, 60, replace=False).tolist()
    index, distance = nearest([ours.of[i].decode() for i in sample], [s.decode() for s in readable])
    for i, at, found in zip(sample, index.tolist(), distance.tolist(), strict=True):
        text = ours.of[i].decode()
        brute = [Levenshtein.distance(text, s.decode()) for s in readable]
        assert found == min(brute)
        assert at == brute.index(min(brute))


def test_a_mined_map_is_the_first_minimum_over_a_small_pivot():
    """Over all of a vocabulary, with a textbook edit distance, entries that are no UTF-8 as bytes."""
    pivot, source = load("bert"), load("unigram")
    vocabulary_map = build_vocabulary_map(pivot, source, "mined", cache=False)
    theirs = sorted((i, s) for s, i in vocabulary_surfaces(pivot).id_of.items())
    for surface, id_ in vocabulary_surfaces(source).id_of.items():
        distances = [reference.levenshtein(surface.decode(), other.decode()) for _, other in theirs]
        assert target(vocabulary_map, id_) == theirs[distances.index(min(distances))][0], surface


def is_text(surface: bytes) -> bool:
    try:
        surface.decode()
    except UnicodeDecodeError:
        return False
    return True


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
    vocabulary_map = maps.vocabulary_map(pivot, source)
    ours, tokenizer = vocabulary_surfaces(load(source)), load(pivot)
    em = build_vocabulary_map(load(pivot), load(source), "em")
    generator = np.random.default_rng(3)
    unmatched = [i for s, i in ours.id_of.items() if target(em, i) < 0 and is_text(s) and "\n" not in s.decode()]
    for i in generator.choice(unmatched, 300, replace=False).tolist():
        # After a line break neither a dummy space nor a merge with what is before gets in the way.
        ids = tokenizer("\n" + ours.of[i].decode(), add_special_tokens=False)["input_ids"]
        spelled = [reference.token_bytes(tokenizer, k) for k in ids]
        begin = next(n for n in range(len(ids)) if b"".join(spelled[: n + 1]).lstrip(b" ") == b"\n")
        assert target(vocabulary_map, i) == ids[begin + 1], ours.of[i]


def test_surfaces_that_are_no_text_map_by_their_longest_prefix():
    source = load("qwen")
    theirs = plain_vocabulary("mistral")
    ours = vocabulary_surfaces(source)
    broken = [i for s, i in ours.id_of.items() if not is_text(s)]
    assert 773 <= len(broken) <= 1470
    for i in broken:
        surface = ours.of[i]
        longest = next(n for n in range(len(surface), 0, -1) if surface[:n] in theirs)
        assert target(maps.vocabulary_map("mistral", "qwen"), i) in theirs[surface[:longest]]


@pytest.mark.parametrize("method", ["em", "prefix"])
def test_special_tokens_map_by_role(method):
    pivot, source = load("llama3"), load("mistral")
    vocabulary_map = build_vocabulary_map(pivot, source, method, cache=False)
    assert target(vocabulary_map, source.bos_token_id) == pivot.bos_token_id
    assert target(vocabulary_map, source.eos_token_id) == pivot.eos_token_id
    assert target(vocabulary_map, source.unk_token_id) == -1
    # tekken has the very strings <s> and </s> as specials too, but roles decide, and padding maps nowhere.
    qwen = load("qwen")
    back = build_vocabulary_map(qwen, load("deepseek"), "em", cache=False)
    assert target(back, load("deepseek").pad_token_id) == -1
    assert target(back, load("deepseek").bos_token_id) == -1  # Qwen has none
    assert target(back, load("deepseek").eos_token_id) == qwen.eos_token_id
    given_role = build_vocabulary_map(
        qwen, source, method, cache=False, pivot_roles={"eos": 151643, "end_of_turn": 151643}
    )
    assert target(given_role, source.eos_token_id) == 151643


def test_the_end_of_turn_is_read_from_the_chat_template():
    from tests.alignment.tokenizers import qwen

    tokenizer = qwen()
    tokenizer.eos_token = "<|endoftext|>"
    assert vocabulary_surfaces(tokenizer).view.roles["end_of_turn"] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    assert vocabulary_surfaces(tokenizer).view.roles["end_of_turn"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(("pivot", "source"), [("qwen", "mistral"), ("anthropic", "mistral"), ("bert", "unigram")])
def test_rows_sum_to_at_most_one_and_pads_get_nothing(pivot, source):
    size = len(vocabulary_surfaces(load(source))) + 300
    vocabulary_map = build_vocabulary_map(load(pivot), load(source), "prefix", source_size=size, cache=False)
    sums = np.asarray(vocabulary_map.matrix.sum(axis=1)).ravel()
    assert vocabulary_map.matrix.shape[0] == size
    assert sums.max() <= 1.0
    assert (sums[-300:] == 0).all()


def random_rows(generator, rows: int, k: int, vocabulary: int):
    ids = np.stack([generator.choice(vocabulary, k, replace=False) for _ in range(rows)])
    mass = generator.dirichlet(np.full(k + 1, 0.3), rows)
    mass = np.maximum(mass, 1e-12)
    mass /= mass.sum(axis=1, keepdims=True)
    return ids, np.log(mass[:, :k]), mass[:, k]


@pytest.mark.parametrize("collisions", ["add", "max"])
@pytest.mark.parametrize("method", ["em", "prefix"])
def test_projection_equals_a_loop_and_conserves_mass(method, collisions):
    vocabulary_map = maps.vocabulary_map("mistral", "qwen", method)
    generator = np.random.default_rng(0)
    ids, logprobs, tail = random_rows(generator, 40, 30, 3000)
    ids[5, 20:], logprobs[5, 20:] = -1, -np.inf
    before = np.exp(logprobs).sum(axis=1) + tail
    found = vocabulary_map.project(ids, logprobs, tail, collisions)
    np.testing.assert_allclose(np.exp(found.logprobs).sum(axis=1) + found.tail, before, atol=1e-6, rtol=0)
    targets = {i: ({t: 1.0} if (t := target(vocabulary_map, i)) >= 0 else {}) for i in set(ids.ravel().tolist()) - {-1}}
    assert len({t for row in targets.values() for t in row}) < sum(map(len, targets.values())) or method == "em"
    for row in range(len(ids)):
        entries, rest = reference.project(
            targets, ids[row].tolist(), logprobs[row].tolist(), float(tail[row]), collisions == "max"
        )
        listed = {int(i): math.exp(p) for i, p in zip(found.ids[row], found.logprobs[row], strict=True) if i >= 0}
        assert listed == pytest.approx(entries, abs=1e-9)
        assert found.tail[row] == pytest.approx(rest, abs=1e-9)
        assert (np.diff(found.logprobs[row][found.ids[row] >= 0]) <= 0).all()


def test_projection_through_shares():
    base = build_vocabulary_map(load("bert"), load("unigram"), "em")
    matrix = sparse.lil_matrix(base.matrix.shape)
    matrix[3, 7], matrix[3, 9], matrix[4, 9] = 0.5, 0.25, 1.0
    vocabulary_map = VocabularyMap(matrix.tocsr(), "em", base.pivot, base.source)
    found = vocabulary_map.project([[3, 4]], np.log([[0.4, 0.5]]), [0.1])
    assert found.ids.tolist() == [[9, 7]]
    np.testing.assert_allclose(np.exp(found.logprobs), [[0.6, 0.2]])
    np.testing.assert_allclose(found.tail, [0.2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[40_000]], [[-1.0]], [0.5]), ["40000", "32000 rows", "source_size"]),
        (([[-2]], [[-1.0]], [0.5]), ["-2"]),
        (([[1]], [[math.nan]], [0.5]), ["row 0", "nan"]),
        (([[1], [2]], [[-1.0], [0.0]], [0.5, 0.5]), ["row 1", "1"]),
        (([[1]], [[-1.0]], [-0.5]), ["row 0"]),
        (([1], [-1.0], [0.5]), ["[T, k]", "(1,)"]),
        (([[1, 2]], [[-1.0]], [0.5]), ["(1, 2)", "(1, 1)"]),
    ],
)
def test_rows_that_are_no_distributions_are_refused(arguments, words):
    vocabulary_map = build_vocabulary_map(load("qwen"), load("mistral"), "em")
    with pytest.raises(AlignmentError) as error:
        vocabulary_map.project(*arguments)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "mind"}, ["'mind'", "mined"]),
        ({"method": "ms"}, ["statistics", "count_mappings"]),
        ({"source_size": 10}, ["source_size=10", "32000"]),
        ({"pivot_roles": {"boss": 1}}, ["boss=1", "end_of_turn"]),
        ({"source_roles": {"eos": 99999}}, ["eos=99999"]),
    ],
)
def test_what_cannot_be_mapped_is_refused(options, words):
    with pytest.raises(AlignmentError) as error:
        build_vocabulary_map(load("qwen"), load("mistral"), **{"cache": False, "method": "em", **options})
    assert all(word in str(error.value) for word in words), error.value


def test_a_map_is_shown_in_one_line():
    shown = repr(maps.vocabulary_map("bert", "unigram", "em"))
    assert "em" in shown
    assert len(shown) < 200


def test_the_matrix_may_not_make_mass():
    base = build_vocabulary_map(load("bert"), load("unigram"), "em")
    with pytest.raises(AlignmentError, match="row 2 sums to 2"):
        VocabularyMap(
            sparse.csr_matrix(([1.0, 1.0], ([2, 2], [0, 1])), base.matrix.shape), "em", base.pivot, base.source
        )


def test_maps_are_kept_on_disk_and_made_again_when_damaged(tmp_path, caplog):
    pivot, source = load("bert"), load("unigram")
    made = build_vocabulary_map(pivot, source, "mined", cache=tmp_path)
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    again = build_vocabulary_map(pivot, source, "mined", cache=tmp_path)
    assert (made.matrix != again.matrix).nnz == 0
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    for damaged in (kept[: len(kept) // 2], b"", bytes([*kept[:200], kept[200] ^ 1, *kept[201:]])):
        file.write_bytes(damaged)
        mended = build_vocabulary_map(pivot, source, "mined", cache=tmp_path)
        assert (made.matrix != mended.matrix).nnz == 0
        assert zipfile.is_zipfile(file)
    assert "made again" in caplog.text
    build_vocabulary_map(source, pivot, "mined", cache=tmp_path)
    build_vocabulary_map(pivot, source, "prefix", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    vocabulary_map = build_vocabulary_map(load("bert"), load("unigram"), "mined", cache=blocked / "folder")
    assert vocabulary_map.matrix.nnz > 50
    assert "not kept" in caplog.text


def test_a_changed_tokenizer_has_another_fingerprint():
    from tests.alignment.tokenizers import unigram

    prints = []
    for change in (lambda t: None, lambda t: t.add_tokens(["new"]), lambda t: setattr(t, "eos_token", "<s>")):
        tokenizer = unigram()
        change(tokenizer)
        prints.append(vocabulary_surfaces(tokenizer).fingerprint)
    assert len(set(prints)) == 3
    assert vocabulary_surfaces(unigram()).fingerprint == prints[0]


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
    assert statistics.texts == len(TEXTS)


def test_ms_takes_the_most_frequent_and_the_released_form_its_formula():
    pivot, source = load("deepseek"), load("cl100k")
    statistics = count_mappings(TEXTS, pivot, source)
    paper = build_vocabulary_map(pivot, source, "ms", statistics=statistics, cache=False)
    released = build_vocabulary_map(pivot, source, "ms_released", statistics=TEXTS, cache=False)
    em = build_vocabulary_map(pivot, source, "em")
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
    with pytest.raises(AlignmentError, match="2 texts"):
        count_mappings(["", ""], load("bert"), load("unigram"))


@pytest.mark.parametrize("name", list(REAL))
def test_every_ordinary_entry_has_its_bytes(name):
    surfaces = vocabulary_surfaces(load(name))
    kinds = surfaces.kinds
    for id_ in range(0, len(surfaces), 97):
        if kinds[id_] not in (Kind.HOLE, Kind.UNKNOWN):
            assert surfaces.of[id_] == reference.token_bytes(load(name), id_)
