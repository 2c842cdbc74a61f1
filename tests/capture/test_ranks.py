"""Processes that know nothing of each other capture one store: by options, under Slurm and Ray, killed and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from fusekit.capturing.capture import capture_job
from fusekit.capturing.store import Store
from fusekit.devices import Processes
from tests.capture.conftest import DEMO, write_rows
from tests.capture.store_processes import listing
from tests.capture.test_capture_interrupted import signal_self_at
from tests.processes import ENVIRONMENT, Process, command, is_stopped, kill_all, wait_until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
OPTIONS = ("--rows-per-shard", "3", "--max-length", "64", "--dtype", "float32")


def capturing(out: Path, *options: str, machine: Path, environment=None, before=None) -> Process:
    """A capture in one of the folders, by its own copy of the model."""
    arguments = ("capture", str(machine / "numbers"), "rows.jsonl", str(out), *OPTIONS, *options)
    return Process(command, machine, arguments, environment or {}, before)


def captured(out: Path, *options: str, machine: Path) -> None:
    done = capturing(out, *options, machine=machine).wait()
    assert done.exitcode == 0, done.output
    assert ("not finished" in done.output) is not Store.open(out, incomplete=True).complete


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two folders with the same examples and models of their own, and the store that one process makes."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for folder in folders:
        write_rows(folder / "rows.jsonl", 20)
        shutil.copytree(DEMO / "numbers", folder / "numbers")
    captured(folders[0] / "alone", machine=folders[0])
    return folders


def shards(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in listing(store).items() if name.endswith(".parquet")}


def assert_is_that_of_one_process(out, machines):
    alone = machines[0] / "alone"
    assert Store.open(out, verify=True).keys == Store.open(alone).keys
    assert shards(out) == shards(alone)
    assert listing(out).keys() == listing(alone).keys()
    assert not list(out.parent.glob(".out.rank*"))


def test_a_rank_that_was_killed_is_run_again_alone(machines, tmp_path):
    (one, two), out = machines, tmp_path / "out"
    # While this rank's second shard, number 3 of the store, is written.
    fourth = partial(signal_self_at, "shard-00003", signal.SIGKILL)
    killed = capturing(out, "--rank", "1", "--world", "2", machine=two, before=fourth)
    captured(out, "--rank", "0", "--world", "2", machine=one)
    assert killed.wait().exitcode == -signal.SIGKILL
    assert not Store.open(out, incomplete=True).complete
    before = {name: (out / name).stat().st_ino for name in shards(out)}
    assert len(before) == 5  # four of rank 0, one of rank 1
    # Once more, in any rank: nothing is to be done.
    for rank, machine in (("1", two), ("0", one)):
        captured(out, "--rank", rank, "--world", "2", machine=machine)
        assert_is_that_of_one_process(out, machines)
        assert {name: (out / name).stat().st_ino for name in before} == before


def test_the_tasks_of_srun_complete_a_store(machines, tmp_path):
    out = tmp_path / "out"
    environments = [{"SLURM_PROCID": str(rank), "SLURM_NTASKS": "3"} for rank in range(3)]
    tasks = [capturing(out, machine=machines[0], environment=environment) for environment in environments]
    for done in [task.wait() for task in tasks]:
        assert done.exitcode == 0, done.output
    assert_is_that_of_one_process(out, machines)


def test_a_rank_and_a_plain_run_do_not_write_at_once(machines, tmp_path):
    out, machine = tmp_path / "out", machines[0]
    stop = partial(signal_self_at, "shard-00003", signal.SIGSTOP)
    rank = capturing(out, "--rank", "1", "--world", "2", machine=machine, before=stop)
    try:
        wait_until(lambda: is_stopped(rank.pid))
        for options in ((), ("--rank", "1", "--world", "2"), ("--rank", "1", "--world", "3")):
            refused = capturing(out, *options, machine=machine).wait()
            assert refused.exitcode == 1
            assert f"process {rank.pid}" in refused.output
    finally:
        kill_all([rank])
    rank.wait()
    captured(out, machine=machine)  # the rest, in one process
    Store.open(out, verify=True)
    assert shards(out) == shards(machines[0] / "alone")
    assert list(tmp_path.glob(".out.rank*")) == []  # the lock of the rank that was killed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--rank", "1"), "world is None"),
        (("--rank", "2", "--world", "2"), "rank is 2"),
        (("--rank", "0", "--world", "2", "--overwrite"), "--overwrite"),
    ],
)
def test_refused(machines, tmp_path, options, named):
    refused = capturing(tmp_path / "out", *options, machine=machines[0]).wait()
    assert refused.exitcode == 1
    assert named in refused.output


def test_ranks_without_a_launcher_are_separate_processes(monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert Processes.started() == Processes.separate(2, 3)
    assert Processes.started(5, 6) == Processes.separate(5, 6)
    monkeypatch.delenv("RANK")
    assert Processes.started() == Processes.separate(0, 4)


def test_one_capture_runs_for_several_ranks_with_one_model(machines, tmp_path, monkeypatch):
    """As a worker of a scheduler does, which is given one share after the other."""
    rows = str(machines[0] / "rows.jsonl")
    job = capture_job(DEMO / "numbers", rows, tmp_path / "out", rows_per_shard=3, max_length=64, quiet=True)
    assert not job.run(Processes.separate(2, 4)).complete
    monkeypatch.setattr("fusekit.capturing.engines.load_model", None)
    monkeypatch.setattr("fusekit.capturing.models.Checkpoint.fingerprint", None)
    for rank in (0, 3, 1):
        store = job.run(Processes.separate(rank, 4))
    assert store.complete
    assert len(store) == 20


def test_the_script_of_the_slurm_array(rows_file, tmp_path):
    """Slurm's part is to start the script with SLURM_ARRAY_TASK_ID set; task 0 is lost at first."""
    (tmp_path / "bin").mkdir()
    named = tmp_path / "bin" / "fusekit"
    named.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')  # what the script calls is run below, without the imports
    named.chmod(0o755)
    path = {"PATH": f"{named.parent}:{os.environ['PATH']}", "WORLD": "2"}
    script = ["bash", str(EXAMPLES / "slurm_capture.sh"), str(DEMO / "numbers"), "rows.jsonl", "out"]
    for task, complete in (("1", False), ("0", True)):
        environment = {"SLURM_ARRAY_TASK_ID": task, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}  # of an array's task
        arguments = subprocess.check_output(script, env={**os.environ, **path, **environment}, text=True).splitlines()
        done = Process(command, tmp_path, (*arguments, "--rows-per-shard", "3"), environment, None).wait()
        assert done.exitcode == 0, done.output
        assert Store.open(tmp_path / "out", incomplete=True).complete is complete
    assert len(Store.open(tmp_path / "out", verify=True)) == 20


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_ray_with_two_workers_of_which_one_is_killed(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 60)
    arguments = [str(DEMO / "numbers"), str(tmp_path / "rows.jsonl"), str(tmp_path / "out")]
    options = ["--workers", "2", "--cpus", "0.5", "--shares", "20", "--rows-per-shard", "3", "--max-length", "64"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "ray_capture.py"), *arguments, *options],
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        killed = None
        while process.poll() is None and killed is None:
            time.sleep(0.02)
            if not (tmp_path / "out" / "shard-00002.json").exists():
                continue
            workers = [one for one in psutil.process_iter(["name", "cmdline"]) if "MapBatches(Shares)" in str(one.info)]
            if workers:
                workers[0].kill()
                killed = workers[0].pid
        status = process.wait(400)
    said = (tmp_path / "log").read_text()
    assert killed is not None, said[-3000:]
    assert status == 0, said[-3000:]
    assert "60 examples" in said
    assert len(Store.open(tmp_path / "out", verify=True)) == 60
