"""Merges that die at any moment, and disks that are full, read-only or forbidden. Real ones."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from fusekit.disk import disk_fault
from fusekit.errors import StorageError
from fusekit.merging import Settings, merge
from tests.helpers import refused
from tests.merging.conftest import MERGE, QUIET, UNESTIMATED, listing, traces
from tests.processes import (
    fusekit,
    is_stopped,
    kill_at,
    limit_file_size,
    start,
    stop_self,
    strace_works,
    under_strace,
    wait_until,
    without_privileges,
)

traceable = pytest.mark.skipif(not strace_works(), reason="strace is not here or may not trace")


def weights(workshop):
    """The weights at the final path if a model stands there; it must be whole then."""
    out = workshop / "out"
    if not out.exists():
        return None
    assert AutoConfig.from_pretrained(out).model_type == "llama"
    assert (out / "tokenizer.json").is_file()
    assert (out / "README.md").is_file()
    assert len(load_file(out / "model.safetensors")) == 21
    return (out / "model.safetensors").read_bytes()


def finish(workshop, *options):
    """The same command again: it sweeps, succeeds, and leaves nothing beside the model."""
    again = fusekit(workshop, *MERGE, *options)
    assert again.exitcode == 0, again.output
    assert [name for name in traces(workshop) if name != ".out2.staging-0"] == []
    return weights(workshop)


def events(workshop, counter, *options):
    done = fusekit(workshop, *MERGE, *options, before=partial(kill_at, 0, str(counter)))
    assert done.exitcode == 0, done.output
    return int(counter.read_text())


# ---------------------------------------------------------------- interruptions


def test_sigkill_at_every_stage_of_a_first_merge(recipe, workshop, tmp_path):
    total = events(workshop, tmp_path / "count")
    expected = weights(workshop)
    published = 0
    # The last events are the ones around the rename: all of them; of the earlier ones, some.
    moments = sorted({*range(3, total - 8, max(1, total // 3)), *range(total - 8, total + 1)})
    (workshop / ".out2.staging-0").mkdir()  # a neighbour's, who may be alive: it must not be swept
    for moment in moments:
        if (workshop / "out").exists():
            (workshop / "out").rename(tmp_path / f"old{moment}")
        died = fusekit(workshop, *MERGE, before=partial(kill_at, moment, ""))
        assert died.exitcode == -signal.SIGKILL, (moment, died)
        found = weights(workshop)
        assert found in (None, expected)
        published += found is not None
        assert finish(workshop, *(["--overwrite"] if found else [])) == expected
    assert (workshop / ".out2.staging-0").exists()
    assert 0 < published < len(moments)


def test_sigkill_around_the_exchange_keeps_the_old_model_or_the_new(write_recipe, workshop, tmp_path):
    write_recipe()
    assert fusekit(workshop, *MERGE).exitcode == 0
    old = weights(workshop)
    write_recipe(parameters={"weight": 0.9})
    total = events(workshop, tmp_path / "count", "--overwrite")
    new = weights(workshop)
    assert old != new
    seen = set()
    for moment in range(total - 12, total + 1, 2):
        write_recipe()
        assert finish(workshop, "--overwrite") == old
        write_recipe(parameters={"weight": 0.9})
        died = fusekit(workshop, *MERGE, "--overwrite", before=partial(kill_at, moment, ""))
        assert died.exitcode == -signal.SIGKILL, (moment, died)
        found = weights(workshop)
        assert found in (old, new)
        seen.add(found == new)
    assert seen == {False, True}
    assert finish(workshop, "--overwrite") == new


@traceable
@pytest.mark.parametrize("call", ["rename", "renameat2"])
def test_sigkill_inside_the_kernel_call_that_publishes(recipe, workshop, call):
    options = ["--overwrite"] if call == "renameat2" else []
    if options:
        assert fusekit(workshop, *MERGE).exitcode == 0
    before = weights(workshop)
    child = start(workshop, *MERGE, *options, before=stop_self)
    died, trace = under_strace(child, f"{call}:signal=KILL:when=1")
    assert died.exitcode == -signal.SIGKILL, died
    assert "killed by SIGKILL" in trace
    found = weights(workshop)
    assert found is not None or before is None
    finish(workshop, *(["--overwrite"] if found else []))


def stop_while_reading():
    from fusekit.merging import models

    original = models.first_not_finite
    seen = []

    def stop(tensor):
        seen.append(1)
        if len(seen) == 5:
            stop_self()
        return original(tensor)

    models.first_not_finite = stop


def stopped_while_reading(workshop):
    child = start(workshop, *MERGE, before=stop_while_reading)
    wait_until(lambda: is_stopped(child.pid))
    return child


def test_sigkill_while_reading_leaves_only_staging_which_the_next_run_sweeps(recipe, workshop):
    child = stopped_while_reading(workshop)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait().exitcode == -signal.SIGKILL
    assert "out" not in listing(workshop)
    left = [name for name in traces(workshop) if "staging" in name]
    again = fusekit(workshop, *MERGE)
    assert again.exitcode == 0
    assert f"removed what an interrupted merge left behind: {workshop / left[0]}" in again.output
    assert traces(workshop) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_clean_up_and_say_what_to_do(recipe, workshop, number, status):
    child = stopped_while_reading(workshop)
    os.kill(child.pid, number)
    os.kill(child.pid, signal.SIGCONT)
    finished = child.wait()
    assert finished.exitcode == status, finished.output
    assert "out is as it was, or whole" in finished.output
    assert "Traceback" not in finished.output
    assert traces(workshop) == []
    assert "out" not in listing(workshop)


def test_the_second_of_two_runs_names_the_first(recipe, workshop):
    """The first is stopped while it reads; the second must not touch anything."""
    first = stopped_while_reading(workshop)
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


# ---------------------------------------------------------------- disks


def test_full_disk_names_path_needed_and_free_and_leaves_nothing(recipe, mounted):
    small = mounted("size=16k")
    with refused(StorageError, str(small), "No space left on device (23.9 kB needed", "free)"):
        merge(recipe, small / "out", settings=UNESTIMATED)
    assert traces(small) == []
    assert not (small / "out").exists()


def test_a_disk_that_is_full_from_the_start_is_left_as_it_was(recipe, mounted):
    """Not even the description of the holder of the lock fits."""
    disk = mounted("size=16k")
    (disk / "ballast").write_bytes(bytes(16 << 10))
    with pytest.raises(StorageError, match="No space left"):
        merge(recipe, disk / "out", settings=UNESTIMATED)
    assert set(listing(disk)) <= {"ballast", ".out.fusekit.lock"}


def test_full_disk_keeps_the_model_that_was_there(recipe, mounted):
    disk = mounted("size=96k")
    merge(recipe, disk / "out", settings=UNESTIMATED)
    before = (disk / "out/model.safetensors").read_bytes()
    (disk / "ballast").write_bytes(bytes(36_000))
    with pytest.raises(StorageError, match="No space left"):
        merge(recipe, disk / "out", settings=Settings(overwrite=True, ignore_estimates=True, say=lambda _: None))
    assert (disk / "out/model.safetensors").read_bytes() == before
    assert traces(disk) == []


def failed(done, workshop, *parts):
    """A command ended with an error of these parts, and left nothing behind."""
    assert done.exitcode == 1, done.output
    assert [part for part in parts if part not in done.output] == [], done.output
    assert "Traceback" not in done.output
    assert "out" not in listing(workshop)
    assert traces(workshop) == []


def test_file_size_limit(recipe, workshop):
    """`ulimit -f` stands in for a full disk where nothing can be mounted."""
    done = fusekit(workshop, *MERGE, before=partial(limit_file_size, 8192))
    failed(done, workshop, "File too large (23.9 kB needed", "ulimit -f")


def test_read_only_file_system(recipe, mounted):
    disk = mounted("size=1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match=rf"{disk}.*Read-only file system \(.* free\)"):
        merge(recipe, disk / "out", settings=QUIET)


def test_no_permission(recipe, workshop):
    # Not below pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as open_to_all:
        root = Path(open_to_all)
        root.chmod(0o755)
        shutil.copytree(workshop, root / "shop")
        (root / "shop").chmod(0o755)
        (root / "locked").mkdir()
        (root / "locked").chmod(0o555)
        os.chdir(root / "shop")
        with without_privileges(), pytest.raises(StorageError, match=r"locked.*Permission denied \(.* free\)"):
            merge("recipe.yml", root / "locked/out", settings=QUIET)
        assert list((root / "locked").iterdir()) == []
        os.chdir(workshop)


@traceable
@pytest.mark.parametrize(
    ("inject", "text"),
    [
        ("fsync:error=EIO:when=1", "Input/output error"),
        ("fsync:error=ENOSPC:when=2", "No space left on device"),
        ("rename:error=EROFS:when=1", "Read-only file system"),
        ("mkdir:error=EDQUOT:when=1+", "Disk quota exceeded"),
    ],
)
def test_system_calls_that_fail(recipe, workshop, inject, text):
    done, trace = under_strace(start(workshop, *MERGE, before=stop_self), inject)
    assert "(INJECTED)" in trace
    failed(done, workshop, text, str(workshop), "free)")


@traceable
@pytest.mark.parametrize("code", ["ENOSYS", "EINVAL"])
def test_a_kernel_or_file_system_that_cannot_exchange_folders(write_recipe, workshop, code):
    merge(write_recipe(), "out", settings=QUIET)
    before = (workshop / "out/model.safetensors").read_bytes()
    write_recipe(parameters={"weight": 0.9})
    child = start(workshop, *MERGE, "--overwrite", before=stop_self)
    done, trace = under_strace(child, f"renameat2:error={code}")
    assert "(INJECTED)" in trace
    assert done.exitcode == 0, done.output
    assert (workshop / "out/model.safetensors").read_bytes() != before
    assert traces(workshop) == []


def test_an_error_of_the_disk_is_found_behind_another():
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = OSError(errno.EIO, "inner")
    assert "Input/output error" in str(disk_fault(wrapped, Path("/tmp")))
