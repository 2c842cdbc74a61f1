"""Sources' rows at the pivot's labels, against a plain loop and against what must come out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from fusekit.alignment import Predictions, project_rows, vocabulary_surfaces
from fusekit.alignment.alignment import TokenAlignment, align_tokens
from fusekit.alignment.ends import tokenize
from fusekit.alignment.rows import NO_ID, Case
from fusekit.alignment.vocabulary_map import VocabularyMap, pivot_groups, source_pieces
from fusekit.distillation.projections import LabelRows, Projection, label_rows
from fusekit.errors import AlignmentError
from fusekit.types import FRAGMENT, TEXT, CapturedRow, Message, Part, Row, TokenizedRow, TopK
from tests.distillation import worlds

PIVOT, SOURCE, ROLES, MAP = worlds.PIVOT, worlds.SOURCE, worlds.ROLES, worlds.vocabulary_map()
LEARN = Row((Message("user", "the"), Message("assistant", "several models learn what each model knows")))
TEXT_ROWS = [
    Row((Message(TEXT, "the naïve fusion of models"), Message(TEXT, "a 東京 text"), Message(FRAGMENT, "none of them"))),
]


def readings(
    rows: list[Row], pivot: object = PIVOT, source: object = SOURCE, k: int = 4
) -> Iterator[tuple[Row, TokenizedRow, CapturedRow]]:
    """Rows, each as the pivot reads it, and what a source says about it."""
    for row in rows:
        yield row, worlds.read(row, pivot), worlds.guessing(worlds.read(row, source), len(source), k)


def entry(rows: TopK, at: int) -> tuple[list[tuple[int, float]], float]:
    """One row as plain numbers, entries that have no id too."""
    pairs = [(int(i), float(p)) for i, p in zip(rows.ids[at], rows.logprobs[at], strict=True) if i != -1]
    return pairs, float(rows.tail[at])


def places(row: Row, pivot: TokenizedRow, source: CapturedRow) -> Iterator[tuple[int, int, int, TokenAlignment]]:
    """Labels whose message both have read: number, place of what predicts it, where the source's message starts."""
    for j, position in enumerate(pivot.label_positions.tolist()):
        message = int(pivot.message[position])
        (ours, before), (theirs, start) = pivot.content(message), source.tokens.content(message)
        at = position - 1 - before
        if 0 <= at < len(ours) - 1 and len(theirs) > 1:
            yield j, at, start, align_tokens(row.messages[message].content, ours, theirs)


def numbers(tokens: TokenizedRow) -> dict[int, int]:
    """The number of the label at a position."""
    return {int(p): j for j, p in enumerate(tokens.label_positions)}


def by_loop(row: Row, pivot: TokenizedRow, source: CapturedRow, conditioning: bool) -> list[object]:
    """Label by label: the message's tokens aligned, the one row picked out; None where there is none."""
    asked, found = numbers(source.tokens), dict.fromkeys(range(len(pivot.label_positions)))
    for label, at, start, alignment in places(row, pivot, source):
        m = len(alignment.source)
        ids, logprobs = np.full((m, 4), -1), np.full((m, 4), -np.inf)
        tail, actual = np.ones(m), np.zeros(m)
        for j in range(m - 1):
            number = asked.get(start + j + 1)
            if number is not None:
                w = source.rows.ids.shape[1]
                ids[j, :w], logprobs[j, :w] = source.rows.ids[number], source.rows.logprobs[number]
                tail[j], actual[j] = source.rows.tail[number], source.actual[number]
        aligned = project_rows(alignment, MAP, (ids, logprobs, tail), actual, conditioning=conditioning)
        found[label] = entry(aligned.rows, at) if aligned.taught[at] else None
    return list(found.values())


def plain(given: LabelRows) -> list[object]:
    return [entry(given.rows, j) if taught else None for j, taught in enumerate(given.taught.tolist())]


def same(a: list[object], b: list[object]) -> bool:
    """Whether rows have the same ids in the same order, and probabilities that are close."""
    ours, theirs = ([[] if row is None else [*chain(*row[0]), row[1]] for row in rows] for rows in (a, b))
    alike = [*map(len, ours)] == [*map(len, theirs)]
    return alike and np.allclose([*chain(*ours)], [*chain(*theirs)], rtol=0, atol=1e-9)


@pytest.mark.parametrize("conditioning", [True, False])
def test_rows_are_those_of_a_plain_loop(conditioning: bool) -> None:
    for row, pivot, source in readings(worlds.conversations(12) + TEXT_ROWS):
        given = label_rows(row, pivot, source, Projection(MAP, conditioning=conditioning))
        assert len(given.taught) == len(pivot.label_positions)
        assert same(plain(given), by_loop(row, pivot, source, conditioning))


