"""`fusekit plan`: nothing is written, what is there is recognised, and what cannot be known is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fusekit.capturing.writer import StoreWriter
from fusekit.cli import cli
from fusekit.cli.plan import WIDTH, table
from fusekit.distillation.vocabulary_maps import NAME
from fusekit.errors import StorageError
from fusekit.pipeline import plan_data
from fusekit.pipeline.context import BEGUN, DONE, MISSING, STALE
from fusekit.pipeline.plan import PAGE_BYTES, Plan, make_plan
from fusekit.pipeline.run import run
from fusekit.recipe import shipped as shipped_recipes
from fusekit.recipe.loading import load_recipe
from tests.merging.hub_server import Hub, Repository

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
FUSION_RECIPES = [path for path in shipped_recipes.recipes().values() if "\npivot:" in path.read_text(encoding="utf-8")]


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with inode, size and time of change: what any writing would alter."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        stat = path.lstat()
        found[str(path)] = (stat.st_ino, stat.st_size if path.is_file() else 0, stat.st_mtime_ns)
    return found


def write_recipe(folder: Path, **changes: Any) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(a + b)}]}
        for a in range(10, 14)
        for b in range(20, 26)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    recipe: dict[str, Any] = {
        "pivot": {"model": str(DEMO / "models" / "pivot")},
        "sources": [{"model": str(DEMO / "sources" / "llama")}],
        "data": {"path": str(folder / "rows.jsonl"), "max_length": 64},
        "capture": {"top_k": 8, "rows_per_shard": 8},
        "distill": {
            "lm_weight": 0.5,
            "num_train_epochs": 1,
            "batch_size": 8,
            "per_device_train_batch_size": 8,
            "lora": {"r": 2},
        },
        "evaluate": {"path": str(folder / "held_out.jsonl"), "metrics": ["bits_per_byte", "exact_match"]},
    }
    for name, values in changes.items():
        recipe[name] = recipe.get(name, {}) | values if isinstance(values, dict) else values
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def states(plan: Plan) -> dict[str, str]:
    return {f"{step.stage} {step.name}": step.state for step in plan.steps}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run up to its alignments: a recipe and its output."""
    folder = tmp_path_factory.mktemp("captured")
    recipe = write_recipe(folder)
    run(load_recipe(recipe), folder / "out", until="align", say=lambda _: None, quiet=True)
    return recipe, folder / "out"


@pytest.mark.slow
def test_a_plan_writes_nothing_and_has_every_figure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    before = listing(tmp_path), listing(DEMO)
    plan = make_plan(load_recipe(recipe), "recipe.yml", tmp_path / "out")
    assert (listing(tmp_path), listing(DEMO)) == before
    assert plan.can_run
    assert set(states(plan).values()) == {MISSING}
    by_name = {f"{step.stage} {step.name}": step for step in plan.steps}
    for name in ("capture pivot", "capture llama", "distill llama", "distill baseline", "evaluate 5 models"):
        step = by_name[name]
        assert step.pflop, name
        assert step.disk, name
    assert by_name["capture pivot"].disk < by_name["capture pivot"].disk_at_most
    assert by_name["distill llama"].memory
    text = table(plan)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "it can run" in text


def test_memory_counts_the_teachers_that_are_loaded_at_once(tmp_path):
    def beside(live: bool, mode: str, **distill: Any) -> dict[str, int]:
        """Of each target, what it needs more than the text alone; the need of the run is the largest."""
        sources = [{"model": str(DEMO / "sources" / name), "on_the_fly": live} for name in ("llama", "neox")]
        recipe = write_recipe(tmp_path, sources=sources, distill=distill, fusion={"mode": mode})
        plan = make_plan(load_recipe(recipe), "recipe.yml", None)
        steps = {step.name: step.memory or 0 for step in plan.steps if step.stage == "distill"}
        [need] = [need for need in plan.needs if need.what.startswith("memory of training")]
        assert need.needed == max(steps.values())
        alone = steps.pop("baseline")
        return {name: memory - alone for name, memory in steps.items()}

    assert beside(False, "pairwise") == {"llama": 0, "neox": 0}
    pairwise = beside(True, "pairwise")
    assert min(pairwise.values()) > 0
    assert beside(True, "joint") == pytest.approx({"joint": sum(pairwise.values())}, rel=1e-6)
    assert beside(False, "pairwise", on_policy=0.5) == pytest.approx(pairwise, rel=1e-6)


