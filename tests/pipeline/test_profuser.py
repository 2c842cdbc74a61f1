"""ProFuser from the data to a trained model: answers, votes, the winners' rows and a schedule; killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusekit.capturing.store import Store
from fusekit.errors import CaptureError, RecipeError, StorageError
from fusekit.layout import Layout
from fusekit.pipeline.clean import made_by, unneeded
from fusekit.pipeline.responding import _made_lines
from fusekit.pipeline.run import make_plan
from fusekit.pipeline.stage import Context
from fusekit.recipe.loading import load_recipe
from tests.pipeline.test_faults import RUN, write_world
from tests.pipeline.worlds import differences, go, refused
from tests.processes import fusekit

RESPOND = {
    "max_new_tokens": 6,
    "prompts_per_shard": 3,
    "judges": [{"exact_match": True}, {"python": "judges:shortest", "allow_code": True}, {"bits_per_byte": True}],
}
SCHEDULE = [{"epochs": 1, "responses": 1.0}, {"epochs": 1, "responses": 0.1, "data": 1.0}]


def write_profuser(folder: Path) -> Path:
    """Two sources, eight rows, three judges, two stages."""
    write_world(folder)
    (folder / "judges.py").write_text(
        "def shortest(messages, answers, references):\n"
        "    return {name: -len(text) for name, text in answers.items()}\n"
    )
    recipe = yaml.safe_load((folder / "recipe.yml").read_text())
    first = recipe["sources"][0]
    recipe["sources"] = [first, first | {"model": first["model"].replace("llama", "qwen")}]
    recipe |= {"respond": RESPOND, "fusion": {"mode": "joint"}}
    recipe["distill"] |= {"schedule": SCHEDULE}
    del recipe["distill"]["num_train_epochs"]
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_profuser(tmp_path_factory.mktemp("whole"))
    done = fusekit(folder, *RUN, before=on_path)
    assert done.exitcode == 0, done.output
    return folder


def on_path() -> None:
    """Import from the working folder, as ``python -m`` does."""
    sys.path.insert(0, "")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_profuser(tmp_path / "world")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_winners_teach_their_own_answers_and_the_schedule_weighs_them(finished: Path) -> None:
    layout = Layout(finished / "out")
    votes, counts = records(layout.judged / "votes.jsonl"), json.loads((layout.judged / "counts.json").read_text())
    answers = {name: records(layout.responses(name) / "answers.jsonl") for name in ("pivot", "llama", "qwen")}
    assert {len(known) for known in answers.values()} == {len(votes)}
    assert set(counts["votes"]) == {"exact_match", "judges:shortest", "bits_per_byte"}
    for number, vote in enumerate(votes):
        lengths = {
            name: -len(known[number]["text"]) for name, known in answers.items() if known[number]["text"].strip()
        }
        assert vote["scores"]["judges:shortest"] == lengths
        assert set(vote["scores"]["bits_per_byte"]) == set(lengths)
        assert vote["winner"] in lengths
    won = {name: sum(vote["winner"] == name for vote in votes) for name in answers}
    assert counts["won"] == {**won, "nobody": 0}
    rows = records(layout.judged / "rows.jsonl")
    written = {row["key"]: row["messages"][-1][1] for row in rows}
    for number, vote in enumerate(votes):
        assert written[vote["row"]] == answers[vote["winner"]][number]["text"]
    # A store of the pivot over all answers, and of each winner over its own.
    assert list(Store.open(layout.winners("pivot")).keys) == list(written)
    for name in ("llama", "qwen"):
        own = {vote["row"] for vote in votes if vote["winner"] == name}
        assert layout.winners(name).exists() == bool(own)
        if own:
            assert set(Store.open(layout.winners(name)).keys) == own
    record = json.loads((layout.targets / "joint" / "training.json").read_text())
    assert record["counts"]["rows"] == 8
    assert record["counts"]["responses/rows"] == 2 * len(rows)
    for name, number in won.items():
        assert record["counts"].get(f"responses/chosen/{name}", 0) == 2 * number
    # Plain fine-tuning has as many passes over the data alone.
    baseline = json.loads((layout.baselines / "sft" / "training.json").read_text())
    assert baseline["counts"]["rows"] == 16
    page = layout.report.read_text()
    assert all(str(name) in page for name in counts["votes"])


def test_a_second_run_does_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.syspath_prepend(tmp_path / "copy")
    recipe, out = Path("recipe.yml"), Path("out").resolve()
    said, layout = go(recipe, out), Layout(out)
    assert differences(finished / "out", out) == []
    assert not [line for line in said if line.startswith(("respond", "judge"))]
    plan = make_plan(load_recipe(recipe), "recipe.yml", out)
    assert {step.state for step in plan.steps if step.stage in ("respond", "judge", "distill")} == {"done"}
    assert unneeded(layout).items == []
    # Other settings of the answers are refused by name, with both values.
    refused(recipe, out, r"max_new_tokens: 6, now 7", "respond.max_new_tokens=7")
    found = made_by(layout, ["respond", "judge"])
    assert {item.path for item in found.items} >= {layout.judged, layout.responses("pivot"), layout.winners("pivot")}
    assert found.spared == []


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

    on_path()
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
def test_sigkill_again_and_again_ends_in_the_same_artifacts(finished: Path, world: Path) -> None:
    stages = killed_again_and_again(world, 8)
    assert len(stages) > 2
    assert {"responses", "judged.work"} & stages
    assert differences(finished / "out", world / "out") == []


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_sigkill_at_every_commit(finished: Path, world: Path) -> None:
    stages = {"data", "responses", "judged", "judged.work", "winners", "captures", "alignment", "targets", "baselines"}
    assert stages | {"merged", "evaluation", "results.json"} <= killed_again_and_again(world, 0)
    assert differences(finished / "out", world / "out") == []


def test_a_model_that_does_not_fit_is_not_loaded_to_answer(world: Path) -> None:
    with pytest.raises(CaptureError, match="pivot does not fit"):
        go(Path("recipe.yml"), Path("out"), "capture.batch_tokens=1000000000", until="respond")
    assert not (Layout(world / "out").responses("pivot")).exists()


def test_answers_that_are_half_written_are_gone_on_with_and_damaged_ones_named(finished: Path, world: Path) -> None:
    recipe, out = Path("recipe.yml"), Path("out").resolve()
    folder = Layout(out).responses("pivot")
    lines = Layout.work(folder) / "answers.jsonl"
    killed = fusekit(world, *RUN, "--until", "respond", before=kill_before_publishing)
    assert killed.exitcode == -signal.SIGKILL
    whole = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join([*whole[:4], whole[4][:5]]))
    plan = make_plan(load_recipe(recipe), "recipe.yml", out)
    [step] = [step for step in plan.steps if (step.stage, step.name) == ("respond", "pivot")]
    assert (step.state, step.rows) == ("resumes", 4)
    lines.write_bytes(b"[" + lines.read_bytes())
    with pytest.raises(StorageError, match=str(lines)):
        go(recipe, out, until="respond")
    lines.write_bytes(lines.read_bytes()[1:])
    go(recipe, out, until="respond")
    assert differences(finished / "out" / "responses", out / "responses") == []
    assert not Layout.work(folder).exists()


def test_a_disk_that_fills_up_under_answers_is_named_and_whole_ones_stay(mounted: Any, world: Path) -> None:
    recipe = load_recipe("recipe.yml")
    disk, context = mounted("size=384k"), Context(recipe, quiet=True)
    path = disk / "work" / "answers.jsonl"
    (disk / "ballast").write_bytes(bytes(320 << 10))

    def made(text: str) -> list[Any]:
        return _made_lines(context, path, {}, range(60), lambda some: [[text, n] for n in some], label="")

    with pytest.raises(StorageError, match=rf"{path}: No space left on device \(.* free\)"):
        made("a" * 3000)
    *whole, cut = path.read_bytes().splitlines(keepends=True)
    assert not cut.endswith(b"\n")
    (disk / "ballast").unlink()
    made("b")
    kept = len(whole) // 3 * 3  # in batches of three
    assert kept > 9
    assert path.read_bytes().splitlines(keepends=True)[: kept + 1] == [*whole[:kept], b'["b", %d]\n' % kept]


def kill_before_publishing() -> None:
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(args[1]).endswith("/responses/pivot"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"respond": None}, "schedule"),
        ({"distill.schedule": None}, "schedule"),
        ({"fusion.mode": "pairwise"}, "schedule"),
        ({"respond.judges": [{"reward_model": "./no/model"}]}, "no/model"),
        ({"respond.judges": [{"python": "judges:longest", "allow_code": True}]}, "judges:longest"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_done(changes: dict[str, Any], named: str, world: Path) -> None:
    with pytest.raises(RecipeError, match=named):
        go(Path("recipe.yml"), Path("out"), *(f"{key}={json.dumps(value)}" for key, value in changes.items()))
    assert not (world / "out").exists()
