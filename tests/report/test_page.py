"""The report as a page: well-formed, self-contained, safe against its data, reproducible, honest if half done."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fusekit import artifacts as artifact
from fusekit.artifacts import weights_hash
from fusekit.cli import cli
from fusekit.disk import output_lock
from fusekit.errors import StorageError
from fusekit.report.card import write_report
from fusekit.report.facts import Facts
from fusekit.report.page import page
from tests.report.worlds import STAGES, make_run

VOID = {"meta", "link", "br", "input", "wbr"}
ALLOWED = VOID | {
    *("html", "head", "title", "style", "body", "header", "main", "section", "footer", "nav", "h1", "h2", "h3", "p"),
    *("span", "b", "a", "ul", "li", "dl", "dt", "dd", "div", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("code", "pre", "details", "summary", "figure", "figcaption", "fieldset", "legend", "label"),
    *("svg", "g", "path", "rect", "circle", "line", "text", "desc", "defs", "marker"),
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
    (run / "targets" / "three.training").mkdir()
    found = shown(run)
    assert "The recipe has no merge: the distilled models are the result." in found
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
    "alignment/one/worth.json",
    "targets/one/training.json",
    "baselines/sft/training.json",
    "merged/coefficients.json",
    "merged/manifest.json",
    "results.json",
    "evaluation/merged/manifest.json",
    "merge.yml",
)
WRONG = b'{"log": 7, "models": [], "groups": {}}'


@pytest.mark.parametrize("content", [b"", b"[1]", WRONG, b"\xff\xfe", b"[" * 9999], ids=range(5))
def test_damaged_files_are_named_and_left_out(run: Path, content: bytes) -> None:
    names = DAMAGED[:-1] if content == WRONG else DAMAGED  # which is a mapping
    whole = {name: (run / name).read_bytes() for name in names}
    for name, before in whole.items():
        (run / name).write_bytes(content)
        (problem,) = dict.fromkeys(line.partition(":")[0] for line in Facts(run).problems)
        assert problem in (name, str(Path(name).parent)), name
        (run / name).write_bytes(before)
    assert Facts(run).problems == []
    for name in names:
        (run / name).write_bytes(content)
    assert shown(run).count("Cannot be read and is left out: ") >= len(names) - 1


def edit(run: Path, **changes: Any) -> None:
    """Save another recipe, as a run does as soon as what is there is of it."""
    path = run / "recipe.resolved.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


def of_sources(*names: str) -> list[dict[str, str]]:
    return [{"model": name} for name in names]


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


def test_scores_of_the_merged_model_before_are_not_those_of_the_new_one(run: Path) -> None:
    shutil.copytree(run / "targets" / "one", run / "targets" / "three")
    edit(run, sources=of_sources("one", "two", "three"))
    merge_anew(run, "one", "two", "three")
    text, card = written(run)
    assert "The scores of merged are left out" in text
    assert "The 3 distilled models were then merged" in text
    assert "The 3 distilled models were then merged" in card
    assert "1.510" not in text + card
    assert "1.760" in text
    edit(run, evaluate=None)
    text, card = written(run)
    assert "The scores in results.json are left out" in text
    assert "bits per byte" not in (text + card).lower()


def test_scores_that_were_made_anew_are_not_told_by_the_results_of_before(run: Path) -> None:
    (run / "evaluation" / "merged" / "scores.json").write_text('{"bits_per_byte": {"add": 9.5}}')
    found = shown(run)
    assert "The scores of merged are left out" in found
    assert "1.510" not in found


def test_a_merged_model_of_another_recipe_is_absent_and_its_card_stays(run: Path) -> None:
    _, before = written(run)
    edit(run, merge=None, sources=of_sources("one", "two", "three"))
    text, card = written(run)
    assert card == before
    assert "merged/ is left out" in text
    assert "The scores of merged are left out" in text
    assert "were then merged" not in text
    edit(run, merge={"merge_method": "linear"})
    text, card = written(run)
    assert card == before
    assert "one and two, but the recipe's distilled models are one, three and two" in text
    assert "The distilled models are not merged yet." in text


def test_a_target_that_was_trained_anew_is_not_the_one_that_was_merged(run: Path) -> None:
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
    edit(run, sources=of_sources("one", "two"))
    merge_anew(run, "one", "two")
    shutil.copytree(run / "targets" / "one", run / "targets" / ".one.staging-1a2b3c4d")
    text, card = written(run)
    assert list(Facts(run).targets) == ["one", "two"]
    for found in (text, card):
        assert "The 2 distilled models were then merged" in found
        assert "three" not in found.replace("targets/three", "").replace("sources/three", "")
        assert "staging" not in found
    assert "The scores of sources/three and targets/three are left out" in text


def test_of_a_recipe_that_this_version_cannot_read_every_target_counts(run: Path) -> None:
    edit(run, ancient=True)
    (run / "targets" / "two.training").mkdir()
    facts = Facts(run)
    assert (list(facts.targets), facts.left_out) == (["one", "two"], [])
    assert facts.merged is not None


def test_names_in_the_results_lead_nowhere(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results["models"] |= dict.fromkeys(("/etc", "../../x", "a\x00b"), results["models"]["pivot"])
    (run / "results.json").write_text(json.dumps(results))
    facts = Facts(run)
    assert facts.results is not None
    assert facts.problems == []
    assert len(facts.results.models) == 7
    shown(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"recipe\.resolved\.yml"):
        Facts(tmp_path)
    for text in ("pivot: 1", "sources: [1]\npivot: {model: x}", "sources: [{name: ../x}]\npivot: {model: x}"):
        (tmp_path / "recipe.resolved.yml").write_text(text)
        with pytest.raises(StorageError, match=r"recipe\.resolved\.yml.*damaged"):
            Facts(tmp_path)
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
    for said in ("quarantined: NaN at label 2", "no system turn", "all examples 48 25.0 % 75.0 %", "align 3.0 s"):
        assert said in text
    for said in ("mlp.experts.*.w1", "… 1 more group", "arc_easy"):
        assert said in text


@pytest.fixture
def locked(run: Path) -> Iterator[Path]:
    """A run that another process is writing: it has the half of its page."""
    (run / ".report.html.0.tmp").write_text("half")
    with output_lock(run.resolve()):
        yield run


def test_while_a_run_is_going_on_card_and_half_page_are_left_to_it(locked: Path) -> None:
    result = CliRunner().invoke(cli, ["report", str(locked)])
    assert result.exit_code == 0
    assert (locked / "report.html").read_text().endswith("</html>\n")
    assert (locked / "merged" / "README.md").read_text() == "# The card of mergekit\n"
    assert {path.name: path.read_text() for path in locked.glob(".*.tmp")} == {".report.html.0.tmp": "half"}


def test_the_page_says_what_each_teacher_is_worth_and_warns(run: Path) -> None:
    text = shown(run)
    assert "1.00 times" in text  # (1 + 2.5 + 1) / 4.5: of one
    assert "1.22 times" in text  # of two, whose tokens that close a label know less than the pivot
    assert text.count("(worse than the pivot)") == 1
    assert all(word in text for word in ("3.500", "3.000", "Warning"))
    assert "was not measured" not in text
    (run / "alignment" / "one" / "worth.json").unlink()
    assert "was not measured" in shown(run)
