"""Rows met with captures by key, candidates judged over the same bytes, and targets fused from them."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from fusekit.alignment.rows import AlignedRows, Case
from fusekit.distillation.batching import FusionCollator
from fusekit.distillation.dataset import FusionDataset, join
from fusekit.distillation.fusion import metrics_of, projected_ce
from fusekit.distillation.projections import Projection, label_nll, label_rows
from fusekit.distillation.settings import FusionSettings
from fusekit.errors import DistillationError
from fusekit.types import CapturedRow, Message, Row, TopK
from tests.distillation import runs, worlds

PIVOT, SOURCE, MAP = worlds.PIVOT, worlds.SOURCE, worlds.vocabulary_map()
ROWS = worlds.conversations(9)


def captured(rows: list[Row] = ROWS, sharpness: float = 1.0) -> dict[str, CapturedRow]:
    return worlds.captured(rows, SOURCE, seed=1, sharpness=sharpness)


def dataset(rows: list[Row], sources: dict[str, dict[str, CapturedRow]], **options: object) -> FusionDataset:
    given: dict[str, object] = {"pivot": worlds.captured(ROWS, PIVOT), "fusion": FusionSettings()}
    given |= {"projections": dict.fromkeys(sources, Projection(MAP))}
    return FusionDataset(rows, sources=sources, **given | options)  # type: ignore[arg-type]


def test_rows_are_joined_by_key_whatever_their_order() -> None:
    source = captured()
    backwards = dict(reversed(source.items()))
    lacking = {key: row for key, row in source.items() if key != ROWS[4].key}
    extra = worlds.conversations(1, seed=99)[0]
    lacking[extra.key] = worlds.certain(worlds.read(extra, SOURCE))
    straight, reversed_, partial = (dataset(ROWS, {"s": rows}) for rows in (source, backwards, lacking))
    for i in range(len(ROWS)):
        for name, value in straight[i].items():
            np.testing.assert_array_equal(value, reversed_[i][name])
            if i != 4 and name != "typical":  # a median over all rows
                np.testing.assert_array_equal(value, partial[i][name])
    assert partial.joined.missing == {"s": [ROWS[4].key]}
    assert partial.joined.report[2] == "s: 8 examples matched, 1 missing"


def test_a_row_that_a_source_lacks_is_not_taught_by_it() -> None:
    source = captured()
    del source[ROWS[4].key]
    example = dataset(ROWS, {"s": source}, fusion=FusionSettings(include_pivot=False))[4]
    assert "target_ids" not in example
    assert (example["labels"] >= 0).any()
    counts = runs.counts_of(dataset(ROWS, {"s": source}), 4)
    assert counts["chosen/pivot"] == 1.0
    assert counts["asked"] == 0.0


def test_duplicates_count_once() -> None:
    joined = join([*ROWS, ROWS[3]], {"s": captured()})
    assert [row.key for row in joined.rows] == [row.key for row in ROWS]
    assert joined.report == ["9 examples of data, 1 more are copies of them", "s: 9 examples matched"]


GROUPED = Projection(MAP, "grouped")
ALONE = {"pivot": None, "fusion": FusionSettings(include_pivot=False)}


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["s"], {"projections": {}}, "no projection into the pivot's vocabulary for s"),
        (["s"], {"pivot": None, "tokenizer": worlds.Reader(PIVOT)}, "include_pivot need what the pivot said"),
        (["s"], ALONE, "need the pivot's tokens"),
        (["pivot"], {}, "cannot be called 'pivot'"),
        (
            ["s"],
            {**ALONE, "tokenizer": worlds.Reader(PIVOT), "projections": {"s": Projection(MAP, tail="back_off")}},
            "back_off for s",
        ),
        (["s", "t"], {"projections": dict.fromkeys("st", GROUPED)}, r"s and t .* mode pairwise"),
    ],
)
def test_what_does_not_go_together_is_refused(sources: list[str], options: dict, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        dataset(ROWS, dict.fromkeys(sources, captured()), **options)


def test_a_model_of_other_data_is_refused() -> None:
    other = captured(worlds.conversations(3, seed=50))
    with pytest.raises(DistillationError, match=r"s has none of 9 examples of data.*captured from other data"):
        dataset(ROWS, {"s": other})
    with pytest.raises(DistillationError, match="no examples of data"):
        join([], {})


def test_rows_that_the_pivots_store_lacks_are_read_or_left_out() -> None:
    own = worlds.captured(ROWS[:5], PIVOT)
    assert len(dataset(ROWS, {"s": captured()}, pivot=own)) == 5
    read = dataset(ROWS, {"s": captured()}, pivot=own, tokenizer=worlds.Reader(PIVOT))
    assert len(read) == 9
    np.testing.assert_array_equal(read[7]["input_ids"], worlds.read(ROWS[7], PIVOT).ids)
    assert read[7]["target_taught"].any()


def test_a_teacher_is_judged_by_what_it_teaches_over_the_labels_that_all_teach() -> None:
    nll = np.array([1.0, 2.0, 4.0, 8.0])
    rows = TopK(np.zeros((4, 1), np.int64), np.zeros((4, 1)), np.zeros(4))
    cases = np.array([Case.SAME, Case.ONE_HOT, Case.SAME, Case.UNLINKED])
    own, given, nothing = (AlignedRows(rows, c, c) for c in (cases * 0 + Case.SAME, cases, cases * 0 + Case.NO_ROW))
    assert projected_ce([(own, nll), (given, nll / 2)]) == [2.5, 1.25]
    assert projected_ce([(own, nll), (nothing, nll)]) == [3.75, np.inf]
    with pytest.raises(DistillationError, match="bits_per_byte"):
        projected_ce([(own, nll), (given, None)])


def test_what_is_typical_of_a_data_set_is_the_mean_of_the_best_models_of_its_rows() -> None:
    own, theirs, others = (worlds.captured(ROWS, PIVOT), captured(ROWS[1:], sharpness=2.0), captured(sharpness=1.5))
    data = dataset(ROWS, {"s": theirs, "t": others}, pivot=own)
    names = {row.dataset for row in ROWS}
    for name in names:
        keys = [row.key for row in ROWS if row.dataset == name]
        pivots = [own[key].bits_per_byte for key in keys]
        best = [min(model[key].bits_per_byte for model in (own, theirs, others) if key in model) for key in keys]
        assert data.typical[name].tolist() == pytest.approx([np.mean(pivots), np.mean(best)])
    assert names == data.typical.keys()
    assert data[0]["typical"].tolist() == data.typical[ROWS[0].dataset].tolist()


def test_the_better_model_of_a_row_teaches_it() -> None:
    """A pivot that is the best may leave it to the text."""
    good = {row.key: worlds.certain(worlds.read(row, SOURCE)) for row in ROWS[:4]}
    sources = {"s": {**captured(sharpness=-60.0), **good}}
    data, judging = dataset(ROWS, sources), dataset(ROWS, sources, fusion=FusionSettings(pivot_teaches=False))
    for i, row in enumerate(ROWS):
        example = data[i]
        assert runs.counts_of(data, i)["chosen/s"] == float(i < 4)
        rows = data.pivot[row.key].rows  # type: ignore[index]
        if i < 4:
            rows = label_rows(row, worlds.read(row, PIVOT), good[row.key], Projection(MAP)).rows
        np.testing.assert_array_equal(example["target_ids"], rows.ids)
        np.testing.assert_allclose(example["target_tail"], rows.tail, atol=1e-6)
        np.testing.assert_array_equal(judging[i]["target_ids"], example["target_ids"])
        np.testing.assert_array_equal(judging[i]["target_taught"], example["target_taught"] & (i < 4))
        assert example["target_taught"].any()


def test_rewards_say_who_teaches_a_row() -> None:
    rewards = {"pivot": {row.key: 0.0 for row in ROWS}, "s": {row.key: 1e5 * (-1) ** i for i, row in enumerate(ROWS)}}
    data = dataset(ROWS, {"s": captured()}, fusion=FusionSettings(function="reward_softmax"), rewards=rewards)
    assert [runs.counts_of(data, i)["chosen/s"] for i in range(3)] == [1.0, 0.0, 1.0]


def test_the_better_model_of_a_label_teaches_it() -> None:
    """At token level every label has the row, of those there are, that gives it most."""
    data = dataset(ROWS, {"s": captured(sharpness=2.0)}, fusion=FusionSettings(level="token"))
    chosen = set()
    for i, row in enumerate(ROWS):
        tokens, example = worlds.read(row, PIVOT), data[i]
        own = data.pivot[row.key]  # type: ignore[index]
        other = label_rows(row, tokens, data.sources["s"][row.key], Projection(MAP))  # type: ignore[index]
        nll = np.stack([-own.actual, label_nll(other.rows, tokens.ids[tokens.label_positions])])
        nll[1, ~other.taught] = np.inf
        best = nll.argmin(axis=0)
        chosen |= set(best.tolist())
        for j, side in enumerate(best):
            found = worlds.masses(TopK(example["target_ids"], example["target_logprobs"], example["target_tail"]), j)
            assert found == pytest.approx(worlds.masses((own, other)[side].rows, j), rel=1e-5)
    assert chosen == {0, 1}


def test_examples_are_the_same_every_time_however_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data, size = runs.data(), sum(array.nbytes for array in runs.data()[0].values())
    again = pickle.loads(pickle.dumps(data))
    monkeypatch.setattr("fusekit.distillation.dataset.KEPT_BYTES", size)
    small = pickle.loads(pickle.dumps(data))
    for i in (0, 1, 0, 1):
        for name, value in data[i].items():
            np.testing.assert_array_equal(value, again[i][name])
            np.testing.assert_array_equal(value, small[i][name])
    assert data[1]["target_ids"] is data[1]["target_ids"]
    assert small[0]["target_ids"] is small[0]["target_ids"]
    assert small[1]["target_ids"] is not small[1]["target_ids"]  # there was room for one
    small[0].clear()
    assert "input_ids" in small[0]


def test_metrics_are_their_definitions() -> None:
    row = ROWS[0]
    source = worlds.guessing(worlds.read(row, SOURCE), len(SOURCE))
    size = sum(len(message.content.encode()) for message in row.messages if message.role == "assistant")
    assert metrics_of([source], "bits_per_byte") == [pytest.approx(source.cross_entropy / math.log(2) / size)]
    assert metrics_of([source], "token_ce") == [pytest.approx(-np.mean(source.actual))]


@pytest.mark.parametrize("metric", ["token_ce", "bits_per_byte"])
def test_rows_cut_at_other_places_are_judged_over_what_all_have(metric: str) -> None:
    row = Row((Message("user", "the"), Message("assistant", "several models learn what each model knows")))
    whole = worlds.guessing(worlds.read(row, PIVOT), len(PIVOT))
    short = worlds.guessing(worlds.read(row, SOURCE, limit=(1, 20)), len(SOURCE), seed=1)
    end = int(short.tokens.ends[-1])
    ours, theirs = metrics_of([whole, short], metric)
    nll = n = 0.0
    covered = 0
    for j, position in enumerate(whole.tokens.label_positions):
        if whole.tokens.ends[position] <= end and position < len(whole.tokens) - 1:
            nll, n, covered = nll - whole.actual[j], n + 1, int(whole.tokens.ends[position])
    expected = nll / n if metric == "token_ce" else nll / math.log(2) / covered
    assert ours == pytest.approx(expected)
    assert theirs == pytest.approx(metrics_of([short], metric)[0])


def test_the_nll_of_a_label_outside_the_entries_is_a_bound() -> None:
    rows = TopK(
        np.array([[3, 5], [3, -1], [3, 5]]),
        np.log(np.array([[0.6, 0.1], [0.9, 1.0], [0.5, 0.5]])),
        np.array([0.3, 0.05, 0.0]),
    )
    nll = label_nll(rows, np.array([5, 4, 4]))
    np.testing.assert_allclose(nll, [-math.log(0.1), -math.log(0.05), math.inf])


def test_a_batch_numbers_its_stretches_apart():
    data = dataset(
        ROWS[:4],
        {"s": captured()},
        projections={"s": Projection(worlds.vocabulary_map("em"), "chunks")},
        fusion=FusionSettings(include_pivot=False, metric="bits_per_byte"),
    )
    examples = [data[i] for i in range(4)]
    batch = FusionCollator()(examples)
    stretches = [sorted({*example["target_chunks"].tolist()} - {-1}) for example in examples]
    assert len({*batch["targets"].chunks.tolist()} - {-1}) == sum(map(len, stretches))


def test_the_pivot_is_judged_by_the_groups_of_its_labels():
    """A label outside the list counts as what the pivot gave it, not as the most that the list leaves to it."""
    own, said = worlds.captured(ROWS, PIVOT, k=3), captured()
    data = dataset(ROWS, {"s": said}, pivot=own, projections={"s": GROUPED})
    outside = 0
    for i, row in enumerate(ROWS):
        mine = own[row.key]
        labels = mine.tokens.ids[mine.tokens.label_positions].tolist()
        taught = label_rows(row, mine.tokens, said[row.key], GROUPED, mine).taught
        losses = []
        for j, label in enumerate(labels):
            listed = worlds.masses(mine.rows, j)
            mass = sum(p for id_, p in listed.items() if GROUPED.groups[id_] == GROUPED.groups[label])
            losses.append(-math.log(max(mass, math.exp(mine.actual[j]))))
            outside += mass == 0
        assert data[i]["cross_entropies"][0] == pytest.approx(np.mean(np.array(losses)[taught]))
    assert outside > 10
