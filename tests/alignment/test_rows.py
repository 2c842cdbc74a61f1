"""Rows at the pivot's positions: certainty, conservation, and a plain loop over every position."""

from __future__ import annotations

import functools
import itertools
import operator

import numpy as np
import pytest

from fusekit.alignment import (
    Case,
    Predictions,
    align,
    align_tokens,
    plan_rows,
    project_rows,
    project_rows_by_rule,
    source_positions,
    tokenize,
    vocabulary_surfaces,
)
from fusekit.alignment.rows import TAILS
from fusekit.errors import AlignmentError
from tests.alignment import reference
from tests.alignment.tokenizers import EDGE_CASES, load, target, vocabulary_map
from tests.helpers import refused

PAIRS = [
    ("mistral", "qwen"),
    ("qwen", "mistral"),
    ("qwen", "deepseek"),
    ("deepseek", "cl100k"),
    ("anthropic", "mistral"),
    ("tekken", "anthropic"),
    ("llama3", "bert"),
    ("bert", "qwen"),
    ("unigram", "llama3"),
]


def certain_rows(alignment):
    """A source that is certain of the text: all of each row on the actual next token."""
    m = len(alignment.source_ids)
    ids, logprobs, tail = np.full((m, 2), -1), np.full((m, 2), -np.inf), np.zeros(m)
    ids[:-1, 0], logprobs[:-1, 0], tail[-1:] = alignment.source_ids[1:], 0.0, 1.0
    return (ids, logprobs, tail), np.zeros(m)


