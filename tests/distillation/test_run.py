"""From stores to published checkpoints: full and LoRA, resumed, refused, loaded and merged."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fusekit import artifacts as artifact
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.capturing.store import StoreSpec
from fusekit.capturing.writer import StoreWriter
from fusekit.cli import cli
from fusekit.disk import output_lock
from fusekit.distillation import run as distillation_run
from fusekit.distillation.inputs import Inputs, Source
from fusekit.distillation.outputs import last_good
from fusekit.distillation.run import distill
from fusekit.distillation.settings import DistillSettings
from fusekit.errors import CaptureError, DistillationError, FusekitError, StorageError
from fusekit.types import CapturedRow
from tests.capture.random_models import random_model
from tests.distillation import worlds
from tests.distillation.runs import different
from tests.helpers import refused
from tests.pipeline.worlds import differences
from tests.processes import Process, command, ranks, wait_until

ROWS = worlds.conversations(8)
PLAIN: dict[str, Any] = {
    "batch_size": 4,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_steps": 1,
}
Train = Callable[..., Path]


def save_model(folder: Path, architecture: str, tokenizer: Any, seed: int = 0, **changes: Any) -> Path:
    """A tiny checkpoint with its tokenizer."""
    random_model(architecture, seed, vocab_size=512, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_store(folder: Path, model: Path, tokenizer: Any, seed: int, **spec: Any) -> Path:
    """What a model with random opinions said about the rows."""
    checkpoint = find_checkpoint(ModelChoice(str(model)))
    fields: dict[str, Any] = {"model_fingerprint": checkpoint.fingerprint(), "vocabulary": 512, "top_k": 4}
    made = StoreSpec(model=str(model), max_error=0, **fields | spec)
    said: list[CapturedRow] = [
        worlds.guessing(worlds.read(row, tokenizer), len(tokenizer), seed=seed + i) for i, row in enumerate(ROWS)
    ]
    writer = StoreWriter(folder, made, [row.key for row in ROWS])
    for plan in writer.missing_shards():
        writer.write_shard(plan, said[plan.start : plan.stop])
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pivots of three architectures, two sources with other tokenizers, and stores of them."""
    root = tmp_path_factory.mktemp("world")
    ours = worlds.tokenizer(320)
    for architecture in ("llama", "qwen2", "gpt_neox"):
        save_model(root / architecture, architecture, ours)
        save_store(root / "stores" / architecture, root / architecture, ours, 1)
    for number, size in ((1, 420), (2, 380)):
        tokenizer = worlds.tokenizer(size)
        save_model(root / f"source{number}", "gpt2", tokenizer, number)
        save_store(root / "stores" / f"source{number}", root / f"source{number}", tokenizer, 10 * number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEKIT_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Targets of source1, each trained once however often it is asked for."""
    made: dict[str, Path] = {}

    def train(preset: str = "fusekit", **training: Any) -> Path:
        name = f"{preset} {training}"
        if name not in made:
            (made[name],) = distill(inputs(world), settings(preset, training=training), tmp_path_factory.mktemp("out"))
        return made[name]

    return train


def inputs(world: Path, pivot: str = "llama", sources: tuple[str, ...] = ("source1",), **changes: Any) -> Inputs:
    fields: dict[str, Any] = {
        "pivot": ModelChoice(str(world / pivot)),
        "rows": ROWS,
        "pivot_store": world / "stores" / pivot,
        "sources": {name: Source(world / "stores" / name) for name in sources},
    }
    return Inputs(**fields | changes)


def settings(preset: str = "fusekit", **sections: dict[str, Any]) -> DistillSettings:
    return DistillSettings.of(preset, {**sections, "training": PLAIN | sections.pop("training", {})})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def equal(a: Path, b: Path) -> bool:
    return different(tensors(a), tensors(b)) == []


def record_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "training.json").read_text()))


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [line for line in record_of(folder)["log"] if "loss" in line]


@pytest.mark.parametrize(("pivot", "lora"), [("llama", {"r": 4}), ("qwen2", None), ("gpt_neox", {"r": 4})], ids=str)
def test_a_pivot_becomes_a_plain_checkpoint(pivot: str, lora: Any, world: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (folder,) = distill(inputs(world, pivot), settings(training={"lora": lora}), tmp_path / "out", say=said.append)
    assert folder == (tmp_path / "out" / "source1").resolve()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["source1"]
    assert tensors(world / pivot).keys() == tensors(folder).keys()
    assert not equal(world / pivot, folder)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(folder).values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a fusion of models")["input_ids"] == worlds.tokenizer(320)("a fusion of models")["input_ids"]
    assert (folder / "adapter" / "adapter_model.safetensors").exists() == (lora is not None)
    if lora is not None:
        base = AutoModelForCausalLM.from_pretrained(world / pivot)
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensors(folder)[name], tensor)
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    record = record_of(folder)
    assert record["sources"] == ["source1"]
    assert [line["step"] for line in lines_of(folder)] == [1, 2]
    assert record["rows"] == ["8 examples of data", "pivot: 8 examples matched", "source1: 8 examples matched"]
    assert said[-1].endswith(f", published to {folder}")


@pytest.mark.parametrize(
    "training",
    [
        {"dtype": "bfloat16"},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "lora": {"r": 4}},
        {"bf16": True, "dtype": "auto", "optim": "adafactor"},
    ],
    ids=str,
)
def test_ways_to_need_less_memory_train_alike(training: dict[str, Any], trained: Train) -> None:
    plain = trained(**{key: value for key, value in training.items() if key in ("lora", "optim")})
    folder = trained(**training)
    for expected, found in zip(lines_of(plain), lines_of(folder), strict=True):
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=2e-2)
        assert found["grad_norm"] > 0
    assert tensors(folder).keys() == tensors(plain).keys()
    assert next(iter(tensors(folder).values())).dtype == torch.float32


def test_pairwise_makes_a_target_per_source_and_joint_one_for_all(world: Path, tmp_path: Path) -> None:
    both = inputs(world, sources=("source1", "source2"))
    pair = distill(both, settings(), tmp_path / "pair")
    assert [folder.name for folder in pair] == ["source1", "source2"]
    assert not equal(*pair)
    (joint,) = distill(both, settings(fusion={"mode": "joint"}), tmp_path / "joint")
    assert joint.name == "joint"
    line = lines_of(joint)[0]
    assert {"chosen/pivot", "chosen/source1", "chosen/source2"} <= line.keys()
    assert sum(value for name, value in line.items() if name.startswith("chosen/")) == pytest.approx(1)


@pytest.mark.parametrize("preset", ["fusellm", "fusechat", "uld", "gold", "grouped_kl", "p_kl", "alm"])
def test_every_preset_trains(preset: str, trained: Train) -> None:
    folder = trained(preset)
    assert folder.name == ("joint" if preset == "fusellm" else "source1")
    assert lines_of(folder)[0]["fusion_loss"] != 0
    assert record_of(folder)["settings"]["preset"] == preset


def test_plain_fine_tuning_needs_no_source_and_reads_the_same_rows(world: Path, trained: Train, tmp_path: Path) -> None:
    alone = inputs(world, sources=(), pivot_store=None, row_tokenizer=worlds.Reader(worlds.tokenizer(320)))
    (folder,) = distill(alone, settings("sft"), tmp_path / "a")
    assert folder.name == "sft"
    assert lines_of(folder)[0]["fusion_loss"] == 0
    assert equal(folder, trained("sft"))


def test_stores_are_read_by_workers_too(trained: Train) -> None:
    assert equal(trained(dataloader_num_workers=2), trained())


class Fails(TrainerCallback):
    """A run that dies after its second step, and the checkpoint of it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("the machine is gone")


def interrupt(how: DistillSettings, world: Path, out: Path, overwrite: bool = False) -> Path:
    plain = distillation_run.FusionTrainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            distillation_run, "FusionTrainer", lambda *args, **options: plain(*args, **options, callbacks=[Fails()])
        )
        with pytest.raises(RuntimeError, match="the machine is gone"):
            distill(inputs(world), how, out, overwrite=overwrite)
    assert (out / "source1.training").is_dir()
    return out


