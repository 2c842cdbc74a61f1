"""What a teacher is worth: sums of nats by case, the ratio of the chain rule, and what is warned of."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fusekit.alignment.cases import Case
from fusekit.alignment.worth import MOST_NATS, RATIO_LIMIT, TeacherWorth

UNTAUGHT = (Case.NO_ROW, Case.UNLINKED)


def example(cases: list[Case], teacher: list[float], pivot: list[float] | None, source: float) -> TeacherWorth:
    worth = TeacherWorth("prefix")
    add(worth, cases, teacher, pivot, source)
    return worth


def add(worth: TeacherWorth, cases: list[Case], teacher: list[float], pivot: list[float] | None, source: float) -> None:
    worth.add(
        np.array(cases),
        ~np.isin(cases, UNTAUGHT),
        teacher=np.array(teacher),
        pivot=None if pivot is None else np.array(pivot),
        source=source,
    )


def test_figures_by_hand() -> None:
    worth = example(
        [Case.SAME, Case.CLOSES, Case.CLOSES, Case.UNLINKED], [1.0, 2.0, 5.0, 99.0], [1.5, 3.0, 3.0, 2], 8.0
    )
    assert worth.per_label(Case.SAME) == (1.0, 1.5)
    assert worth.per_label(Case.CLOSES) == (3.5, 3.0)
    assert worth.per_label(Case.UNLINKED) == (None, 2.0)
    assert worth.per_label(Case.LONGER) == (None, None)
    assert worth.ratio == (1 + 2 + 5 + 2) / 8  # a label without a row counts as the pivot has it
    assert [case for case in Case if worth.is_worse(case)] == [Case.CLOSES]
    by_ratio, by_case = worth.warnings
    assert "1.25" in by_ratio
    assert all(word in by_case for word in ("closes", "3.500", "3.000", "2 labels"))
    found = json.loads(json.dumps(worth.to_dict(), allow_nan=False))
    assert found["cases"]["closes"] == {"labels": 2, "teacher": 3.5, "pivot": 3.0, "worse": True}
    assert found["cases"].keys() == {"same", "closes", "unlinked"}
    assert (found["examples"], found["labels"], found["ratio"], found["source_nats"]) == (1, 4, 1.25, 8.0)
    assert found["warnings"] == worth.warnings


def test_many_examples_equal_a_loop() -> None:
    random = np.random.default_rng(0)
    worth, rows, source = TeacherWorth("em"), [], 0.0
    for _ in range(30):
        cases = [Case(int(case)) for case in random.integers(1, len(Case), random.integers(0, 20))]
        teacher, pivot = random.exponential(size=(2, len(cases))).tolist()
        nats = float(random.exponential() * len(cases))
        add(worth, cases, teacher, pivot, nats)
        rows += list(zip(cases, teacher, pivot, strict=True))
        source += nats
    for case in Case:
        of_case = [row for row in rows if row[0] == case]
        assert worth.labels[case] == len(of_case)
        teacher_mean, pivot_mean = worth.per_label(case)
        if not of_case:
            assert (teacher_mean, pivot_mean) == (None, None)
            continue
        assert pivot_mean == pytest.approx(math.fsum(p for _, _, p in of_case) / len(of_case))
        if case in UNTAUGHT:
            assert teacher_mean is None
        else:
            assert teacher_mean == pytest.approx(math.fsum(t for _, t, _ in of_case) / len(of_case))
    projected = math.fsum(p if case in UNTAUGHT else t for case, t, p in rows)
    assert worth.ratio == pytest.approx(projected / source)
    assert worth.examples == 30


@pytest.mark.parametrize(
    ("source", "teacher", "warned"),
    [(1.0, RATIO_LIMIT, False), (1.0, RATIO_LIMIT + 1e-6, True), (2.0, 2.0, False), (2.0, 1.0, False)],
)
def test_a_ratio_above_the_limit_is_warned_of(source: float, teacher: float, warned: bool) -> None:
    assert bool(example([Case.SAME], [teacher], [9.0], source).warnings) == warned


def test_the_pivot_may_be_as_bad_as_its_teacher_but_not_better() -> None:
    assert not example([Case.SAME], [2.0], [2.0], 2.0).warnings
    (warning,) = example([Case.SAME], [2.0], [1.999], 2.0).warnings
    assert "same" in warning


def test_without_the_pivot_its_column_is_empty() -> None:
    whole = example([Case.SAME, Case.LONGER], [1.0, 1.0], None, 2.0)
    assert whole.per_label(Case.SAME) == (1.0, None)
    assert (whole.ratio, whole.warnings) == (1.0, [])
    assert whole.to_dict()["cases"]["same"]["pivot"] is None
    gap = example([Case.SAME, Case.UNLINKED], [1.0, 0.0], None, 2.0)
    assert gap.ratio is None  # nobody says what the label without a row costs
    both = example([Case.SAME], [1.0], [1.0], 1.0)
    add(both, [Case.SAME], [1.0], None, 1.0)
    assert both.per_label(Case.SAME) == (1.0, None)


def test_a_label_that_a_row_rules_out_leaves_finite_figures() -> None:
    worth = example([Case.RULE, Case.RULE], [np.inf, 1.0], [1.0, 1.0], 2.0)
    assert worth.per_label(Case.RULE) == ((MOST_NATS + 1) / 2, 1.0)
    json.dumps(worth.to_dict(), allow_nan=False)


def test_nothing_was_counted() -> None:
    found = TeacherWorth("prefix").to_dict()
    assert (found["examples"], found["ratio"], found["cases"], found["warnings"]) == (0, None, {}, [])
    assert found["mass_survived"] == {"rows": 0, "mean": None, "p1": None, "p10": None, "p50": None, "p90": None}


def test_surviving_mass() -> None:
    worth, nothing = TeacherWorth("em"), np.zeros(0)
    survived = np.array([1.0, 0.5, 0.5, 0.0])
    empty = np.zeros(0, np.int64)
    worth.add(empty, empty.astype(bool), teacher=nothing, pivot=nothing, source=0.0, survived=survived)
    found = worth.to_dict()["mass_survived"]
    assert (found["rows"], found["mean"], found["p50"], found["p90"]) == (4, 0.5, 0.5, 1.0)
    assert "em" in worth.summary[1]
