"""``fusekit run`` as a real process that is killed, stopped and starved, and with inputs that change under it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusekit.artifacts import output_lock
from fusekit.errors import CaptureError, DistillationError, StorageError
from fusekit.layout import Layout
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from tests.capture.conftest import write_rows
from tests.helpers import edit_tensors
from tests.pipeline.artifacts import differences
from tests.processes import Finished, Process, command

DEMO = Path(__file__).parents[2] / "demo"
RUN = ("run", "recipe.yml", "out")


def write_world(folder: Path) -> Path:
    """A recipe with one source, eight rows in two shards, and two steps; the pivot is a copy."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(DEMO / "models" / "pivot", folder / "pivot")
    write_rows(folder / "rows.jsonl", 8)
    write_rows(folder / "held_out.jsonl", 2)
    load = {"dtype": "float32"}
    recipe: dict[str, Any] = {
        "pivot": {"model": "pivot", "load": load},
        "sources": [{"model": str(DEMO / "sources" / "llama"), "load": load}],
        "data": {"path": "rows.jsonl", "max_length": 64},
        "capture": {"top_k": 4, "rows_per_shard": 4},
        "distill": {
            "lm_weight": 0.5,
            "num_train_epochs": 1,
            "learning_rate": 3e-4,
            "batch_size": 4,
            "per_device_train_batch_size": 4,
        },
        "merge": {"merge_method": "linear", "parameters": {"weight": 1.0}, "dtype": "float32"},
        "evaluate": {"path": "held_out.jsonl", "metrics": ["bits_per_byte"]},
    }
    recipe["distill"] |= {"save_steps": 1, "save_strategy": "steps"}
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
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


def inodes(folder: Path, pattern: str) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in sorted(folder.glob(pattern))}


def artifacts(out: Path) -> dict[str, int]:
    """All that a run made but its logs."""
    return {name: inode for name, inode in inodes(out, "**/*").items() if not name.startswith("logs/")}


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


def killed_again_and_again(world: Path, number: int) -> list[str]:
    """Run to the end although every process dies at a commit; returns what each was about to commit."""
    log = world / "killed.log"
    for _ in range(100):
        done = child(world, *RUN, before=die_at_commit, FUSEKIT_TEST_COMMIT=str(number), FUSEKIT_TEST_LOG=str(log))
        if done.exitcode == 0:
            return log.read_text().split()
        assert done.exitcode == -signal.SIGKILL, done.output
    raise AssertionError(f"no end of it: {log.read_text()}")


def stages_of(commits: list[str]) -> set[str]:
    return {commit.split("/")[0] for commit in commits}


def test_sigkill_again_and_again_at_commits_ends_in_the_same_artifacts(finished: Path, world: Path) -> None:
    died_at = killed_again_and_again(world, 6)
    assert len(died_at) > 4
    assert len(stages_of(died_at)) > 2
    assert differences(finished / "out", world / "out") == []


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_sigkill_at_every_commit_of_every_stage(finished: Path, world: Path) -> None:
    died_at = killed_again_and_again(world, 0)
    stages = {"data", "captures", "alignment", "targets", "baselines", "merged", "evaluation", "results.json"}
    assert stages <= stages_of(died_at), sorted(died_at)
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
    ("number", "status", "moment", "kept", "stage", "made", "said"),
    [
        ("SIGINT", 130, "llama/.shard-00001", "captures/*/*.parquet", "capture", "captures", ""),
        (
            "SIGTERM",
            143,
            "llama.training/checkpoint-2/",
            "captures/*/*",
            "distill",
            "targets",
            "resumes from checkpoint-1",
        ),
    ],
    ids=["capture", "training"],
)
def test_a_signal_keeps_what_is_whole_and_prints_the_command_that_goes_on(
    number: str, status: int, moment: str, kept: str, stage: str, made: str, said: str, finished: Path, world: Path
) -> None:
    stopped = child(world, *RUN, before=signal_self, FUSEKIT_TEST_SIGNAL=number, FUSEKIT_TEST_AT=moment)
    assert stopped.exitcode == status, stopped.output
    assert "Traceback" not in stopped.output
    assert "fusekit: stopped; what is whole in out stays. To resume:" in stopped.output
    again = shlex.split(stopped.output.strip().splitlines()[-1])
    assert again == ["fusekit", *RUN]
    before = inodes(world / "out", kept)
    assert before
    done = child(world, *again[1:], "--until", stage)
    assert done.exitcode == 0, done.output
    assert said in done.output
    assert inodes(world / "out", kept).items() >= before.items()
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
    ("moment", "kept", "stage", "made"),
    [
        ("llama/.shard-00001", "out/captures/pivot/*", "capture", "captures"),
        ("llama.training/checkpoint-2/", "out/targets/llama.training/checkpoint-1/*", "distill", "targets"),
        ("evaluation/sources/.llama", "out/merged/*.safetensors", "report", ""),
    ],
    ids=["capture", "training", "evaluation"],
)
def test_a_full_disk_is_named_and_what_was_committed_stays(
    moment: str,
    kept: str,
    stage: str,
    made: str,
    finished: Path,
    world: Path,
    mounted: Callable[[str], Path],
) -> None:
    disk = mounted("size=80m")
    full = child(
        world,
        "run",
        "recipe.yml",
        str(disk / "out"),
        before=fill_disk,
        FUSEKIT_TEST_DISK=str(disk),
        FUSEKIT_TEST_AT=moment,
    )
    assert full.exitcode == 1, full.output
    assert "Traceback" not in full.output
    last = full.output.strip().splitlines()[-1]
    assert f"fusekit: {disk}/out" in last
    assert "No space left on device" in last
    assert "free)" in last
    before = inodes(disk, kept)
    assert before
    (disk / "ballast").unlink()
    done = child(world, "run", "recipe.yml", str(disk / "out"), "--until", stage)
    assert done.exitcode == 0, done.output
    assert "resumes from checkpoint-1" in done.output if stage == "distill" else inodes(disk, kept) == before
    assert differences(finished / "out" / made, disk / "out" / made) == []


