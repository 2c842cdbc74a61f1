"""Publishing a folder in one step, also where the kernel cannot exchange two folders."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusekit import artifacts, disk
from fusekit.disk import disk_fault, existing_parent, free_bytes, human, output_lock, recover, refuse_file, staging
from fusekit.errors import StorageError
from tests.processes import run


def put(folder, text):
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "sub/file").write_text(text)


def read(folder):
    return (folder / "sub/file").read_text()


@pytest.fixture(params=["exchange", "two renames"])
def kernel(request, monkeypatch):
    """The kernel as it is, and one without RENAME_EXCHANGE."""
    if request.param == "two renames":
        monkeypatch.setattr(disk, "_exchange", lambda one, other: False)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("before", ["nothing", "empty", "a folder"])
def test_publish(tmp_path, before):
    final = tmp_path / "a[b]*"
    if before != "nothing":
        final.mkdir()
    if before == "a folder":
        put(final, "old")
    with staging(final) as stage:
        put(stage, "new")
    assert read(final) == "new"
    assert list(tmp_path.iterdir()) == [final]


def test_what_is_not_published_leaves_no_trace(tmp_path):
    final = tmp_path / "out"
    put(final, "old")

    def build():
        with staging(final) as stage:
            put(stage, "new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        build()
    assert read(final) == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_the_exchange_is_one_step(tmp_path):
    """The path is never missing while two folders take turns there."""
    final, other = tmp_path / "final", tmp_path / "other"
    put(final, "1")
    put(other, "2")
    watch = "import os,sys\nwhile os.path.exists(sys.argv[1]): pass"
    watcher = subprocess.Popen([sys.executable, "-c", watch, str(final)])
    try:
        for _ in range(2000):
            assert disk._exchange(other, final)
        assert watcher.poll() is None
    finally:
        watcher.kill()
        watcher.wait()


def die_between_the_renames(final: Path) -> None:
    seen = []

    def hook(event, _args):
        if event == "os.rename":
            seen.append(event)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    disk._exchange = lambda one, other: False
    sys.addaudithook(hook)
    with staging(final) as stage:
        put(stage, "new")


def test_death_between_the_two_renames_is_repaired(tmp_path):
    final = tmp_path / "out"
    put(final, "old")
    assert run(die_between_the_renames, final).exitcode == -signal.SIGKILL
    assert not final.exists()
    swept = recover(final)
    assert read(final) == "old"
    assert len(swept) == 1
    assert list(tmp_path.iterdir()) == [final]


def test_recover_touches_only_its_own_output(tmp_path):
    final = tmp_path / "out"
    put(final, "kept")
    for name in (".out.staging-1", ".out.previous-1", ".out2.staging-1", ".outx.previous-1", "out.staging-1"):
        put(tmp_path / name, name)
    assert recover(final) == [tmp_path / ".out.staging-1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out2.staging-1", ".outx.previous-1", "out", "out.staging-1"]
    assert read(final) == "kept"


def test_everything_is_synced_before_the_rename_and_the_parent_after(tmp_path):
    final = tmp_path / "out"
    events = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor):
        events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real_sync(descriptor)

    def rename(one, other, **kwargs):
        events.append("rename")
        real_rename(one, other, **kwargs)

    with pytest.MonkeyPatch.context() as patch, staging(final) as stage:
        put(stage, "new")
        patch.setattr(os, "fsync", sync)
        patch.setattr(os, "rename", rename)
        path = str(stage)
    assert events == [f"{path}/sub", f"{path}/sub/file", path, "rename", str(tmp_path)]


def die_with_the_lock(out: Path) -> None:
    with output_lock(out):
        os._exit(9)


def test_lock_is_free_again_after_its_holder_died(tmp_path):
    out = tmp_path / "out"
    assert run(die_with_the_lock, out).exitcode == 9
    assert (tmp_path / ".out.fusekit.holder").exists()
    with output_lock(out):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".out.fusekit.lock"]


def test_two_outputs_in_one_folder_do_not_meet(tmp_path):
    with output_lock(tmp_path / "a"), output_lock(tmp_path / "b"):
        pass
    first, second = output_lock(tmp_path / "a"), output_lock(tmp_path / "a")
    with first, pytest.raises(StorageError, match="already being written by process"), second:
        pass


def test_the_holder_is_named_whatever_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fusekit", "a\udcff"])  # a name of a file that is no UTF-8
    first, second = output_lock(tmp_path / "a"), output_lock(tmp_path / "a")
    with first:
        with pytest.raises(StorageError, match=r"fusekit a\\udcff\. Wait"), second:
            pass
        (tmp_path / ".a.fusekit.holder").unlink()
        third = output_lock(tmp_path / "a")
        with pytest.raises(StorageError, match="already being written by another process"), third:
            pass


def test_a_lock_that_cannot_be_made_names_its_place():
    for out in ("/dev/null/out", "/dev/null/deep/out"):
        with pytest.raises(StorageError, match="/dev/null is not a folder: choose another"), output_lock(Path(out)):
            pass


@pytest.mark.parametrize("name", ["circle", "circle/out", "a" * 300])
def test_links_in_a_circle_and_long_names_are_no_output(tmp_path, name):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(StorageError, match="choose another"):
        refuse_file(tmp_path / name)


def test_sizes_as_people_read_them(tmp_path):
    assert [human(n) for n in (0, 9999, 12_345, 999_949, 1_500_000, 14_500_000_000, 2_340_000_000_000)] == [
        "0 bytes", "9999 bytes", "12.3 kB", "999.9 kB", "1.5 MB", "14.5 GB", "2.34 TB",
    ]  # fmt: skip
    assert existing_parent(tmp_path / "no/such/folder") == tmp_path
    assert free_bytes(tmp_path / "no/such/folder") > 0


def test_an_error_that_names_its_file_wins(tmp_path):
    error = OSError(28, "No space left on device", str(tmp_path / "shard"))
    assert str(tmp_path / "shard") in str(disk_fault(error, tmp_path))


def test_an_error_that_is_its_own_cause_is_no_endless_chain(tmp_path):
    error = ValueError("of no disk")
    error.__cause__ = error  # as `raise error from error` leaves it
    assert disk_fault(error, tmp_path) is None


def test_a_changed_byte_of_a_manifest_is_noticed(tmp_path):
    (tmp_path / "weights").write_bytes(b"weights")
    artifacts.seal(tmp_path, "distill", {"targets": {"é\ud800": 0.1}}, {"seconds": 1.5})
    known, path = artifacts.read(tmp_path), tmp_path / "manifest.json"
    assert (known.stage, known.inputs, known.made) == ("distill", {"targets": {"é\ud800": 0.1}}, {"seconds": 1.5})
    assert (list(known.files), known.files["weights"].size) == (["weights"], 7)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if not whole[at : at + 1].isspace():
            with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
                artifacts.read(tmp_path)


def test_where_there_is_no_manifest(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert [artifacts.read(place) for place in (tmp_path, tmp_path / "model.gguf", tmp_path / "none")] == [None] * 3


def test_each_file_that_differs_has_a_line_also_one_that_cannot_be_read(tmp_path):
    (tmp_path / "broken").symlink_to("/proc/self/mem")  # whose first byte is an input/output error
    (tmp_path / "longer").write_bytes(b"1")
    listed = artifacts.File(size=0, xxh3="0" * 32)
    found = artifacts.differing(tmp_path, dict.fromkeys(["broken", "gone", "longer"], listed))
    for line, *named in zip(found, ["broken", "gone", "longer"], ["Input/output error", "missing", "1"], strict=True):
        assert all(name in line for name in named)
