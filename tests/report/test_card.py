"""The card of a merged model: what hubs read of it, safe against its data, and sealed whatever happens."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from click.testing import CliRunner

from fusekit import artifacts as artifact
from fusekit.artifacts import weights_hash
from fusekit.cli import cli
from fusekit.disk import output_lock, staging
from fusekit.errors import StorageError
from fusekit.report.card import write_report
from tests.pipeline.worlds import stamps
from tests.processes import kill_at
from tests.processes import run as run_process
from tests.report.test_page import ALLOWED, Page
from tests.report.worlds import HOSTILE, make_run


def parts(run: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a run's card."""
    write_report(run)
    _, metadata, text = (run / "merged" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_says_what_hubs_and_people_ask(run: Path) -> None:
    counts = json.loads((run / "data" / "counts.json").read_text())
    counts["first_refusal"] = "/home/me/templates/one.jinja: no system turn; and/or https://x.org/y"
    (run / "data" / "counts.json").write_text(json.dumps(counts))
    metadata, text = parts(run)
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["org/pivot"],  # the sources are folders of this machine
        "base_model_relation": "merge",
        "tags": ["mergekit", "merge", "fusekit"],
    }
    tensors = json.loads((run / "merged" / "coefficients.json").read_text())["tensors"]
    values = [tensor["coefficients"]["/home/me/out/targets/one"] for tensor in tensors.values()]
    for said in (
        "pivot: [org/pivot](https://huggingface.co/org/pivot)",
        "source `one`: `one` (7.24 B parameters), weights `xxh3 1`",
        "https://arxiv.org/abs/2408.07990",
        "| merged model | **1.500** | **1.510** | **1.520** | **1.510** |",
        "24 of 27 examples used",
        ": one.jinja: no system turn; and/or https://x.org/y",
        "hf upload YOU/MODEL . --exclude manifest.json",
        "apply_chat_template",
        "Licence",
        f"xxh3 `{weights_hash(run / 'merged')}`",
        f"| one | {sum(values) / len(values):.4f} | {min(values):.4f} | {max(values):.4f} |",
    ):
        assert said in text
    assert "/home/me" not in text  # paths of this machine stay here
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(blocks[0])["merge"]["parameters"] == {"select_topk": 1.0, "variant": "paper"}


NAMES = ("a|b<img src=x onerror=alert(1)>", "`c`|[d](javascript:x)*_~#&amp;")
"""Of model folders; sources are called as their folders are."""


def test_whatever_comes_from_data_is_text_on_the_card_and_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", NAMES, hostile=True)
    metadata, text = parts(run)
    assert metadata["base_model"] == ["org/pivot"]
    outside = re.sub(r"(`{3,})yaml\n.*?\n\1\n", "", text, flags=re.DOTALL)
    outside = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", outside)  # code is shown as it is
    assert {tag for tag, _ in Page(outside).elements} <= {"details", "summary"}
    assert "](javascript:" not in outside.replace("\\]", "")
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3  # bits per byte, lm-eval, coefficients
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    named = [line for line in tables[0].splitlines() if line.startswith("| source")]
    assert named[0].startswith("| source a\\|b&lt;img src=x onerror=alert(1)&gt; | ")
    html = (run / "report.html").read_text()
    assert "\u202e" not in text + html  # it would turn round what follows
    page = Page(html)
    assert page.wrong == []
    assert {tag for tag, _ in page.elements} <= ALLOWED
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any("javascript:" in a["href"] for a in page.all("a"))
    assert all(page.text.count(name) > 10 for name in NAMES)
    assert page.text.count("source " + NAMES[0]) >= 2  # a row in the table of each metric
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert page.text.count(shown) > 20  # recipe, models, skills, keys, refusals, quarantine, samples, ...
    for before in ("org/pivot", "NaN at label 2", "no system turn", "machine", "norm", "to", "latin"):
        assert before + shown[:20] in page.text, before