def test_the_same_tokenizer_teaches_every_label() -> None:
    own = worlds.vocabulary_map(source=PIVOT)
    for row, tokens, source in readings(worlds.conversations(6) + TEXT_ROWS, source=PIVOT):
        given = label_rows(row, tokens, source, Projection(own))
        assert given.taught.all()
        assert given.linked.all()
        known = np.exp(source.rows.logprobs).sum(axis=1) + source.rows.tail
        np.testing.assert_allclose(np.exp(given.rows.logprobs).sum(axis=1) + given.rows.tail, known, atol=1e-9)


def test_a_template_token_between_content_and_end_has_no_teacher() -> None:
    row = Row((Message("user", "the"), Message("assistant", "a fusion")))
    tokens = worlds.read(row, PIVOT)
    at = len(tokens) - 1  # before the end of turn
    more = {"ids": PIVOT.convert_tokens_to_ids("<pad>"), "message": 1, "part": Part.TEMPLATE, "labels": True}
    more |= {"ends": len("a fusion"), "lows": len("a fusion")}
    pivot = replace(tokens, **{name: np.insert(getattr(tokens, name), at, value) for name, value in more.items()})
    given = label_rows(row, pivot, worlds.certain(worlds.read(row, SOURCE)), Projection(MAP))
    assert not given.taught[-2]
    assert given.taught[-1]
    assert given.rows.ids[-1, 0] == ROLES["end_of_turn"]


def test_what_a_source_was_not_asked_about_is_not_taught() -> None:
    pivot, tokens = worlds.read(LEARN, PIVOT), worlds.read(LEARN, SOURCE)
    labels = tokens.labels.copy()
    gap = int(tokens.label_positions[3])
    labels[gap] = False
    source = worlds.certain(replace(tokens, labels=labels))
    whole, given = (label_rows(LEARN, pivot, said, Projection(MAP)) for said in (worlds.certain(tokens), source))
    lost = whole.taught & ~given.taught
    assert lost.any()
    start, stop = tokens.ends[gap - 1], tokens.ends[gap]
    ends = pivot.ends[pivot.label_positions]
    begins = pivot.ends[pivot.label_positions - 1]
    crossing = (ends > start) & (begins < stop)
    assert (given.taught == (whole.taught & ~crossing)).all()
    some, every = ([p for p, t in zip(plain(of), given.taught, strict=True) if t] for of in (given, whole))
    assert same(some, every)


def test_only_the_common_beginning_is_taught() -> None:
    pivot = worlds.read(LEARN, PIVOT)
    source = worlds.certain(worlds.read(LEARN, SOURCE, limit=(1, 20)))
    given = label_rows(LEARN, pivot, source, Projection(MAP))
    ends = pivot.ends[pivot.label_positions]
    assert given.taught[ends <= source.tokens.ends[-1]].all()
    assert not given.taught[ends > 20].any()
    assert (given.cases[ends > 20] == Case.UNLINKED).any()


def test_warping_takes_the_rows_of_equal_tokens() -> None:
    """With one tokenizer the papers' rule finds all tokens equal, also the one before the content and the end."""
    same = worlds.vocabulary_map("em", source=PIVOT)
    for row, tokens, source in readings(worlds.conversations(4), source=PIVOT):
        given = label_rows(row, tokens, source, Projection(same, tokens="dtw", collisions="max"))
        assert (given.cases == Case.RULE).all()
        assert given.linked.all()
        for j in range(len(given.taught)):
            found, expected = (
                {i: p for i, p in worlds.masses(rows, j).items() if i >= len(worlds.SPECIALS)}
                for rows in (given.rows, source.rows)
            )
            assert found == pytest.approx(expected)


def test_rows_without_a_map_are_the_sources_own() -> None:
    ((row, pivot, source),) = readings(worlds.conversations(3)[1:2])
    given = label_rows(row, pivot, source, Projection(None))
    own = {entry_ids.tobytes() for entry_ids in source.rows.ids}
    assert given.taught.any()
    assert (given.taught <= given.linked).all()
    assert all(given.rows.ids[j].tobytes() in own for j in np.flatnonzero(given.taught))
    span = label_rows(row, pivot, source, Projection(MAP, conditioning=False))
    assert (span.taught <= given.taught).all()


