"""The card of a merged model: what hubs read of it, safe against its data, and sealed whatever happens."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusekit import artifacts as artifact
from fusekit.artifacts import weights_hash
from fusekit.errors import StorageError
from fusekit.report.facts import read_facts
from fusekit.report.write import write_report
from tests.processes import kill_at
from tests.processes import run as run_process
from tests.report.test_page import ALLOWED, Page
from tests.report.worlds import make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "out")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and text."""
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_says_what_hubs_and_people_ask(run: Path) -> None:
    write_report(run)
    metadata, text = parts((run / "merged" / "README.md").read_text())
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["org/pivot"],  # the sources are folders of this machine
        "base_model_relation": "merge",
        "tags": ["mergekit", "merge", "fusekit"],
    }
    assert "pivot: [org/pivot](https://huggingface.co/org/pivot)" in text
    assert f"commit `{'c' * 40}`" in text
    assert "source `one`: `one` (7.24 B parameters)" in text
    assert "/home/me" not in text  # paths of this machine stay here
    assert "https://arxiv.org/abs/2408.07990" in text
    assert "| merged model | **1.500** | **1.510** | **1.520** | **1.510** |" in text
    assert "24 of 27 examples used" in text
    assert "hf upload YOU/MODEL . --exclude manifest.json" in text
    assert "apply_chat_template" in text
    assert "Licence" in text
    assert f"xxh3 `{weights_hash(run / 'merged')}`" in text
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(blocks[0])["merge"]["parameters"] == {"select_topk": 1.0, "variant": "paper"}
    merge = yaml.safe_load(blocks[1])
    assert [entry["model"] for entry in merge["models"]] == ["targets/one", "targets/two"]
    assert merge["base_model"] == "org/pivot"


def test_reasons_on_the_card_name_no_folder(run: Path) -> None:
    counts = json.loads((run / "data" / "counts.json").read_text())
    counts["first_refusal"] = "/home/me/templates/one.jinja: no system turn; and/or https://x.org/y"
    (run / "data" / "counts.json").write_text(json.dumps(counts))
    write_report(run)
    text = (run / "merged" / "README.md").read_text()
    assert ": one.jinja: no system turn; and/or https://x.org/y" in text
    assert "/home/me" not in text


def test_coefficients_on_the_card_are_means_over_tensors(run: Path) -> None:
    write_report(run)
    text = (run / "merged" / "README.md").read_text()
    tensors = json.loads((run / "merged" / "coefficients.json").read_text())["tensors"]
    values = [tensor["coefficients"]["/home/me/out/targets/one"] for tensor in tensors.values()]
    mean = sum(values) / len(values)
    assert f"| one | {mean:.4f} | {min(values):.4f} | {max(values):.4f} | 20.0 % |" in text
    assert "10.0 % of the elements" in text


NAMES = ("a|b<img src=x onerror=alert(1)>", "`c`|[d](javascript:x)*_~#&amp;")
"""Of model folders; sources are called as their folders are."""


def test_markup_in_names_is_text_on_the_card_and_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", NAMES, hostile=True)
    write_report(run)
    metadata, text = parts((run / "merged" / "README.md").read_text())
    assert metadata["base_model"] == ["org/pivot"]
    outside = re.sub(r"(`{3,})yaml\n.*?\n\1\n", "", text, flags=re.DOTALL)
    outside = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", outside)  # code is shown as it is
    assert {tag for tag, _ in Page(outside).elements} <= {"details", "summary"}
    assert "\u202e" not in text
    assert "](javascript:" not in outside.replace("\\]", "")
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3  # bits per byte, lm-eval, coefficients
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    named = [line for line in tables[0].splitlines() if line.startswith("| source")]
    assert named[0].startswith("| source a\\|b&lt;img src=x onerror=alert(1)&gt; | ")
    page = Page((run / "report.html").read_text())
    assert page.wrong == []
    assert {tag for tag, _ in page.elements} <= ALLOWED
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(page.text.count(name) > 10 for name in NAMES)
    rows = page.text.count("source " + NAMES[0])
    assert rows >= 2  # a row in the table of each metric


def test_the_seal_holds_and_a_second_time_changes_nothing(run: Path) -> None:
    assert write_report(run) == [f"{run}/merged/README.md", f"{run}/report.html"]
    assert artifact.problems(run / "merged") == []
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in run.rglob("*") if path.is_file()}
    assert write_report(run) == []
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in run.rglob("*") if path.is_file()} == before
    manifest = artifact.read(run / "merged")
    assert manifest is not None
    assert manifest.made["host"] == "machine"
    assert "replacing" not in json.loads((run / "merged" / artifact.MANIFEST).read_text())


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


def test_new_results_give_a_new_card(run: Path) -> None:
    write_report(run)
    (run / "results.json").unlink()
    assert str(run / "merged" / "README.md") in write_report(run)
    assert "## Results" not in (run / "merged" / "README.md").read_text()
    assert artifact.problems(run / "merged") == []


def _replace(folder: Path, data: bytes, number: int, counter: str) -> None:
    kill_at(number, counter)
    artifact.replace_file(folder, "README.md", data)


def _in_a_child(folder: Path, data: bytes, number: int, counter: Path) -> int:
    return run_process(_replace, folder, data, number, str(counter), timeout=60).exitcode


def test_a_kill_at_any_moment_leaves_a_card_that_is_recorded(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        folder = tmp_path / name / "out" / "merged"
        artifact.publish(folder, "merge", {}, lambda into: (into / "README.md").write_bytes(b"old"))
        return folder

    whole = fresh("whole")
    assert _in_a_child(whole, b"new card", 0, tmp_path / "counter") == 0
    moments = int((tmp_path / "counter").read_text())
    assert moments > 8
    cards = set()
    for number in range(1, moments + 1):
        folder = fresh(str(number))
        assert _in_a_child(folder, b"new card", number, tmp_path / "counter") == -signal.SIGKILL
        cards.add((folder / "README.md").read_bytes())
        assert artifact.problems(folder) == [], number
        artifact.replace_file(folder, "README.md", b"new card")
        left = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert left == {path.name: path.read_bytes() for path in whole.iterdir()}, number
    assert cards == {b"old", b"new card"}


def test_what_is_announced_is_not_taken_for_anything_else(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    artifact.publish(folder, "merge", {}, lambda into: (into / "model.bin").write_bytes(b"w"))
    assert artifact.replace_file(folder, "README.md", b"added")
    assert not artifact.replace_file(folder, "README.md", b"added")
    (folder / ".other.0.tmp").write_bytes(b"?")
    (folder / ".model.bin.0.tmp").write_bytes(b"half")
    (problem,) = artifact.problems(folder)
    assert problem.startswith(f"{folder}/.other.0.tmp: ")
    with pytest.raises(StorageError, match=r"manifest\.json"):
        artifact.replace_file(tmp_path, "README.md", b"x")


def test_without_a_merged_model_there_is_no_card(tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", until="distill")
    assert write_report(run) == [f"{run}/report.html"]
    assert not (run / "merged").exists()
    assert read_facts(run).merged is None
