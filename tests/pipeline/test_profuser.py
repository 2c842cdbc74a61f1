"""ProFuser from the data to a trained model: answers, votes, the winners' rows and a schedule."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fusekit.capturing.store import Store
from fusekit.errors import CaptureError, RecipeError, StorageError
from fusekit.layout import Layout
from fusekit.pipeline.clean import made_by, unneeded
from fusekit.pipeline.responding import _made_lines
from fusekit.pipeline.stage import Context
from fusekit.recipe.loading import load_recipe
from tests.pipeline.test_faults import die_at_commit
from tests.pipeline.worlds import RUN, differences, go, planned, refused
from tests.processes import fusekit


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_winners_teach_their_own_answers_and_the_schedule_weighs_them(whole: Path) -> None:
    layout = Layout(whole / "out")
    votes, counts = records(layout.judged / "votes.jsonl"), json.loads((layout.judged / "counts.json").read_text())
    answers = {name: records(layout.responses(name) / "answers.jsonl") for name in ("pivot", "llama", "qwen")}
    assert {len(known) for known in answers.values()} == {len(votes)}
    assert set(counts["votes"]) == {"exact_match", "judges:shortest", "bits_per_byte"}
    rows = records(layout.judged / "rows.jsonl")
    written = {row["key"]: row["messages"][-1][1] for row in rows}
    for number, vote in enumerate(votes):
        texts = {name: known[number]["text"] for name, known in answers.items()}
        lengths = {name: -len(text) for name, text in texts.items() if text.strip()}
        assert vote["scores"]["judges:shortest"] == lengths
        assert set(vote["scores"]["bits_per_byte"]) == set(lengths)
        assert vote["winner"] in lengths
        assert written[vote["row"]] == texts[vote["winner"]]
    won = {name: sum(vote["winner"] == name for vote in votes) for name in answers}
    assert counts["won"] == {**won, "nobody": 0}
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


def test_a_second_run_does_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.syspath_prepend(tmp_path / "copy")
    recipe, out = Path("recipe.yml"), Path("out").resolve()
    said, layout = go(recipe, out), Layout(out)
    assert differences(whole / "out", out) == []
    assert not [line for line in said if line.startswith(("respond", "judge"))]
    plan = planned(recipe, out)
    assert {step.state for step in plan.steps if step.stage in ("respond", "judge", "distill")} == {"done"}
    assert unneeded(layout).items == []
    # Other settings of the answers are refused by name, with both values.
    refused(recipe, out, r"max_new_tokens: 6, now 7", "respond.max_new_tokens=7")
    found = made_by(layout, ["respond", "judge"])
    assert {item.path for item in found.items} >= {layout.judged, layout.responses("pivot"), layout.winners("pivot")}
    assert found.spared == []


def test_a_model_that_does_not_fit_is_not_loaded_to_answer(world: Path) -> None:
    with pytest.raises(CaptureError, match="pivot does not fit"):
        go(Path("recipe.yml"), Path("out"), "capture.batch_tokens=1000000000", until="respond")
    assert not (Layout(world / "out").responses("pivot")).exists()


def test_answers_that_are_half_written_are_gone_on_with_and_damaged_ones_named(whole: Path, world: Path) -> None:
    recipe, out = Path("recipe.yml"), Path("out").resolve()
    folder = Layout(out).responses("pivot")
    lines = Layout.work(folder) / "answers.jsonl"
    killed = world / "killed.log"
    fusekit(world, *RUN, before=partial(die_at_commit, 5, killed))
    assert killed.read_text() == "responses/pivot\n"
    written = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join([*written[:4], written[4][:5]]))
    plan = planned(recipe, out)
    [step] = [step for step in plan.steps if (step.stage, step.name) == ("respond", "pivot")]
    assert (step.state, step.rows) == ("resumes", 4)
    lines.write_bytes(b"[" + lines.read_bytes())
    with pytest.raises(StorageError, match=str(lines)):
        go(recipe, out, until="respond")
    lines.write_bytes(lines.read_bytes()[1:])
    go(recipe, out, until="respond")
    assert differences(whole / "out" / "responses", out / "responses") == []
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