def random_rows(tokens, vocabulary: int, seed: int, k: int = 6):
    """Random rows after each token; in half of them the next token is listed."""
    generator = np.random.default_rng(seed)
    m = len(tokens)
    # Different residues, so that no row names an id twice.
    ids = generator.integers(0, vocabulary // k, (m, k)) * k + np.arange(k)
    mass = generator.dirichlet(np.full(k + 1, 0.5), m)
    actual = np.log(mass[:, -1] * generator.random(m) + 1e-12)
    listed = generator.random(m) < 0.5
    for j, following in enumerate(tokens[1:].tolist()):
        ids[j, ids[j] == following] = -1
        if listed[j]:
            ids[j, 2], actual[j] = following, np.log(mass[j, 2])
    logprobs = np.where(ids >= 0, np.log(np.maximum(mass[:, :k], 1e-300)), -np.inf)
    tail = 1 - np.where(ids >= 0, mass[:, :k], 0).sum(axis=1)
    return (ids, logprobs, tail), actual


def row_of(rows, i) -> dict[int, float]:
    """The entries of a row."""
    return {int(t): float(np.exp(p)) for t, p in zip(rows[0][i], rows[1][i], strict=True) if t >= 0}


def plain(rows, actual, tokens):
    """For plain loops: entries and tail of each row, and the probability of each next token, None where not known."""
    said = [(row_of(rows, j), float(rows[2][j])) for j in range(len(tokens))]
    following = [*tokens[1:].tolist(), -1]
    known = [
        None if np.isnan(logprob) else row.get(token, float(np.exp(logprob)))
        for (row, _), logprob, token in zip(said, actual, following, strict=True)
    ]
    return said, known


@pytest.mark.parametrize(("pivot", "source"), PAIRS)
def test_a_certain_source_is_certain_of_the_label_wherever_it_teaches(pivot, source):
    for text in EDGE_CASES.values():
        alignment = align(text, load(pivot), load(source))
        rows, actual = certain_rows(alignment)
        found = project_rows(alignment, vocabulary_map(pivot, source), rows, actual)
        assert sum(found.counts.values()) == len(alignment.pivot_ids)
        taught = np.flatnonzero(found.taught)
        if len(taught):
            assert (found.rows.ids[taught, 0] == alignment.pivot_ids[taught + 1]).all()
            np.testing.assert_allclose(np.exp(found.rows.logprobs[taught, 0]), 1.0, atol=1e-9)
            np.testing.assert_allclose(found.rows.tail[taught], 0.0, atol=1e-9)


@pytest.mark.parametrize(("pivot", "source"), PAIRS)
def test_rows_are_distributions(pivot, source):
    for seed, text in enumerate(EDGE_CASES.values()):
        mapping = vocabulary_map(pivot, source, ("em", "prefix")[seed % 2])
        alignment = align(text, load(pivot), load(source))
        rows, actual = random_rows(alignment.source_ids, len(mapping.source), seed)
        for conditioning in (True, False):
            found = project_rows(alignment, mapping, rows, actual, conditioning=conditioning)
            total = np.exp(found.rows.logprobs).sum(axis=1) + found.rows.tail
            np.testing.assert_allclose(total, 1.0, atol=1e-6)
            assert (found.rows.tail >= -1e-12).all()


@pytest.mark.parametrize("kind", TAILS)
@pytest.mark.parametrize(("pivot", "source"), [("mistral", "qwen"), ("qwen", "mistral"), ("deepseek", "cl100k")])
def test_rows_equal_a_loop_over_every_position(pivot, source, kind):
    mapping = vocabulary_map(pivot, source)
    of = vocabulary_surfaces(load(source)).of
    taught = 0
    for seed, text in enumerate(EDGE_CASES.values()):
        if reference.normalized(load(pivot), text) != text or reference.normalized(load(source), text) != text:
            continue
        if "▁" in text or "<" in text:
            continue
        alignment = align(text, load(pivot), load(source))
        (ids, logprobs, tail), actual = random_rows(alignment.source_ids, len(mapping.source), seed, k=40)
        # Entries that share their beginning with the actual token are what conditioning is about.
        for j in range(len(ids) - 1):
            ids[j, 5:20] = near(of, source, alignment.source_ids[j + 1], set(ids[j].tolist()))
        logprobs = np.where(ids >= 0, np.where(np.isfinite(logprobs), logprobs, np.log(1e-6)), -np.inf)
        scale = np.exp(logprobs).sum(axis=1) + tail
        rows = (ids, logprobs - np.log(scale)[:, None], tail / scale)
        said, known = plain(rows, actual, alignment.source_ids)
        own, of_pivot = random_rows(alignment.pivot_ids, len(mapping.pivot), seed)
        of_pivot[np.random.default_rng(seed).random(len(of_pivot)) < 0.1] = np.nan
        own_said = plain(own, of_pivot, alignment.pivot_ids)
        slow = reference.RowReference(
            text.encode(),
            alignment,
            of,
            lambda i, mapping=mapping: target(mapping, i),
            lambda rest, mapping=mapping: int(mapping.remainders([rest])[0]),
        )
        logs = np.log(np.maximum(known, 1e-300))
        found = project_rows(alignment, mapping, rows, logs, pivot=Predictions(own, of_pivot), tail=kind)
        for i in np.flatnonzero(found.taught).tolist():
            expected = slow.row(i, said, known, kind, own_said)
            listed = row_of(found.rows, i) | {-1: float(found.rows.tail[i])}
            expected = {t: p for t, p in expected.items() if p > 0 or t == -1}
            assert listed == pytest.approx(expected, abs=1e-8), (text, i, Case(int(found.cases[i])))
            taught += 1
    assert taught > 250


@functools.cache
def by_first_byte(source: str):
    found: dict[int, list[int]] = {}
    for surface, id_ in vocabulary_surfaces(load(source)).id_of.items():
        found.setdefault(surface[0], []).append(id_)
    return found


def near(of, source: str, id_: int, taken: set[int]) -> list[int]:
    """Fifteen other entries that begin as an entry does, as far as there are so many."""
    ids = [i for i in by_first_byte(source).get(of[id_][0], [])[:200] if i not in taken and i != id_]
    ids.sort(key=lambda i: -sum(1 for _ in itertools.takewhile(bool, map(operator.eq, of[i], of[id_]))))
    return [*ids[:15], *[-1] * (15 - len(ids[:15]))]


def test_each_case_by_hand():
    """Text ``␣1234␣unbelievable``-like: digits split singly by one side and by threes by the other."""
    alignment = align("a 1234", load("qwen"), load("cl100k"))
    pivot = load("qwen").convert_ids_to_tokens(alignment.pivot_ids.tolist())
    source = load("cl100k").convert_ids_to_tokens(alignment.source_ids.tolist())
    assert pivot == ["a", "Ġ", "1", "2", "3", "4"]
    assert source == ["a", "Ġ", "123", "4"]
    names = [Case(c).name for c in plan_rows(alignment).cases]
    assert names == ["SAME", "LONGER", "WITHIN_LONGER", "WITHIN_SAME", "SAME", "LAST"]
    back = align("a 1234", load("cl100k"), load("qwen"))
    assert [Case(c).name for c in plan_rows(back).cases] == ["SAME", "CLOSES", "SAME", "LAST"]
    off = plan_rows(alignment, conditioning=False)
    assert [Case(c).name for c in off.cases] == ["SAME", "LONGER", "UNLINKED", "UNLINKED", "SAME", "LAST"]


def test_back_off_by_hand_multiplies_to_the_probability_of_the_source_token():
    """The pivot reads 1, 2, 3 where the source's token is 123, which its top k does not hold."""
    alignment, mapping = align("a 1234", load("qwen"), load("cl100k")), vocabulary_map("qwen", "cl100k")
    t12, other = (load("cl100k").convert_tokens_to_ids(d) for d in ("12", "9"))
    q1, q2, q3, q9 = (load("qwen").convert_tokens_to_ids(d) for d in "1239")
    with np.errstate(divide="ignore"):
        rows = (np.array([[-1, -1], [t12, other], [-1, -1], [-1, -1]]), np.log([[0, 0], [0.2, 0.3], [0, 0], [0, 0]]))
        rows = (*rows, np.array([1.0, 0.5, 1.0, 1.0]))
        actual = np.log([1.0, 0.1, 1.0, 1.0])
        own = np.full((6, 2), -1), np.full((6, 2), -np.inf), np.ones(6)
        own[0][1], own[1][1], own[2][1] = [q1, q9], np.log([0.6, 0.3]), 0.1
        own[0][2], own[1][2], own[2][2] = [q2, -1], np.log([0.5, 0.0]), 0.5
        said = Predictions(own, np.log([1.0, 0.6, 0.5, 0.25, 1.0, 1.0]))
    found = project_rows(alignment, mapping, rows, actual, pivot=said, tail="back_off")
    # After "a ", the tail of .5 holds 123 with .1; the other .4 is distributed like the pivot's row.
    assert row_of(found.rows, 1) == pytest.approx({q1: 0.2 + 0.1 + 0.4 * 0.6, q9: 0.3 + 0.4 * 0.3})
    assert found.rows.tail[1] == pytest.approx(0.4 * 0.1)
    # After 1, of which the pivot says .6: 12 (.2), 123 (.1) and .24 of the tail are left.
    assert row_of(found.rows, 2) == pytest.approx({q2: (0.3 + 0.24 * 0.5) / 0.54})
    # After 2: of 12 nothing is left, 123 goes on with 3, and .12 of the tail is like the pivot.
    assert row_of(found.rows, 3) == pytest.approx({q3: (0.1 + 0.12 * 0.25) / (0.2 + 0.1 + 0.12)})
    labels = np.exp(found.rows.logprobs[1:4])[found.rows.ids[1:4] == np.array([[q1], [q2], [q3]])]
    assert np.prod(labels) == pytest.approx(0.54 * (0.42 / 0.54) * (0.13 / 0.42))


def test_the_end_of_the_turn_is_taught_by_role():
    text = "Hello 世界"
    pivot_end, source_end = load("mistral").eos_token_id, load("qwen").eos_token_id
    alignment = align_tokens(
        text, tokenize(text, load("mistral")).closed(pivot_end), tokenize(text, load("qwen")).closed(source_end)
    )
    rows, actual = certain_rows(alignment)
    found = project_rows(alignment, vocabulary_map("mistral", "qwen"), rows, actual)
    assert found.rows.ids[-2, 0] == pivot_end
    assert Case(found.cases[-2]) is Case.SAME


def test_one_hot_by_request():
    alignment = align("a 1234", load("qwen"), load("cl100k"))
    rows, actual = certain_rows(alignment)
    found = project_rows(alignment, vocabulary_map("qwen", "cl100k"), rows, actual, conditioning=False, one_hot=True)
    assert found.counts["one_hot"] == 2
    assert found.taught.tolist() == [True] * 5 + [False]
    assert found.rows.ids[:5, 0].tolist() == alignment.pivot_ids[1:].tolist()


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda r, a: ((r[0][:-1], r[1][:-1], r[2][:-1]), a), {}, ["4 source tokens", "3 rows"]),
        (lambda r, a: (r, a[:-1]), {}, ["(3,)"]),
        (lambda r, a: (r, np.array([0.0, np.nan, 0, 0])), {}, ["actual_logprobs[1]", "nan"]),
        (lambda r, a: (r, np.array([0.0, 2.0, 0, 0])), {}, ["actual_logprobs[1]", "2.0"]),
        (lambda r, a: (r, a), {"tail": "shrink"}, ["'shrink'", "back_off"]),
        (lambda r, a: (r, a), {"tail": "back_off"}, ["'back_off'", "pivot"]),
        (lambda r, a: (r, a), {"collisions": "sum"}, ["'sum'", "add, max"]),
        (lambda r, a: (r, a), {"method": "dtw"}, ["'dtw'", "source_positions"]),
    ],
)
def test_rows_that_do_not_fit_are_refused(change, options, words):
    options = dict(options)
    alignment = align("a 1234", load("qwen"), load("cl100k"), options.pop("method", "span"))
    rows, actual = change(*certain_rows(alignment))
    with refused(AlignmentError, *words):
        project_rows(alignment, vocabulary_map("qwen", "cl100k"), rows, actual, **options)


