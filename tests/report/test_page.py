"""The report as a page: well-formed, self-contained, safe against its data, reproducible, honest if half done."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fusekit import artifacts as artifact
from fusekit.artifacts import joined_hash, weights_hash
from fusekit.capturing.store import Store
from fusekit.cli import cli
from fusekit.disk import output_lock
from fusekit.errors import StorageError
from fusekit.merge_methods.provenance import MergeRecord, TensorRecord
from fusekit.report import text
from fusekit.report.card import write_report
from fusekit.report.facts import Facts
from fusekit.report.page import MOST_POINTS, chart, heat_map, page, ticks
from tests.report.worlds import STAGES, make_run

VOID = {"meta", "link", "br"}
ALLOWED = VOID | {
    *("html", "head", "title", "style", "body", "header", "main", "section", "footer", "nav", "h1", "h2", "h3", "p"),
    *("span", "b", "a", "ul", "li", "dl", "dt", "dd", "div", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("code", "pre", "details", "summary", "figure", "figcaption"),
    *("svg", "g", "path", "circle", "line", "text"),
}


class Page(HTMLParser):
    """Tags with their attributes, texts, and what is wrong with the nesting."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.parents: list[tuple[str, ...]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.parents.append(tuple(self.open))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    return page(Facts(finished))


def shown(run: Path) -> str:
    """The text of the page of a run."""
    found = Page(page(Facts(run)))
    assert found.wrong == []
    return found.text


def test_the_page_is_well_formed_and_accessible(html: str) -> None:
    found = Page(html)
    assert found.wrong == found.open == []
    assert {tag for tag, _ in found.elements} <= ALLOWED
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    headings = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    assert len(found.all("table")) == len(found.all("caption")) > 8
    assert all("scope" in attributes for attributes in found.all("th"))
    drawings = [attributes for attributes in found.all("svg") if attributes.get("aria-hidden") != "true"]
    assert len(drawings) == 2
    assert all(a["role"] == "img" and a["aria-labelledby"] in ids for a in drawings)
    # What is wide scrolls in a box that the keyboard reaches.
    boxes = [a for a in found.all("div") if "box" in a.get("class", "").split()]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in boxes)
    parents = [above for (tag, _), above in zip(found.elements, found.parents, strict=True) if tag == "table"]
    assert all("div" in above for above in parents)


def test_what_the_page_says_of_a_run(html: str) -> None:
    text = Page(html).text
    for said in (
        "One model, the pivot, learned from 2 others: one and two.",
        "24 examples",
        "Fusion of one and two into org/pivot",
        # 3.0, 2.75, 2.5, 2.25, 2.0, 1.75, 1.5, each with 0.01 more per skill
        "Merged model 1.510 bits per byte",
        "2.760 merged: −45.3 %, better",
        "quarantined: NaN at label 2",
        "no system turn",
        "pivot 25.0 %, one 75.0 %",
        "mlp.experts.*.w1",
        "… 1 more group",
        "arc_easy",
        # what the teachers are worth: (1 + 2.5 + 1) / 4.5, and of two, whose tokens that close a label know less
        "1.00 times",
        "1.22 times",
        "Warning",
    ):
        assert said in text, said
    assert text.count("(worse than the pivot)") == 1


