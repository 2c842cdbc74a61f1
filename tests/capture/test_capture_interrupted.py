"""Captures that are killed and stopped at every commit, in one process and in two, for real."""

import os
import shlex
import shutil
import signal
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fusekit.capturing.capture import capture_rows
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_model, valid_ids
from fusekit.capturing.store import Store, StoreSpec
from fusekit.capturing.teacher import Teacher
from fusekit.cli import cli
from fusekit.devices import Processes
from fusekit.settings import Selection
from tests.capture.conftest import DEMO, demo_rows
from tests.capture.store_processes import listing
from tests.processes import free_port, fusekit, kill_at, ranks, run

SPEC = StoreSpec(model="numbers", vocabulary=768, top_k=5, rows_per_shard=5)


class Bench:
    """A loaded model in a process that forks: a child that captures starts in milliseconds."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.tokenizer = demo_rows(folder, 12)
        # bfloat16 is slow on most CPUs.
        model = load_model(find_checkpoint(ModelChoice(str(DEMO / "numbers"), dtype="float32")), torch.device("cpu"))
        self.teacher = Teacher(model, valid_ids(self.tokenizer.tokenizer), Selection(5), batch_tokens=128)

    def fork(self, out: Path, rank: int, world: int, port: int, event: int, counter: Path) -> int:
        """Start a capture, which dies at its ``event``-th file operation on the store; its process id.

        event: 0 to count them into ``counter``, -1 for neither.
        """
        child = os.fork()
        if child:
            return child
        try:
            if world > 1:
                store = f"tcp://127.0.0.1:{port}"
                torch.distributed.init_process_group(
                    "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=30)
                )
            if event >= 0:
                kill_at(event, str(counter))
            processes = Processes(rank, world, world, torch.device("cpu"))
            capture_rows(
                self.rows, self.tokenizer, lambda: self.teacher, out, lambda: SPEC, quiet=True, processes=processes
            )
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def finish(self, children: list[int]) -> list[int]:
        """Exit codes, negative for a signal; once one has died the others are killed, as a launcher does."""
        codes: dict[int, int] = {}
        while len(codes) < len(children):
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:
                for other in set(children) - codes.keys():
                    os.kill(other, signal.SIGKILL)
        return [codes[child] for child in children]


def _kill_at_every_event(folder: Path, world: int, stride: int, least: int) -> None:
    """Kill one process at each file operation, run again, compare with the store of a run that nobody disturbed.

    stride: between the operations that are tried, of which there are more than ``least``.
    """
    bench = Bench(folder)
    expected_path = folder / "whole" / "out"
    counters = [folder / f"count{rank}" for rank in range(world)]

    def start(out: Path, events: list[int]) -> list[int]:
        port = free_port()
        return bench.finish([bench.fork(out, rank, world, port, events[rank], counters[rank]) for rank in range(world)])

    assert start(expected_path, [0] * world) == [0] * world
    expected = listing(expected_path)
    # Equal to what one process makes, whatever the number of processes.
    alone = folder / "alone" / "out"
    assert bench.finish([bench.fork(alone, 0, 1, 0, -1, counters[0])]) == [0]
    assert listing(alone) == expected
    kills = finished = 0
    for rank in range(world):
        total = int(counters[rank].read_text())
        assert total > 10
        for event in range(1, total + 1, stride):
            out = folder / f"{rank}-{event}" / "out"
            codes = start(out, [event if r == rank else -1 for r in range(world)])
            assert codes[rank] == -signal.SIGKILL, (rank, event, codes)
            kills += 1
            there = listing(out) if out.exists() else {}
            finished += there.keys() == expected.keys()
            # What is there under its final name is whole, before the next run touches anything.
            assert all(expected[name] == there[name] for name in expected.keys() & there if "shard" in name)
            recorded = [name for name in there if name.endswith(".parquet") and name[:-7] + "json" in there]
            kept = {name: (out / name).stat().st_ino for name in recorded}
            assert start(out, [-1] * world) == [0] * world, (rank, event)
            assert listing(out) == expected, (rank, event)
            # A committed shard is not written again.
            assert {name: (out / name).stat().st_ino for name in kept} == kept, (rank, event)
            leftovers = [p.name for p in out.parent.iterdir() if p.name not in ("out", ".out.fusekit.lock")]
            assert leftovers == [], (rank, event)
            shutil.rmtree(out.parent)
    assert kills > max(finished, least)


def test_sigkill_at_every_file_operation_of_one_process(tmp_path):
    done = run(_kill_at_every_event, tmp_path, 1, 1, 30, timeout=280)
    assert done.exitcode == 0, done.output


def test_sigkill_at_commits_of_either_of_two_processes(tmp_path, full):
    done = run(_kill_at_every_event, tmp_path, 2, 1 if full else 5, 10, timeout=280)
    assert done.exitcode == 0, done.output


def signal_self_at(shard: str, number: signal.Signals) -> None:
    """Send a signal to this process while a shard is written."""
    sent = []

    def hook(event, args):
        if event == "open" and f".{shard}.parquet" in str(args[0]) and not sent:
            sent.append(True)
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_whole_shards_and_prints_the_command_that_goes_on(
    rows_file, tmp_path, monkeypatch, number, status
):
    arguments = ("capture", str(DEMO / "numbers"), "rows.jsonl", "out", "--rows-per-shard", "5", "--max-length", "64")
    before = partial(signal_self_at, "shard-00001", number)
    stopped = fusekit(tmp_path, *arguments, "--overwrite", before=before)
    assert stopped.exitcode == status, stopped.output
    assert "Traceback" not in stopped.output
    assert "out has 1 whole shard" in stopped.output
    assert sorted(listing(tmp_path / "out")) == ["manifest.json", "shard-00000.json", "shard-00000.parquet"]
    first = (tmp_path / "out" / "shard-00000.parquet").stat().st_ino
    again = shlex.split(stopped.output.strip().splitlines()[-1])
    assert again == ["fusekit", *arguments]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, again[1:])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "shard-00000.parquet").stat().st_ino == first
    assert Store.open(tmp_path / "out", verify=True).complete


def test_a_refusal_stops_every_process_and_is_said_once(rows_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    children = ranks(tmp_path, 2, "capture", str(DEMO / "numbers"), "rows.jsonl", "out", "--max-length", "64")
    finished = [child.wait() for child in children]
    assert [child.exitcode for child in finished] == [1, 1]
    assert "thesis.txt" in finished[0].output
    assert "thesis.txt" not in finished[1].output
