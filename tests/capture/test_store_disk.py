"""Fault 3: full, read-only and forbidden disks, for real."""

import resource
import subprocess
import tempfile
from pathlib import Path

import pytest

from fusekit.errors import StorageError
from tests.capture.store_processes import Child, listing, write
from tests.merging.test_disk import mounted, without_privileges  # noqa: F401


def test_full_disk_keeps_committed_shards(tmp_path, mounted):  # noqa: F811
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


def limit_file_size(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_file_size_limit(tmp_path):
    """`ulimit -f` stands in for a full disk where nothing can be mounted."""
    log = tmp_path / "log"
    assert Child(log, (tmp_path / "out",), limit_file_size, (800,)).wait() == 1
    assert "File too large" in log.read_text()
    assert str(tmp_path / "out") in log.read_text()
    assert not [name for name in listing(tmp_path / "out") if name.endswith(".tmp")]


def test_read_only_file_system(mounted):  # noqa: F811
    disk = mounted("size=1m")
    write(disk / "out")
    (disk / "out/shard-00001.safetensors").unlink()
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