def test_the_papers_rules_equal_a_loop():
    pivot, source, mapping = "mistral", "qwen", vocabulary_map("mistral", "qwen")
    ours, theirs = vocabulary_surfaces(load(pivot)).of, vocabulary_surfaces(load(source)).of
    some = dict.fromkeys(("em", "mined", "ms"), 0)
    for text in EDGE_CASES.values():
        alignment = align(text, load(pivot), load(source), method="dtw")
        found = {rule: source_positions(alignment, mapping, rule) for rule in some}
        p = [ours[i] for i in alignment.pivot_ids.tolist()]
        s = [theirs[i] for i in alignment.source_ids.tolist()]
        path = reference.warp([[reference.token_cost(a, b) for b in s] for a in p])
        for i in range(len(p)):
            matched = [j for k, j in path if k == i]
            j = matched[-1]
            spelled = b"".join(s[j] for j in matched).removeprefix(b" ") == p[i].removeprefix(b" ")
            fits = {"em": False, "mined": False, "ms": spelled}
            if len(matched) == 1:
                maps = target(mapping, alignment.source_ids[j]) == alignment.pivot_ids[i]
                ends = p[i].endswith(s[j]) or s[j].endswith(p[i])
                fits = {"em": p[i] == s[j], "mined": p[i] == s[j] or maps, "ms": ends}
            for rule, fit in fits.items():
                assert found[rule][i] == (j if fit else -1)
                some[rule] += fit
    assert min(some.values()) > 100