def test_the_page_loads_nothing_and_says_so(html: str) -> None:
    found = Page(html)
    policy = next(a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    for tag, attributes in found.elements:
        assert not {"src", "srcset", "action", "data", "poster", "background"} & attributes.keys(), tag
        href = attributes.get("href", "#")
        assert href.startswith(("#", "https://huggingface.co/")) if tag == "a" else href in ("#", "data:,")
    targets = {a["href"][1:] for a in found.all("a") if a["href"].startswith("#")}
    assert targets <= {attributes.get("id") for _, attributes in found.elements}
    assert "url(" not in html
    assert "@import" not in html
    assert len(html) < 1_000_000


def test_the_same_artifacts_give_the_same_bytes(finished: Path, html: str, tmp_path: Path, monkeypatch) -> None:
    copy = shutil.copytree(finished, tmp_path / "elsewhere" / "other name")
    monkeypatch.chdir(tmp_path)
    assert page(Facts(copy)) == html
    assert str(finished) not in html


@pytest.mark.parametrize("until", STAGES[:-1])
def test_a_run_that_is_half_done_has_a_report_that_says_so(tmp_path: Path, until: str) -> None:
    run = make_run(tmp_path / "out", until=until)
    found, done = shown(run), STAGES.index(until)
    says = {
        "capture": "Not captured completely yet: pivot, one and two.",
        "align": "Not aligned yet: one and two.",
        "distill": "No model is distilled yet.",
        "merge": "The distilled models are not merged yet.",
        "evaluate": "Nothing is evaluated yet.",
    }
    for stage, line in says.items():
        assert (line in found) == (STAGES.index(stage) > done), stage
    assert ("The 2 distilled models were then merged" in found) == (until == "merge")
    assert (write_report(run) == [f"{run}/report.html"]) == (until != "merge")  # else there is a card, too


def test_a_run_without_merge_and_evaluation_is_not_called_unfinished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", until="distill")
    edit(run, merge=None, evaluate=None)
    (run / "targets" / "two" / "training.json").unlink()
    (run / "targets" / "two.training").mkdir()
    found = shown(run)
    assert "The recipe has no merge: the distilled models are the result." in found
    assert "The recipe has no evaluation." in found
    assert "not merged yet" not in found
    assert "Training has begun and is not finished: two." in found


DAMAGED = (
    "models.json",
    "data/counts.json",
    "data/manifest.json",
    "captures/one/manifest.json",
    "alignment/one/quality.json",
    "alignment/one/samples.json",
    "alignment/one/worth.json",
    "targets/one/training.json",
    "baselines/sft/training.json",
    "merged/coefficients.json",
    "results.json",
    "evaluation/merged/manifest.json",
    "merged/manifest.json",
)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"log": 7, "models": [], "groups": {}}', b"[" * 9999], ids=range(4))
def test_damaged_files_are_named_and_left_out(run: Path, content: bytes) -> None:
    for name in DAMAGED:
        before = (run / name).read_bytes()
        (run / name).write_bytes(content)
        (problem,) = dict.fromkeys(line.partition(":")[0] for line in Facts(run).problems)
        assert problem in (name, str(Path(name).parent)), name
        (run / name).write_bytes(before)
    assert Facts(run).problems == []
    for name in DAMAGED:
        (run / name).write_bytes(content)
    assert shown(run).count("Cannot be read and is left out: ") >= len(DAMAGED) - 1


def edit(run: Path, **changes: Any) -> None:
    """Save another recipe, as a run does as soon as what is there is of it."""
    path = run / "recipe.resolved.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


def written(run: Path) -> tuple[str, str]:
    """The text of the page, and the card."""
    write_report(run)
    return Page((run / "report.html").read_text()).text, (run / "merged" / "README.md").read_text()


def test_what_was_made_of_other_models_than_the_recipes_is_left_out(run: Path) -> None:
    """A source more: the merged model before is not the recipe's, and once it is merged again, its scores are not."""
    _, before = written(run)
    shutil.copytree(run / "targets" / "one", run / "targets" / "three")
    edit(run, sources=[{"model": name} for name in ("one", "two", "three")])
    text, card = written(run)
    assert card == before
    assert "merged/ is left out" in text
    assert "The scores of merged are left out" in text
    assert "The distilled models are not merged yet." in text
    shutil.rmtree(run / "merged")
    inputs = {"targets": {name: weights_hash(run / "targets" / name) for name in ("one", "two", "three")}}
    artifact.publish(run / "merged", "merge", inputs, lambda into: (into / "model.safetensors").write_bytes(b"others"))
    text, card = written(run)
    assert "The scores of merged are left out" in text
    for said in (text, card):
        assert "The 3 distilled models were then merged" in said
        assert "1.510" not in said
    assert "1.760" in text
    edit(run, sources=[{"model": "one"}])
    text, _ = written(run)
    assert "The scores of sources/two, targets/two and merged are left out" in text
    assert list(Facts(run).targets) == ["one"]


def test_a_target_that_was_trained_anew_is_not_the_one_that_was_merged(run: Path) -> None:
    _, before = written(run)
    (run / "targets" / "two" / "model.safetensors").write_text("other weights")
    artifact.seal(run / "targets" / "two", "distill", {"target": "two"})
    text, card = written(run)
    assert card == before
    assert "merged/ is left out" in text
    assert "The scores of targets/two and merged are left out" in text
    assert "2.010" in text  # targets/one, which is as it was


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert isinstance(result.exception, StorageError)
    assert "recipe.resolved.yml" in str(result.exception)
    assert [path.name for path in tmp_path.parent.glob(f".{tmp_path.name}*")] == []


