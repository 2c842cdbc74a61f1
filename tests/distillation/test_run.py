"""From stores to published checkpoints: full and LoRA, resumed, refused, loaded and merged."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fusekit import artifacts as artifact
from fusekit.artifacts import output_lock
from fusekit.capturing.manifest import StoreSpec
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.capturing.store import Store
from fusekit.capturing.writer import StoreWriter
from fusekit.distillation import run as distillation_run
from fusekit.distillation.inputs import Inputs, Source
from fusekit.distillation.run import distill
from fusekit.distillation.settings import DistillSettings
from fusekit.errors import CaptureError, DistillationError, FusekitError, StorageError
from fusekit.types import CapturedRow
from tests.capture.random_models import random_model
from tests.distillation import worlds
from tests.pipeline.artifacts import differences

ROWS = worlds.conversations(8)
TINY: dict[str, Any] = {"batch_size": 4, "per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 1e-2}
SILENT = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_steps": 1}


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
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabulary maps are kept in the test's folder."""
    monkeypatch.setenv("FUSEKIT_CACHE", str(tmp_path / "cache"))


def inputs(world: Path, pivot: str = "llama", sources: tuple[str, ...] = ("source1",), **changes: Any) -> Inputs:
    fields: dict[str, Any] = {
        "pivot": ModelChoice(str(world / pivot)),
        "rows": ROWS,
        "pivot_store": world / "stores" / pivot,
        "sources": {name: Source(world / "stores" / name) for name in sources},
    }
    return Inputs(**fields | changes)


def with_source(world: Path, name: str, source: Source) -> Inputs:
    return replace(inputs(world, sources=()), sources={name: source})


def settings(preset: str = "fusekit", **sections: dict[str, Any]) -> DistillSettings:
    training = {**TINY, **SILENT, **sections.pop("training", {})}
    return DistillSettings.of(preset, {**sections, "training": training})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_alpha": 64}], ids=["full", "lora"])
@pytest.mark.parametrize("pivot", ["llama", "qwen2", "gpt_neox"])
def test_a_pivot_becomes_a_plain_checkpoint(pivot: str, lora: Any, world: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (folder,) = distill(inputs(world, pivot), settings(training={"lora": lora}), tmp_path / "out", say=said.append)
    assert folder == (tmp_path / "out" / "source1").resolve()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["source1"]
    before, after = tensors(world / pivot), tensors(folder)
    assert before.keys() == after.keys()
    assert not equal(before, after)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a fusion of models")["input_ids"] == worlds.tokenizer(320)("a fusion of models")["input_ids"]
    assert (folder / "adapter" / "adapter_model.safetensors").exists() == (lora is not None)
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    record = json.loads((folder / "training.json").read_text())
    assert record["sources"] == ["source1"]
    assert [line["step"] for line in record["log"] if "loss" in line] == [1, 2]
    assert record["rows"] == ["8 examples of data", "pivot: 8 examples matched", "source1: 8 examples matched"]
    assert said[-1].endswith(f", published to {folder}")


@pytest.mark.parametrize(
    "training",
    [
        {"bf16": True},
        {"dtype": "bfloat16"},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "lora": {"r": 4}},
        {"bf16": True, "dtype": "auto", "optim": "adafactor"},
    ],
    ids=["bf16", "bfloat16 weights", "checkpointing", "checkpointing lora", "adafactor"],
)
def test_ways_to_need_less_memory_train_alike(training: Any, world: Path, tmp_path: Path) -> None:
    plain = settings(training={key: value for key, value in training.items() if key in ("lora", "optim")})
    (a,) = distill(inputs(world), plain, tmp_path / "a")
    (b,) = distill(inputs(world), settings(training=training), tmp_path / "b")
    lines = [[line for line in json.loads((f / "training.json").read_text())["log"] if "loss" in line] for f in (a, b)]
    for expected, found in zip(*lines, strict=True):
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=2e-2)
        assert found["grad_norm"] > 0
    assert tensors(b).keys() == tensors(a).keys()
    assert next(iter(tensors(b).values())).dtype == torch.float32


