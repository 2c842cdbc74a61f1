"""Faults 5 and 6: outputs that are in the way, and two runs on one output."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from fusekit.artifacts import output_lock
from fusekit.errors import MergeError, StorageError
from fusekit.merging import Settings, merge
from tests.merging.conftest import MERGE, traces
from tests.processes import fusekit, is_stopped, start, stop_self, wait_until

QUIET = Settings(say=lambda _: None)
OVERWRITE = Settings(overwrite=True, say=lambda _: None)


def content(folder: Path) -> dict[str, tuple[bytes, float]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_non_empty_output_is_refused_and_nothing_is_touched(recipe, workshop):
    (workshop / "out").mkdir()
    (workshop / "out/precious.txt").write_text("mine")
    before = content(workshop)
    with pytest.raises(MergeError, match=r"out is not empty \(precious.txt\).*--overwrite"):
        merge(recipe, "out", settings=QUIET)
    assert content(workshop) == before


def test_an_empty_folder_is_fine(recipe, workshop):
    (workshop / "out").mkdir()
    merge(recipe, "out", settings=QUIET)
    assert (workshop / "out/config.json").is_file()


def test_overwrite_replaces_a_model_entirely(write_recipe, workshop):
    merge(write_recipe(), "out", settings=QUIET)
    first = (workshop / "out/model.safetensors").read_bytes()
    (workshop / "out/model.safetensors.index.json").write_text('{"weight_map": {}}')
    merge(write_recipe(parameters={"weight": 0.9}), "out", settings=OVERWRITE)
    assert (workshop / "out/model.safetensors").read_bytes() != first
    assert not (workshop / "out/model.safetensors.index.json").exists(), "a stale index survived"
    assert traces(workshop) == []


def test_overwrite_deletes_nothing_but_models(recipe, workshop):
    (workshop / "home").mkdir()
    (workshop / "home/thesis.tex").write_text("years of work")
    before = content(workshop)
    with pytest.raises(MergeError, match="does not look like a model"):
        merge(recipe, "home", settings=OVERWRITE)
    assert content(workshop) == before


def test_a_failed_overwrite_leaves_the_old_model(recipe, workshop):
    merge(recipe, "out", settings=QUIET)
    before = content(workshop / "out")
    os.truncate(workshop / "target1/model.safetensors", 3000)
    with pytest.raises(MergeError, match="target1"):
        merge(recipe, "out", settings=OVERWRITE)
    assert content(workshop / "out") == before


@pytest.mark.parametrize("out", ["base", "./target1", "link", "../shop/base"])
def test_an_input_is_never_the_output(recipe, workshop, out):
    (workshop / "link").symlink_to("base")
    before = content(workshop)
    with pytest.raises(MergeError, match="is the input model"):
        merge(recipe, out, settings=OVERWRITE)
    assert content(workshop / "base") == {k[5:]: v for k, v in before.items() if k.startswith("base/")}


def test_output_that_holds_an_input_or_the_recipe_is_refused(write_recipe, workshop):
    shutil.copytree(workshop / "base", workshop / "model")
    shutil.copytree(workshop / "target1", workshop / "model/target1")
    recipe = write_recipe(models=[{"model": "model/target1"}, {"model": "target2"}])
    with pytest.raises(MergeError, match=r"input model model/target1 .* lies inside the output"):
        merge(recipe, "model", settings=OVERWRITE)
    inside = workshop / "model/recipe.yml"
    inside.write_text(write_recipe().read_text())
    with pytest.raises(MergeError, match=r"the recipe .* lies inside the output"):
        merge(inside, "model", settings=OVERWRITE)
    with pytest.raises(MergeError, match="lies inside the input model"):
        merge(write_recipe(), "base/merged", settings=QUIET)


def test_a_file_and_a_mount_point_are_refused(recipe, workshop):
    (workshop / "file").write_text("")
    with pytest.raises(MergeError, match="is a file"):
        merge(recipe, "file", settings=QUIET)
    with pytest.raises(MergeError, match="mount point"):
        merge(recipe, "/proc", settings=OVERWRITE)


def test_a_symlinked_output_keeps_its_link(recipe, workshop):
    (workshop / "disk").mkdir()
    (workshop / "out").symlink_to("disk/model")
    merge(recipe, "out", settings=QUIET)
    assert (workshop / "out").is_symlink()
    assert (workshop / "disk/model/config.json").is_file()


def test_the_second_of_two_runs_names_the_first(recipe, workshop):
    """The first is stopped while it reads; the second must not touch anything."""
    first = start(workshop, *MERGE, before=stop_while_reading)
    wait_until(lambda: is_stopped(first.pid))
    second = fusekit(workshop, *MERGE, "--overwrite")
    assert second.exitcode == 1
    for part in (f"process {first.pid}", socket.gethostname(), "since 20", "fusekit merge recipe.yml out"):
        assert part in second.output
    assert len([name for name in traces(workshop) if "staging" in name]) == 1
    elsewhere = fusekit(workshop, "merge", "recipe.yml", "out2")
    assert elsewhere.exitcode == 0, elsewhere.output
    os.kill(first.pid, signal.SIGCONT)
    finished = first.wait()
    assert finished.exitcode == 0, finished.output
    assert (workshop / "out/model.safetensors").is_file()
    assert traces(workshop) == []


def stop_while_reading() -> None:
    from fusekit.merging import loading

    original = loading.first_not_finite
    seen = []

    def stop(tensor):
        seen.append(1)
        if len(seen) == 5:
            stop_self()
        return original(tensor)

    loading.first_not_finite = stop


def test_a_holder_file_that_cannot_be_read_does_not_hide_the_error(tmp_path):
    with output_lock(tmp_path / "out"):
        (tmp_path / ".out.fusekit.holder").write_text("{")
        with (
            pytest.raises(StorageError, match="already being written by another process"),
            output_lock(tmp_path / "out"),
        ):
            pass
    with output_lock(tmp_path / "out"):
        holder = json.loads((tmp_path / ".out.fusekit.holder").read_text())
    assert holder["pid"] == os.getpid()
    assert not (tmp_path / ".out.fusekit.holder").exists()