def test_the_command_seals_the_card_and_a_second_time_changes_nothing(run: Path) -> None:
    first = CliRunner().invoke(cli, ["report", str(run)])
    assert first.output == f"{run}/merged/README.md\n{run}/report.html\nreport: {run}/report.html\n"
    assert CliRunner().invoke(cli, ["verify", "--quiet", str(run / "merged")]).exit_code == 0
    before = stamps(run), sorted(run.rglob("*"))
    assert CliRunner().invoke(cli, ["report", str(run)]).output == f"report: {run}/report.html\n"
    assert (stamps(run), sorted(run.rglob("*"))) == before
    manifest = artifact.read(run / "merged")
    assert manifest is not None
    assert manifest.made["host"] == "machine"
    (run / "results.json").unlink()
    assert str(run / "merged" / "README.md") in write_report(run)
    assert "## Results" not in (run / "merged" / "README.md").read_text()
    assert artifact.problems(run / "merged") == []


def test_a_card_that_somebody_wrote_is_left_alone(run: Path) -> None:
    write_report(run)
    card = run / "merged" / "README.md"
    made = card.read_text()
    card.write_text("mine")
    (warning,) = write_report(run)
    assert warning.startswith(f"warning: {card} ")
    assert card.read_text() == "mine"
    (problem,) = artifact.problems(run / "merged")
    assert all(part in problem for part in (str(card), "4 bytes", str(len(made.encode()))))
    card.unlink()
    assert str(card) in write_report(run)
    assert card.read_text() == made
    assert artifact.problems(run / "merged") == []


def published(folder: Path, name: str = "model.bin") -> Path:
    """An artifact of one file."""
    artifact.publish(folder, "merge", {}, lambda into: (into / name).write_bytes(b"old"))
    return folder


def _replace(folder: Path, number: int, counter: str) -> None:
    kill_at(number, counter)
    artifact.replace_file(folder, "README.md", b"new card")


def test_a_kill_at_any_moment_leaves_a_card_that_is_recorded(tmp_path: Path) -> None:
    def exit_code(folder: Path, number: int) -> int:
        return run_process(_replace, folder, number, str(tmp_path / "counter"), timeout=60).exitcode

    def listing(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    whole = published(tmp_path / "whole" / "out" / "merged", "README.md")
    assert exit_code(whole, 0) == 0
    moments = int((tmp_path / "counter").read_text())
    assert moments > 8
    cards = set()
    for number in range(1, moments + 1):
        folder = published(tmp_path / str(number) / "out" / "merged", "README.md")
        assert exit_code(folder, number) == -signal.SIGKILL
        cards.add((folder / "README.md").read_bytes())
        assert artifact.problems(folder) == [], number
        artifact.replace_file(folder, "README.md", b"new card")
        assert listing(folder) == listing(whole), number
    assert cards == {b"old", b"new card"}


def test_the_card_waits_for_a_merge_into_the_same_folder(run: Path) -> None:
    merged = run / "merged"
    with output_lock(merged), staging(merged) as other:
        with pytest.raises(StorageError, match="already being written"):
            write_report(run)
        (other / "config.json").write_text("{}")
    assert [path.name for path in merged.iterdir()] == ["config.json"]


def test_a_disk_without_links_is_written_to_and_may_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "Operation not permitted")))
    folder = published(tmp_path / "merged")
    assert artifact.replace_file(folder, "README.md", b"added")
    assert artifact.problems(folder) == []
    monkeypatch.setattr(shutil, "copy2", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError, match=r"merged: No space left on device \(.* free\)"):
        artifact.replace_file(folder, "README.md", b"changed")
    assert (folder / "README.md").read_bytes() == b"added"


def test_a_file_where_an_artifact_is_to_come_stays(tmp_path: Path) -> None:
    (tmp_path / "merged").write_text("mine")
    with pytest.raises(StorageError, match="is not a folder"):
        published(tmp_path / "merged")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("merged", "mine")]


def test_a_file_is_added_and_others_are_not_of_the_artifact(tmp_path: Path) -> None:
    folder = published(tmp_path / "merged")
    assert artifact.replace_file(folder, "README.md", b"added")
    assert not artifact.replace_file(folder, "README.md", b"added")
    (folder / ".other.0.tmp").write_bytes(b"?")
    (problem,) = artifact.problems(folder)
    assert problem.startswith(f"{folder}/.other.0.tmp: ")
    with pytest.raises(StorageError, match=r"manifest\.json"):
        artifact.replace_file(tmp_path, "README.md", b"x")
