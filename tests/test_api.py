"""The public names, and the ten lines that a researcher writes."""

from __future__ import annotations

import doctest
import inspect
import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import fusekit
from fusekit import FusekitError, FusionConfig, FusionTrainer, Store, artifacts, capture
from fusekit.capturing.models import ModelChoice
from fusekit.data.reading import rows_of
from fusekit.distillation import preference
from fusekit.distillation.inputs import Inputs, Source
from fusekit.distillation.live import Loaded
from fusekit.distillation.run import distill
from fusekit.distillation.settings import DistillSettings
from fusekit.errors import CaptureError, DataError, DistillationError
from tests.helpers import refused
from tests.merging.hub_server import Hub, Repository
from tests.processes import program

ROOT = Path(__file__).parents[1]
PIVOT, NEOX = str(ROOT / "demo/models/pivot"), str(ROOT / "demo/sources/neox")
RECORDS = [json.loads(line) for line in (ROOT / "demo/rows/train.jsonl").read_text().splitlines()[:24]]
TRAINING: dict[str, Any] = {"loss": "kl", "lm_weight": 0.5, "learning_rate": 1e-3, "disable_tqdm": True}
TRAINING |= {"save_strategy": "no", "logging_steps": 1}


def config(out: Path, **fields: Any) -> FusionConfig:
    return FusionConfig(str(out), **{**TRAINING, **fields})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return capture(NEOX, RECORDS, tmp_path_factory.mktemp("api") / "neox", quiet=True)


def losses(log: list[dict[str, float]]) -> list[tuple[float, float, float]]:
    return [(line["loss"], line["lm_loss"], line["fusion_loss"]) for line in log if "loss" in line]


