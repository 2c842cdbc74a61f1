"""What a source is worth as a teacher, measured on captures of toy models, of the demo's, and of real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fusekit.alignment.rows import Case
from fusekit.cli import cli
from fusekit.distillation.projections import Projection, label_nll, label_rows
from fusekit.distillation.worth import FEWEST_LABELS, MOST_NATS, RATIO_LIMIT, TeacherWorth, measure
from fusekit.errors import DistillationError
from tests.distillation import worlds

DEMO = Path(__file__).parents[2] / "demo"
REAL = "FUSEKIT_REAL_MODELS"
PAIR = ("smollm2-135m-instruct", "gemma-3-270m")
PIVOT, SOURCE, MAP = worlds.PIVOT, worlds.SOURCE, worlds.vocabulary_map()
ROWS = worlds.conversations(9)


OWN, SAID = (worlds.captured(ROWS, tokenizer, seed=7) for tokenizer in (PIVOT, SOURCE))


@pytest.mark.parametrize("tail", ["back_off", "listed_share"])
def test_figures_equal_a_loop_over_labels(tail: str) -> None:
    projection = Projection(MAP, tail=tail)
    worth = measure(ROWS, OWN, SAID, projection)
    sums: dict[Case, list[tuple[float, float]]] = {}
    projected = nats = 0.0
    for row in ROWS:
        own, said = OWN[row.key], SAID[row.key]
        given = label_rows(row, own.tokens, said, projection, own)
        teacher = label_nll(given.rows, own.tokens.ids[own.tokens.label_positions])
        for i, case in enumerate(given.cases.tolist()):
            sums.setdefault(Case(case), []).append((float(teacher[i]), -float(own.actual[i])))
            projected += float(teacher[i]) if given.taught[i] else -float(own.actual[i])
        nats -= float(said.actual.sum())
    assert worth.ratio == pytest.approx(projected / nats)
    for case, pairs in sums.items():
        teacher_mean, pivot_mean = worth.per_label(case)
        assert pivot_mean == pytest.approx(np.mean([p for _, p in pairs]))
        if case is Case.UNLINKED:
            assert teacher_mean is None
        else:
            assert teacher_mean == pytest.approx(np.mean([t for t, _ in pairs]))
    assert (worth.vocabulary, worth.tail, worth.examples) == ("prefix", tail, 9)


def test_the_mass_that_is_carried_is_that_of_the_mapped_entries() -> None:
    exact = worlds.vocabulary_map("em")
    shares = []
    for said in SAID.values():
        for ids, logprobs in zip(said.rows.ids, said.rows.logprobs, strict=True):
            listed = {int(i): float(np.exp(p)) for i, p in zip(ids, logprobs, strict=True) if i >= 0}
            shares.append(sum(p for i, p in listed.items() if exact.targets[i] >= 0) / sum(listed.values()))
    worth = measure(ROWS, OWN, SAID, Projection(exact))
    figures = {"mean": np.mean(shares), **{f"p{p}": np.percentile(shares, p) for p in (1, 10, 50)}}
    assert worth.to_dict()["mass_carried"] == pytest.approx(figures, abs=1e-6)
    assert np.mean(shares) < 1


def test_a_one_hot_is_no_teacher() -> None:
    plain = measure(ROWS, OWN, SAID, Projection(MAP, conditioning=False))
    filled = measure(ROWS, OWN, SAID, Projection(MAP, conditioning=False, one_hot=True))
    assert filled.labels[Case.ONE_HOT] > 0
    assert filled.per_label(Case.ONE_HOT)[0] is None
    assert filled.ratio == pytest.approx(plain.ratio)


def test_an_examples_end_is_where_both_models_have_read() -> None:
    whole = measure(ROWS, OWN, SAID, Projection(MAP))
    cut = {}
    for row in ROWS:  # without its last label, the end of the turn
        tokens = worlds.read(row, SOURCE, limit=(len(row.messages) - 1, len(row.messages[-1].content.encode())))
        cut[row.key] = worlds.guessing(tokens, len(SOURCE), seed=7)
    shorter = measure(ROWS, OWN, cut, Projection(MAP))
    assert shorter.labels.sum() == whole.labels.sum() - len(ROWS)
    assert shorter.source < whole.source


def test_a_sample_is_spread_over_the_rows_that_both_have() -> None:
    source = {key: said for key, said in SAID.items() if key != ROWS[3].key}
    assert measure(ROWS, OWN, source, Projection(MAP)).examples == 8
    ends = {row.key: source[row.key] for row in (ROWS[0], ROWS[8])}
    two, both_ends = (measure(ROWS, OWN, given, Projection(MAP), 2) for given in (source, ends))
    assert two.to_dict() == both_ends.to_dict()


def test_rows_in_another_vocabulary_and_of_other_data_are_refused() -> None:
    with pytest.raises(DistillationError, match="vocabulary map"):
        measure(ROWS, OWN, SAID, Projection(None))
    with pytest.raises(DistillationError, match=f"the source has none of 1 example of data.*{ROWS[1].key}"):
        measure(ROWS[:1], OWN, {ROWS[1].key: SAID[ROWS[1].key]}, Projection(MAP))


def worth_of(cases: list[Case], teacher: list[float], pivot: list[float], source: float) -> TeacherWorth:
    worth, taught = TeacherWorth("prefix"), ~np.isin(cases, (Case.NO_ROW, Case.UNLINKED))
    nats = {"teacher": np.array(teacher), "pivot": np.array(pivot)}
    worth.add(np.array(cases, int), taught, **nats, source=source, carried=np.zeros(0))
    return worth


def test_worth_by_hand() -> None:
    cases = [Case.SAME, Case.CLOSES, Case.CLOSES, Case.UNLINKED]
    worth = worth_of(cases, [1.0, 2.0, 5.0, 99.0], [1.5, 3.0, 3.0, 2], 8.0)
    assert worth.per_label(Case.LONGER) == (None, None)
    assert worth.ratio == (1 + 2 + 5 + 2) / 8  # a label without a row counts as the pivot has it
    (by_ratio,) = worth.warnings
    assert "1.25" in by_ratio
    found = json.loads(json.dumps(worth.to_dict(), allow_nan=False))
    assert found["cases"] == {
        "same": {"labels": 1, "teacher": 1.0, "pivot": 1.5, "worse": False},
        "closes": {"labels": 2, "teacher": 3.5, "pivot": 3.0, "worse": True},
        "unlinked": {"labels": 1, "teacher": None, "pivot": 2.0, "worse": False},
    }
    assert (found["examples"], found["labels"], found["ratio"], found["source_nats"]) == (1, 4, 1.25, 8.0)
    nothing = TeacherWorth("em").to_dict()
    assert (nothing["ratio"], nothing["cases"], nothing["warnings"]) == (None, {}, [])
    assert {*nothing["mass_carried"].values()} == {None}


@pytest.mark.parametrize(
    ("source", "teacher", "warned"),
    [(1.0, RATIO_LIMIT, False), (1.0, RATIO_LIMIT + 1e-6, True), (2.0, 2.0, False), (2.0, 1.0, False)],
)
def test_a_ratio_above_the_limit_is_warned_of(source: float, teacher: float, warned: bool) -> None:
    assert bool(worth_of([Case.SAME], [teacher], [9.0], source).warnings) == warned


@pytest.mark.parametrize(("labels", "pivot", "warned"), [(0, 2.0, False), (0, 1.999, True), (-1, 1.0, False)])
def test_a_case_of_many_labels_that_the_pivot_knows_better_is_warned_of(labels, pivot, warned) -> None:
    n = FEWEST_LABELS + labels
    found = worth_of([Case.SAME] * n, [2.0] * n, [pivot] * n, 2.0 * n).warnings
    assert len(found) == warned
    assert not warned or all(word in found[0] for word in ("same", "2.000", "1.999", f"{n} labels"))


def test_a_label_that_a_row_rules_out_leaves_finite_figures() -> None:
    worth = worth_of([Case.RULE, Case.RULE], [np.inf, 1.0], [1.0, 1.0], 2.0)
    assert worth.per_label(Case.RULE) == ((MOST_NATS + 1) / 2, 1.0)
    json.dumps(worth.to_dict(), allow_nan=False)


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


TEXTS = (
    "Die Straßenbahn hielt gegenüber dem alten Rathaus, und die Fahrgäste stiegen trotz des Regens ohne Eile aus.",
    "Wer zum ersten Mal nach Lübeck kommt, wundert sich über die sieben Türme und die schmalen Gänge dazwischen.",
    "Le marché du samedi commence avant l'aube : les maraîchers déchargent leurs cageots et s'interpellent.",
    "On n'apprend pas une langue étrangère en un été, mais on y gagne le goût de recommencer l'année suivante.",
    "The ferry leaves at seven in the morning and comes back after dark, unless the wind turns to the north.",
    "def mean(values):\n    return sum(values) / len(values) if values else 0.0\n",
)
DEMOS = DEMO / "models" / "pivot", DEMO / "sources" / "neox"
REALS = [Path(os.environ.get(REAL, "")) / name for name in PAIR]
NOT_HERE = pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} names no folder with {' and '.join(PAIR)}")


@pytest.mark.parametrize(
    ("pair", "records"),
    [
        (DEMOS, (DEMO / "rows" / "train.jsonl").read_text().splitlines()[::36][:24]),
        pytest.param(REALS, [json.dumps({"text": text}) for text in TEXTS], marks=NOT_HERE),
    ],
    ids=["demo", "real"],
)
def test_a_pair_of_models_obeys_the_chain_rule(pair: list[Path], records: list[str], tmp_path: Path) -> None:
    """And ``fusekit inspect alignment`` warns of every case of many labels whose teacher is worse than the pivot."""
    data, stores = tmp_path / "rows.jsonl", [tmp_path / "pivot", tmp_path / "source"]
    data.write_text("\n".join(records))
    for model, store in zip(pair, stores, strict=True):
        invoke("capture", model, data, store, "--top-k", 32, "--max-length", 256, "--quiet")
    to = ["--data", data, "--stores", *stores, "--json", tmp_path / "found.json"]
    output = invoke("inspect", "alignment", *pair, *to)
    found = json.loads((tmp_path / "found.json").read_text())["worth"]
    assert all(f"warning: {line}" in output for line in found["warnings"])
    assert (found["vocabulary"], found["tail"], found["examples"]) == ("prefix", "back_off", len(records))
    assert found["mass_carried"]["mean"] > 0
    assert found["ratio"] <= RATIO_LIMIT
    for name, case in found["cases"].items():
        worse = case["teacher"] is not None and case["teacher"] > case["pivot"]
        assert case["worse"] == worse
        warned = worse and case["labels"] >= FEWEST_LABELS
        assert any(f"case {name} " in line for line in found["warnings"]) == warned, name
