"""The report as a page: well-formed, self-contained, safe against its data, reproducible, honest if half done."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fusekit import artifacts as artifact
from fusekit.artifacts import output_lock, weights_hash
from fusekit.cli import cli
from fusekit.errors import StorageError
from fusekit.report.facts import read_facts
from fusekit.report.page import page
from fusekit.report.write import write_report
from tests.report.worlds import HOSTILE, STAGES, make_run

VOID = {"meta", "link", "br", "input", "wbr"}
ALLOWED = VOID | {
    *("html", "head", "title", "style", "body", "header", "main", "section", "footer", "nav", "h1", "h2", "h3", "p"),
    *("span", "b", "a", "ul", "li", "dl", "dt", "dd", "div", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("code", "pre", "details", "summary", "figure", "figcaption", "fieldset", "legend", "label"),
    *("svg", "g", "path", "rect", "circle", "line", "text", "desc", "defs", "marker"),
}
GARBAGE = (b"", b"{", b"[1]", b'{"log": 7, "models": [], "groups": {}', b"\xff\xfe", b"[" * 9999)


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
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.parents.append(tuple(self.open))
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
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="module")
def html(out: Path) -> str:
    return page(read_facts(out))


def test_the_page_is_well_formed_and_accessible(html: str) -> None:
    found = Page(html)
    assert found.wrong == []
    assert found.open == []
    assert {tag for tag, _ in found.elements} <= ALLOWED
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    headings = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    assert len(found.all("table")) == len(found.all("caption")) > 8
    assert all("scope" in attributes for attributes in found.all("th"))
    drawings = [attributes for attributes in found.all("svg") if attributes.get("aria-hidden") != "true"]
    assert len(drawings) >= 4
    assert all(attributes.get("role") == "img" for attributes in drawings)
    assert all("aria-label" in a or set(a.get("aria-labelledby", "?").split()) <= set(ids) for a in drawings)
    labelled = {attributes["for"] for attributes in found.all("label")}
    assert {attributes["id"] for attributes in found.all("input")} == labelled
    # What is wide scrolls in a box that the keyboard reaches; nothing is as wide as a table outside of one.
    boxes = [a for a in found.all("div") if "box" in a.get("class", "").split()]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in boxes)
    depth = [parents for (tag, _), parents in zip(found.elements, found.parents, strict=True) if tag == "table"]
    assert all("div" in parents for parents in depth)


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
    assert "url(" not in html.replace("url(#arrow)", "")
    assert "@import" not in html
    assert len(html) < 1_000_000


def test_whatever_comes_from_data_is_escaped(tmp_path: Path) -> None:
    html = page(read_facts(make_run(tmp_path / "out", hostile=True)))
    found = Page(html)
    assert found.wrong == []
    assert {tag for tag, _ in found.elements} <= ALLOWED
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert not any("javascript:" in a["href"] for a in found.all("a"))
    assert "\u202e" not in html  # it would turn round what follows
    shown = HOSTILE.replace("\u202e", "\\u202e")
    places = found.text.count(shown)
    assert places > 25  # recipe, models, skills, data, keys, refusals, quarantine, samples, tensors, host
    for before in ("org/pivot", "NaN at label 2", "no system turn", "machine", "norm", "to", "a", "rows"):
        assert before + shown[:20] in found.text, before


def test_the_same_artifacts_give_the_same_bytes(out: Path, html: str, tmp_path: Path, monkeypatch) -> None:
    copy = tmp_path / "elsewhere" / "other name"
    shutil.copytree(out, copy)
    monkeypatch.chdir(tmp_path)
    assert page(read_facts(copy)) == html
    assert str(out) not in html


@pytest.mark.parametrize("until", STAGES[:-1])
def test_a_run_that_is_half_done_has_a_report_that_says_so(tmp_path: Path, until: str) -> None:
    run = make_run(tmp_path / "out", until=until)
    found = Page(page(read_facts(run)))
    assert found.wrong == []
    done = STAGES.index(until)
    says = {
        "capture": "Not captured completely yet: pivot, one and two.",
        "align": "Not aligned yet: one and two.",
        "distill": "No target is trained yet.",
        "merge": "The targets are not merged yet.",
        "evaluate": "Nothing is evaluated yet.",
    }
    for stage, line in says.items():
        assert (line in found.text) == (STAGES.index(stage) > done), stage
    assert ("The 2 targets were then merged" in found.text) == (until == "merge")


def test_a_run_without_merge_and_evaluation_is_not_called_unfinished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", until="distill")
    text = (run / "recipe.resolved.yml").read_text()
    cut = text[: text.index("merge:")] + "merge: null\nevaluate: null\n"
    (run / "recipe.resolved.yml").write_text(cut)
    (run / "targets" / "three.training").mkdir()
    found = Page(page(read_facts(run))).text
    assert "The recipe has no merge: the targets are the result." in found
    assert "The recipe has no evaluation." in found
    assert "not merged yet" not in found
    assert "Training has begun and is not finished: three." in found


DAMAGED = (
    "models.json",
    "data/counts.json",
    "data/manifest.json",
    "captures/one/manifest.json",
    "alignment/one/quality.json",
    "alignment/one/samples.json",
    "targets/one/training.json",
    "baselines/sft/training.json",
    "merged/coefficients.json",
    "merged/manifest.json",
    "merge.yml",
    "results.json",
    "evaluation/merged/manifest.json",
)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"log": 7, "models": [], "groups": {}', b"\xff\xfe", b"[" * 9999]
)
def test_damaged_files_are_named_and_left_out(out: Path, tmp_path: Path, content: bytes) -> None:
    run = tmp_path / "out"
    shutil.copytree(out, run)
    whole = {name: (run / name).read_bytes() for name in DAMAGED}
    for name, before in whole.items():
        (run / name).write_bytes(content)
        (problem,) = dict.fromkeys(line.partition(":")[0] for line in read_facts(run).problems)
        assert problem in (name, str(Path(name).parent)), name
        (run / name).write_bytes(before)
    assert read_facts(run).problems == []
    for name in DAMAGED:
        (run / name).write_bytes(content)
    found = Page(page(read_facts(run)))
    assert found.wrong == []
    assert found.text.count("Cannot be read and is left out: ") >= len(DAMAGED) - 1


def edit(run: Path, **changes: Any) -> None:
    """Save another recipe, as a run does as soon as what is there is of it."""
    path = run / "recipe.resolved.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


def merge_anew(run: Path, *targets: str) -> None:
    shutil.rmtree(run / "merged")

    def write(into: Path) -> None:
        (into / "model.safetensors").write_bytes(b"others")
        (into / "README.md").write_text("# The card of mergekit\n")

    inputs = {"targets": {name: weights_hash(run / "targets" / name) for name in targets}}
    artifact.publish(run / "merged", "merge", inputs, write)


def written(run: Path) -> tuple[str, str]:
    """The text of the page, and the card."""
    write_report(run)
    return Page((run / "report.html").read_text()).text, (run / "merged" / "README.md").read_text()


def test_scores_of_the_merged_model_before_are_not_those_of_the_new_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    shutil.copytree(run / "targets" / "one", run / "targets" / "three")
    edit(run, sources=[{"model": name} for name in ("one", "two", "three")])
    merge_anew(run, "one", "two", "three")
    text, card = written(run)
    assert "The scores of merged are left out" in text
    assert "The 3 targets were then merged" in text
    assert "The 3 targets were then merged" in card
    assert "1.510" not in text + card
    assert "1.760" in text
    edit(run, evaluate=None)
    text, card = written(run)
    assert "The scores in results.json are left out" in text
    assert "bits per byte" not in (text + card).lower()


def test_scores_that_were_made_anew_are_not_told_by_the_results_of_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    known = artifact.read(run / "evaluation" / "merged")
    assert known is not None
    (run / "evaluation" / "merged" / "scores.json").write_text('{"bits_per_byte": {"add": 9.5}}')
    text, _ = written(run)
    assert "The scores of merged are left out" in text
    assert "1.510" not in text


def test_a_merged_model_of_another_recipe_is_absent_and_its_card_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    _, before = written(run)
    edit(run, merge=None, sources=[{"model": name} for name in ("one", "two", "three")])
    text, card = written(run)
    assert card == before
    assert "merged/ is left out" in text
    assert "The scores of merged are left out" in text
    assert "were then merged" not in text
    edit(run, merge={"merge_method": "linear"})
    text, card = written(run)
    assert card == before
    assert "one and two, but the recipe's targets are one, three and two" in text
    assert "The targets are not merged yet." in text


def test_a_target_that_was_trained_anew_is_not_the_one_that_was_merged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    _, before = written(run)
    (run / "targets" / "two" / "model.safetensors").write_text("other weights")
    artifact.seal(run / "targets" / "two", "distill", {"target": "two"})
    text, card = written(run)
    assert card == before
    assert "merged/ is left out" in text
    assert "(two)" in text
    assert "The scores of targets/two are left out" in text
    assert "2.010" in text  # targets/one, which is as it was


def test_targets_that_the_recipe_does_not_have_do_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", ("one", "two", "three"))
    edit(run, sources=[{"model": name} for name in ("one", "two")])
    merge_anew(run, "one", "two")
    shutil.copytree(run / "targets" / "one", run / "targets" / ".one.staging-1a2b3c4d")
    text, card = written(run)
    assert list(read_facts(run).targets) == ["one", "two"]
    for found in (text, card):
        assert "The 2 targets were then merged" in found
        assert "three" not in found.replace("targets/three", "").replace("sources/three", "")
        assert "staging" not in found
    assert "The scores of sources/three and targets/three are left out" in text


def test_of_a_recipe_that_this_version_cannot_read_every_target_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    edit(run, ancient=True)
    (run / "targets" / "two.training").mkdir()
    facts = read_facts(run)
    assert (list(facts.targets), facts.left_out) == (["one", "two"], [])
    assert facts.merged is not None


def test_names_in_the_results_lead_nowhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    results = json.loads((run / "results.json").read_text())
    results["models"] |= dict.fromkeys(("/etc", "../../x", "a\x00b"), results["models"]["pivot"])
    (run / "results.json").write_text(json.dumps(results))
    facts = read_facts(run)
    assert facts.results is not None
    assert facts.problems == []
    assert len(facts.results.models) == 7
    assert Page(page(facts)).wrong == []


def test_a_folder_that_is_no_run_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"recipe\.resolved\.yml"):
        read_facts(tmp_path)
    for text in ("pivot: 1", "sources: [1]\npivot: {model: x}", "sources: [{name: ../x}]\npivot: {model: x}"):
        (tmp_path / "recipe.resolved.yml").write_text(text)
        with pytest.raises(StorageError, match=r"recipe\.resolved\.yml.*damaged"):
            read_facts(tmp_path)
    result = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert isinstance(result.exception, StorageError)
    assert [path.name for path in tmp_path.parent.glob(f".{tmp_path.name}*")] == []


def test_what_the_page_says_of_a_run(html: str) -> None:
    text = Page(html).text
    assert "One model, the pivot, learned from 2 others: one and two." in text
    assert "24 examples" in text
    assert "Fusion of one and two into org/pivot" in text
    # 3.0, 2.75, 2.5, 2.25, 2.0, 1.75, 1.5, each with 0.01 more per skill
    assert "Merged model 1.510 bits per byte" in text
    assert "2.760 merged: −45.3 %, better" in text
    assert text.count("at 3 of 3 skills") == 2
    assert "quarantined: NaN at label 2" in text
    assert "no system turn" in text
    assert "all examples 48 25.0 % 75.0 %" in text
    assert "align 3.0 s" in text
    assert "mlp.experts.*.w1" in text
    assert "… 1 more group" in text
    assert "arc_easy" in text


def test_the_command_makes_page_and_card_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    first = CliRunner().invoke(cli, ["report", str(run)])
    assert first.exit_code == 0, first.output
    assert f"{run}/merged/README.md\n{run}/report.html\nreport: {run}/report.html\n" == first.output
    before = {path: path.stat().st_ino for path in run.rglob("*") if path.is_file()}
    assert CliRunner().invoke(cli, ["report", str(run)]).output == f"report: {run}/report.html\n"
    assert {path: path.stat().st_ino for path in run.rglob("*") if path.is_file()} == before
    assert CliRunner().invoke(cli, ["verify", "--quiet", str(run / "merged")]).exit_code == 0


def test_while_a_run_is_going_on_the_card_is_left_to_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    with output_lock(run.resolve()):
        result = CliRunner().invoke(cli, ["report", str(run)])
    assert result.exit_code == 0
    assert (run / "report.html").is_file()
    assert (run / "merged" / "README.md").read_text() == "# The card of mergekit\n"


def test_beside_a_run_the_half_of_its_page_is_left_to_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    theirs = run / ".report.html.0.tmp"  # what the run has written of its own page so far
    theirs.write_text("half")
    with output_lock(run.resolve()):
        result = CliRunner().invoke(cli, ["report", str(run)])
    assert result.exit_code == 0
    assert theirs.read_text() == "half"
    assert (run / "report.html").read_text().endswith("</html>\n")
    assert [path.name for path in run.glob(".*.tmp")] == [theirs.name]


def test_a_manifest_of_another_version_does_not_hide_the_rest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out")
    manifest = json.loads((run / "merged" / artifact.MANIFEST).read_text())
    (run / "merged" / artifact.MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    text = Page(page(read_facts(run))).text
    assert "Cannot be read and is left out: merged" in text
    assert "The scores of merged are left out" in text
    assert "1.760" in text  # of a target


def test_the_page_says_what_each_teacher_is_worth_and_warns(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", until="align")
    text = Page(page(read_facts(run))).text
    assert "1.00 times" in text  # (1 + 2.5 + 1) / 4.5: of one
    assert "1.22 times" in text  # of two, whose tokens that close a label know less than the pivot
    assert text.count("(worse than the pivot)") == 1
    assert all(word in text for word in ("3.500", "3.000", "Warning"))
    assert "was not measured" not in text
    (run / "alignment" / "one" / "worth.json").unlink()
    assert "was not measured" in Page(page(read_facts(run))).text
    (run / "alignment" / "two" / "worth.json").write_text('{"ratio": []}')
    assert any("alignment/two/worth.json" in line for line in read_facts(run).problems)
