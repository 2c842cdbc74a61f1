"""The three examples of the README run as they stand, on the models of the checkout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.processes import program, start

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, word: str) -> str:
    """The one code block of a language that has a word in it."""
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL) if word in b]
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder from which the README's paths lead to the checkout's files, and to nothing else that is written."""
    for name in ("demo", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(folder: Path, code: str) -> None:
    done = program(folder, code, {"TQDM_DISABLE": "1"})
    assert done.exitcode == 0, done.output[-3000:]


@pytest.mark.parametrize(
    ("language", "word"), [("yaml", "merge_method"), ("python", "FusionTrainer"), ("console", "cp")]
)
def test_an_example_is_short(language, word):
    assert len(block(language, word).strip().splitlines()) <= 8


def test_the_merge_recipe_runs_under_stock_mergekit(checkout):
    (checkout / "merge.yml").write_text(block("yaml", "merge_method"))
    run(checkout, "import sys; from fusekit.mergekit_yaml import main; sys.argv = ['x', 'merge.yml', 'out']; main()")
    assert (checkout / "out" / "model.safetensors").is_file()


def test_the_trainer_trains(checkout):
    """For three steps, on some of the rows that it names."""
    rows = "demo/rows/train.jsonl"
    (checkout / "some.jsonl").write_text("".join((checkout / rows).read_text().splitlines(keepends=True)[:64]))
    code = block("python", "FusionTrainer")
    for words, fewer in ((rows, "some.jsonl"), ("learning_rate=1e-3", "learning_rate=1e-3, max_steps=3")):
        assert words in code
        code = code.replace(words, fewer)
    shutil.rmtree(checkout / "out", ignore_errors=True)
    run(checkout, code + "\ntrainer.save_model('out/saved')\n")
    assert (checkout / "out" / "saved" / "model.safetensors").is_file()
    assert (checkout / "out" / "neox" / "manifest.json").is_file()


def test_the_commands_run_one_after_the_other(checkout):
    small = ["--set", "data.limit=12", "--set", "evaluate.limit=2", "--set", "distill.max_steps=2"]
    for line in block("console", "cp demo").splitlines():
        words = line.partition("  #")[0].split()
        assert words[0] == "fusekit"
        more = small if words[1] in ("plan", "run") else []
        done = start(checkout, *words[1:], *more).wait(timeout=600)
        assert done.exitcode == 0, done.output[-3000:]
    results = json.loads((checkout / "out" / "my" / "results.json").read_text())
    assert {"pivot", "merged"} <= set(results["models"])