def test_matched_rows_are_the_sources_own_with_the_pivots_ids_where_strings_are_equal() -> None:
    em = worlds.vocabulary_map("em")
    of = {i: t for i, t in enumerate(em.targets.tolist()) if t >= 0}
    kinds = set()
    for row, pivot, source in readings(worlds.conversations(6) + TEXT_ROWS, k=6):
        own = label_rows(row, pivot, source, Projection(None))
        given = label_rows(row, pivot, source, Projection(em, tokens="matched"))
        assert (given.taught == own.taught).all()
        assert (given.cases == own.cases).all()
        for j in np.flatnonzero(given.taught):
            (found, tail), (expected, rest) = entry(given.rows, j), entry(own.rows, j)
            assert [i for i, _ in found] == [of.get(i, NO_ID) for i, _ in expected]
            assert [p for _, p in found] == pytest.approx([p for _, p in expected])
            assert tail == pytest.approx(rest)
            kinds |= {i == NO_ID for i, _ in found}
    assert kinds == {True, False}


def test_matched_entries_of_equal_strings_are_added_and_others_are_not() -> None:
    """Source ids 10 and 11 are the pivot's 7; 12 and 13 are no tokens of the pivot."""
    em = worlds.vocabulary_map("em")
    targets = em.targets.copy()
    targets[10:14] = [7, 7, -1, -1]
    made = VocabularyMap(targets, "em", em.pivot, em.source)
    text = align_tokens("a", tokenize("a", PIVOT), worlds.tokenize("a", SOURCE))
    ours = text.pivot.opened(1)
    alignment = align_tokens("a", ours, ours)
    ids, mass = np.array([[12, 10, 13, 11, -1]] * 2), np.array([[0.3, 0.25, 0.2, 0.15, 0.0]] * 2)
    with np.errstate(divide="ignore"):
        said = Predictions(TopK(ids, np.log(mass), np.full(2, 0.1)), np.zeros(2))
    found = Projection(made, tokens="matched").apply(alignment, said)
    assert found.taught.tolist() == [True, False]
    assert found.rows.ids[0].tolist() == [7, NO_ID, NO_ID]
    assert np.exp(found.rows.logprobs[0]) == pytest.approx([0.4, 0.3, 0.2])
    assert found.rows.tail[0] == pytest.approx(0.1)
    with pytest.raises(AlignmentError, match=f"token id {len(SOURCE)} is outside"):
        Projection(made, tokens="matched").apply(
            alignment, Predictions(said.rows._replace(ids=ids + len(SOURCE) - 13), np.zeros(2))
        )


SIDES = pytest.mark.parametrize("sides", [(PIVOT, SOURCE), (SOURCE, PIVOT)], ids=["finer", "coarser"])


def followed(bytes_: bytes, sides) -> bytes | None:
    """The end of the chain of first tokens of first tokens, each of the other side."""
    ours, theirs = (vocabulary_surfaces(side) for side in sides)
    while True:
        cut = tokenize_bytes(bytes_, sides[1], theirs)
        if cut is None:
            return None
        again = tokenize_bytes(cut, sides[0], ours)
        if again == bytes_:
            return bytes_
        bytes_ = again


def tokenize_bytes(bytes_: bytes, tokenizer, surfaces) -> bytes | None:
    """The first token of a string in a text; for bytes that are no text the longest token that they begin with."""
    if bytes_ in surfaces.id_of:
        return bytes_
    try:
        return surfaces.of[tokenizer.encode(bytes_.decode(), add_special_tokens=False)[0]]
    except UnicodeDecodeError:
        return max((s for s in surfaces.id_of if bytes_.startswith(s)), key=len, default=None)


@SIDES
def test_a_group_is_what_both_tokenizers_begin_alike(sides):
    into = worlds.vocabulary_map("prefix", *sides)
    groups, surfaces = pivot_groups(into), vocabulary_surfaces(sides[0])
    assert groups[ROLES["end_of_turn"]] == ROLES["end_of_turn"]
    found = 0
    for id_ in surfaces.id_of.values():
        assert surfaces.of[groups[id_]] == followed(surfaces.of[id_], sides)
        assert groups[groups[id_]] == groups[id_]
        found += groups[id_] != id_
    assert found > 3
    assert groups[sides[0].convert_tokens_to_ids("<pad>")] == -1
    carried = into.targets  # no listed token leaves the student nothing to answer it with
    assert (groups[carried[carried >= 0]] >= 0).all()


