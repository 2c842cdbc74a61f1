"""The figures of an alignment, what a teacher is worth, the page and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from pydantic import TypeAdapter

from fusekit.alignment import align, plan_rows, vocabulary_surfaces
from fusekit.alignment.quality import AlignmentQuality, Sample, sample_of, script_of, write_samples
from fusekit.alignment.rows import HAS_ROW, Case
from fusekit.cli import cli
from fusekit.distillation.worth import TeacherWorth
from fusekit.errors import AlignmentError
from fusekit.report.page import alignment_page
from tests.alignment.tokenizers import EDGE_CASES, load


def test_figures_equal_a_loop():
    quality = AlignmentQuality("mistral", "qwen")
    alignments = [align(text, load("mistral"), load("qwen")) for text in EDGE_CASES.values()]
    for n, alignment in enumerate(alignments):
        quality.add(alignment, f"set {n % 2}")
    found = json.loads(json.dumps(quality.to_dict()))
    positions = sum(len(a.pivot_ids) for a in alignments)
    assert found["positions"] == found["pivot_tokens"] == positions
    assert found["linked_share"] == sum(i >= 0 for a in alignments for i in a.source_at) / positions
    assert found["rows"] == sum(c in HAS_ROW for a in alignments for c in plan_rows(a).cases)
    sizes = [(p.stop - p.start, s.stop - s.start) for a in alignments for p, s in a.groups]
    shapes = {"1-1": sizes.count((1, 1)), "m-n": sum(n > 1 and m > 1 for n, m in sizes)}
    shapes |= {"n-1": sum(n > 1 and m == 1 for n, m in sizes), "1-n": sum(n == 1 and m > 1 for n, m in sizes)}
    assert found["groups"] == shapes
    assert sum(share["positions"] for share in found["scripts"].values()) == positions
    assert sum(found["cases"].values()) == positions
    assert found["data"]["set 0"]["positions"] == sum(len(a.pivot_ids) for a in alignments[::2])
    assert found["data"]["set 0"]["linked"] + found["data"]["set 1"]["linked"] == found["linked"]
    taught = [sum(c in HAS_ROW for c in plan_rows(a).cases) / max(len(a.pivot_ids) - 1, 1) for a in alignments]
    assert [worst["row_share"] for worst in found["worst"]] == sorted(taught)[:10]
    assert {worst["text"] for worst in found["worst"]} <= {*EDGE_CASES.values()}


@pytest.mark.parametrize(
    ("character", "script"),
    zip("aя日7 🤖,", ("latin", "cyrillic", "cjk", "digits", "space", "emoji", "punctuation"), strict=True),
)
def test_scripts(character, script):
    assert script_of(character) == script


def test_the_page_escapes_everything(tmp_path):
    text = "<script>alert(1)</script> & \"quotes\" 'x' </title><img src=x onerror=y>"
    alignment = align(text, load("mistral"), load("qwen"))
    quality = AlignmentQuality("<b>pivot</b>", "source&")
    quality.add(alignment, "<i>data</i>")
    sample = sample_of(alignment, (vocabulary_surfaces(load("mistral")), vocabulary_surfaces(load("qwen"))))
    write_samples(tmp_path / "samples.json", [sample])
    written = json.loads((tmp_path / "samples.json").read_bytes())
    assert TypeAdapter(list[Sample]).validate_python(written) == [sample]
    assert "worth" not in alignment_page(quality, [sample])
    worth = TeacherWorth("<em>")
    cases, pivot = np.array([Case.SAME, Case.UNLINKED]), np.ones(2)
    worth.add(cases, cases == Case.SAME, teacher=pivot * 4.25, pivot=pivot, source=4.0, carried=np.array([0.5]))
    html = alignment_page(quality, [sample], worth)
    assert not any(tag in html for tag in ("<script", "<img", "<em>", "<b>pivot", "<i>data"))
    assert html.count("ends at byte") == len(alignment.pivot_ids) + len(alignment.source_ids)
    assert all(word in html for word in ("4.250", "1.000", "worse than the pivot", "&lt;em&gt;"))


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
    assert "linked" in result.output
    assert "pivot  │" in result.output
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")


def test_options_that_need_each_other(folders):
    result = run(folders / "bert", folders / "bert", "--text", "a", "--tail", "keep")
    assert result.exit_code == 2
    assert "--tail" in result.output


def test_a_tokenizer_that_is_not_there(tmp_path):
    result = run(tmp_path / "missing", tmp_path / "missing", "--text", "a")
    assert isinstance(result.exception, AlignmentError)
    assert "cannot be loaded" in str(result.exception)
