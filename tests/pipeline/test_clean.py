"""``fusekit clean``: what it shows, what it removes, and above all what it leaves alone."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import yaml
from click.testing import CliRunner

from fusekit import artifacts as artifact
from fusekit.cli import cli
from fusekit.disk import output_lock
from fusekit.errors import StorageError
from tests.pipeline.worlds import changed, go, stamps, with_sources


def clean(out: Path, *options: str) -> str:
    result = CliRunner().invoke(cli, ["clean", str(out), *options])
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    return result.output


def refused(out: Path) -> str:
    """How cleaning a folder is refused."""
    error = CliRunner().invoke(cli, ["clean", str(out), "--yes"]).exception
    assert isinstance(error, StorageError)
    return str(error)


def removed(before: dict[str, int], out: Path) -> set[str]:
    """The folders that lack a file that was there."""
    return {name.rsplit("/", 1)[0] for name in before if not (out / name).exists()}


def test_what_a_removed_source_left_goes_and_a_finished_run_has_nothing_to_remove(finished):
    path, out = finished
    two = with_sources(path, ["neox"])
    before = stamps(out)
    assert clean(out, "--yes") == "nothing to remove\n"
    shown = clean(out, "--recipe", str(two))
    assert stamps(out) == before
    assert re.search(rf"{out}/captures/llama  .* the recipe does not ask for it\n", shown)
    assert re.search("5 things, .*; nothing was removed: --yes does it", shown)
    assert "removed 5 things, " in clean(out, "--recipe", str(two), "--yes")
    assert removed(before, out) == {
        f"{folder}/llama" for folder in ("captures", "alignment", "targets", "evaluation/sources", "evaluation/targets")
    }


def test_scores_of_lm_eval_that_nobody_asks_for_go(finished):
    path, out = finished
    for place in ("pivot", "sources/llama", "sources/gone", "targets/gone", "merged"):
        artifact.publish(
            out / "evaluation" / "lm_eval" / place, "evaluate", {}, lambda into: (into / "scores.json").write_text("{}")
        )
    (out / "evaluation" / "lm_eval" / "targets" / "gone" / "notes.txt").write_text("mine")
    for place in ("evaluation", "evaluation/lm_eval"):
        (out / place / "manifest.json").write_text("mine")
    asks = path.with_name("asks.yml")
    recipe = yaml.safe_load(path.read_text())
    recipe["evaluate"]["lm_eval"] = ["sums", "own/sums"]
    asks.write_text(yaml.safe_dump(recipe))
    said = clean(out, "--recipe", str(asks))
    shown = [line.split("  ")[0].strip() for line in said.splitlines() if "/lm_eval/" in line]
    assert shown[0] == f"{out}/evaluation/lm_eval/sources/gone"
    assert shown[1].startswith(f"spared: {out}/evaluation/lm_eval/targets/gone: holds notes.txt")
    assert len(shown) == 2
    assert "removed 4 things" in clean(out, "--yes")  # the run's own recipe asks for none
    assert (out / "evaluation" / "lm_eval" / "targets" / "gone" / "notes.txt").is_file()


def test_what_processes_that_died_left_goes_and_nothing_else(finished):
    _, out = finished
    half = [out / "targets" / "llama.training", out / "targets" / ".llama.staging-0123abcd"]
    half += [out / ".merged.previous-0123abcd", out / "data" / ".rows.jsonl.0.tmp"]
    (half[0] / "checkpoint-8").mkdir(parents=True)
    (half[0] / "made_from.json").write_text("{}")
    half[1].mkdir()
    half[2].mkdir()
    half[3].write_text("half")
    # None of these is of the run, whatever it is called.
    links = [out / ".merged.staging-0123abcd", out / "captures" / "link"]
    for link in links:
        link.symlink_to(out / "thesis")
    (out / ".notes.staging-0123abcd").mkdir()
    (out / "thesis").mkdir()
    (out / "thesis" / ".x.0.tmp").write_text("mine")
    (out / "targets" / "mine").mkdir()
    (out / "targets" / "mine" / "model.safetensors").write_bytes(b"mine")
    before = stamps(out)
    said = clean(out, "--yes")
    assert "removed 4 things" in said
    assert not any(path.exists() for path in half)
    assert f"spared: {out}/targets/mine: holds model.safetensors, which is not of the run" in said
    for link in links:
        assert f"spared: {link}: is a link" in said
        assert link.is_symlink()
    assert (out / ".notes.staging-0123abcd").is_dir()
    assert (out / "thesis" / ".x.0.tmp").read_text() == "mine"
    assert changed(before, out) == {"targets/llama.training/made_from.json", "logs/run.log"}


def test_what_a_run_that_is_not_finished_has_made_stays(finished):
    path, out = finished
    two = with_sources(path, ["llama", "neox"])
    go(two, out, until="data")  # stopped there, or later
    shutil.copytree(out / "captures" / "llama", out / "captures" / "neox")
    assert clean(out, "--yes") == "nothing to remove\n"
    assert f"{out}/captures/neox  " in clean(out, "--recipe", str(path))
    go(path, out, start="merge")  # all of it is of the first again
    assert f"{out}/captures/neox  " in clean(out)


def test_checkpoints_of_a_training_that_goes_on_stay(finished):
    _, out = finished
    (out / "targets" / "llama").rename(out / "targets" / "llama.training")
    (out / "targets" / "llama.training" / "made_from.json").write_text("{}")
    assert clean(out, "--yes") == "nothing to remove\n"


def test_a_stage_is_removed_to_be_made_anew(finished):
    path, out = finished
    before = stamps(out)
    (out / "targets" / "llama" / "notes.txt").write_text("mine")
    said = clean(out, "--stage", "distill", "--yes")
    assert f"spared: {out}/targets/llama: holds notes.txt" in said
    assert removed(before, out) == {"baselines/sft"}
    said = clean(out, "--from", "merge", "--yes")
    assert (out / "targets" / "llama" / "notes.txt").is_file()
    assert not (out / "merged").exists()
    assert not (out / "results.json").exists()
    assert "merge.yml  " in said
    go(path, out, start="merge", until="merge")
    assert (out / "merged" / "model.safetensors").is_file()


def test_a_folder_that_is_no_run_or_in_use_is_not_touched(tmp_path, first):
    left = tmp_path / ".merged.staging-0123abcd"
    left.mkdir()
    said = f"{tmp_path} is not the output of a run: it has no recipe.resolved.yml; nothing was touched"
    assert said in refused(tmp_path)
    assert left.is_dir()
    _, out = first
    with output_lock(out.resolve()):
        assert f"{out}: already being written by process {os.getpid()} on " in refused(out)