def test_a_weighting_by_rows_is_planned_with_one_baseline(tmp_path):
    sources = [{"model": str(DEMO / "sources" / name)} for name in ("llama", "neox")]
    recipe = write_recipe(tmp_path, sources=sources, distill={"lm_weighting": "soft"})
    found = states(make_plan(load_recipe(recipe), "recipe.yml", None))
    assert [name for name in found if name.startswith("distill")] == [
        "distill llama",
        "distill neox",
        "distill baseline",
    ]


def test_tokens_are_those_that_a_run_counts(captured):
    recipe, out = captured
    plan = make_plan(load_recipe(recipe), "recipe.yml", None)
    store = json.loads((out / "captures" / "llama" / "manifest.json").read_text())
    step = next(step for step in plan.steps if (step.stage, step.name) == ("capture", "llama"))
    assert step.rows == sum(shard["rows"] for shard in store["shards"]) == 24
    assert step.tokens == sum(shard["tokens"] for shard in store["shards"])
    on_disk = sum(path.stat().st_size for path in (out / "captures" / "llama").glob("shard-*.parquet"))
    assert on_disk <= step.disk_at_most
    step = next(step for step in plan.steps if (step.stage, step.name) == ("align", "llama"))
    assert step.disk - PAGE_BYTES == pytest.approx((out / "alignment" / "llama" / NAME).stat().st_size, rel=0.2)
    assert sum(path.stat().st_size for path in (out / "alignment" / "llama").iterdir()) < step.disk


def test_what_is_there_is_reused_and_nothing_in_it_is_touched(captured):
    recipe, out = captured
    before = listing(out.parent)
    plan = make_plan(load_recipe(recipe), "recipe.yml", out)
    assert listing(out.parent) == before
    found = states(plan)
    assert found["data rows"] == found["capture pivot"] == found["capture llama"] == found["align llama"] == DONE
    assert found["distill llama"] == MISSING
    assert plan.can_run


def test_more_entries_than_there_are_ids_are_all_ids_in_a_plan_too(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["capture.top_k=99999", "data.limit=2"])
    run(recipe, tmp_path / "out", until="capture", say=lambda _: None, quiet=True)
    found = states(make_plan(recipe, "recipe.yml", tmp_path / "out"))
    assert found["capture pivot"] == found["capture llama"] == DONE


@pytest.mark.parametrize(
    ("override", "refused", "difference"),
    [
        ("capture.top_k=4", ["capture pivot", "capture llama"], "top_k: 8, now 4"),
        ("data.max_length=32", ["data rows"], "max_length: 64, now 32"),
        ("alignment.vocabulary=em", ["align llama"], "vocabulary: 'prefix', now 'em'"),
    ],
)
def test_changed_inputs_are_named_with_the_difference(captured, override, refused, difference):
    recipe, out = captured
    plan = make_plan(load_recipe(recipe, [override]), "recipe.yml", out)
    assert [name for name, state in states(plan).items() if state == STALE] == refused
    assert any(difference in line for line in plan.refused)
    assert not plan.can_run