def test_while_a_run_is_going_on_card_and_half_page_are_left_to_it(run: Path) -> None:
    (run / ".report.html.0.tmp").write_text("half")
    with output_lock(run.resolve()):
        result = CliRunner().invoke(cli, ["report", str(run)])
    assert result.exit_code == 0
    assert (run / "report.html").read_text().endswith("</html>\n")
    assert (run / "merged" / "README.md").read_text() == "# The card of mergekit\n"
    assert {path.name: path.read_text() for path in run.glob(".*.tmp")} == {".report.html.0.tmp": "half"}


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_enclose_what_they_are_for(low: float, width: float) -> None:
    found = ticks(low, low + width)
    tolerance = 1e-6 * max(abs(low), width, 1)
    assert found[0] <= low + tolerance
    assert found[-1] >= low + width - tolerance
    assert found == sorted(set(found))
    assert len(found) < 12


def test_a_chart_stays_in_its_frame_and_keeps_its_ends() -> None:
    many = [(float(i), math.sin(i / 500)) for i in range(20_000)]
    drawn = chart({("a", "c1"): [(1.0, 5.0), (50.0, 0.013)], ("b", "c2"): [(1.0, 3.0)], ("c", "c3"): many})
    assert drawn is not None
    assert [(curve["name"], curve["first"]) for curve in drawn["curves"]] == [("a", 5.0), ("c", 0.0)]
    for curve in drawn["curves"]:
        places = [tuple(map(float, pair.split())) for pair in curve["path"][1:].split("L")]
        assert len(places) <= MOST_POINTS + 2
        assert places[-1] == curve["end"]
        assert all(drawn["left"] <= x <= drawn["right"] and drawn["top"] <= y <= drawn["bottom"] for x, y in places)
    assert chart({("a", "c1"): [(1.0, 5.0)]}) is None
    assert chart({("a", "c1"): [(1.0, 2.0), (2.0, 2.0)]}) is not None


def record_merge(run: Path, tensors: dict[str, dict[str, float]]) -> None:
    """A merge of these coefficients, by tensor and model."""
    record = MergeRecord(None, {name: TensorRecord("varm", {}, given) for name, given in tensors.items()})
    (run / "merged" / "coefficients.json").write_text(record.to_json())


def test_coefficients_are_arranged_by_layer_and_module(run: Path) -> None:
    shares = {"model.layers.10.mlp.experts.0.w1.weight": 0.2, "model.layers.10.mlp.experts.1.w1.weight": 0.4}
    shares |= {"model.layers.2.self_attn.q_proj.weight": 0.9, "model.norm.weight": 0.5, "model.layers.2.bias": 0.1}
    record_merge(run, {name: {"/out/one": share, "/out/two": 1 - share} for name, share in shares.items()})
    found = heat_map(Facts(run))
    assert found is not None
    assert (list(found["cells"]), found["layers"], found["tensors"]) == (["one", "two"], [2, 10], 5)
    assert found["modules"] == ["model.norm", "self_attn.q_proj", "bias", "mlp.experts.*.w1"]
    assert found["cells"]["one"]["mlp.experts.*.w1", 10] == pytest.approx(0.3)
    assert found["cells"]["two"]["model.norm", None] == 0.5
    assert found["reach"] == pytest.approx(0.4)
    assert found["figures"]["one"] == pytest.approx((0.42, 0.1, 0.9))


def test_one_distilled_model_needs_no_map_of_coefficients(run: Path) -> None:
    record_merge(run, {"model.norm.weight": {"/out/one": 1.0}})
    text = shown(run)
    assert "all of every matrix comes from it" in text
    assert "Coefficients by distilled model" not in text


def test_scores_that_were_measured_again_are_not_shown_as_they_were(run: Path) -> None:
    scores = run / "evaluation" / "targets" / "one" / "scores.json"
    known = json.loads(scores.read_text())
    skill = next(iter(known["bits_per_byte"]))
    scores.write_text(json.dumps(known | {"bits_per_byte": {**known["bits_per_byte"], skill: 9.875}}))
    assert "The scores of targets/one are left out" in shown(run)


def test_every_artifact_has_the_hash_of_its_files(run: Path) -> None:
    known = artifact.read(run / "data")
    store = Store.open(run / "captures" / "one", incomplete=True)
    assert known is not None
    for content in (
        joined_hash(f"{name} {file.xxh3}" for name, file in known.files.items()),
        joined_hash(record.xxh3 for record in store.records.values()),
    ):
        assert content in shown(run)


def test_numbers_and_names_as_people_read_them() -> None:
    counts = (None, 951_424, 7_241_732_096, 405e9, 1.2e12, 999)
    assert list(map(text.scaled, counts)) == ["–", "0.951 M", "7.24 B", "405 B", "1.2 T", "999"]
    assert list(map(text.seconds, (None, 3.14, 72, 7500))) == ["–", "3.1 s", "1 min 12 s", "2 h 05 min"]
    assert text.name("a\n b\x00\u202e\ud800") == "a b\\u0000\\u202e\\ud800"
