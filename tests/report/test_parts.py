"""Parts of the report against slow and obvious ones: who taught, changes, axes, the arrangement of coefficients."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusekit import artifacts as artifact
from fusekit.artifacts import joined_hash
from fusekit.merge_methods.provenance import MergeRecord, TensorRecord
from fusekit.pipeline.layout import Layout
from fusekit.report import text
from fusekit.report.coefficients import heat_map, short_names
from fusekit.report.curves import MOST_POINTS, chart, thinned, ticks
from fusekit.report.facts import Facts, read_facts
from fusekit.report.provenance import made
from fusekit.report.records import Coefficients, Results
from fusekit.report.results import headline, metrics_of
from fusekit.report.sections import given_text, training_rows
from fusekit.report.teaching import teachers_of
from tests.report.worlds import make_run


def test_who_taught_is_what_training_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", until="distill")
    found = {teachers.target: teachers for teachers in teachers_of(read_facts(run))}
    for source in ("one", "two"):
        total, by_data = found[source].total, found[source].by_data
        assert total is not None
        assert (total.rows, total.shares) == (48, {"pivot": 0.25, source: 0.75})
        assert [(part.dataset, part.rows) for part in by_data] == [("a", 16), ("b", 32)]
        assert [part.shares for part in by_data] == [{"pivot": 0.5, source: 0.5}, {"pivot": 0.125, source: 0.875}]


@pytest.mark.parametrize("counts", [{}, {"rows": 0.0}, {"rows": 4.0, "chosen/one": 3.0}])
def test_who_taught_where_little_was_counted(tmp_path: Path, counts: dict[str, float]) -> None:
    run = make_run(tmp_path / "out", until="distill")
    path = run / "targets" / "one" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"counts": counts}))
    found = {teachers.target: teachers for teachers in teachers_of(read_facts(run))}["one"]
    assert found.by_data == []
    assert (found.total and found.total.shares) == ({"pivot": 0.0, "one": 0.75} if counts.get("rows") else None)


def test_tasks_of_lm_eval_have_no_mean_and_their_own_direction() -> None:
    models = {name: {"lm_eval": {"acc": a, "ppl": p}} for name, a, p in (("pivot", 0.5, 9.0), ("merged", 0.4, 8.0))}
    tasks = {"acc": {"metric": "acc,none", "higher_is_better": True}, "ppl": {"metric": "ppl,none"}}
    tasks["ppl"]["higher_is_better"] = False
    (metric,) = metrics_of(Results.model_validate({"models": models, "lm_eval": tasks}))
    assert metric.columns == ["acc (acc,none)", "ppl (ppl,none, lower is better)"]
    assert metric.direction == "each column says which way"
    pivot, merged = metric.lines
    assert [cell.best for cell in pivot.cells] == [True, False]
    assert [cell.best for cell in merged.cells] == [False, True]
    assert [cell.changes["pivot"].word for cell in merged.cells] == ["worse", "better"]
    assert metric.skills == 2
    assert metric.mean("merged") is None
    assert headline([metric]) is None


def results(**models: dict[str, dict[str, float | None]]) -> Results:
    return Results(models={name.replace("__", "/"): found for name, found in models.items()})


def test_changes_have_a_sign_and_a_word_and_the_best_is_marked() -> None:
    scores = results(
        pivot={"bits_per_byte": {"a": 2.0, "b": 4.0}, "exact_match": {"a": 0.5}},
        baseline={"bits_per_byte": {"a": 1.0, "b": 2.0}, "exact_match": {"a": 0.75}},
        targets__x={"bits_per_byte": {"a": 0.5, "b": None}},
        merged={"bits_per_byte": {"a": 1.0, "b": 1.0}, "exact_match": {"a": 0.625}, "lm_eval": {"arc": 0.25}},
    )
    bits, exact, other = metrics_of(scores)
    assert (bits.lower, exact.lower, other.lower) == (True, False, False)
    assert bits.columns == ["a", "b", "mean"]
    merged = bits.line("merged")
    assert merged is not None
    said = [{name: (c.shown, c.word) for name, c in cell.changes.items()} for cell in merged.cells]
    assert said[0] == {"pivot": ("−50.0 %", "better"), "baseline": ("±0.0 %", "same")}
    assert said[1] == {"pivot": ("−75.0 %", "better"), "baseline": ("−50.0 %", "better")}
    assert [cell.best for cell in merged.cells] == [False, True, True]
    target = bits.line("targets/x")
    assert target is not None
    assert [cell.shown for cell in target.cells] == ["0.500", "–", "–"]
    assert target.cells[0].best
    last = exact.line("merged")
    assert last is not None
    assert (last.cells[0].shown, last.cells[0].changes["baseline"].shown) == ("62.5", "−12.5 points")
    assert last.cells[0].changes["baseline"].word == "worse"
    assert last.cells[0].changes["pivot"].word == "better"
    head = headline([bits, exact, other])
    assert head is not None
    assert (head.merged.shown, head.wins, head.best) == ("1.000", {"pivot": 2, "baseline": 1}, "merged")
    assert headline([]) is None
    assert headline(metrics_of(results(pivot={"bits_per_byte": {"a": 1.0}}))) is None


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_enclose_what_they_are_for_and_are_round(low: float, width: float, about: int) -> None:
    found = ticks(low, low + width, about)
    tolerance = 1e-6 * max(abs(low), width, 1)
    assert found[0] <= low + tolerance
    assert found[-1] >= low + width - tolerance
    assert len(found) <= 2.5 * about + 3
    assert found == sorted(set(found))


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    points = [(float(i), math.sin(i / 500)) for i in range(20_000)]
    found = thinned(points)
    assert len(found) == MOST_POINTS + 2
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert all(abs(y - math.sin(x / 500)) < 0.02 for x, y in found)
    assert thinned(points[:50]) == points[:50]


def test_a_chart_stays_in_its_frame() -> None:
    made = chart("t", [("a", "c1", [(1.0, 5.0), (50.0, 0.013)]), ("b", "c2", [(1.0, 3.0)]), ("c", "c3", [])])
    assert made is not None
    assert [curve.name for curve in made.curves] == ["a"]
    places = [tuple(map(float, pair.split())) for pair in made.curves[0].path[1:].split("L")]
    assert all(made.left <= x <= made.right and made.top <= y <= made.bottom for x, y in places)
    assert made.values == [("a", "5.000", "0.013", "0.013")]
    assert chart("t", [("a", "c1", [(1.0, 5.0)])]) is None
    flat = chart("t", [("a", "c1", [(1.0, 2.0), (2.0, 2.0)])])
    assert flat is not None
    assert len({tick.says for tick in flat.y}) == len(flat.y)


def test_coefficients_are_arranged_by_layer_and_module() -> None:
    record = MergeRecord()
    shares = {"model.layers.10.mlp.experts.0.w1.weight": 0.2, "model.layers.10.mlp.experts.1.w1.weight": 0.4}
    shares |= {"model.layers.2.self_attn.q_proj.weight": 0.9, "model.norm.weight": 0.5, "model.layers.2.bias": 0.1}
    for name, share in shares.items():
        record.add(name, None, TensorRecord("varm", {}, {"out/a": share, "out/b": 1 - share}))
    found = heat_map(Coefficients.model_validate(record.as_dict()))
    assert found is not None
    assert (found.models, found.layers, found.tensors) == (["a", "b"], [2, 10], 5)
    assert found.modules == ["self_attn.q_proj", "mlp.experts.*.w1", "bias"]
    experts = found.cells[(10, "mlp.experts.*.w1")]
    assert (experts.tensors, experts.shares) == (2, pytest.approx([0.3, 0.7]))
    assert [cell.name for cell in found.outside] == ["model.norm.weight"]
    assert found.reach == pytest.approx(0.4)
    assert found.selected is None
    assert short_names(["x/a", "y/a", "z/b"]) == {"x/a": "x/a", "y/a": "y/a", "z/b": "b"}
    assert heat_map(Coefficients(tensors={})) is None


def test_numbers_and_names_as_people_read_them() -> None:
    assert [text.scaled(x) for x in (None, 951_424, 7_241_732_096, 405e9, 1.2e12, 999)] == [
        "–",
        "0.95 M",
        "7.24 B",
        "405 B",
        "1.20 T",
        "999",
    ]
    assert [text.seconds(x) for x in (None, 3.14, 72, 7500)] == ["–", "3.1 s", "1 min 12 s", "2 h 05 min"]
    assert [text.signed(x, 1) for x in (0.04, -0.06, 2, None)] == ["±0.0", "−0.1", "+2.0", "–"]
    assert text.fixed(float("nan")) == "–"
    assert (text.counted(1, "row"), text.counted(1344, "row")) == ("1 row", "1,344 rows")
    assert text.listed(["a"]) == "a"
    assert text.listed(["a", "b", "c"]) == "a, b and c"
    assert text.name("a\n b\x00\u202e\ud800") == "a b\\u0000\\u202e\\ud800"
    assert text.shorten("abcdefghij", 5) == "ab…ij"


def test_the_recipe_as_given_is_what_its_preset_does_not_say(tmp_path: Path) -> None:
    facts = read_facts(make_run(tmp_path / "out", until="data"))
    said = given_text(facts)
    assert "max_length: 64" in said
    assert "epochs" not in said
    assert "select_topk" not in said  # the preset's own
    assert "model: org/pivot" in said
    assert given_text(Facts(Layout(tmp_path), {"preset": "of another version", "sources": []}, [])) == ""


def test_a_target_with_a_manifest_is_named_by_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", until="distill")
    for place in ("targets/one", "baselines/sft"):  # of an earlier version
        (run / place / artifact.MANIFEST).unlink()
    before = {one.place: one for one in made(read_facts(run))}
    assert before["targets/one"].holds == "a checkpoint; the hash is of its inputs"
    assert before["targets/one"].seconds == 12.5
    sealed = artifact.seal(run / "targets" / "one", "distill", {}, {"seconds": 3.0, "host": "h"})
    facts = read_facts(run)
    after = {one.place: one for one in made(facts)}
    assert after["targets/one"].content == joined_hash(f"{n} {file.xxh3}" for n, file in sealed.files.items())
    assert list(after) == list(before)
    rows = {row.name: row.values["time"] for row in training_rows(facts)}
    assert rows == {"one": "3.0 s", "two": "12.5 s", "plain fine-tuning": "12.5 s"}