def test_a_capture_that_was_stopped_goes_on_with_what_is_missing(captured, tmp_path, monkeypatch):
    recipe, _ = captured
    loaded, out = load_recipe(recipe), tmp_path / "out"
    run(loaded, out, until="data", say=lambda _: None, quiet=True)
    all_missing = StoreWriter.missing_shards
    monkeypatch.setattr(StoreWriter, "missing_shards", lambda self: all_missing(self)[:2])
    with pytest.raises(StorageError, match="1 of 3"):
        run(loaded, out, only="capture", say=lambda _: None, quiet=True)
    monkeypatch.undo()
    plan = make_plan(loaded, "recipe.yml", out)
    step = next(step for step in plan.steps if step.name == "pivot")
    assert step.state == BEGUN
    assert step.rows == 24 - 16
    assert "16 of 24 examples captured" in step.notes[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    recipe = write_recipe(tmp_path, merge=None)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    before = listing(tmp_path)
    result = CliRunner().invoke(cli, ["plan", str(recipe), str(tmp_path / "photos")])
    assert result.exit_code == 1
    assert "holds 'cat.jpg'" in " ".join(result.output.split())
    assert listing(tmp_path) == before


def test_missing_models_and_data_are_refused_and_the_rest_is_planned(tmp_path):
    recipe = write_recipe(tmp_path, sources=[{"model": "./nowhere"}], data={"path": str(tmp_path / "none.jsonl")})
    plan = make_plan(load_recipe(recipe), "recipe.yml", None)
    assert any("there is no folder ./nowhere" in line for line in plan.refused)
    assert any("none.jsonl does not exist" in line for line in plan.refused)
    assert states(plan)["capture pivot"] == MISSING


def test_what_does_not_fit_is_said_with_the_numbers(tmp_path):
    recipe = write_recipe(tmp_path)
    plan = make_plan(load_recipe(recipe, ["capture.batch_tokens=99999999999"]), "r", None)
    assert [need.what.split()[0] for need in plan.lacking] == ["memory", "memory"]
    assert not plan.can_run
    assert "it cannot run" in table(plan)


def offline(
    arguments: list[str], home: Path, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PYTHONPATH": str(ROOT)} | (environment or {})
    environment = os.environ | environment
    command = [sys.executable, "-m", "fusekit.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


@pytest.mark.slow
def test_the_recipe_of_the_paper_is_planned_offline_from_its_sizes(tmp_path):
    home = tmp_path / "hf"
    home.mkdir()
    recipe, unknown = ROOT / "recipes" / "fusechat-7b.yml", "sources.0={model: nobody/nothing}"
    done = offline([str(recipe), "out", "--json", "--set", unknown], home, cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # 149 GB of memory are not here
    assert not list(home.iterdir())
    assert list(tmp_path.iterdir()) == [home]
    plan = json.loads(done.stdout)
    assert not plan["can_run"]
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
    assert any("as large as the recipe says" in line for line in plan["basis"])
    assert steps["capture nothing"]["memory"] is None
    assert not plan["totals"]["memory"]["complete"]
    assert any("nobody/nothing is not in the cache" in line and "`size:`" in line for line in plan["unknown"])
    assert "capture nothing: how large nobody/nothing is" in plan["unknown"]


@pytest.mark.slow
def test_of_models_on_the_hub_only_the_small_files_are_asked_for(tmp_path):
    folder = DEMO / "sources" / "llama"
    with Hub({"some/open": Repository(folder), "some/gated": Repository(folder, gated=True)}) as hub:
        recipe = write_recipe(tmp_path, sources=[{"model": "some/open"}, {"model": "some/gated"}], evaluate=None)
        environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
        done = offline([str(recipe), "--json"], tmp_path / "hf", environment=environment)
        assert not hub.bytes_sent_of("model.safetensors")
    assert done.returncode == 1, done.stderr
    plan = json.loads(done.stdout)
    assert len(plan["refused"]) == 1
    assert "some/gated is gated: accept its licence at" in plan["refused"][0]
    steps = {step["name"]: step for step in plan["steps"] if step["stage"] == "capture"}
    assert steps["open"]["tokens"] > 0
    assert steps["gated"]["memory"] is None
    assert any(
        need["what"].startswith("disk for the whole run") and "1 model," in need["what"] for need in plan["needs"]
    )


@pytest.mark.parametrize("path", FUSION_RECIPES, ids=lambda path: path.stem)
def test_every_shipped_fusion_recipe_is_valid_and_says_what_it_is(path):
    recipe = load_recipe(path)
    assert recipe.sources
    title = shipped_recipes.title(path)
    assert title
    assert "schema" not in title


def test_large_files_are_counted_to_the_line_and_sampled_everywhere(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    many = [line for line in lines for _ in range(1)] + [line.replace("+", " + ") for line in lines]
    (tmp_path / "rows.jsonl").write_text("\n".join(many))  # the last line has no end
    monkeypatch.setattr(plan_data, "READ_WHOLE_BYTES", 1)
    monkeypatch.setattr(plan_data, "SAMPLED_ROWS", 12)
    plan = make_plan(load_recipe(recipe), "recipe.yml", None)
    step = plan.steps[0]
    assert step.rows == len(many) == 48
    assert any("12 examples of 48 were read" in line for line in plan.basis)
    exact = make_plan(load_recipe(recipe, [f"data.path={tmp_path / 'rows.jsonl'}"]), "r", None)
    assert step.tokens == pytest.approx(exact.steps[0].tokens, rel=0.1)


def test_more_models_in_the_recipe_are_reused_where_they_are_there(captured):
    recipe, out = captured
    second = f"sources=[{{model: {DEMO / 'sources' / 'llama'}}}, {{model: {DEMO / 'sources' / 'neox'}}}]"
    plan = make_plan(load_recipe(recipe, [second]), "recipe.yml", out)
    found = states(plan)
    assert found["capture llama"] == found["align llama"] == DONE
    assert found["capture neox"] == found["distill neox"] == MISSING
