"""``fusekit generate``: files of prompts, output for people and programs, errors before models are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fusekit.cli.generate import generate
from fusekit.data.reading import read_rows
from fusekit.disk import output_lock
from fusekit.errors import FusekitError, StorageError
from fusekit.generation import Segment
from fusekit.generation.ensemble import drain
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe

DEMO = Path(__file__).parents[2] / "demo"
MODELS = [str(DEMO / "models/pivot"), str(DEMO / "sources/neox")]


def invoke(*arguments: str, **options):
    return CliRunner().invoke(generate, arguments, **options)


def refusal(*arguments: str) -> str:
    failed = invoke(*arguments)
    assert isinstance(failed.exception, FusekitError)
    return str(failed.exception)


def test_prompts_of_a_file_as_json_and_in_colours(tmp_path):
    file = tmp_path / "prompts.jsonl"
    asked = ["57+68=", [{"role": "user", "content": "11+12="}], "<b>12+12=</b>"]
    lines = [
        json.dumps(asked[0]),
        json.dumps({"messages": [*asked[1], {"role": "assistant", "content": "23"}]}),
        "",
        json.dumps({"prompt": asked[2], "source": "mine"}),
    ]
    file.write_text("\n".join(lines))
    common = ["--prompts", str(file), "--mode", "unite", "--max-new-tokens", "6"]
    done = invoke(*MODELS, *common, "--json")
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["prompt"] for record in found] == asked
    for record in found:
        assert record["text"] == "".join(segment["text"] for segment in record["segments"])
        assert {segment["model"] for segment in record["segments"]} <= {"pivot", "neox"}

    shown = invoke(*MODELS, *common, color=True)
    assert shown.exit_code == 0
    for record in found:
        for segment in record["segments"]:
            assert f"\x1b[{34 if segment['model'] == 'pivot' else 33}m{segment['text']}\x1b[0m" in shown.stdout
    assert "\x1b" not in invoke(*MODELS, *common).stdout


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('"a"\n{"question": "b"}', ["line 2", "question"]),
        ('{"messages": ["b"]}', ["line 1", "messages"]),
        ('{"prompt": ""}', ["line 1", "empty"]),
        ("{", ["line 1"]),
        ("\n", ["prompts.jsonl"]),
    ],
)
def test_a_file_of_prompts_is_refused_with_its_line(tmp_path, content, named):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    said = refusal("missing-a", "missing-b", "--prompts", str(file))
    assert all(name in said for name in [str(file), *named])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--mode", "vote"], "vote"),
        (["--prompts", __file__], "--prompts"),
        (["--rerank"], "rerank"),
        (["--prompt", ""], "empty"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(options, named):
    done = invoke("missing-a", "missing-b", "--prompt", "x", *options)
    assert isinstance(done.exception, (FusekitError, SystemExit))
    assert named in f"{done.output}{done.exception}"
    assert "two models" in invoke("missing", "--prompt", "x").output


def test_answers_in_a_file_are_examples_and_are_continued_where_they_end(tmp_path):
    """The same lines whether a run was cut off within a line or not; a recipe's data reads them."""
    file, whole, cut = (tmp_path / name for name in ("prompts.jsonl", "whole.jsonl", "cut.jsonl"))
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "11+12="}]
    file.write_text("".join(json.dumps(one) + "\n" for one in ["57+68=", {"messages": chat}, "12+12="]))
    common = ["--prompts", str(file), "--mode", "unite", "--temperature", "1", "--max-new-tokens", "4"]
    done = invoke(*MODELS, *common, "--out", str(whole))
    assert done.exit_code == 0, done.output
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(lines[0] + lines[1][:50])
    assert invoke(*MODELS, *common, "--out", str(cut)).exit_code == 0
    assert cut.read_bytes() == whole.read_bytes()
    assert invoke("missing-a", "missing-b", *common, "--out", str(cut)).exception is not None
    before = cut.stat().st_mtime_ns
    assert invoke(*MODELS, *common, "--out", str(cut)).exit_code == 0
    assert cut.stat().st_mtime_ns == before
    rows = list(read_rows(str(whole)))
    assert [[message.content for message in row.messages[:-1]] for row in rows] == [
        ["57+68="],
        ["Add.", "11+12="],
        ["12+12="],
    ]
    for row, line in zip(rows, lines, strict=True):
        record = json.loads(line)
        assert row.messages[-1] == ("assistant", "".join(segment["text"] for segment in record["segments"]))
    for changed, named in ((["--seed", "1"], "seed"), (["--mode", "safe"], "unite"), (["--raw"], "line 1")):
        assert named in refusal(*MODELS, *common, *changed, "--out", str(cut))
    file.write_text('"1+1="')
    assert "57+68=" in refusal(*MODELS, *common, "--out", str(cut))


def test_an_ensemble_is_distilled(tmp_path):
    """Ensemble, then distil: the answers are the data of a run."""
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(f"{a}+{a}=") + "\n" for a in range(10, 14)))
    assert invoke(*MODELS, "--prompts", str(file), "--max-new-tokens", "4", "--out", str(out)).exit_code == 0
    recipe = tmp_path / "recipe.yml"
    document = {
        "pivot": {"model": MODELS[0]},
        "sources": [{"model": MODELS[1]}],
        "data": {"path": str(out)},
        "distill": {"max_steps": 1, "batch_size": 4, "save_strategy": "no"},
    }
    recipe.write_text(yaml.safe_dump(document))
    made = run(load_recipe(recipe), tmp_path / "out", until="distill", say=lambda _: None, quiet=True)
    assert [target.name for target in made.targets] == ["neox"]
    record = json.loads((made.targets[0] / "training.json").read_text())
    assert record["rows"][0].startswith("4 examples")


def test_raw_answers_are_texts_and_end_before_a_stop(tmp_path):
    out = tmp_path / "answers.jsonl"
    common = [*MODELS, "--prompt", "def close(self):", "--raw", "--max-new-tokens", "24"]
    whole = json.loads(invoke(*common, "--json").stdout)["text"]
    stop = whole[5:8]
    done = invoke(*common, "--stop", stop, "--json", "--out", str(out))
    found = json.loads(done.stdout)
    assert (found["text"], found["finish"]) == (whole[: whole.index(stop)], "stop")
    assert found["text"] == "".join(segment["text"] for segment in found["segments"])
    [row] = read_rows(str(out))
    assert row.messages == (("text", "def close(self):" + found["text"]),)


def test_one_process_at_a_time_writes_a_file(tmp_path):
    out = tmp_path / "answers.jsonl"
    with output_lock(out):
        failed = invoke(*MODELS, "--prompt", "1+1=", "--out", str(out)).exception
    assert isinstance(failed, StorageError)
    assert str(out) in str(failed)
    assert not out.exists()


@pytest.mark.parametrize(
    ("stop", "expected", "finish"),
    [
        ([], ["one ", "two\nthr", "ee"], "end"),
        (["\n"], ["one ", "two"], "stop"),
        (["wo\nt"], ["one ", "t"], "stop"),
        (["hree", "thre"], ["one ", "two\n"], "stop"),
        (["one"], [], "stop"),
        (["eee"], ["one ", "two\nthr", "ee"], "end"),
    ],
)
def test_what_is_shown_is_what_is_kept(stop, expected, finish):
    def running():
        for text in ("one ", "two\nthr", "ee"):
            yield Segment(text, "model", 1.0, {})
        return "end"

    shown = []
    segments, why = drain(running(), shown.append, stop)
    assert [segment.text for segment in segments] == [segment.text for segment in shown] == expected
    assert why == finish