TWICE = {"num_train_epochs": 2}


@pytest.fixture(scope="module")
def interrupted_once(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interrupt(settings(training=TWICE), world, tmp_path_factory.mktemp("interrupted") / "out")


@pytest.fixture
def interrupted(interrupted_once: Path, tmp_path: Path) -> Path:
    """The output of a run that died after the second of four steps."""
    return Path(shutil.copytree(interrupted_once, tmp_path / "out"))


def test_an_adapter_goes_on_where_it_was(world: Path, trained: Train, tmp_path: Path) -> None:
    training = {**TWICE, "lora": {"r": 4, "lora_dropout": 0.3}}
    out = interrupt(settings(training=training), world, tmp_path / "out")
    (folder,) = distill(inputs(world), settings(training=training), out, resume=True)
    assert equal(folder, trained(**training))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_goes_on_from_its_last_good_checkpoint(
    damaged: bool, interrupted: Path, world: Path, trained: Train
) -> None:
    said: list[str] = []
    lost = interrupted / "source1.training" / "checkpoint-2" / "optimizer.pt"
    if damaged:
        lost.unlink()
    (folder,) = distill(inputs(world), settings(training=TWICE), interrupted, resume=True, say=said.append)
    assert any("checkpoint-2 is not used" in line and str(lost) in line for line in said) == damaged
    assert f"source1: resumes from checkpoint-{1 if damaged else 2}" in said
    assert differences(folder, trained(**TWICE)) == []  # the weights, the log, the counts
    assert artifact.problems(folder) == []
    assert sorted(path.name for path in interrupted.iterdir()) == ["source1"]
    again: list[str] = []
    distill(inputs(world), settings(training=TWICE), interrupted, resume=True, say=again.append)
    assert again == [f"source1: done already, {folder}"]


def test_other_settings_are_refused_with_the_difference(interrupted: Path, world: Path) -> None:
    other = settings(training={**TWICE, "learning_rate": 2e-2}, fusion={"metric": "token_ce"})
    rate, metric = "training.learning_rate: 0.01, now 0.02", "fusion.metric: 'projected_ce', now 'token_ce'"
    with refused(DistillationError, rate, metric):
        distill(inputs(world), other, interrupted, resume=True)
    with pytest.raises(DistillationError, match=r"rows\.count: 8, now 7"):
        distill(inputs(world, rows=ROWS[:7]), settings(training=TWICE), interrupted, resume=True)


def test_another_split_of_the_batch_is_no_difference(interrupted: Path, world: Path) -> None:
    split = settings(training={**TWICE, "per_device_train_batch_size": 1, "logging_steps": 100})
    (folder,) = distill(inputs(world), split, interrupted, resume=True)
    assert record_of(folder)["counts"]["rows"] == 2 * len(ROWS)  # those since the last line of the log too


def test_what_is_there_is_not_touched_unasked(interrupted: Path, world: Path) -> None:
    before = sorted(path.as_posix() for path in interrupted.rglob("*"))
    with pytest.raises(DistillationError, match=r"there already.*nothing was touched"):
        distill(inputs(world), settings(training=TWICE), interrupted)
    assert sorted(path.as_posix() for path in interrupted.rglob("*")) == before
    (folder,) = distill(inputs(world), settings(training={"learning_rate": 2e-2}), interrupted, overwrite=True)
    assert record_of(folder)["settings"]["training"]["learning_rate"] == 2e-2


@pytest.mark.parametrize("rate", [1e-2, 2e-2], ids=["as it was", "other settings"])
def test_an_overwrite_that_was_interrupted_goes_on(rate: float, world: Path, trained: Train, tmp_path: Path) -> None:
    """The former target stands until the new one is whole, and is not taken for it."""
    out = tmp_path / "out"
    former = Path(shutil.copytree(trained(**TWICE), out / "source1"))
    before = (former / "manifest.json").read_bytes()
    how = {**TWICE, "learning_rate": rate}
    interrupt(settings(training=how), world, out, overwrite=True)
    assert (former / "manifest.json").read_bytes() == before
    said: list[str] = []
    (folder,) = distill(inputs(world), settings(training=how), out, resume=True, say=said.append)
    assert "source1: resumes from checkpoint-2" in said
    assert differences(folder, trained(**how)) == []
    assert sorted(path.name for path in out.iterdir()) == ["source1"]
    with pytest.raises(DistillationError, match=r"training\.learning_rate: .*, now 0\.5"):
        distill(inputs(world), settings(training={**TWICE, "learning_rate": 0.5}), out, resume=True)


@pytest.mark.parametrize("out", ["", "source1"])
def test_a_result_of_another_stage_is_not_overwritten_nor_written_into(out: str, world: Path, tmp_path: Path) -> None:
    artifact.publish(tmp_path / "source1", "align", {}, lambda into: (into / "quality.json").write_text("{}"))
    with refused(DistillationError, tmp_path / "source1", "align"):
        distill(inputs(world), settings(), tmp_path / out, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "source1").iterdir()) == ["manifest.json", "quality.json"]


