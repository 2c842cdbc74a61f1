"""Faults 1 and 3, for real: writers that die at any moment, and disks that are full, read-only or forbidden."""

import signal
import subprocess
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from fusekit.capturing.store import Store
from fusekit.errors import StorageError
from tests.capture.store_processes import KEYS, ROWS, SPEC, listing, start, write
from tests.processes import limit_file_size, stop_self, strace_works, under_strace, without_privileges


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a store that was written without interruption, which must be right."""
    path = tmp_path_factory.mktemp("whole") / "out"
    assert write(path) == [0, 1, 2, 3]
    assert Store.open(path, verify=True).keys == [key for key in KEYS[:ROWS] if key != KEYS[4]]
    return listing(path)


def test_another_number_of_processes_goes_on(tmp_path, whole):
    path = tmp_path / "out"
    assert write(path, 2, 3, SPEC, False) == [2]
    (path / ".shard-00001.parquet.1.tmp").write_bytes(b"of a process that died")
    assert write(path) == [0, 1, 3]
    assert listing(path) == whole


def test_a_living_neighbours_temporary_file_is_not_swept(tmp_path):
    path = tmp_path / "out"
    write(path, 0, 2, SPEC, False)
    (path / ".shard-00001.parquet.1.tmp").write_bytes(b"half a shard")
    write(path, 0, 2, SPEC, False)
    assert (path / ".shard-00001.parquet.1.tmp").exists()


@pytest.mark.skipif(not strace_works(), reason="strace is not here or may not trace")
@pytest.mark.parametrize(
    "inject", [f"rename:signal=KILL:when={when}" for when in (1, 2, 3, 9, 10)] + ["fsync:signal=KILL:when=5"]
)
def test_sigkill_inside_the_system_call(tmp_path, whole, inject):
    path = tmp_path / "out"
    died, trace = under_strace(start(path, before=stop_self), inject)
    assert died.exitcode == -signal.SIGKILL
    assert "killed by SIGKILL" in trace
    with suppress(StorageError):  # no store yet, or a whole one
        assert len(Store.open(path, verify=True)) == ROWS - 1
    write(path)
    assert listing(path) == whole


@pytest.mark.skipif(not strace_works(), reason="strace is not here or may not trace")
@pytest.mark.parametrize(
    ("inject", "text"),
    [
        ("fsync:error=EIO:when=4", "Input/output error"),
        ("write:error=ENOSPC:when=3", "No space left on device"),
        ("rename:error=EROFS:when=3", "Read-only file system"),
    ],
)
def test_system_calls_that_fail_keep_what_was_committed(tmp_path, whole, inject, text):
    path = tmp_path / "out"
    done, trace = under_strace(start(path, before=stop_self), inject)
    assert "(INJECTED)" in trace
    assert done.exitcode == 1
    assert all(part in done.output for part in (text, str(path), "free)")), done.output
    assert not [name for name in listing(path) if name.endswith(".tmp")]
    write(path)
    assert listing(path) == whole


def test_full_disk_keeps_committed_shards(tmp_path, mounted):
    disk = mounted("size=64k")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(45_000))
    with pytest.raises(StorageError, match=rf"{disk}.*No space left on device \(.* free\)"):
        write(disk / "out")
    kept = listing(disk / "out")
    assert not [name for name in kept if name.endswith(".tmp")]
    ballast.unlink()
    again = write(disk / "out")
    assert len(again) + len([name for name in kept if name.startswith("shard") and name.endswith(".json")]) == 4
    write(tmp_path / "out")
    assert listing(disk / "out") == listing(tmp_path / "out")


def test_file_size_limit(tmp_path):
    """`ulimit -f` stands in for a full disk where nothing can be mounted."""
    done = start(tmp_path / "out", before=partial(limit_file_size, 800)).wait()
    assert done.exitcode == 1
    assert all(part in done.output for part in ("File too large", str(tmp_path / "out"))), done.output
    assert not [name for name in listing(tmp_path / "out") if name.endswith(".tmp")]


def test_read_only_file_system(mounted):
    disk = mounted("size=1m")
    write(disk / "out")
    (disk / "out/shard-00001.parquet").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match=rf"{disk}.*Read-only file system \(.* free\)"):
        write(disk / "out")
    with pytest.raises(StorageError, match=rf"{disk}.*Read-only file system"):
        write(disk / "other")


def test_no_permission(tmp_path_factory):
    # Not below pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as open_to_all:
        root = Path(open_to_all)
        root.chmod(0o755)
        (root / "locked").mkdir(mode=0o555)
        with without_privileges(), pytest.raises(StorageError, match=r"locked.*Permission denied \(.* free\)"):
            write(root / "locked/out")
        assert list((root / "locked").iterdir()) == []
