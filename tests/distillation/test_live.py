"""Teachers that are scored while training reads: the same targets as from a store, whatever is made ahead."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusekit import FusionConfig, FusionTrainer, Store, capture
from fusekit.capturing.models import ModelChoice
from fusekit.capturing.settings import CaptureSettings
from fusekit.data.reading import rows_of
from fusekit.distillation.live import LiveTeacher, live_teacher
from fusekit.errors import CaptureError, DistillationError
from fusekit.pipeline.distilling import Distill
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from fusekit.types import TopK
from tests.distillation.runs import different, lines
from tests.pipeline.worlds import write_recipe

ROOT = Path(__file__).parents[2]
PIVOT, PLACE = str(ROOT / "demo/models/pivot"), str(ROOT / "demo/sources/neox")
NEOX = ModelChoice(PLACE, dtype="float32")  # in bfloat16 batches of other sizes differ by some .03 nats
RECORDS = [json.loads(line) for line in (ROOT / "demo/rows/train.jsonl").read_text().splitlines()[:12]]


def trainer(out: Path, teachers: Any, rows: Any = RECORDS, **fields: Any) -> FusionTrainer:
    plain: dict[str, Any] = {
        "loss": "kl",
        "lm_weight": 0.5,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return FusionTrainer(PIVOT, FusionConfig(str(out), **plain | fields), rows, teachers=teachers)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("live")
    how: dict[str, Any] = {"exact": {"max_error": 0}, "rounded": {}}
    return {name: capture(NEOX, RECORDS, folder / name, quiet=True, **settings) for name, settings in how.items()}


def test_losses_are_those_of_the_store(stores: dict[str, Store], tmp_path: Path) -> None:
    """Up to what batches of other sizes round; and the same examples are taken from the same candidates."""
    stored = trainer(tmp_path / "a", {"neox": stores["exact"]}, lm_weighting="relative")
    live = trainer(tmp_path / "b", {"neox": NEOX}, lm_weighting="relative")
    stored.train()
    live.train()
    assert not (tmp_path / "b" / "captures" / "neox").exists()
    assert len(lines(live)) == 6
    for ours, theirs in zip(lines(live), lines(stored), strict=True):
        assert ours["fusion_loss"] > 0
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert live.tally.so_far() == pytest.approx(stored.tally.so_far())


def by_id(rows: TopK) -> list[Any]:
    """What is rounded may be ordered otherwise."""
    order = np.argsort(rows.ids, axis=1)
    return [np.take_along_axis(values, order, 1) for values in (rows.ids, rows.logprobs)]


def test_rows_are_those_of_a_store_within_its_bound(stores: dict[str, Store]) -> None:
    found = live_teacher("neox", NEOX, list(rows_of(RECORDS)), CaptureSettings(), max_length=2048)
    for name, bound in (("exact", 1e-4), ("rounded", stores["rounded"].spec.max_error)):
        for key in found.keys:
            ours, theirs = found.get(key), stores[name].get(key)
            assert ours is not None
            (ids, logprobs), (stored_ids, stored) = (by_id(row.rows) for row in (ours, theirs))
            assert (ids == stored_ids).all()
            assert np.abs(logprobs - stored).max() < bound
            assert ours.cross_entropy == pytest.approx(theirs.cross_entropy, rel=1e-5)


def test_a_run_that_resumes_reads_the_same_numbers(tmp_path: Path) -> None:
    how: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "lm_weighting": "constant"}
    whole = trainer(tmp_path, {"neox": NEOX}, **how)
    whole.train()
    again = trainer(tmp_path, {"neox": NEOX}, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert different(whole.model.state_dict(), again.model.state_dict()) == []


def test_what_needs_all_examples_is_measured_before_the_thread_begins(tmp_path: Path, monkeypatch: Any) -> None:
    """All processes take part in it, and examples that it has scored are not those of a step."""
    monkeypatch.setattr("fusekit.distillation.live.AT_ONCE", 3)
    made = trainer(tmp_path, {"neox": NEOX}, lm_weighting="relative")
    found: list[tuple[int, bool]] = []

    def score(keys: Any) -> None:
        keys = list(keys)
        found.append((len(keys), threading.current_thread() is threading.main_thread()))
        LiveTeacher.score(teacher, keys)

    teacher = made.live[0]
    teacher.score = score  # type: ignore[method-assign]
    made.train()
    assert found == [(3, True)] * 4 + [(4, False)] * 6


def test_nothing_is_scored_after_training(tmp_path: Path) -> None:
    """It would load the teacher again, beside the next model that is trained."""
    made = trainer(tmp_path, {"neox": NEOX}, max_steps=1, lm_weighting="constant")
    teacher = made.live[0]
    score = teacher.score

    def slowly(keys: Any) -> None:
        time.sleep(0.2)
        score(keys)

    teacher.score = slowly  # type: ignore[method-assign]
    made.train()
    teacher.close()
    time.sleep(0.5)
    assert teacher._scorer is None


def test_a_loaded_model_is_a_teacher_but_not_of_itself(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(PLACE, dtype=torch.float32)
    made = trainer(tmp_path, model, max_steps=1)
    assert made.train().global_step == 1
    assert isinstance(made.train_dataset.data.sources["teacher"], LiveTeacher)
    own = AutoModelForCausalLM.from_pretrained(PIVOT, dtype=torch.float32)
    with pytest.raises(DistillationError, match="neox"):
        FusionTrainer(own, FusionConfig(str(tmp_path)), RECORDS, teachers={"neox": own})


def test_loader_processes_have_no_teachers(tmp_path: Path) -> None:
    with pytest.raises(DistillationError) as error:
        trainer(tmp_path, {"neox": NEOX}, dataloader_num_workers=2)
    assert "dataloader_num_workers is 2" in str(error.value)
    assert "neox" in str(error.value)


def test_examples_without_a_distribution_are_left_out_and_too_many_are_refused() -> None:
    model = AutoModelForCausalLM.from_pretrained(PLACE, dtype=torch.float32)
    rows = list(rows_of(RECORDS))
    found = live_teacher("neox", model, rows, CaptureSettings(), max_length=2048)
    token = int(found.tokens(rows[0].key).ids[2])  # that only some of the examples have
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    having = [key for key in found.keys if token in found.tokens(key).ids]
    assert having[0] == rows[0].key
    assert rows[0].key not in found
    assert len(having) > 1
    with pytest.raises(CaptureError, match="neox") as error:
        found.score(found.keys)
    assert "--max-quarantined" not in str(error.value)  # of a capture


@pytest.mark.slow
def test_a_recipe_may_score_a_source_on_the_fly(tmp_path: Path) -> None:
    """No store of it; the losses of a run with one; done is done, and the other way of reading it is another input."""
    path = write_recipe(tmp_path, ["llama"], capture={"max_error": 0}, distill={"disable_tqdm": True})
    said: list[str] = []
    logs = []
    for live in ("true", "false", "true"):
        recipe = load_recipe(path, [f"sources.0.on_the_fly={live}"])
        run(recipe, tmp_path / live, until="distill", say=said.append)
        record = json.loads((tmp_path / live / "targets" / "llama" / "training.json").read_text())
        logs.append([line for line in record["log"] if "loss" in line])
    assert any("done already" in line for line in said)
    assert not (tmp_path / "true" / "captures" / "llama").exists()
    assert (tmp_path / "true" / "captures" / "pivot").exists()
    for ours, theirs in zip(*logs[:2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    with pytest.raises(DistillationError) as error:
        run(load_recipe(path, ["sources.0.on_the_fly=true"]), tmp_path / "false", start="distill", until="distill")
    assert "stores.llama" in str(error.value)
    workers = load_recipe(path, ["sources.0.on_the_fly=true", "distill.dataloader_num_workers=1"])
    assert any("llama" in mistake.says for mistake in Distill().mistakes(workers))