def test_checkpoints_that_cannot_be_forgotten_are_named(world: Path, trained: Train, tmp_path: Path) -> None:
    shutil.copytree(trained(**TWICE), tmp_path / "out" / "source1")
    (tmp_path / "out" / "source1.training").write_text("no folder")
    with pytest.raises(StorageError, match=r"source1\.training cannot be written: .*File exists"):
        distill(inputs(world), settings(training=TWICE), tmp_path / "out", overwrite=True)


def test_a_second_run_names_the_first(world: Path, tmp_path: Path) -> None:
    with output_lock((tmp_path / "out").resolve()), pytest.raises(StorageError, match="already being written"):
        distill(inputs(world), settings(), tmp_path / "out")


def test_stores_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    hot = save_store(tmp_path / "hot", world / "source1", worlds.tokenizer(420), 3, temperature=2.0)
    store, model = world / "stores" / "source1", str(world / "source1")
    revised = Source(store, tokenizer=ModelChoice(model, revision="v1"))  # a folder has none
    plain = inputs(world)
    cases: list[tuple[Inputs, type[FusekitError], str]] = [
        (replace(plain, sources={"source1": Source(hot)}), DistillationError, r"source1 .* 2.0.*temperature 1.0"),
        (
            replace(plain, sources={"source1": Source(store, str(world / "source2"))}),
            DistillationError,
            "source1 was captured with another tokenizer",
        ),
        (replace(plain, sources={"source1": revised}), CaptureError, "the revision 'v1' has no meaning there"),
        (replace(plain, pivot_store=world / "stores" / "qwen2"), DistillationError, "pivot's store was captured from"),
        (replace(plain, sources={}), DistillationError, "no source to learn from"),
        (replace(plain, sources={"joint": Source(hot)}), DistillationError, "a source cannot be called 'joint'"),
    ]
    for given, kind, message in cases:
        with pytest.raises(kind, match=message):
            distill(given, settings(), tmp_path / "out")


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TINY = ["--batch-size", "4", "--per-device-train-batch-size", "2", "--num-train-epochs", "1", "--learning-rate", "1e-2"]
QUIET = ["--set", "distill.use_cpu=true", "--set", "distill.disable_tqdm=true", "--set", "distill.logging_steps=1"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
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


def arguments(commanded: Path, out: Path, *more: object) -> list[object]:
    stores = ["--pivot-store", commanded / "pivot-store", "--source-store", f"other={commanded / 'source-store'}"]
    return ["distill", commanded / "pivot", out, "--data", commanded / "rows.jsonl", *stores, *TINY, *QUIET, *more]


def test_the_command_trains_and_says_where(commanded: Path, tmp_path: Path) -> None:
    done = invoke(*arguments(commanded, tmp_path / "out", "--lora", '{"r": 4}', "--set", "alignment.one_hot=true"))
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" / "other"
    assert done.stdout.splitlines()[-1] == str(folder.resolve())
    assert "other: 6 examples matched" in done.stderr
    record = record_of(folder)
    assert record["settings"]["training"]["lora"] == {"r": 4}
    assert record["settings"]["alignment"]["one_hot"] is True
    assert record["counts"]["taught"] == record["counts"]["labels"] > 0
    assert tensors(folder).keys() == tensors(commanded / "pivot").keys()


def test_packed_text_is_met_by_packing_it_again(commanded: Path, tmp_path: Path) -> None:
    words = [" ".join(message.content for message in row.messages) for row in worlds.conversations(12, seed=5)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words), encoding="utf-8")
    pack: list[Any] = ["--pack", "--max-length", 100]
    for name, other in (("pivot", "source"), ("source", "pivot")):
        given = [commanded / name, tmp_path / "text.jsonl", tmp_path / f"{name}-store", "--with", commanded / other]
        assert invoke("capture", *given, "--quiet", *pack).exit_code == 0
    stores = ["--pivot-store", tmp_path / "pivot-store", "--source-store", f"s={tmp_path / 'source-store'}"]
    given = [commanded / "pivot", tmp_path / "out", "--data", tmp_path / "text.jsonl", *pack, *stores]
    assert invoke("distill", *given, *TINY, *QUIET).exit_code == 0
    record = record_of(tmp_path / "out" / "s")
    assert record["unmatched"] == {}
    assert record["counts"]["rows"] > 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "--overwrite"], "--resume keeps what is there"),
        (["--set", "warmup=1"], "write SECTION.FIELD=VALUE"),
        (["--source-store", "x"], "write NAME=STORE"),
        (["--lora", "{r"], "is not JSON"),
    ],
)
def test_misuse_is_explained(more: list[str], message: str, commanded: Path, tmp_path: Path) -> None:
    done = invoke(*arguments(commanded, tmp_path / "out", *more))
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.slow
def test_a_terminated_run_says_how_it_is_resumed(commanded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = ["--num-train-epochs", "400", "--set", "distill.save_steps=3", "--set", "distill.logging_steps=1000"]
    process = Process(command, tmp_path, tuple(map(str, arguments(commanded, out, *long))), {}, None)
    wait_until(
        lambda: bool(list(out.glob("other.training/checkpoint-*/manifest.json"))) or not process.process.is_alive(), 120
    )
    if process.process.is_alive():
        os.kill(process.pid, signal.SIGTERM)
    stopped = process.wait(60)
    assert stopped.exitcode == 143, stopped.output
    assert "To resume, give the same command with --resume" in stopped.output
    assert sorted(path.name for path in out.iterdir()) == ["other.training"]
    assert last_good(out / "other.training") is not None


@pytest.mark.slow
def test_two_processes_publish_one_target(commanded: Path, tmp_path: Path) -> None:
    plain = ["--set", "distill.optim=sgd", "--set", "distill.warmup_steps=0"]
    both = ranks(tmp_path, 2, *map(str, arguments(commanded, tmp_path / "two", *plain)))
    finished = [process.wait(240) for process in both]
    said = "\n---\n".join(process.output for process in finished)
    assert [process.exitcode for process in finished] == [0, 0], said
    assert invoke(*arguments(commanded, tmp_path / "one", *plain)).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["other"]
    a, b = (tensors(tmp_path / name / "other") for name in ("one", "two"))
    assert different(a, b, 2e-6) == []
    one, two = (record_of(tmp_path / name / "other") for name in ("one", "two"))
    assert one["counts"] == pytest.approx(two["counts"])
