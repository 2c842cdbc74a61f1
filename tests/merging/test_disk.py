"""Fault 3: disk full, I/O error, read-only, no permission. Real ones."""

import errno
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest

from fusekit.artifacts import disk_fault
from fusekit.errors import StorageError
from fusekit.merging import Settings, merge
from tests.merging.conftest import MERGE, listing, traces
from tests.processes import fusekit, limit_file_size, start, stop_self, strace_works, under_strace, without_privileges

QUIET = Settings(say=lambda _: None)


def test_full_disk_names_path_needed_and_free_and_leaves_nothing(recipe, mounted):
    small = mounted("size=16k")
    with pytest.raises(StorageError) as caught:
        merge(recipe, small / "out", settings=Settings(ignore_estimates=True, say=lambda _: None))
    message = str(caught.value)
    assert str(small) in message
    assert "No space left on device (23.9 kB needed" in message
    assert "free)" in message
    assert traces(small) == []
    assert not (small / "out").exists()


def test_a_disk_that_is_full_from_the_start_is_left_as_it_was(recipe, mounted):
    """Not even the description of the holder of the lock fits."""
    disk = mounted("size=16k")
    (disk / "ballast").write_bytes(bytes(16 << 10))
    with pytest.raises(StorageError, match="No space left"):
        merge(recipe, disk / "out", settings=Settings(ignore_estimates=True, say=lambda _: None))
    assert set(listing(disk)) <= {"ballast", ".out.fusekit.lock"}


def test_full_disk_keeps_the_model_that_was_there(recipe, mounted):
    disk = mounted("size=96k")
    merge(recipe, disk / "out", settings=Settings(ignore_estimates=True, say=lambda _: None))
    before = (disk / "out/model.safetensors").read_bytes()
    (disk / "ballast").write_bytes(bytes(36_000))
    with pytest.raises(StorageError, match="No space left"):
        merge(recipe, disk / "out", settings=Settings(overwrite=True, ignore_estimates=True, say=lambda _: None))
    assert (disk / "out/model.safetensors").read_bytes() == before
    assert traces(disk) == []


def test_file_size_limit(recipe, workshop):
    """`ulimit -f` stands in for a full disk where nothing can be mounted."""
    done = fusekit(workshop, *MERGE, before=partial(limit_file_size, 8192))
    assert done.exitcode == 1, done.output
    assert "File too large (23.9 kB needed" in done.output
    assert "ulimit -f" in done.output
    assert "Traceback" not in done.output
    assert "out" not in listing(workshop)
    assert traces(workshop) == []


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


@pytest.mark.skipif(not strace_works(), reason="strace is not here or may not trace")
@pytest.mark.parametrize(
    ("inject", "text"),
    [
        ("fsync:error=EIO:when=1", "Input/output error"),
        ("fsync:error=EIO:when=3", "Input/output error"),
        ("fsync:error=ENOSPC:when=2", "No space left on device"),
        ("rename:error=EROFS:when=2", "Read-only file system"),
        ("mkdir:error=EDQUOT:when=1+", "Disk quota exceeded"),
    ],
)
def test_system_calls_that_fail(recipe, workshop, inject, text):
    done, trace = under_strace(start(workshop, *MERGE, before=stop_self), inject)
    assert "(INJECTED)" in trace
    assert done.exitcode == 1, done.output
    assert text in done.output
    assert str(workshop) in done.output
    assert "free)" in done.output
    assert "Traceback" not in done.output
    assert "out" not in listing(workshop)
    assert traces(workshop) == []


@pytest.mark.skipif(not strace_works(), reason="strace is not here or may not trace")
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


def test_errors_of_rust_libraries_are_understood():
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    fault = disk_fault(error, Path("/tmp"), needed=123_456)
    assert fault is not None
    assert "123.5 kB needed" in str(fault)
    assert disk_fault(ValueError("unrelated"), Path("/tmp")) is None
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = OSError(errno.EIO, "inner")
    assert "Input/output error" in str(disk_fault(wrapped, Path("/tmp")))
