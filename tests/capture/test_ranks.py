"""Processes that know nothing of each other capture one store: by options, under Slurm, killed and started again."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from fusekit.api import capture_job
from fusekit.capturing.store import Store
from fusekit.devices import Processes
from fusekit.errors import CaptureError
from tests.capture.conftest import DEMO, write_rows
from tests.capture.test_capture_interrupted import contents, signal_self_at
from tests.processes import Process, command, fusekit, kill_all

OPTIONS = ("--rows-per-shard", "3", "--max-length", "64", "--dtype", "float32")


def arguments(out: Path, model: Path = DEMO / "numbers") -> tuple[str, ...]:
    return "capture", str(model), "rows.jsonl", str(out), *OPTIONS


@pytest.fixture
def machines(tmp_path):
    """Two folders with the same examples and models of their own, and the store that one process makes."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", 20)
        shutil.copytree(DEMO / "numbers", tmp_path / name / "numbers")
    done = fusekit(tmp_path / "one", *arguments(tmp_path / "alone"))
    assert done.exitcode == 0, done.output
    return tmp_path / "one", tmp_path / "two"


def shards(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(store).items() if name.endswith(".parquet")}


def assert_is_that_of_one_process(tmp_path):
    store, alone = Store.open(tmp_path / "out", verify=True), Store.open(tmp_path / "alone")
    assert store.keys == alone.keys
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")
    assert sorted(contents(tmp_path / "out")) == sorted(contents(tmp_path / "alone"))
    assert not list(tmp_path.glob(".out.rank*"))


def test_a_rank_that_was_killed_is_run_again_alone(machines, tmp_path):
    out = tmp_path / "out"
    killed = Process(
        command,
        machines[1],
        (*arguments(out, machines[1] / "numbers"), "--rank", "1", "--world", "2"),
        {},
        signal_self_at_fourth_shard,
    )
    other = Process(
        command, machines[0], (*arguments(out, machines[0] / "numbers"), "--rank", "0", "--world", "2"), {}, None
    )
    assert killed.wait().exitcode == -signal.SIGKILL
    done = other.wait()
    assert done.exitcode == 0, done.output
    assert not Store.open(out, incomplete=True).complete
    before = {name: path.stat().st_ino for name in shards(out) if (path := out / name)}
    assert len(before) == 5  # four of rank 0, one of rank 1
    again = fusekit(machines[1], *arguments(out, machines[1] / "numbers"), "--rank", "1", "--world", "2")
    assert again.exitcode == 0, again.output
    assert_is_that_of_one_process(tmp_path)
    assert {name: (out / name).stat().st_ino for name in before} == before
    # Once more, in any rank: nothing is to be done.
    once_more = fusekit(machines[0], *arguments(out), "--rank", "0", "--world", "2")
    assert once_more.exitcode == 0, once_more.output
    assert_is_that_of_one_process(tmp_path)


def signal_self_at_fourth_shard() -> None:
    """SIGKILL while this rank's second shard, number 3 of the store, is written."""
    signal_self_at("shard-00003", signal.SIGKILL)


def test_the_tasks_of_srun_complete_a_store(machines, tmp_path):
    out = tmp_path / "out"
    tasks = [
        Process(command, machines[0], arguments(out), {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "3"}, None)
        for rank in range(3)
    ]
    for task in tasks:
        done = task.wait()
        assert done.exitcode == 0, done.output
    assert_is_that_of_one_process(tmp_path)


def test_a_rank_and_a_plain_run_do_not_write_at_once(machines, tmp_path):
    out = tmp_path / "out"
    rank = Process(command, machines[0], (*arguments(out), "--rank", "1", "--world", "2"), {}, stop_at_second_shard)
    try:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for options in ((), ("--rank", "1", "--world", "2"), ("--rank", "1", "--world", "3")):
            refused = fusekit(machines[0], *arguments(out), *options)
            assert refused.exitcode == 1
            assert f"process {rank.pid}" in refused.output
    finally:
        kill_all([rank])
    rank.wait()
    done = fusekit(machines[0], *arguments(out))  # the rest, in one process
    assert done.exitcode == 0, done.output
    assert shards(out) == shards(tmp_path / "alone")


def stop_at_second_shard() -> None:
    signal_self_at("shard-00003", signal.SIGSTOP)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--rank", "1"), "world is None"),
        (("--rank", "2", "--world", "2"), "rank is 2"),
        (("--rank", "0", "--world", "2", "--overwrite"), "--overwrite"),
    ],
)
def test_refused(machines, tmp_path, options, named):
    refused = fusekit(machines[0], *arguments(tmp_path / "out"), *options)
    assert refused.exitcode == 1
    assert named in refused.output


def test_a_rank_with_other_settings_is_refused(machines, tmp_path):
    out = tmp_path / "out"
    assert fusekit(machines[0], *arguments(out), "--rank", "1", "--world", "2").exitcode == 0
    refused = fusekit(machines[0], *arguments(out), "--rank", "0", "--world", "2", "--top-k", "5")
    assert refused.exitcode == 1
    assert "top_k: 10, now 5" in refused.output


def test_one_capture_runs_for_several_ranks_with_one_model(tmp_path, monkeypatch):
    """As a worker of a scheduler does, which is given one share after the other."""
    write_rows(tmp_path / "rows.jsonl", 20)
    job = capture_job(
        DEMO / "numbers", str(tmp_path / "rows.jsonl"), tmp_path / "out", rows_per_shard=3, max_length=64, quiet=True
    )
    assert not job.run(Processes.separate(2, 4)).complete
    monkeypatch.setattr("fusekit.capturing.capture.load_model", None)
    monkeypatch.setattr("fusekit.capturing.models.Checkpoint.fingerprint", None)
    for rank in (0, 3, 1):
        store = job.run(Processes.separate(rank, 4))
    assert store.complete
    assert len(store) == 20


def test_how_processes_were_started(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.started() == Processes.current()
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")  # a job of one task, as those of an array
    assert Processes.started().connected
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert (Processes.started().rank, Processes.started().world, Processes.started().connected) == (0, 4, False)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (Processes.started().rank, Processes.started().world) == (2, 3)
    assert (Processes.started(5, 6).rank, Processes.started(5, 6).world) == (5, 6)
    with pytest.raises(CaptureError):
        Processes.started(6, 6)