def test_rows_by_rule_put_a_one_hot_elsewhere():
    mapping = vocabulary_map("mistral", "qwen")
    alignment = align(EDGE_CASES["mixed"], load("mistral"), load("qwen"), method="dtw")
    rows, _ = random_rows(alignment.source_ids, len(mapping.source), 0)
    found = project_rows_by_rule(alignment, mapping, rows, "em")
    at = source_positions(alignment, mapping, "em")
    assert found.counts["rule"] == (at[:-1] >= 0).sum()
    bare = np.flatnonzero(at[:-1] < 0)
    assert found.rows.ids[bare, 0].tolist() == alignment.pivot_ids[bare + 1].tolist()
    one = int(np.flatnonzero(at[:-1] >= 0)[0])
    ids, logprobs, tail = (array[at[one] : at[one] + 1] for array in rows)
    single = mapping.project(ids, logprobs, tail, "max")
    assert row_of(found.rows, one) == row_of(single, 0)
    with pytest.raises(AlignmentError, match="'emm'"):
        source_positions(alignment, mapping, "emm")


def opening_row(pivot: str, source: str, entries: dict[str, float]) -> tuple[dict[str, float], float]:
    """The row after bos and its tail, by the pivot's strings. entries: what the source says there, by its strings."""
    text = "Hi there"
    alignment = align_tokens(text, *(tokenize(text, load(name)).opened(0) for name in (pivot, source)))
    (ids, logprobs, tail), actual = certain_rows(alignment)
    wide = np.full((len(ids), len(entries)), -1), np.full((len(ids), len(entries)), -np.inf)
    wide[0][:, 0], wide[1][:, 0] = ids[:, 0], logprobs[:, 0]
    wide[0][0], wide[1][0] = load(source).convert_tokens_to_ids(list(entries)), np.log(list(entries.values()))
    tail[0], actual[0] = 1 - sum(entries.values()), wide[1][0, 0]
    found = project_rows(alignment, vocabulary_map(pivot, source), (*wide, tail), actual).rows
    strings = load(pivot).convert_ids_to_tokens
    return {strings(id_): mass for id_, mass in row_of(found, 0).items()}, found.tail[0]


def test_a_space_that_only_the_source_brings_is_conditioned_on():
    """SentencePiece begins a text with ``▁Hi``, a byte-level tokenizer with ``Hi``."""
    # "ing" does not follow a space: the text has ruled it out.
    entries, tail = opening_row("qwen", "mistral", {"▁Hi": 0.4, "▁The": 0.2, "ing": 0.2, "▁It": 0.1})
    stays = 0.1 * 7 / 9  # of the tail, as of what is listed
    whole = 0.7 + stays
    assert entries == pytest.approx({"Hi": 0.4 / whole, "The": 0.2 / whole, "It": 0.1 / whole})
    assert tail == pytest.approx(stays / whole)


def test_a_space_that_only_the_pivot_brings_is_put_before_the_entries():
    entries, tail = opening_row("mistral", "qwen", {"Hi": 0.4, "The": 0.3, "It": 0.1})
    assert entries == pytest.approx({"▁Hi": 0.4, "▁The": 0.3, "▁It": 0.1})
    assert tail == pytest.approx(0.2)
