"""`fusekit distill` on stores that `fusekit capture` makes, in one process and in two."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fusekit.cli import cli
from fusekit.distillation.outputs import last_good
from tests.distillation import worlds
from tests.distillation.runs import different
from tests.distillation.test_run import save_model, tensors
from tests.processes import Process, command, ranks, wait_until

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TINY = ["--batch-size", "4", "--per-device-train-batch-size", "2", "--num-train-epochs", "1", "--learning-rate", "1e-2"]
QUIET = ["--set", "distill.use_cpu=true", "--set", "distill.disable_tqdm=true", "--set", "distill.logging_steps=1"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two models with tokenizers of their own, rows in a file, and stores captured by the command."""
    root = tmp_path_factory.mktemp("cli")
    rows = [row for row in worlds.conversations(9) if len(row.messages) == 2]
    lines = [json.dumps({"messages": [m._asdict() for m in row.messages]}) for row in rows]
    (root / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, size, architecture in (("pivot", 320, "llama"), ("source", 420, "gpt2")):
        tokenizer = worlds.tokenizer(size)
        tokenizer.chat_template = TEMPLATE
        save_model(root / name, architecture, tokenizer, seed=size)
        tokenizer.chat_template = None
        other = root / ("source" if name == "pivot" else "pivot")
        with_other = ["--with", other] if other.exists() else []
        made = invoke("capture", root / name, root / "rows.jsonl", root / f"{name}-store", "--quiet", *with_other)
        assert made.exit_code == 0, made.output
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEKIT_CACHE", str(root / "cache"))
        yield root


def arguments(world: Path, out: Path, *more: object) -> list[object]:
    stores = ["--pivot-store", world / "pivot-store", "--source-store", f"other={world / 'source-store'}"]
    return ["distill", world / "pivot", out, "--data", world / "rows.jsonl", *stores, *TINY, *QUIET, *more]


def test_the_command_trains_and_says_where(world: Path, tmp_path: Path) -> None:
    done = invoke(*arguments(world, tmp_path / "out", "--lora", '{"r": 4}', "--set", "alignment.one_hot=true"))
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" / "other"
    assert done.stdout.splitlines()[-1] == str(folder.resolve())
    assert "other: 6 examples matched" in done.stderr
    record = json.loads((folder / "training.json").read_text())
    assert record["settings"]["training"]["lora"] == {"r": 4}
    assert record["settings"]["alignment"]["one_hot"] is True
    assert record["counts"]["taught"] == record["counts"]["labels"] > 0
    assert tensors(folder).keys() == tensors(world / "pivot").keys()


def test_text_alone_needs_no_store(world: Path, tmp_path: Path) -> None:
    plain = ["distill", world / "pivot", tmp_path / "a", "--data", world / "rows.jsonl", "--preset", "sft"]
    assert invoke(*plain, *TINY, *QUIET).exit_code == 0
    assert tensors(tmp_path / "a" / "sft").keys() == tensors(world / "pivot").keys()


def test_packed_text_is_met_by_packing_it_again(world: Path, tmp_path: Path) -> None:
    words = [" ".join(message.content for message in row.messages) for row in worlds.conversations(12, seed=5)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words), encoding="utf-8")
    pack: list[Any] = ["--pack", "--max-length", 100]
    for name, other in (("pivot", "source"), ("source", "pivot")):
        given = [world / name, tmp_path / "text.jsonl", tmp_path / f"{name}-store", "--with", world / other]
        assert invoke("capture", *given, "--quiet", *pack).exit_code == 0
    stores = ["--pivot-store", tmp_path / "pivot-store", "--source-store", f"s={tmp_path / 'source-store'}"]
    given = [world / "pivot", tmp_path / "out", "--data", tmp_path / "text.jsonl", *pack, *stores]
    assert invoke("distill", *given, *TINY, *QUIET).exit_code == 0
    record = json.loads((tmp_path / "out" / "s" / "training.json").read_text())
    assert record["unmatched"] == {}
    assert record["counts"]["rows"] > 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "--overwrite"], "--resume continues what is there"),
        (["--set", "warmup=1"], "write SECTION.FIELD=VALUE"),
        (["--source-store", "x"], "write NAME=STORE"),
        (["--lora", "{r"], "is not JSON"),
    ],
)
def test_misuse_is_explained(more: list[str], message: str, world: Path, tmp_path: Path) -> None:
    done = invoke(*arguments(world, tmp_path / "out", *more))
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.slow
def test_a_terminated_run_says_how_it_is_resumed(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = ["--num-train-epochs", "400", "--set", "distill.save_steps=3", "--set", "distill.logging_steps=1000"]
    process = Process(command, tmp_path, tuple(map(str, arguments(world, out, *long))), {}, None)
    wait_until(
        lambda: bool(list(out.glob("other.training/checkpoint-*/fusekit.json"))) or not process.process.is_alive(), 120
    )
    if process.process.is_alive():
        os.kill(process.pid, signal.SIGTERM)
    stopped = process.wait(60)
    assert stopped.exitcode == 143, stopped.output
    assert "The same command with --resume continues" in stopped.output
    assert sorted(path.name for path in out.iterdir()) == ["other.training"]
    assert last_good(out / "other.training") is not None


@pytest.mark.slow
def test_two_processes_publish_one_target(world: Path, tmp_path: Path) -> None:
    plain = ["--set", "distill.optim=sgd", "--set", "distill.warmup_steps=0"]
    both = ranks(tmp_path, 2, *map(str, arguments(world, tmp_path / "two", *plain)))
    finished = [process.wait(240) for process in both]
    said = "\n---\n".join(process.output for process in finished)
    assert [process.exitcode for process in finished] == [0, 0], said
    assert invoke(*arguments(world, tmp_path / "one", *plain)).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["other"]
    a, b = (tensors(tmp_path / name / "other") for name in ("one", "two"))
    assert different(a, b, 2e-6) == []
    records = [json.loads((tmp_path / name / "other" / "training.json").read_text()) for name in ("one", "two")]
    assert records[0]["counts"] == pytest.approx(records[1]["counts"])