def test_a_training_that_does_not_fit_is_refused_with_the_numbers(
    finished: Path,
    world: Path,
    mounted: Callable[[str], Path],
) -> None:
    disk = mounted("size=8m")
    for name in ("data", "captures", "alignment", "recipe.resolved.yml"):
        copy = shutil.copytree if (finished / "out" / name).is_dir() else shutil.copy
        (disk / "out").mkdir(exist_ok=True)
        copy(finished / "out" / name, disk / "out" / name)
    before = inodes(disk / "out", "*/*/*")
    with pytest.raises(
        DistillationError, match=r"does not fit:\n  disk \(.* about .* MB needed, .* free on the disk of"
    ):
        run(load_recipe("recipe.yml"), disk / "out", say=lambda _: None, quiet=True)
    assert inodes(disk / "out", "*/*/*") == before


# In use, changed, out of reach


def test_a_second_run_names_the_first(world: Path) -> None:
    with (
        output_lock(world / "out"),
        pytest.raises(StorageError, match=rf"already being written by process {os.getpid()} "),
    ):
        run(load_recipe("recipe.yml"), "out", say=lambda _: None)
    assert not (world / "out").exists()


def change_a_weight(world: Path) -> None:
    edit_tensors(world / "pivot", lambda tensors: tensors["model.norm.weight"].mul_(1.5))


def change_the_template(world: Path) -> None:
    template = world / "pivot" / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")


def change_the_tokenizer(world: Path) -> None:
    file = world / "pivot" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    del tokenizer["model"]["merges"][-1]
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("change", "override", "message"),
    [
        (change_a_weight, [], "model_fingerprint: 'xxh3 "),
        (change_the_tokenizer, [], "tokenizer: '"),
        (change_the_template, [], "tokenizer: '"),
        (None, ["merge.parameters.weight=0.5"], "merge.parameters.weight: 1.0, now 0.5"),
        (None, ["alignment.vocabulary=em"], "vocabulary: 'prefix', now 'em'"),
        (None, ["distill.seed=1"], "training.seed: 0, now 1"),
    ],
    ids=["model", "tokenizer", "template", "merge", "alignment", "seed"],
)
def test_what_changed_between_runs_is_refused_with_the_difference(
    change: Callable[[Path], None] | None, override: list[str], message: str, finished: Path, world: Path
) -> None:
    shutil.copytree(finished / "out", world / "out")
    if change is not None:
        change(world)
    before = artifacts(world / "out")
    with pytest.raises(Exception, match=message) as refusal:
        run(load_recipe("recipe.yml", override), "out", say=lambda _: None, quiet=True)
    assert type(refusal.value).__module__ == "fusekit.errors"
    assert artifacts(world / "out") == before


def test_a_source_out_of_reach_stops_the_run_at_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CaptureError, match="nobody/nothing"):
        run(load_recipe("recipe.yml", ["sources.0.model=nobody/nothing"]), "out", say=lambda _: None)
    assert not Layout(world / "out").data.exists()
