"""Parts of the report against slow and obvious ones: who taught, axes, the arrangement of coefficients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusekit import artifacts as artifact
from fusekit.artifacts import joined_hash
from fusekit.merge_methods.provenance import MergeRecord, TensorRecord
from fusekit.report import text
from fusekit.report.facts import Coefficients, Facts, Training
from fusekit.report.page import (
    MOST_POINTS,
    chart,
    given_text,
    heat_map,
    made,
    short_names,
    teachers,
    thinned,
    ticks,
    training_rows,
)


def test_who_taught_is_what_training_counted(finished: Path) -> None:
    facts = Facts(finished)
    for source in ("one", "two"):
        assert teachers(facts.targets[source]) == [{"rows": 48, "shares": {"pivot": 0.25, source: 0.75}}]


@pytest.mark.parametrize("counts", [{}, {"rows": 0.0}, {"rows": 4.0, "chosen/one": 3.0}])
def test_who_taught_where_little_was_counted(counts: dict[str, float]) -> None:
    found = teachers(Training(target="one", sources=["one"], counts=counts))
    assert [part["shares"] for part in found] == ([{"pivot": 0.0, "one": 0.75}] if counts.get("rows") else [])


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
    drawn = chart("t", [("a", "c1", [(1.0, 5.0), (50.0, 0.013)]), ("b", "c2", [(1.0, 3.0)]), ("c", "c3", [])])
    assert drawn is not None
    [curve] = drawn["curves"]
    assert (curve["name"], curve["first"], curve["least"], curve["last"]) == ("a", 5.0, 0.013, 0.013)
    places = [tuple(map(float, pair.split())) for pair in curve["path"][1:].split("L")]
    assert all(drawn["left"] <= x <= drawn["right"] and drawn["top"] <= y <= drawn["bottom"] for x, y in places)
    assert chart("t", [("a", "c1", [(1.0, 5.0)])]) is None
    flat = chart("t", [("a", "c1", [(1.0, 2.0), (2.0, 2.0)])])
    assert flat is not None
    assert len({label for _, label in flat["y"]}) == len(flat["y"])


def test_coefficients_are_arranged_by_layer_and_module() -> None:
    record = MergeRecord()
    shares = {"model.layers.10.mlp.experts.0.w1.weight": 0.2, "model.layers.10.mlp.experts.1.w1.weight": 0.4}
    shares |= {"model.layers.2.self_attn.q_proj.weight": 0.9, "model.norm.weight": 0.5, "model.layers.2.bias": 0.1}
    for name, share in shares.items():
        record.tensors[name] = TensorRecord("varm", {}, {"out/a": share, "out/b": 1 - share})
    found = heat_map(Coefficients.model_validate(record.as_dict()))
    assert found is not None
    assert (found["models"], found["layers"], found["tensors"]) == (["a", "b"], [2, 10], 5)
    assert found["modules"] == ["self_attn.q_proj", "mlp.experts.*.w1", "bias"]
    experts = found["cells"][(10, "mlp.experts.*.w1")]
    assert experts["shares"] == pytest.approx([0.3, 0.7])
    assert [cell["name"] for cell in found["outside"]] == ["model.norm.weight"]
    assert found["reach"] == pytest.approx(0.4)
    assert found["selected"] is None
    assert short_names(["x/a", "y/a", "z/b"]) == {"x/a": "x/a", "y/a": "y/a", "z/b": "b"}
    assert heat_map(Coefficients(tensors={})) is None


def test_numbers_and_names_as_people_read_them() -> None:
    counts = (None, 951_424, 7_241_732_096, 405e9, 1.2e12, 999)
    assert list(map(text.scaled, counts)) == ["–", "0.95 M", "7.24 B", "405 B", "1.20 T", "999"]
    assert list(map(text.seconds, (None, 3.14, 72, 7500))) == ["–", "3.1 s", "1 min 12 s", "2 h 05 min"]
    assert list(map(text.listed, (["a"], ["a", "b", "c"]))) == ["a", "a, b and c"]
    assert text.name("a\n b\x00\u202e\ud800") == "a b\\u0000\\u202e\\ud800"
    assert text.shorten("abcdefghij", 5) == "ab…ij"


def test_the_recipe_as_given_is_what_is_not_default(finished: Path) -> None:
    said = given_text(Facts(finished).recipe)
    assert all(line in said for line in ("max_length: 64", "model: org/pivot", "select_topk: 1.0"))
    assert "epochs" not in said
    assert given_text({"preset": "of another version", "sources": []}) == ""


def test_the_time_of_a_target_is_its_manifests_or_else_the_trainers(run: Path) -> None:
    artifact.seal(run / "targets" / "one", "distill", {}, {"seconds": 3.0})
    (run / "targets" / "two" / artifact.MANIFEST).unlink()
    rows = {row["name"]: row["seconds"] for row in training_rows(Facts(run))}
    assert rows == {"targets/one": 3.0, "targets/two": 12.5, "baseline": 12.5}


def test_an_artifact_is_identified_by_its_files_but_not_by_the_card(finished: Path) -> None:
    known = artifact.read(finished / "merged")
    assert known is not None
    found = {one["place"]: one for one in made(Facts(finished))}
    hashes = [f"{name} {file.xxh3}" for name, file in known.files.items() if name != "README.md"]
    assert found["merged"]["content"] == joined_hash(hashes)
    assert list(found)[:2] == ["data", "captures/pivot"]
