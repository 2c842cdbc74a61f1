"""Tasks of lm-eval behind one line of the recipe: what is refused without it, and real scores where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from fusekit.capturing.models import ModelChoice
from fusekit.cli import cli
from fusekit.errors import DataError, RecipeError
from fusekit.evaluation.metrics import check_tasks, lm_eval_figures
from fusekit.layout import Layout
from fusekit.pipeline.evaluating import Evaluate
from fusekit.pipeline.stage import Context
from fusekit.recipe.loading import load_recipe
from fusekit.settings import LmEval
from tests.pipeline.worlds import write_recipe

DEMO = Path(__file__).parents[2] / "demo"
PIVOT = str(DEMO / "models" / "numbers")
# No choice begins another: their end is not scored.
SUMS = [
    ("57+68=", ["125", "115", "126", "135"]),
    ("25+25=", ["40", "50", "55", "60"]),
    ("67+66=", ["123", "143", "134", "133"]),
]


def write_tasks(folder: Path) -> Path:
    """Two tasks over one local file: the right sum among four, and the sum written out (the last is marked wrong)."""
    folder.mkdir(exist_ok=True)
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps({"sum": s, "choices": c, "label": i}) + "\n" for i, (s, c) in enumerate(SUMS)))
    both = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    both |= {"doc_to_text": "{{sum}}", "metadata": {"version": 2.0}, "target_delimiter": ""}
    names = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    choose = {"task": "sums", "output_type": "multiple_choice", "metric_list": names}
    choose |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    write = {"task": "sums_written", "output_type": "generate_until", "doc_to_target": "{{choices[label]}}"}
    write |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}}
    write["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    for task in (choose, write):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(both | task))
    return folder


def recipe(folder: Path, **evaluate: object) -> Path:
    return write_recipe(folder, ["llama"], evaluate=evaluate)


def test_a_list_of_names_is_enough_and_mistakes_are_named(tmp_path):
    short = LmEval.model_validate(["hellaswag", "gsm8k"])
    assert short == LmEval(tasks=["hellaswag", "gsm8k"]) == LmEval.model_validate("hellaswag,gsm8k")
    for wrong in ([], {"tasks": ["a"], "limits": 3}, ["hellaswag", ""], {"tasks": ["a"], "limit": 0}, 7):
        with pytest.raises(ValidationError):
            LmEval.model_validate(wrong)
    path = recipe(tmp_path, lm_eval={"tasks": ["hellaswag"], "include_paths": "x"})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "include_paths" in text)
    with pytest.raises(RecipeError, match=f"line {line}: .*'include_paths'; did you mean 'include_path'"):
        load_recipe(path)
    for options, named in ((["--lm-eval", ""], "--data"), ([], "--data"), (["--lm-eval", "hellaswag,"], "--lm-eval")):
        result = CliRunner().invoke(cli, ["evaluate", PIVOT, *options])
        assert result.exit_code
        assert named in f"{result.output}{result.exception}"


def test_without_lm_eval_the_command_that_installs_it_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    path, out = recipe(tmp_path, lm_eval=["hellaswag"]), tmp_path / "out"
    for command in (
        ["validate", str(path)],
        ["run", str(path), str(out)],
        ["evaluate", "no-such-model", "--lm-eval", "hellaswag"],
    ):
        result = CliRunner().invoke(cli, command)
        assert isinstance(result.exception, RecipeError)
        assert "pip install 'mergekit-fusekit[lm-eval]'" in str(result.exception)
    assert not (out / "data").exists()
    # Stages before it run without it, on another machine perhaps: this one stops at what it lacks itself.
    assert "`data`" in str(CliRunner().invoke(cli, ["run", str(path), str(out), "--only", "align"]).exception)


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """The folder of the two tasks, where lm-eval is installed."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return write_tasks(tmp_path / "tasks")


def test_unknown_tasks_and_folders_are_refused_before_anything_is_loaded(tasks):
    with pytest.raises(RecipeError, match=r"no folder .*nowhere"):
        check_tasks(LmEval(tasks=["sums"], include_path=str(tasks / "nowhere")))
    check_tasks(LmEval(tasks=["sums", "sums_written"], include_path=str(tasks)))
    with pytest.raises(RecipeError) as error:
        check_tasks(LmEval(tasks=["sums", "helaswag", "sums_writen"], include_path=str(tasks)))
    assert "'helaswag'; did you mean 'hellaswag'" in str(error.value)
    assert "'sums_writen'; did you mean 'sums_written'" in str(error.value)


@pytest.mark.slow
def test_real_tasks_from_the_command_line(tasks, tmp_path):
    out = tmp_path / "scores.json"

    def scored(**options: object) -> str:
        asked = json.dumps({"tasks": "sums,sums_written", "include_path": str(tasks)} | options)
        result = CliRunner().invoke(cli, ["evaluate", PIVOT, "--lm-eval", asked, "--json", str(out)])
        assert result.exit_code == 0, result.exception
        return result.output

    shown, document = scored(chat_template=True), json.loads(out.read_text())
    # The labels are 0, 1 and 2: the last sum is 133, and its label says 134.
    assert document["models"][PIVOT]["lm_eval"] == {"sums": pytest.approx(2 / 3), "sums_written": pytest.approx(2 / 3)}
    known = document["lm_eval"]["sums"]
    assert (known["metric"], known["higher_is_better"], known["version"]) == ("acc", True, 2.0)
    assert known["stderr"][PIVOT] > 0
    assert "| sums (acc) | sums_written (exact_match) |" in shown
    # Without the template the model is asked in a form that it does not know.
    scored()
    assert json.loads(out.read_text())["models"][PIVOT]["lm_eval"]["sums_written"] == 0.0


@pytest.mark.slow
def test_scores_are_kept_per_model(tasks, tmp_path):
    path = recipe(tmp_path, lm_eval={"tasks": ["sums"], "include_path": str(tasks), "chat_template": True})
    said: list[str] = []

    def figures(*overrides: str) -> dict[str, float]:
        said.clear()
        loaded = load_recipe(path, ["pivot.model=" + PIVOT, *overrides])
        context = Context(loaded, Layout(tmp_path / "out"), said.append)
        Evaluate().make(context, {"pivot"})
        return json.loads(context.layout.results.read_text())["models"]["pivot"]["lm_eval"]

    first = figures()
    assert "evaluate pivot: sums acc 0.6667" in said
    assert figures("evaluate.lm_eval.batch_size=2") == first
    assert said == []
    (tasks / "sums.jsonl").write_text((tasks / "sums.jsonl").read_text().replace('"label": 2', '"label": 3'))
    assert figures() == {"sums": 1.0}  # the task's data changed


@pytest.mark.slow
def test_what_lm_eval_refuses_names_task_and_model(tasks):
    task = yaml.safe_load((tasks / "sums_written.yaml").read_text())
    task["generation_kwargs"]["max_gen_toks"] = 4096  # the model has 512 positions
    (tasks / "sums_written.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(DataError, match=r"(?s)numbers on 'sums_written'.*4096.*512"):
        lm_eval_figures(ModelChoice(PIVOT), "own", LmEval(tasks=["sums_written"], include_path=str(tasks)))
    (tasks / "sums.jsonl").unlink()
    with pytest.raises(DataError, match=r"numbers on 'sums'.*sums\.jsonl"):
        lm_eval_figures(ModelChoice(PIVOT), "own", LmEval(tasks=["sums"], include_path=str(tasks)))