@pytest.mark.slow
def test_the_trainer_has_the_loss_of_the_command(teacher: Store, tmp_path: Path) -> None:
    fields = {"max_steps": 4, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    args = config(tmp_path / "out", **fields)
    trainer = FusionTrainer(PIVOT, args, datasets.Dataset.from_list(RECORDS), teachers={"neox": teacher.path})
    trainer.train()
    training = TRAINING | fields | {"batch_size": 4, "warmup_steps": 0, "seed": args.seed}
    own = tmp_path / "out" / "captures" / "pivot"
    inputs = Inputs(ModelChoice(PIVOT), list(rows_of(RECORDS)), own, {"neox": Source(teacher.path)})
    (folder,) = distill(inputs, DistillSettings.of("fusekit", {"training": training}), tmp_path / "command")
    record = json.loads((folder / "training.json").read_text())
    assert losses(trainer.state.log_history) == losses(record["log"])
    assert len(losses(record["log"])) == 4


@pytest.mark.slow
def test_teachers_may_be_models_and_the_student_a_loaded_one(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(PIVOT, dtype=torch.float32)
    args = config(tmp_path, max_steps=2, top_k=4, eval_strategy="steps", eval_steps=1)
    lora = {"r": 2, "target_modules": "all-linear"}
    trainer = FusionTrainer(model, args, RECORDS, NEOX, eval_dataset=RECORDS[:4], peft_config=lora)
    assert trainer.train().global_step == 2
    assert len([line for line in trainer.state.log_history if line.get("eval_loss", 0) > 0]) == 2
    assert trainer.train_dataset.data.sources["teacher"].spec.top_k == 4
    assert not (tmp_path / "captures" / "teacher").exists()
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.slow
def test_a_student_and_a_teacher_come_from_the_hub(tmp_path: Path) -> None:
    """The real client against a hub on loopback, with nothing in its cache."""
    pivot, numbers = (Repository(ROOT / "demo/models" / name) for name in ("pivot", "numbers"))
    with Hub({"demo/pivot": pivot, "demo/numbers": numbers}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
        code = (
            f"from tests.merging.hub_server import client; client({environment})\n"
            "from fusekit import FusionConfig, FusionTrainer; from fusekit.capturing.store import Store\n"
            "args = FusionConfig('out', max_steps=1, save_strategy='no', disable_tqdm=True)\n"
            f"rows, teachers = {RECORDS[:4]}, {{'numbers': 'demo/numbers'}}\n"
            "trainer = FusionTrainer('demo/pivot', args, rows, teachers=teachers); trainer.train()\n"
            "print(trainer.state.global_step, Store.open('out/captures/pivot').spec.model_fingerprint)"
        )
        done = program(tmp_path, code)
    assert done.exitcode == 0, done.output[-2000:]
    assert done.output.splitlines()[-1].split() == ["1", "commit", pivot.commit()]
    assert (tmp_path / "cache" / "hub" / "models--demo--numbers").is_dir()


def test_nothing_but_the_text_needs_no_teacher(tmp_path: Path) -> None:
    trainer = FusionTrainer(PIVOT, config(tmp_path, max_steps=1, preset="sft", lm_weight=1.0), RECORDS)
    assert trainer.train().global_step == 1
    assert not (tmp_path / "captures").exists()


def test_weights_of_a_loaded_student_are_told_apart_by_every_tensor() -> None:
    """A tensor without dimensions too."""
    model = AutoModelForCausalLM.from_pretrained(PIVOT, dtype=torch.bfloat16)
    model.register_buffer("scale", torch.tensor(1.0))
    before = Loaded.of(model).fingerprint()
    assert Loaded.of(model).fingerprint() == before
    model.scale += 1
    assert Loaded.of(model).fingerprint() != before


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"loss": "kll"}, ("kll", "kl")),
        ({"lm_weight": 2.0}, ("lm_weight", "2.0")),
        ({"alignment": {"tial": "drop"}}, ("tial", "tail")),
        ({"preset": "fusechatt"}, ("fusechatt", "fusechat")),
        ({"preset": "profuser", "fusion": {}}, ("profuser", "recipe")),
        ({"label_smoothing_factor": 0.1}, ("label_smoothing_factor",)),
        ({"top_k": 0}, ("top_k is 0: ",)),
        ({"max_length": 0}, ("max_length is 0: ",)),
        ({"max_length": -3}, ("max_length is -3: ",)),
        ({"fusion": {"mode": "pairwise"}}, ("fusion.mode", "pairwise")),
    ],
)
def test_wrong_settings_are_refused_by_name(fields: dict[str, Any], said: tuple[str, ...], tmp_path: Path) -> None:
    with refused(DistillationError, *said):
        FusionConfig(str(tmp_path), **fields)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"args": TrainingArguments("out", use_cpu=True)}, DistillationError, ("TrainingArguments", "FusionConfig")),
        ({"model": 3}, DistillationError, ("int", "name or path")),
        ({"model": "no/such-model-at-all"}, CaptureError, ("no/such-model-at-all",)),
        ({"teachers": {"neox": 3}}, DistillationError, ("neox", "int", "Store")),
        ({"teachers": [NEOX]}, DistillationError, ("list", "mapping")),
        ({"train_dataset": [{"quest": "1", "reply": "2"}]}, DataError, ("'quest'", "messages")),
        ({"train_dataset": []}, DistillationError, ("no example",)),
        ({}, DistillationError, ("no source", "sft")),
        ({"teachers": {"../neox": NEOX}}, DistillationError, ("'../neox'",)),
    ],
    ids=str,
)
def test_wrong_arguments_say_what_was_given_and_what_is_wanted(
    change: dict[str, Any], kind: type[FusekitError], said: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = {"model": PIVOT, "args": config(tmp_path), "train_dataset": RECORDS[:2], "teachers": None} | change
    with refused(kind, *said):
        FusionTrainer(**arguments)


def test_teachers_that_cannot_teach_these_examples_are_refused(teacher: Store, tmp_path: Path) -> None:
    made = FusionTrainer(PIVOT, config(tmp_path), RECORDS, {"neox": teacher}).train_dataset.data
    with pytest.raises(DistillationError, match="teachers"):
        FusionTrainer(PIVOT, config(tmp_path), made, {"neox": teacher})
    with pytest.raises(DistillationError, match="neox has none of"):
        FusionTrainer(PIVOT, config(tmp_path / "other"), [{"prompt": "1", "response": "2"}], {"neox": teacher})


def test_evaluation_without_teachers_is_the_likelihood_of_the_text(teacher: Store, tmp_path: Path) -> None:
    """Whatever weight the text has in training."""
    model = AutoModelForCausalLM.from_pretrained(PIVOT, dtype=torch.float32)
    args = config(tmp_path, lm_weighting="constant", lm_weight=0.25, per_device_eval_batch_size=1)
    trainer = FusionTrainer(model, args, RECORDS, {"neox": teacher}, eval_dataset=RECORDS[:3])
    found = trainer.evaluate()["eval_loss"]
    expected = []
    for index in range(3):
        example = trainer.eval_dataset[index]
        ids, labels = (torch.tensor(example[name])[None] for name in ("input_ids", "labels"))
        with torch.inference_mode():
            expected.append(float(model.eval()(input_ids=ids, labels=labels).loss))
    assert found == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_a_model_that_a_run_made_is_no_store(tmp_path: Path) -> None:
    """A published model has a manifest, as a store has; as a teacher it is loaded."""
    made = tmp_path / "made"
    shutil.copytree(ROOT / "demo/models/numbers", made)
    artifacts.seal(made, "distill", {}, {})
    trainer = FusionTrainer(PIVOT, config(tmp_path / "out", max_steps=1), RECORDS[:4], {"made": made})
    assert len(trainer.train_dataset.data.sources["made"]) == 4
    assert trainer.train_dataset.data.candidates == ["pivot", "made"]


@pytest.mark.parametrize("settings", [{"topk": 5}, {"top_k": 0}, {"max_length": 1}], ids=str)
def test_wrong_settings_of_a_capture(settings: dict[str, Any], tmp_path: Path) -> None:
    with refused(DataError, *settings):
        capture(NEOX, RECORDS, tmp_path / "store", **settings)
    assert not (tmp_path / "store").exists()


def test_every_public_name_is_there_and_documented() -> None:
    for name in fusekit.__all__:
        found = getattr(fusekit, name)
        assert inspect.getdoc(found), name
    with pytest.raises(AttributeError, match="fuse_all"):
        fusekit.fuse_all  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    "found",
    [fusekit.capture, fusekit.FusionConfig, fusekit.FusionTrainer, preference.answers, preference.PreferenceTrainer],
    ids=lambda found: found.__name__,
)
def test_the_examples_of_the_docstrings_run(found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name = found.__name__
    globs = {**vars(import_module(found.__module__)), "folder": str(tmp_path / "store")}
    text = (found.__doc__ or "").replace('FusionConfig("out"', f'FusionConfig("{tmp_path}"')
    test = doctest.DocTestParser().get_doctest(text, globs, name, None, None)
    assert test.examples
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=failures.append)
    assert not failures, "".join(failures)
