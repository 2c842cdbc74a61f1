"""`fusekit plan`: nothing is written, what is there is recognised, and what cannot be known is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from fusekit import devices
from fusekit.capturing.writer import StoreWriter
from fusekit.cli import cli
from fusekit.cli.recipe import WIDTH, table
from fusekit.errors import StorageError
from fusekit.pipeline import plan as planning
from fusekit.pipeline.plan import Plan
from fusekit.pipeline.stage import BEGUN, DONE, MISSING, Step
from tests.merging.hub_server import Hub, Repository
from tests.pipeline.worlds import DEMO, go, planned, with_sources, write_recipe


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with inode, size and time of change: what any writing would alter."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        stat = path.lstat()
        found[str(path)] = (stat.st_ino, stat.st_size if path.is_file() else 0, stat.st_mtime_ns)
    return found


def steps_of(plan: Plan) -> dict[str, Step]:
    return {f"{step.stage} {step.name}": step for step in plan.steps}


def states(plan: Plan) -> dict[str, str]:
    return {name: step.state for name, step in steps_of(plan).items()}


def test_a_plan_writes_nothing_and_has_every_figure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, ["llama"], distill={"lora": {"r": 2}})
    before = listing(tmp_path), listing(DEMO)
    plan = planned(recipe, tmp_path / "out", "evaluate.metrics=[bits_per_byte, exact_match]")
    assert (listing(tmp_path), listing(DEMO)) == before
    assert plan.can_run
    assert set(states(plan).values()) == {MISSING}
    steps = steps_of(plan)
    for name in ("capture pivot", "capture llama", "distill llama", "distill baseline", "evaluate 5 models"):
        assert steps[name].pflop, name
        assert steps[name].disk, name
    assert steps["distill llama"].memory
    text = table(plan)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "it can run" in text


def test_memory_counts_the_teachers_that_are_loaded_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "taken_bytes", lambda: 0)  # of this process, which change while it plans
    recipe = with_sources(write_recipe(tmp_path, []), ["llama", "neox"])

    def beside(live: bool, mode: str, *changes: str) -> dict[str, int]:
        """Of each target, what it needs more than the text alone; the need of the run is the largest."""
        on_the_fly = [f"sources.{at}.on_the_fly={str(live).lower()}" for at in (0, 1)]
        plan = planned(recipe, None, *on_the_fly, f"fusion.mode={mode}", *changes)
        steps = {step.name: step.memory or 0 for step in plan.steps if step.stage == "distill"}
        [need] = [need for need in plan.needs if need.what.startswith("memory of training")]
        assert need.needed == max(steps.values())
        alone = steps.pop("baseline")
        return {name: memory - alone for name, memory in steps.items()}

    assert beside(False, "pairwise", "distill.lm_weighting=soft") == {"llama": 0, "neox": 0}
    pairwise = beside(True, "pairwise")
    assert min(pairwise.values()) > 0
    assert beside(True, "joint") == pytest.approx({"joint": sum(pairwise.values())}, rel=1e-6)
    assert beside(False, "pairwise", "distill.on_policy=0.5") == pytest.approx(pairwise, rel=1e-6)


def test_what_is_there_is_reused_counted_alike_and_not_touched(captured):
    recipe, out = captured
    go(recipe, out, until="align")
    before = listing(out.parent)
    plan = planned(recipe, out)
    assert listing(out.parent) == before
    found = states(plan)
    assert found["data rows"] == found["capture pivot"] == found["capture llama"] == found["align llama"] == DONE
    assert found["distill llama"] == MISSING
    assert plan.can_run
    # Another source is to be made, and those that are there are not.
    found = states(planned(with_sources(recipe, ["llama", "neox"]), out))
    assert found["capture llama"] == found["align llama"] == DONE
    assert found["capture neox"] == found["distill neox"] == MISSING
    # Plain fine-tuning has no second one beside it.
    plan = planned(recipe, out, "distill.lm_weight=1.0")
    assert [step.name for step in plan.steps if step.stage in ("distill", "evaluate")] == ["sft", "4 models"]
    # Without the output, rows and tokens are those that the run counted.
    steps = steps_of(planned(recipe, None))
    shards = json.loads((out / "captures" / "llama" / "manifest.json").read_text())["files"].values()
    step = steps["capture llama"]
    assert step.rows == sum(shard["rows"] for shard in shards) == 24
    assert step.tokens == sum(shard["tokens"] for shard in shards)
    on_disk = sum(path.stat().st_size for path in (out / "captures" / "llama").glob("shard-*.parquet"))
    assert on_disk <= 2 * step.disk
    step = steps["align llama"]
    assert sum(path.stat().st_size for path in (out / "alignment" / "llama").iterdir()) < step.disk


def test_a_capture_that_was_stopped_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    recipe, out, changes = write_recipe(tmp_path, ["llama"]), tmp_path / "out", ["capture.rows_per_shard=8"]
    all_missing = StoreWriter.missing_shards
    monkeypatch.setattr(StoreWriter, "missing_shards", lambda self: all_missing(self)[:2])
    with pytest.raises(StorageError, match="1 of 3"):
        go(recipe, out, *changes, until="capture")
    monkeypatch.undo()
    step = steps_of(planned(recipe, out, *changes))["capture pivot"]
    assert step.state == BEGUN
    assert step.rows == 24 - 16
    assert "16 of 24" in step.note


def test_what_stops_a_run_is_said_and_the_rest_is_planned(tmp_path):
    recipe = write_recipe(tmp_path, ["llama"])
    plan = planned(recipe, None, "capture.batch_tokens=99999999999")
    assert [need.what.split()[0] for need in plan.lacking] == ["memory", "memory"]
    assert "it cannot run" in table(plan)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    before = listing(tmp_path)
    result = CliRunner().invoke(cli, ["plan", str(recipe), str(tmp_path / "photos")])
    assert result.exit_code == 1
    assert "holds 'cat.jpg'" in str(result.exception)
    assert listing(tmp_path) == before


def told(*arguments: str) -> dict[str, Any]:
    """What the command says of a plan that cannot run here."""
    done = CliRunner().invoke(cli, ["plan", *arguments, "--json"])
    assert done.exit_code == 1, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_recipe_of_the_paper_is_planned_offline_from_its_sizes(tmp_path, monkeypatch):
    home = tmp_path / "hf"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    recipe, unknown = DEMO.parent / "recipes" / "fusechat-7b.yml", "sources.0={model: nobody/nothing}"
    plan = told(str(recipe), "out", "--set", unknown)
    assert not list(home.iterdir())
    assert list(tmp_path.iterdir()) == [home]
    assert not plan["can_run"]  # 149 GB of memory are not here
    assert not plan["refused"]
    steps = {f"{step['stage']} {step['name']}": step for step in plan["steps"]}
    assert len(steps) == 18
    assert steps["capture pivot"]["rows"] == 95_000
    assert steps["capture Qwen1.5-72B-Chat"]["memory"] > 2 * 72_287_920_128
    assert steps["distill internlm2-chat-20b"]["disk"] == pytest.approx(2 * 7_241_748_480, rel=0.01)
    # float32 weights, gradients and two moments, the bfloat16 copies that are computed with (18 bytes a parameter); the
    # gradients of head and embedding, activations and the heap on top
    assert 18 * 7_241_748_480 < steps["distill internlm2-chat-20b"]["memory"] < 21 * 7_241_748_480
    assert steps["merge fusechat_sce"]["disk"] == pytest.approx(2 * 7_241_748_480, rel=0.01)
    assert steps["capture nothing"]["memory"] is None
    assert not plan["totals"]["memory"]["complete"]
    assert any("nobody/nothing is not in the cache" in line and "`size:`" in line for line in plan["unknown"])
    assert "capture nothing: how large nobody/nothing is" in plan["unknown"]


def test_of_models_on_the_hub_only_the_small_files_are_asked_for(tmp_path, monkeypatch):
    folder = DEMO / "sources" / "llama"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    recipe = write_recipe(tmp_path, ["llama"])
    sources = "sources=[{model: some/open}, {model: some/gated}]"
    with Hub({"some/open": Repository(folder), "some/gated": Repository(folder, gated=True)}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        plan = told(str(recipe), "--set", sources, "--set", "evaluate=null")
        assert not hub.bytes_sent_of("model.safetensors")
    assert len(plan["refused"]) == 1
    assert "some/gated is gated: accept its licence at" in plan["refused"][0]
    steps = {step["name"]: step for step in plan["steps"] if step["stage"] == "capture"}
    assert steps["open"]["tokens"] > 0
    assert steps["gated"]["memory"] is None
    assert any(
        need["what"].startswith("disk for the whole run") and "1 model," in need["what"] for need in plan["needs"]
    )


def test_tokens_of_many_examples_are_those_of_a_sample(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, ["llama"])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, *(line.replace("+", " + ") for line in lines)]))
    exact = planned(recipe, None).steps[0]
    monkeypatch.setattr(planning, "SAMPLED_ROWS", 12)
    sampled = planned(recipe, None).steps[0]
    assert sampled.rows == exact.rows == 48
    assert sampled.tokens == pytest.approx(exact.tokens, rel=0.1)
