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
from fusekit.evaluation import lm_eval
from fusekit.evaluation.settings import LmEval, LmEvalTask
from fusekit.recipe.loading import load_recipe
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


def test_a_list_of_names_is_enough_and_mistakes_are_named():
    short = LmEval.model_validate(["hellaswag", {"task": "gsm8k", "num_fewshot": 5}])
    assert short == LmEval(tasks=[LmEvalTask(task="hellaswag"), LmEvalTask(task="gsm8k", num_fewshot=5)])
    assert LmEval.model_validate("hellaswag") == LmEval.model_validate({"tasks": "hellaswag"})
    for wrong in ([], {"tasks": ["a"], "limits": 3}, {"tasks": ["a", "a"]}, {"tasks": ["a"], "limit": 0}, 7):
        with pytest.raises(ValidationError):
            LmEval.model_validate(wrong)


@pytest.mark.parametrize(
    ("section", "wrong", "near"),
    [
        ({"tasks": ["hellaswag"], "include_paths": "x"}, "include_paths", "include_path"),
        (["hellaswag", {"task": "gsm8k", "num_few_shot": 8}], "num_few_shot", "num_fewshot"),
        ([{"task": "gsm8k", "tusk": 8}], "tusk", "task"),  # a key of the task's own, not of the section
    ],
)
def test_a_misspelled_option_is_told_with_its_line(tmp_path, section, wrong, near):
    path = recipe(tmp_path, lm_eval=section)
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if wrong in text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}, line {line}: unknown key {wrong!r}; did you mean {near!r}?"


def test_a_task_without_a_name_and_nothing_to_evaluate_on_are_refused(tmp_path):
    for options in (["--lm-eval", ""], []):
        result = CliRunner().invoke(cli, ["evaluate", PIVOT, *options])
        assert result.exit_code == 2
        assert all(option in result.output for option in ("--data", "--lm-eval"))
    result = CliRunner().invoke(cli, ["evaluate", PIVOT, "--lm-eval", "hellaswag,"])
    assert isinstance(result.exception, RecipeError)
    assert "--lm-eval" in str(result.exception)
    with pytest.raises(RecipeError, match=r"evaluate\.lm_eval.*at least 1 character"):
        load_recipe(recipe(tmp_path, lm_eval=["hellaswag", ""]))


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


SCORE = {
    "metrics": {"acc,none": 0.25, "em,strict": 0.5, "em,loose": 0.75},
    "primary": "acc,none",
    "stderr": {"em,loose": 0.1},
    "higher_is_better": {"acc,none": True, "em,strict": True, "em,loose": True},
    "documents": 4,
    "num_fewshot": 0,
    "version": 1,
}


@pytest.mark.parametrize(
    ("asked", "metric", "value"),
    [(None, "acc", 0.25), ("acc", "acc", 0.25), ("em", "em,strict", 0.5), ("em,loose", "em,loose", 0.75)],
)
def test_the_figure_is_the_first_metric_or_the_one_asked_for(asked, metric, value):
    shown = lm_eval.figure(LmEvalTask(task="t", metric=asked), "t", SCORE)
    assert (shown["metric"], shown["value"]) == (metric, value)
    with pytest.raises(DataError, match="'t' has no metric 'bleu': there are acc,none, em,strict, em,loose"):
        lm_eval.figure(LmEvalTask(task="t", metric="bleu"), "t", SCORE)


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """The folder of the two tasks, where lm-eval is installed."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return write_tasks(tmp_path / "tasks")


def test_unknown_tasks_and_folders_are_refused_before_anything_is_loaded(tasks):
    with pytest.raises(RecipeError, match=r"there is no folder .*nowhere"):
        lm_eval.check(LmEval(tasks=["sums"], include_path=str(tasks / "nowhere")))
    lm_eval.check(LmEval(tasks=["sums", "sums_written"], include_path=str(tasks)))
    with pytest.raises(RecipeError) as error:
        lm_eval.check(LmEval(tasks=["sums", "helaswag", "sums_writen"], include_path=str(tasks)))
    assert "no task 'helaswag'; did you mean 'hellaswag'" in str(error.value)
    assert "no task 'sums_writen'; did you mean 'sums_written'" in str(error.value)


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
    assert (known["metric"], known["documents"], known["version"]) == ("acc", 3, 2.0)
    assert "| sums (acc) | sums_written (exact_match) |" in shown
    # Without the template the model is asked in a form that it does not know.
    scored()
    assert json.loads(out.read_text())["models"][PIVOT]["lm_eval"]["sums_written"] == 0.0


@pytest.mark.slow
def test_scores_are_kept_per_model_and_task(tasks, tmp_path):
    loads, said = [], []

    def figures(*asked: object, **options: object):
        settings = LmEval.model_validate(
            {"tasks": list(asked), "include_path": str(tasks), "chat_template": True} | options
        )

        def load() -> lm_eval.Harness:
            loads.append(settings)
            return lm_eval.Harness(ModelChoice(PIVOT, dtype="float32"), "own", settings, said.append)

        return lm_eval.cached_scores(
            settings, tmp_path / "evaluation", {"model": "numbers"}, load=load, made=lambda _: {}, say=said.append
        )

    first = figures("sums")
    assert len(loads) == 1
    assert figures("sums", batch_size=2) == first  # nor does what is only shown
    assert figures({"task": "sums", "metric": "acc_norm"})["sums"]["metric"] == "acc_norm"
    assert len(loads) == 1
    assert set(figures("sums", "sums_written")) == {"sums", "sums_written"}  # the new one alone is scored
    assert len(loads) == 2
    assert [line.split()[0] for line in said] == ["sums", "sums_written"]
    (tasks / "sums.jsonl").write_text((tasks / "sums.jsonl").read_text().replace('"label": 2', '"label": 3'))
    assert figures("sums")["sums"]["value"] == 1.0  # the task's data changed
    assert len(loads) == 3


@pytest.mark.slow
def test_what_lm_eval_refuses_names_task_model_and_way_out(tasks):
    task = yaml.safe_load((tasks / "sums_written.yaml").read_text())
    task["generation_kwargs"]["max_gen_toks"] = 4096  # the model has 512 positions
    (tasks / "sums_written.yaml").write_text(yaml.safe_dump(task))
    settings = LmEval(tasks=["sums_written", "sums"], include_path=str(tasks))
    harness = lm_eval.Harness(ModelChoice(PIVOT), "own", settings, print)
    with pytest.raises(DataError, match=r"(?s)cannot score .*numbers .*: the task 'sums_written'.*4096.*512"):
        harness.score(settings.tasks[0])
    (tasks / "sums.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot score .*numbers .*: the task 'sums': .*sums\.jsonl"):
        harness.score(settings.tasks[1])
