"""The figures of an alignment, what a teacher is worth, the page and the command."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner

from fusekit.alignment import align, plan_rows, vocabulary_surfaces
from fusekit.alignment.cases import HAS_ROW, Case
from fusekit.alignment.quality import (
    FEWEST_LABELS,
    MOST_NATS,
    RATIO_LIMIT,
    AlignmentQuality,
    TeacherWorth,
    read_samples,
    sample_of,
    script_of,
    write_samples,
)
from fusekit.cli import cli
from fusekit.errors import AlignmentError, DataError
from fusekit.report.page import alignment_page
from tests.alignment.tokenizers import EDGE_CASES, load

UNTAUGHT = (Case.NO_ROW, Case.UNLINKED)


def test_figures_equal_a_loop():
    quality = AlignmentQuality("mistral", "qwen")
    alignments = [align(text, load("mistral"), load("qwen")) for text in EDGE_CASES.values()]
    for n, alignment in enumerate(alignments):
        quality.add(alignment, f"set {n % 2}")
    found = json.loads(quality.to_json())
    positions = sum(len(a.pivot_ids) for a in alignments)
    assert found["positions"] == found["pivot_tokens"] == positions
    assert found["linked_share"] == sum(i >= 0 for a in alignments for i in a.source_at) / positions
    assert found["rows"] == sum(c in HAS_ROW for a in alignments for c in plan_rows(a).cases)
    sizes = [(p.stop - p.start, s.stop - s.start) for a in alignments for p, s in a.groups]
    assert found["groups"]["1-1"] == sizes.count((1, 1))
    assert found["groups"]["n-1"] == sum(n > 1 and m == 1 for n, m in sizes)
    assert found["groups"]["1-n"] == sum(n == 1 and m > 1 for n, m in sizes)
    assert sum(found["group_sizes"].values()) == sum(found["groups"].values()) == len(sizes)
    assert sum(share["positions"] for share in found["scripts"].values()) == positions
    assert found["data"]["set 0"]["positions"] + found["data"]["set 1"]["positions"] == positions
    assert sum(found["cases"].values()) == positions
    shares = [item["row_share"] for item in found["worst"]]
    assert shares == sorted(shares)
    assert "worth" not in found


@pytest.mark.parametrize(
    ("character", "script"),
    zip("aя日7 🤖,", ("latin", "cyrillic", "cjk", "digits", "space", "emoji", "punctuation"), strict=True),
)
def test_scripts(character, script):
    assert script_of(character) == script


def worth_of(cases: list[Case], teacher: list[float], pivot: list[float] | None, source: float) -> TeacherWorth:
    worth = TeacherWorth("prefix")
    add(worth, cases, teacher, pivot, source)
    return worth


def add(
    worth: TeacherWorth,
    cases: list[Case],
    teacher: list[float],
    pivot: list[float] | None,
    source: float,
    survived: tuple[float, ...] = (),
) -> None:
    worth.add(
        np.array(cases, int),
        ~np.isin(cases, UNTAUGHT),
        teacher=np.array(teacher),
        pivot=None if pivot is None else np.array(pivot),
        source=source,
        survived=np.array(survived),
    )


def test_worth_by_hand() -> None:
    worth = worth_of(
        [Case.SAME, Case.CLOSES, Case.CLOSES, Case.UNLINKED], [1.0, 2.0, 5.0, 99.0], [1.5, 3.0, 3.0, 2], 8.0
    )
    assert worth.per_label(Case.SAME) == (1.0, 1.5)
    assert worth.per_label(Case.CLOSES) == (3.5, 3.0)
    assert worth.per_label(Case.UNLINKED) == (None, 2.0)
    assert worth.per_label(Case.LONGER) == (None, None)
    assert worth.ratio == (1 + 2 + 5 + 2) / 8  # a label without a row counts as the pivot has it
    assert [case for case in Case if worth.is_worse(case)] == [Case.CLOSES]
    (by_ratio,) = worth.warnings
    assert "1.25" in by_ratio
    found = json.loads(json.dumps(worth.to_dict(), allow_nan=False))
    assert found["cases"]["closes"] == {"labels": 2, "teacher": 3.5, "pivot": 3.0, "worse": True}
    assert found["cases"].keys() == {"same", "closes", "unlinked"}
    assert (found["examples"], found["labels"], found["ratio"], found["source_nats"]) == (1, 4, 1.25, 8.0)
    assert found["warnings"] == worth.warnings


def test_worth_of_many_examples_equals_a_loop() -> None:
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
    assert bool(worth_of([Case.SAME], [teacher], [9.0], source).warnings) == warned


def test_the_pivot_may_be_as_bad_as_its_teacher_but_not_better() -> None:
    n = FEWEST_LABELS
    assert not worth_of([Case.SAME] * n, [2.0] * n, [2.0] * n, 2.0 * n).warnings
    (warning,) = worth_of([Case.SAME] * n, [2.0] * n, [1.999] * n, 2.0 * n).warnings
    assert all(word in warning for word in ("same", "2.000", "1.999", f"{n} labels"))


def test_a_case_of_few_labels_is_not_warned_of() -> None:
    n = FEWEST_LABELS - 1
    worth = worth_of([Case.SAME] * n, [2.0] * n, [1.0] * n, 2.0 * n)
    assert (worth.warnings, worth.is_worse(Case.SAME)) == ([], True)


def test_without_the_pivot_its_column_is_empty() -> None:
    whole = worth_of([Case.SAME, Case.LONGER], [1.0, 1.0], None, 2.0)
    assert whole.per_label(Case.SAME) == (1.0, None)
    assert (whole.ratio, whole.warnings) == (1.0, [])
    assert whole.to_dict()["cases"]["same"]["pivot"] is None
    gap = worth_of([Case.SAME, Case.UNLINKED], [1.0, 0.0], None, 2.0)
    assert gap.ratio is None  # nobody says what the label without a row costs
    both = worth_of([Case.SAME], [1.0], [1.0], 1.0)
    add(both, [Case.SAME], [1.0], None, 1.0)
    assert both.per_label(Case.SAME) == (1.0, None)


def test_a_label_that_a_row_rules_out_leaves_finite_figures() -> None:
    worth = worth_of([Case.RULE, Case.RULE], [np.inf, 1.0], [1.0, 1.0], 2.0)
    assert worth.per_label(Case.RULE) == ((MOST_NATS + 1) / 2, 1.0)
    json.dumps(worth.to_dict(), allow_nan=False)


def test_surviving_mass() -> None:
    worth = TeacherWorth("em")
    found = worth.to_dict()
    assert (found["examples"], found["ratio"], found["cases"], found["warnings"]) == (0, None, {}, [])
    assert found["mass_survived"] == {"rows": 0, "mean": None, "p1": None, "p10": None, "p50": None, "p90": None}
    add(worth, [], [], [], 0.0, (1.0, 0.5, 0.5, 0.0))
    found = worth.to_dict()["mass_survived"]
    assert (found["rows"], found["mean"], found["p50"], found["p90"]) == (4, 0.5, 0.5, 1.0)
    assert "em" in worth.summary[1]


class Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]
        inline = ("href", "data:,")  # the empty icon, so that no browser asks for one
        assert not any(name in ("src", "href") or name.startswith("on") for name, _ in set(attrs) - {inline})

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_escapes_everything_and_loads_nothing(tmp_path):
    text = "<script>alert(1)</script> & \"quotes\" 'x' </title><img src=x onerror=y>"
    alignment = align(text, load("mistral"), load("qwen"))
    quality = AlignmentQuality("<b>pivot</b>", "source&")
    quality.add(alignment, "<i>data</i>")
    sample = sample_of(alignment, (vocabulary_surfaces(load("mistral")), vocabulary_surfaces(load("qwen"))))
    write_samples(tmp_path / "samples.json", [sample])
    assert read_samples(tmp_path / "samples.json") == [sample]
    assert "worth" not in alignment_page(quality, [sample])
    quality.worth = TeacherWorth("<em>")
    add(quality.worth, [Case.SAME, Case.UNLINKED], [4.25, 0.0], [1.0, 1.0], 4.0, (0.5,))
    html, outline = alignment_page(quality, [sample]), Outline()
    outline.feed(html)
    assert not {"script", "img", "i", "em", "iframe"} & set(outline.tags)
    assert "<b>pivot</b>" in "".join(outline.words)
    tokens = [title for title in outline.titles if "ends at byte" in title]
    assert len(tokens) == len(alignment.pivot_ids) + len(alignment.source_ids)
    assert all(word in html for word in ("4.250", "1.000", "worse than the pivot", "&lt;em&gt;"))
    assert json.loads(quality.to_json())["worth"] == json.loads(json.dumps(quality.worth.to_dict()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for name in ("mistral", "bert"):
        load(name).save_pretrained(root / name)
    return root


def run(*arguments: str):
    return CliRunner().invoke(cli, ["inspect", "alignment", *map(str, arguments)])


def test_inspect_alignment(folders, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "The quick fox"}]},
        {"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "Café 日本"}]},
        {"messages": [{"role": "user", "content": "over"}]},
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    result = run(
        folders / "mistral",
        folders / "bert" / "tokenizer.json",
        *("--data", data, "--text", "given", "--json", tmp_path / "q.json", "--html", tmp_path / "p.html"),
    )
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "q.json").read_text())
    assert figures["texts"] == 5
    assert set(figures["data"]) == {"--text", "rows"}
    assert "linked" in result.output
    assert "pivot  │" in result.output
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("content", "name", "kind", "words"),
    [
        ('{"text": "a"}\n{"text": ', "x.jsonl", DataError, ["line 2", "JSON"]),
        ('{"other": 1}', "x.json", DataError, ["messages"]),
        ("a,b", "x.csv", DataError, [".csv", ".jsonl"]),
        ("", "x.txt", AlignmentError, ["no text"]),
    ],
)
def test_data_that_cannot_be_read(folders, tmp_path, content, name, kind, words):
    file = tmp_path / name
    file.write_text(content)
    result = run(folders / "bert", folders / "bert", "--data", file)
    assert type(result.exception) is kind
    assert all(word in str(result.exception) for word in words)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--text", "a", "--stores", ".", "."], "--data"),
        (["--text", "a", "--tail", "keep"], "--tail"),
        (["--text", "a", "--vocabulary", "em"], "--vocabulary"),
    ],
)
def test_options_that_need_each_other(folders, options, word):
    result = run(folders / "bert", folders / "bert", *options)
    assert result.exit_code == 2
    assert word in result.output


def test_a_tokenizer_that_is_not_there(tmp_path):
    result = run(tmp_path / "missing", tmp_path / "missing", "--text", "a")
    assert isinstance(result.exception, AlignmentError)
    assert "cannot be loaded" in str(result.exception)
    assert run(tmp_path, tmp_path).exit_code == 2