@SIDES
def test_grouped_rows_at_links_are_the_sources_own_grouped(sides):
    """Entry by entry at every link: the mass of a group is that of the source tokens that begin with it."""
    how = Projection(worlds.vocabulary_map("prefix", *sides), "grouped", tail="keep", conditioning=False)
    carried, rows_seen, expected_rows = how.vocabulary_map.targets, 0, 0
    for row, tokens, said in readings(worlds.conversations(8), *sides, k=6):
        given = label_rows(row, tokens, said, how)
        asked = numbers(said.tokens)
        expected_rows += int(given.taught.sum())
        for j, place, start, alignment in places(row, tokens, said):
            if not given.taught[j]:
                continue
            at = int(alignment.source_at[place]) + start + 1
            number = asked[at]
            actual, expected, listed = int(said.tokens.ids[at]), {}, 0.0
            for u, p in {actual: math.exp(said.actual[number]), **worlds.masses(said.rows, number)}.items():
                v = int(tokens.ids[tokens.label_positions[j]]) if u == actual else int(carried[u])
                if v >= 0 and how.groups[v] >= 0:
                    expected[int(how.groups[v])] = expected.get(int(how.groups[v]), 0.0) + p
                    listed += p
            assert worlds.masses(given.rows, j) == pytest.approx(expected, abs=1e-9)
            assert given.rows.tail[j] == pytest.approx(1 - listed, abs=1e-9)
            rows_seen += 1
    assert rows_seen == expected_rows > 30


@SIDES
@pytest.mark.parametrize("tail", ["back_off", "listed_share"])
@pytest.mark.parametrize("tokens", ["span", "grouped"])
def test_a_source_certain_of_the_text_is_certain_of_the_labels(sides, tail, tokens):
    how, taught = Projection(worlds.vocabulary_map("prefix", *sides), tokens, tail=tail), 0
    for row in worlds.conversations(8) + (TEXT_ROWS if tokens == "span" else []):
        pivot = worlds.read(row, sides[0])
        given = label_rows(row, pivot, worlds.certain(worlds.read(row, sides[1])), how, worlds.certain(pivot))
        nll = how.nll(given.rows, pivot.ids[pivot.label_positions])
        assert (nll[given.taught] < 1e-9).all()
        assert (given.rows.tail[given.taught] < 1e-9).all()
        taught += int(given.taught.sum())
    assert taught > 50


@SIDES
def test_pieces_spell_the_token_and_weigh_one(sides):
    into = worlds.vocabulary_map("em", *sides)
    pivots, sources, weights = source_pieces(into)
    for id_ in np.unique(pivots).tolist():
        at = pivots == id_
        spelled = b"".join(into.source.of[i] for i in sources[at].tolist())
        assert at.sum() <= 3
        assert weights[at].sum() == pytest.approx(1)
        if id_ in set(into.pivot.id_of.values()):
            assert into.pivot.of[id_].startswith(spelled)
            assert spelled == into.pivot.of[id_] or at.sum() == 3
    assert {*into.pivot.id_of.values(), ROLES["end_of_turn"]} <= set(pivots.tolist())


@SIDES
def test_rows_of_stretches_are_those_of_a_plain_loop(sides):
    """Means of the source's rows, and its log-likelihoods; a stretch is taught whole or not at all."""
    into = worlds.vocabulary_map("em", *sides)
    pieces, chunks = Projection(into, "pieces"), Projection(into, "chunks")
    known = set(source_pieces(into)[1].tolist())
    several = 0
    for row, tokens, said in readings(worlds.conversations(8), *sides, k=6):
        means, nats = (label_rows(row, tokens, said, how) for how in (pieces, chunks))
        number, asked = numbers(tokens), numbers(said.tokens)
        seen: set[int] = set()
        for message in np.unique(tokens.message[tokens.labels]).tolist():
            (ours, start), (theirs, other) = tokens.content(message), said.tokens.content(message)
            for mine, its in align_tokens(row.messages[message].content, ours, theirs).groups[1:]:
                labels = [number[start + i] for i in range(mine.start, mine.stop) if start + i in number]
                rows = [asked[other + i] for i in range(its.start, its.stop) if other + i in asked]
                whole = len(labels) == mine.stop - mine.start and len(rows) == its.stop - its.start
                assert nats.taught[labels].all() if whole else not nats.taught[labels].any()
                if not whole:
                    continue
                assert len(set(nats.source_at[labels].tolist())) == 1
                assert np.exp(nats.rows.logprobs[labels, 0]) == pytest.approx(math.exp(said.actual[rows].sum()))
                expected: dict[int, float] = {}
                for i in rows:
                    for u, p in worlds.masses(said.rows, i).items():
                        if u in known:
                            expected[u] = expected.get(u, 0.0) + p / len(rows)
                for j in labels:
                    assert worlds.masses(means.rows, j) == pytest.approx(expected)
                    assert means.rows.tail[j] == pytest.approx(1 - sum(expected.values()))
                several += len(labels) > 1 or len(rows) > 1
                seen |= set(labels)
        assert set(np.flatnonzero(nats.taught).tolist()) == seen
    assert several > 20