def test_lora_weights_are_the_base_and_the_adapter(world: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    (folder,) = distill(inputs(world), settings(training={"lora": {"r": 4}}), tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensors(folder)[name], tensor)


def test_pairwise_makes_a_target_per_source_and_joint_one_for_all(world: Path, tmp_path: Path) -> None:
    both = inputs(world, sources=("source1", "source2"))
    pair = distill(both, settings(), tmp_path / "pair")
    assert [folder.name for folder in pair] == ["source1", "source2"]
    assert not equal(tensors(pair[0]), tensors(pair[1]))
    (joint,) = distill(both, settings(fusion={"mode": "joint"}), tmp_path / "joint")
    assert joint.name == "joint"
    line = next(line for line in json.loads((joint / "training.json").read_text())["log"] if "loss" in line)
    assert {"chosen/pivot", "chosen/source1", "chosen/source2"} <= line.keys()
    assert sum(value for name, value in line.items() if name.startswith("chosen/")) == pytest.approx(1)


def test_rows_since_the_last_line_of_the_log_are_counted(world: Path, tmp_path: Path) -> None:
    (folder,) = distill(inputs(world), settings(training=SILENT | {"logging_steps": 100}), tmp_path)
    record = json.loads((folder / "training.json").read_text())
    assert record["counts"]["rows"] == len(ROWS)


@pytest.mark.parametrize("preset", ["fusellm", "fusechat", "sft", "uld", "gold", "grouped_kl", "p_kl", "alm"])
def test_every_preset_trains(preset: str, world: Path, tmp_path: Path) -> None:
    (folder,) = distill(inputs(world), settings(preset), tmp_path / "out")
    assert folder.name == {"fusellm": "joint", "sft": "sft"}.get(preset, "source1")
    record = json.loads((folder / "training.json").read_text())
    line = next(line for line in record["log"] if "loss" in line)
    assert (line["fusion_loss"] == 0) == (preset == "sft")
    assert record["settings"]["preset"] == preset


def test_plain_fine_tuning_needs_no_source_and_reads_the_same_rows(world: Path, tmp_path: Path) -> None:
    alone = inputs(world, sources=(), pivot_store=None, row_tokenizer=worlds.Reader(worlds.tokenizer(320)))
    (a,) = distill(alone, settings("sft"), tmp_path / "a")
    (b,) = distill(inputs(world), settings("sft"), tmp_path / "b")
    assert equal(tensors(a), tensors(b))


class Fails(TrainerCallback):
    """A run that dies after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the checkpoint of the step before."""
        if state.global_step == self.step:
            raise RuntimeError("the machine is gone")


@pytest.fixture
def interrupted(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that died after the second of four steps."""
    return interrupt(settings(training={"num_train_epochs": 2}), world, tmp_path / "out", monkeypatch)


def interrupt(
    how: DistillSettings, world: Path, out: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool = False
) -> Path:
    plain = distillation_run.FusionTrainer

    def failing(*args: Any, **options: Any) -> Any:
        return plain(*args, **options, callbacks=[Fails(2)])

    with monkeypatch.context() as patch:
        patch.setattr(distillation_run, "FusionTrainer", failing)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            distill(inputs(world), how, out, overwrite=overwrite)
    assert (out / "source1.training").is_dir()
    return out


def test_an_adapter_goes_on_where_it_was(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = settings(training={"num_train_epochs": 2, "lora": {"r": 4, "lora_dropout": 0.3}})
    out = interrupt(how, world, tmp_path / "out", monkeypatch)
    (folder,) = distill(inputs(world), how, out, resume=True)
    (whole,) = distill(inputs(world), how, tmp_path / "whole")
    assert equal(tensors(folder), tensors(whole))


def test_a_run_goes_on_where_it_was(interrupted: Path, world: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (folder,) = distill(
        inputs(world), settings(training={"num_train_epochs": 2}), interrupted, resume=True, say=said.append
    )
    assert "source1: resumes from checkpoint-2" in said
    (whole,) = distill(inputs(world), settings(training={"num_train_epochs": 2}), tmp_path / "whole")
    assert equal(tensors(folder), tensors(whole))
    # Not the weights alone: the log, the counts, and the manifest but for its times.
    assert differences(folder, whole) == []
    assert artifact.problems(folder) == []
    assert sorted(path.name for path in interrupted.iterdir()) == ["source1"]
    again: list[str] = []
    distill(inputs(world), settings(training={"num_train_epochs": 2}), interrupted, resume=True, say=again.append)
    assert again == [f"source1: done already, {folder}"]


def test_a_damaged_checkpoint_is_not_gone_on_from(interrupted: Path, world: Path, tmp_path: Path) -> None:
    (interrupted / "source1.training" / "checkpoint-2" / "optimizer.pt").unlink()
    said: list[str] = []
    (folder,) = distill(
        inputs(world), settings(training={"num_train_epochs": 2}), interrupted, resume=True, say=said.append
    )
    assert "source1: warning: checkpoint-2 is not used: optimizer.pt is missing" in said
    assert "source1: resumes from checkpoint-1" in said
    (whole,) = distill(inputs(world), settings(training={"num_train_epochs": 2}), tmp_path / "whole")
    assert equal(tensors(folder), tensors(whole))


def test_other_settings_are_refused_with_the_difference(interrupted: Path, world: Path) -> None:
    other = settings(training={"num_train_epochs": 2, "learning_rate": 2e-2}, fusion={"metric": "token_ce"})
    with pytest.raises(DistillationError) as refusal:
        distill(inputs(world), other, interrupted, resume=True)
    assert "training.learning_rate: 0.01, now 0.02" in str(refusal.value)
    assert "fusion.metric: 'projected_ce', now 'token_ce'" in str(refusal.value)
    fewer = inputs(world, rows=ROWS[:7])
    with pytest.raises(DistillationError, match=r"rows\.count: 8, now 7"):
        distill(fewer, settings(training={"num_train_epochs": 2}), interrupted, resume=True)


def test_another_split_of_the_batch_is_no_difference(interrupted: Path, world: Path) -> None:
    split = settings(training={"num_train_epochs": 2, "per_device_train_batch_size": 1, "logging_steps": 5})
    (folder,) = distill(inputs(world), split, interrupted, resume=True)
    assert folder.is_dir()


def test_what_is_there_is_not_touched_unasked(interrupted: Path, world: Path) -> None:
    before = sorted(path.as_posix() for path in interrupted.rglob("*"))
    with pytest.raises(DistillationError, match=r"there already.*nothing was touched"):
        distill(inputs(world), settings(training={"num_train_epochs": 2}), interrupted)
    assert sorted(path.as_posix() for path in interrupted.rglob("*")) == before
    (folder,) = distill(inputs(world), settings(training={"learning_rate": 2e-2}), interrupted, overwrite=True)
    assert json.loads((folder / "training.json").read_text())["settings"]["training"]["learning_rate"] == 2e-2


@pytest.mark.parametrize("rate", [1e-2, 2e-2], ids=["as it was", "other settings"])
def test_an_overwrite_that_was_interrupted_goes_on(
    rate: float, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former target stands until the new one is whole, and is not taken for it."""
    out = tmp_path / "out"
    (former,) = distill(inputs(world), settings(training={"num_train_epochs": 2}), out)
    before = (former / "manifest.json").read_bytes()
    how = settings(training={"num_train_epochs": 2, "learning_rate": rate})
    interrupt(how, world, out, monkeypatch, overwrite=True)
    assert (former / "manifest.json").read_bytes() == before
    said: list[str] = []
    (folder,) = distill(inputs(world), how, out, resume=True, say=said.append)
    assert "source1: resumes from checkpoint-2" in said
    (whole,) = distill(inputs(world), how, tmp_path / "whole")
    assert differences(folder, whole) == []
    assert sorted(path.name for path in out.iterdir()) == ["source1"]
    with pytest.raises(DistillationError, match=r"training\.learning_rate: .*, now 0\.5"):
        distill(inputs(world), settings(training={"num_train_epochs": 2, "learning_rate": 0.5}), out, resume=True)


def test_a_second_run_names_the_first(world: Path, tmp_path: Path) -> None:
    with output_lock((tmp_path / "out").resolve()), pytest.raises(StorageError, match="already being written"):
        distill(inputs(world), settings(), tmp_path / "out")


def test_stores_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    hot = save_store(tmp_path / "hot", world / "source1", worlds.tokenizer(420), 3, temperature=2.0)
    with pytest.raises(DistillationError, match=r"source1 holds rows of temperature 2.0.*temperature 1.0"):
        distill(with_source(world, "source1", Source(hot)), settings(), tmp_path / "a")
    wrong = Source(world / "stores" / "source1", tokenizer=str(world / "source2"))
    with pytest.raises(DistillationError, match="source1 was captured with another tokenizer"):
        distill(with_source(world, "source1", wrong), settings(), tmp_path / "b")
    revised = Source(world / "stores" / "source1", tokenizer=ModelChoice(str(world / "source1"), revision="v1"))
    with pytest.raises(CaptureError, match="the revision 'v1' has no meaning there"):  # a folder has none
        distill(with_source(world, "source1", revised), settings(), tmp_path / "f")
    with pytest.raises(DistillationError, match="pivot's store was captured from"):
        distill(inputs(world, pivot_store=world / "stores" / "qwen2"), settings(), tmp_path / "c")
    with pytest.raises(DistillationError, match="no source to learn from"):
        distill(inputs(world, sources=()), settings(), tmp_path / "d")
    with pytest.raises(DistillationError, match="a source cannot be called 'joint'"):
        distill(with_source(world, "joint", Source(hot)), settings(), tmp_path / "e")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"adam_beta3": 1},
            "unknown setting training.adam_beta3; did you mean 'adam_beta",
        ),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is set by batch_size"),
        ({"save_only_model": True}, "save_only_model cannot be set"),
        ({"optim": "sgdd"}, "transformers refuses the training arguments"),
        ({"per_device_train_batch_size": 3}, "batch_size 4 .* cannot be divided by per_device_train_batch_size 3"),
        ({"lora": {"lora_alhpa": 4}}, "lora.lora_alhpa is no field of peft's LoraConfig; did you mean 'lora_alpha'"),
        ({"lora": {"target_modules": ["nothing"]}}, "peft refuses the lora settings"),
    ],
)
def test_settings_that_cannot_be_are_refused(training: Any, message: str, world: Path, tmp_path: Path) -> None:
    with pytest.raises(FusekitError, match=message):
        distill(inputs(world), settings(training=training), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_misspelled_setting_names_the_nearest() -> None:
    with pytest.raises(DistillationError, match=r"unknown setting training.lm_wieght; did you mean 'lm_weight'\?"):
        DistillSettings.of("fusekit", {"training": {"lm_wieght": 1}})
    with pytest.raises(DistillationError, match=r"unknown preset 'fusechatt'; did you mean 'fusechat'\?"):
        DistillSettings.of("fusechatt")
    with pytest.raises(DistillationError, match=r"training.lm_weight = 2.*less than or equal to 1"):
        DistillSettings.of("fusekit", {"training": {"lm_weight": 2}})
    with pytest.raises(DistillationError, match=r"unknown fusion function 'min_cee'; did you mean 'min_ce'\?"):
        DistillSettings.of("fusekit", {"fusion": {"function": "min_cee"}})


@pytest.mark.slow
def test_targets_merge_with_mergekit(world: Path, tmp_path: Path) -> None:
    full = distill(inputs(world), settings(), tmp_path / "full")[0]
    lora = distill(inputs(world), settings(training={"lora": {"r": 4}}), tmp_path / "lora")[0]
    recipe = {
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in (full, lora)],
        "merge_method": "linear",
        "dtype": "float32",
    }
    (tmp_path / "merge.yml").write_text(json.dumps(recipe))
    mergekit = Path(sys.executable).parent / "mergekit-yaml"
    subprocess.run([mergekit, tmp_path / "merge.yml", tmp_path / "merged", "--quiet"], check=True, timeout=240)
    merged, a, b = (tensors(path) for path in (tmp_path / "merged", full, lora))
    for name in merged:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)


def test_stores_are_read_by_workers_too(world: Path, tmp_path: Path) -> None:
    (a,) = distill(inputs(world), settings(training={"dataloader_num_workers": 2}), tmp_path / "a")
    (b,) = distill(inputs(world), settings(), tmp_path / "b")
    assert equal(tensors(a), tensors(b))
    assert len(Store.open(world / "stores" / "source1")) == 8
