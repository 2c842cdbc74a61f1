"""GGUF files in a run: a source as it is, a pivot dequantised once; and in every command that reads a model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from fusekit import artifacts as artifact
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.capturing.store import Store
from fusekit.cli import cli as commands
from fusekit.errors import MergeError
from fusekit.pipeline import clean as cleaning
from fusekit.pipeline.stage import DONE, MISSING, STALE
from fusekit.recipe.loading import load_recipe
from tests.gguf_files import write_gguf
from tests.pipeline.worlds import DEMO, changed, go, planned, refused, stamps, write_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a pivot and a source as GGUF, a recipe of them, and its finished run."""
    folder = tmp_path_factory.mktemp("world")
    write_gguf(DEMO / "models" / "pivot", folder / "pivot.Q8_0.gguf", "Q8_0")
    (folder / "models").mkdir()
    write_gguf(DEMO / "sources" / "llama", folder / "models" / "llama.F16.gguf", "F16")
    path = write_recipe(folder, ["llama"])
    recipe = yaml.safe_load(path.read_text())
    recipe["pivot"] = {"model": str(folder / "pivot.Q8_0.gguf")}
    recipe["sources"] = [{"model": str(folder / "models"), "gguf_file": "llama.F16.gguf", "load": {"dtype": "float32"}}]
    recipe["distill"]["num_train_epochs"] = 1
    path.write_text(yaml.safe_dump(recipe))
    go(path, folder / "out")
    return folder


def test_a_run_of_gguf_files_leaves_what_any_run_leaves(world):
    out = world / "out"
    assert load_recipe(world / "recipe.yml").sources[0].label == "llama.F16"
    manifests = {str(path.parent.relative_to(out)) for path in out.rglob("manifest.json")}
    assert {"pivot", "data", "captures/llama.F16", "targets/llama.F16", "merged"} <= manifests
    assert not [line for path in ("pivot", "targets/llama.F16", "merged") for line in artifact.problems(out / path)]
    spec = Store.open(out / "captures" / "pivot").spec
    assert spec.model == str(world / "pivot.Q8_0.gguf")
    assert spec.model_fingerprint == find_checkpoint(ModelChoice(spec.model)).fingerprint()
    trained, began = (load_file(out / name / "model.safetensors") for name in ("targets/llama.F16", "pivot"))
    assert {name: (t.shape, t.dtype) for name, t in trained.items()} == {
        name: (t.shape, t.dtype) for name, t in began.items()
    }
    scores = json.loads((out / "results.json").read_text())["models"]
    assert {"pivot", "sources/llama.F16", "targets/llama.F16", "merged", "baseline"} == set(scores)
    card = (out / "merged" / "README.md").read_text()
    assert all(f"`{name}.gguf`" in card for name in ("pivot.Q8_0", "llama.F16"))
    assert str(world) not in card


def test_a_rerun_does_nothing_and_a_pivot_of_another_file_is_refused_by_run_and_plan(world, tmp_path):
    recipe, out, file = world / "recipe.yml", tmp_path / "out", tmp_path / "pivot.gguf"
    shutil.copytree(world / "out", out)
    shutil.copyfile(world / "pivot.Q8_0.gguf", file)
    before = stamps(out)
    assert not any("dequantising" in line for line in go(recipe, out, f"pivot.model={file}", until="align"))
    assert not {name.split("/")[0] for name in changed(before, out)} & {"pivot", "targets", "captures", "data"}

    def pivot(place: Path) -> tuple[str, int | None]:
        plan = planned(recipe, place, f"pivot.model={file}")
        [step] = [step for step in plan.steps if step.stage == "pivot"]
        return step.state, step.disk

    assert pivot(out) == (DONE, None)  # the same file elsewhere
    write_gguf(DEMO / "models" / "pivot", file, "F16")
    refused(recipe, out, r"out/pivot: its inputs changed:\n  gguf: 'xxh3", f"pivot.model={file}")
    assert pivot(out)[0] == STALE
    assert pivot(tmp_path / "new") == (MISSING, find_checkpoint(ModelChoice(str(file))).weight_bytes)
    with cleaning.claimed(out) as layout:
        assert layout.pivot not in [item.path for item in cleaning.unneeded(layout).items]
        plain = load_recipe(recipe, [f"pivot.model={DEMO / 'models' / 'pivot'}"])
        assert layout.pivot in [item.path for item in cleaning.unneeded(layout, plain).items]
    verified = CliRunner().invoke(commands, ["verify", str(out)])
    assert verified.exit_code == 0, verified.output
    assert re.search(rf"{out / 'pivot'}: \d+ files of the stage 'pivot', all as committed", verified.output)


def test_commands_take_the_path_of_a_file(world, tmp_path):
    source, pivot = world / "models" / "llama.F16.gguf", world / "pivot.Q8_0.gguf"
    rows, invoke = str(world / "rows.jsonl"), CliRunner().invoke

    def done(*args: object) -> str:
        result = invoke(commands, [str(arg) for arg in args])
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        return result.output

    done("capture", source, rows, tmp_path / "source", "--quiet", "--with", pivot)
    done("capture", pivot, rows, tmp_path / "pivot", "--quiet", "--with", source)
    linked = done("inspect", "alignment", pivot, source, "--text", "12+34=46")
    assert "linked      100.0 %" in linked or "with a row" in linked
    done("evaluate", source, pivot, "--data", world / "held_out.jsonl", "--metrics", "bits_per_byte")
    distil = ["distill", pivot, tmp_path / "out", "--data", rows, "--pivot-store", tmp_path / "pivot"]
    distil += ["--source-store", f"llama={tmp_path / 'source'}", "--num-train-epochs", "1", "--batch-size", "6"]
    done(*distil, "--per-device-train-batch-size", "6")
    assert {path.parent.name for path in (tmp_path / "out").rglob("manifest.json")} == {"pivot", "llama"}
    before = stamps(tmp_path / "out" / "pivot")
    done(*distil, "--per-device-train-batch-size", "6", "--resume")
    assert stamps(tmp_path / "out" / "pivot") == before


def test_a_merge_refuses_gguf_files_with_the_way_out(world, tmp_path):
    from mergekit.options import MergeOptions

    from fusekit.merging import Settings, merge

    for model in (world / "pivot.Q8_0.gguf", world / "models"):
        recipe = tmp_path / "merge.yml"
        recipe.write_text(
            yaml.safe_dump({"merge_method": "linear", "models": [{"model": str(model)}], "parameters": {"weight": 1}})
        )
        with pytest.raises(MergeError, match=r"(?s)GGUF file.*dequantise\('.*\.gguf', 'FOLDER'\)"):
            merge(recipe, tmp_path / "out", MergeOptions(quiet=True), Settings())
