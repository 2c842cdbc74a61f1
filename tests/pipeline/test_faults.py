"""``fusekit run`` as a real process that is killed, stopped and starved."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusekit import artifacts as artifact
from fusekit.artifacts import weights_hash
from fusekit.disk import output_lock
from fusekit.distillation.run import _begin, _start
from fusekit.distillation.settings import Target
from fusekit.errors import CaptureError, DistillationError, FusekitError, StorageError
from fusekit.layout import Layout
from fusekit.pipeline.stage import read_rows_file
from fusekit.pipeline.stage import write_rows as write_prepared
from fusekit.types import Message, Row
from tests.capture.conftest import write_rows
from tests.pipeline.worlds import differences, go, write_recipe
from tests.processes import Finished, Process, command

RUN = ("run", "recipe.yml", "out")


def write_world(folder: Path) -> Path:
    """A recipe with one source, eight rows in two shards, and two steps."""
    folder.mkdir(parents=True, exist_ok=True)
    training = {"num_train_epochs": 1, "batch_size": 4, "per_device_train_batch_size": 4}
    write_recipe(
        folder,
        ["llama"],
        data={"path": "rows.jsonl"},
        capture={"top_k": 4, "rows_per_shard": 4},
        distill=training | {"save_steps": 1, "save_strategy": "steps"},
        evaluate={"path": "held_out.jsonl"},
    )
    write_rows(folder / "rows.jsonl", 8)
    write_rows(folder / "held_out.jsonl", 2)
    return folder


def child(folder: Path, *args: str, before: Callable[[], None] | None = None, **environment: str) -> Finished:
    """``fusekit ARGS`` in a folder, in a process of its own, to its end."""
    return Process(command, folder, args, environment, before).wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose run nobody disturbed."""
    folder = write_world(tmp_path_factory.mktemp("whole"))
    done = child(folder, *RUN)
    assert done.exitcode == 0, done.output
    return folder


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that was not run yet, in the working directory."""
    folder = write_world(tmp_path / "world")
    monkeypatch.chdir(folder)
    return folder


def begun(out: Path, finished: Path, names: str) -> None:
    """An output that has these of the finished run."""
    out.mkdir(exist_ok=True)
    for name in [*names.split(), "recipe.resolved.yml"]:
        copy = shutil.copytree if (finished / "out" / name).is_dir() else shutil.copy
        copy(finished / "out" / name, out / name)


def inodes(folder: Path, pattern: str) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in sorted(folder.glob(pattern))}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("targets/llama/model.safetensors", b"x", "model.safetensors: its content differs"),
        ("results.json", b'{"models": {}}', "results.json: models.pivot"),
        ("targets/.two.staging-1/x", b"", "only in "),
        ("logs/run.log", b"of another day", ""),
        ("data/manifest.json", b'{"x": 1}', "data/manifest.json: "),
    ],
)
def test_the_comparison_of_outputs_notices_what_it_is_there_for(name, content, said, finished, tmp_path):
    out = tmp_path / "elsewhere"
    shutil.copytree(finished / "out", out)
    before = differences(finished / "out", out)  # merge.yml, which names the first output
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(content)
    found = [line for line in differences(finished / "out", out) if line not in before]
    assert bool(found) == bool(said)
    assert said in "\n".join(found)


# Killed


def die_at_commit() -> None:
    """SIGKILL this process when it is about to move the n-th file or folder to its place in the output.

    0: the first one at which none has died yet.
    """
    number, log = int(os.environ["FUSEKIT_TEST_COMMIT"]), Path(os.environ["FUSEKIT_TEST_LOG"])
    died_at = set(log.read_text().split()) if log.exists() else set()
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event != "os.rename" or "/out/" not in str(args[1]):
            return
        name = str(args[1]).split("/out/")[1]
        if any(part.startswith(".") for part in name.split("/")):  # locks, and what is staged under a random name
            return
        seen += 1
        if seen == number or (number == 0 and name not in died_at):
            with log.open("a") as file:
                file.write(name + "\n")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_again_and_again(world: Path, number: int) -> set[str]:
    """Run to the end although every process dies at a commit; returns of what stages each was about to commit."""
    log = world / "killed.log"
    for _ in range(100):
        done = child(world, *RUN, before=die_at_commit, FUSEKIT_TEST_COMMIT=str(number), FUSEKIT_TEST_LOG=str(log))
        if done.exitcode == 0:
            died_at = log.read_text().split()
            assert len(died_at) > 4
            return {commit.split("/")[0] for commit in died_at}
        assert done.exitcode == -signal.SIGKILL, done.output
    raise AssertionError(f"no end of it: {log.read_text()}")


@pytest.mark.full  # test_profuser.py does the same by default, with two stages more
def test_sigkill_again_and_again_at_commits_ends_in_the_same_artifacts(finished: Path, world: Path) -> None:
    assert len(killed_again_and_again(world, 6)) > 2
    assert differences(finished / "out", world / "out") == []


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_sigkill_at_every_commit_of_every_stage(finished: Path, world: Path) -> None:
    stages = {"data", "captures", "alignment", "targets", "baselines", "merged", "evaluation", "results.json"}
    assert stages <= killed_again_and_again(world, 0)
    assert differences(finished / "out", world / "out") == []


# Stopped


def signal_self() -> None:
    """Send the signal named in the environment to this process when it opens a certain file of the output."""
    number, fragment = signal.Signals[os.environ["FUSEKIT_TEST_SIGNAL"]], os.environ["FUSEKIT_TEST_AT"]
    sent = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and fragment in str(args[0]) and not sent:
            sent.append(True)
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    ("number", "status", "moment", "before", "kept", "stage", "made", "said"),
    [
        ("SIGINT", 130, "llama/.shard-00001", "", "captures/*/*.parquet", "capture", "captures", ""),
        (
            "SIGTERM",
            143,
            "llama.training/checkpoint-2/",
            "data captures alignment",
            "captures/*/*",
            "distill",
            "targets",
            "resumes from checkpoint-1",
        ),
    ],
    ids=["capture", "training"],
)
def test_a_signal_keeps_what_is_whole_and_prints_the_command_that_goes_on(
    number, status, moment, before, kept, stage, made, said, finished, world
):
    begun(world / "out", finished, before)
    stopped = child(world, *RUN, before=signal_self, FUSEKIT_TEST_SIGNAL=number, FUSEKIT_TEST_AT=moment)
    assert stopped.exitcode == status, stopped.output
    assert "Traceback" not in stopped.output
    assert "fusekit: stopped; what is whole in out stays. To resume:" in stopped.output
    again = shlex.split(stopped.output.strip().splitlines()[-1])
    assert again == ["fusekit", *RUN]
    assert "stopped by " in (world / "out" / "logs" / "run.log").read_text().splitlines()[-1]
    there = inodes(world / "out", kept)
    assert there
    done = child(world, *again[1:], "--until", stage)
    assert done.exitcode == 0, done.output
    assert said in done.output
    assert inodes(world / "out", kept).items() >= there.items()
    assert differences(finished / "out" / made, world / "out" / made) == []


# Starved


def fill_disk() -> None:
    """Leave nothing of the disk that the output is on when a certain file is opened."""
    disk, fragment = Path(os.environ["FUSEKIT_TEST_DISK"]), os.environ["FUSEKIT_TEST_AT"]
    full = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and fragment in str(args[0]) and not full:
            full.append(True)
            free = os.statvfs(disk)
            descriptor = os.open(disk / "ballast", os.O_WRONLY | os.O_CREAT)
            os.posix_fallocate(descriptor, 0, free.f_bavail * free.f_frsize)
            os.close(descriptor)

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    ("moment", "before", "kept", "stage", "made"),
    [
        ("llama/.shard-00001", "data", "out/captures/pivot/*", "capture", "captures"),
        (
            "llama.training/checkpoint-2/",
            "data captures alignment",
            "out/targets/llama.training/checkpoint-1/*",
            "distill",
            "targets",
        ),
        (
            "evaluation/sources/.llama",
            "data captures alignment targets baselines merged",
            "out/merged/*.safetensors",
            "report",
            "",
        ),
    ],
    ids=["capture", "training", "evaluation"],
)
def test_a_full_disk_is_named_and_what_was_committed_stays(
    moment,
    before,
    kept,
    stage,
    made,
    finished,
    world,
    mounted,
):
    disk = mounted("size=80m")
    begun(disk / "out", finished, before)
    run = ("run", "recipe.yml", str(disk / "out"))
    full = child(world, *run, before=fill_disk, FUSEKIT_TEST_DISK=str(disk), FUSEKIT_TEST_AT=moment)
    assert full.exitcode == 1, full.output
    assert "Traceback" not in full.output
    last = full.output.strip().splitlines()[-1]
    assert f"fusekit: {disk}/out" in last
    assert "No space left on device" in last
    assert "free)" in last
    there = inodes(disk, kept)
    assert there
    (disk / "ballast").unlink()
    done = child(world, *run, "--until", stage)
    assert done.exitcode == 0, done.output
    assert "resumes from checkpoint-1" in done.output if stage == "distill" else inodes(disk, kept) == there
    assert differences(finished / "out" / made, disk / "out" / made) == []


def test_a_training_that_does_not_fit_is_refused_with_the_numbers(finished, world, mounted):
    disk = mounted("size=8m")
    begun(disk / "out", finished, "data captures alignment")
    before = inodes(disk / "out", "*/*/*")
    with pytest.raises(
        DistillationError, match=r"does not fit:\n  disk \(.* about .* MB needed, .* free on the disk of"
    ):
        go(world / "recipe.yml", disk / "out")
    assert inodes(disk / "out", "*/*/*") == before


# In use, out of reach


def test_a_second_run_names_the_first(world):
    with (
        output_lock(world / "out"),
        pytest.raises(StorageError, match=rf"already being written by process {os.getpid()} "),
    ):
        go(world / "recipe.yml", Path("out"))
    assert not (world / "out").exists()


def test_a_source_out_of_reach_stops_the_run_at_once(world, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CaptureError, match="nobody/nothing"):
        go(world / "recipe.yml", Path("out"), "sources.0.model=nobody/nothing")
    assert not Layout(world / "out").data.exists()


FACTS = {"rows": {"count": 2}, "settings": {"num_train_epochs": 1.0}}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """Prepared rows, a published model, and the beginning of a training."""
    out = tmp_path_factory.mktemp("out")
    rows = [Row((Message("user", "a"), Message("assistant", "b")), dataset="d"), Row((Message("text", "c"),))]
    artifact.publish(out / "data", "data", {"limit": 3, "files": {"x": None}}, lambda into: write_prepared(into, rows))
    artifact.publish(out / "one", "distill", FACTS, lambda into: (into / "model.safetensors").write_bytes(b"weights"))
    found = Target("two", out / "two", ("two",))
    _begin(found, FACTS)
    return found


def resumed(target: Target) -> None:
    _start(target, FACTS, lambda _: None)


READERS: dict[str, Callable[[Target], object]] = {
    "data/manifest.json": lambda target: artifact.problems(target.folder.parent / "data"),
    "data/rows.jsonl": lambda target: read_rows_file(target.folder.parent / "data"),
    "one/manifest.json": lambda target: (
        artifact.require_whole(target.folder.parent / "one"),
        weights_hash(target.folder.parent / "one"),
    ),
    "two.training/made_from.json": resumed,
}

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=8), child, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(data=st.data())
@pytest.mark.parametrize("name", sorted(READERS))
def test_fuzzed_files_of_a_run_raise_only_our_errors(name: str, target: Target, data: st.DataObject) -> None:
    path: Path = target.folder.parent / name
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, min(start + 40, len(whole))))
        path.write_bytes(whole[:start] + data.draw(st.binary(max_size=40)) + whole[stop:])
    else:
        value = data.draw(VALUES)
        found = json.loads(whole.splitlines()[0] if name.endswith(".jsonl") else whole)
        key = data.draw(st.sampled_from([None, *found]))
        path.write_text(json.dumps(value if key is None else {**found, key: value}), encoding="utf-8")
    try:
        with suppress(FusekitError):
            READERS[name](target)
    finally:
        path.write_bytes(whole)
    READERS[name](target)
