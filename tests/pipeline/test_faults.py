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
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusekit import artifacts as artifact
from fusekit.artifacts import weights_hash
from fusekit.disk import output_lock
from fusekit.distillation.run import _start
from fusekit.distillation.settings import Target
from fusekit.errors import CaptureError, DistillationError, FusekitError, StorageError
from fusekit.layout import Layout
from fusekit.pipeline.stage import read_rows_file
from fusekit.pipeline.stage import write_rows as write_prepared
from fusekit.types import Message, Row
from tests.pipeline.worlds import RUN, differences, go
from tests.processes import fusekit


def begun(out: Path, whole: Path, names: str) -> None:
    """An output that has these of the whole run."""
    out.mkdir(exist_ok=True)
    for name in [*names.split(), "recipe.resolved.yml"]:
        copy = shutil.copytree if (whole / "out" / name).is_dir() else shutil.copy
        copy(whole / "out" / name, out / name)


def inodes(folder: Path, pattern: str) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in sorted(folder.glob(pattern))}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("targets/joint/model.safetensors", b"x", "model.safetensors: its content differs"),
        ("results.json", b'{"models": {}}', "results.json: models.pivot"),
        ("targets/.two.staging-1/x", b"", "only in "),
        ("logs/run.log", b"of another day", ""),
        ("data/manifest.json", b'{"x": 1}', "data/manifest.json: "),
    ],
)
def test_the_comparison_of_outputs_notices_what_it_is_there_for(name, content, said, whole, tmp_path):
    out = tmp_path / "elsewhere"
    shutil.copytree(whole / "out", out)
    before = differences(whole / "out", out)  # merge.yml, which names the first output
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(content)
    found = [line for line in differences(whole / "out", out) if line not in before]
    assert bool(found) == bool(said)
    assert said in "\n".join(found)


# Killed


def die_at_commit(number: int, log: Path) -> None:
    """SIGKILL this process when it is about to move the n-th file or folder to its place in the output.

    0: the first one at which none has died yet, by the log.
    """
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
    for _ in range(200):
        done = fusekit(world, *RUN, before=partial(die_at_commit, number, log))
        if done.exitcode == 0:
            died_at = log.read_text().split()
            assert len(died_at) > 4
            return {commit.split("/")[0] for commit in died_at}
        assert done.exitcode == -signal.SIGKILL, done.output
    raise AssertionError(f"no end of it: {log.read_text()}")


@pytest.mark.timeout(900)
def test_sigkill_again_and_again_ends_in_the_same_artifacts(whole: Path, world: Path) -> None:
    stages = killed_again_and_again(world, 8)
    assert len(stages) > 2
    assert {"responses", "judged.work"} & stages
    assert differences(whole / "out", world / "out") == []


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_sigkill_at_every_commit(whole: Path, world: Path) -> None:
    stages = {"data", "responses", "judged", "judged.work", "winners", "captures", "alignment", "targets", "baselines"}
    assert stages | {"merged", "evaluation", "results.json"} <= killed_again_and_again(world, 0)
    assert differences(whole / "out", world / "out") == []


# Stopped and starved in the middle of a stage


def when_opened(fragment: str, act: Callable[..., object], *given: object) -> None:
    """Do something once, when this process opens a file with such a path."""
    done = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and fragment in str(args[0]) and not done:
            done.append(True)
            act(*given)

    sys.addaudithook(hook)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    free = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)


JUDGED = "data responses judged winners"
MOMENTS = {
    # a file that is opened then, what is there before, what has to stay, and what the stage makes
    "capture": ("llama/.shard-00001", JUDGED, "captures/*/*.parquet", "captures"),
    "distill": ("joint.training/checkpoint-2/", f"{JUDGED} captures alignment", "captures/*/*", "targets"),
    "evaluate": (
        "evaluation/sources/.llama",
        f"{JUDGED} captures alignment targets baselines merged",
        "merged/*.safetensors",
        "",
    ),
}


def resumed_from(out: Path, stage: str, whole: Path, *command: str) -> None:
    """The command, given again, completes the stage: of what was whole nothing is made again."""
    _, _, kept, made = MOMENTS[stage]
    there = inodes(out, kept)
    assert there
    done = fusekit(Path.cwd(), *command, "--until", stage)
    assert done.exitcode == 0, done.output
    assert ("resumes from checkpoint-1" in done.output) == (stage == "distill")
    assert inodes(out, kept).items() >= there.items()
    assert differences(whole / "out" / made, out / made) == []


@pytest.mark.parametrize(("stage", "number", "status"), [("capture", "SIGINT", 130), ("distill", "SIGTERM", 143)])
def test_a_signal_keeps_what_is_whole_and_prints_the_command_that_goes_on(stage, number, status, whole, world):
    moment, before, _, _ = MOMENTS[stage]
    begun(world / "out", whole, before)
    stop = partial(when_opened, moment, signal.raise_signal, signal.Signals[number])
    stopped = fusekit(world, *RUN, before=stop)
    assert stopped.exitcode == status, stopped.output
    assert "Traceback" not in stopped.output
    assert "fusekit: stopped; what is whole in out stays. To resume:" in stopped.output
    again = shlex.split(stopped.output.strip().splitlines()[-1])
    assert again == ["fusekit", *RUN]
    assert "stopped by " in (world / "out" / "logs" / "run.log").read_text().splitlines()[-1]
    resumed_from(world / "out", stage, whole, *again[1:])


@pytest.mark.parametrize("stage", MOMENTS)
@pytest.mark.usefixtures("world")
def test_a_full_disk_is_named_and_what_was_committed_stays(stage, whole, mounted):
    disk, (moment, before, _, _) = mounted("size=80m"), MOMENTS[stage]
    out, run = disk / "out", ("run", "recipe.yml", str(disk / "out"))
    begun(out, whole, before)
    full = fusekit(Path.cwd(), *run, before=partial(when_opened, moment, fill, disk))
    assert full.exitcode == 1, full.output
    assert "Traceback" not in full.output
    last = full.output.strip().splitlines()[-1]
    assert all(said in last for said in (f"fusekit: {out}", "No space left on device", "free)"))
    (disk / "ballast").unlink()
    resumed_from(out, stage, whole, *run)


def test_a_training_that_does_not_fit_is_refused_with_the_numbers(whole, world, mounted):
    disk = mounted("size=8m")
    begun(disk / "out", whole, MOMENTS["distill"][1])
    before = inodes(disk / "out", "*/*/*")
    with pytest.raises(DistillationError, match=r"does not fit:\n  disk \(.* MB needed, .* free on the disk of"):
        go(world / "recipe.yml", disk / "out")
    assert inodes(disk / "out", "*/*/*") == before


# In use, out of reach


def test_a_second_run_names_the_first(world):
    said = rf"already being written by process {os.getpid()} "
    with output_lock(world / "out"), pytest.raises(StorageError, match=said):
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
    artifact.begin(found.work, FACTS)
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
