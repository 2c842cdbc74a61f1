"""Stages that weigh two parts of data: their order, the loss of a step against a loop, and a run that is resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusekit.distillation.batching import Scheduled
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.losses import SparseTargets, fusion_loss
from fusekit.distillation.settings import DistillSettings, ScheduleStage
from tests.capture.random_models import random_model
from tests.distillation import runs
from tests.distillation.test_trainer import CLOSE, gradients_by_loop

STAGES = [ScheduleStage(epochs=1, responses=1.0), ScheduleStage(epochs=2, responses=0.1, data=1.0)]


def scheduled(stages: list[ScheduleStage] = STAGES, step: int = 4) -> Scheduled:
    """Twelve examples of data and six answers."""
    return Scheduled(runs.data(12), runs.data(6, seed=5), stages, 3, step)


def trained(out: Path, examples: Scheduled, **arguments: Any) -> Any:
    model = random_model("llama", attention_dropout=0.3 if "save_steps" in arguments else 0.0)
    return runs.trainer(out, model, examples, train_sampling_strategy="sequential", **arguments)


def test_the_worked_example() -> None:
    """arXiv 2408.04998: P_S = (.7 .2 .1), P_T = (.5 .3 .2), label 0: SFT .69315, KL .08512, with beta 1 .77827."""
    targets = SparseTargets(
        torch.tensor([[0, 1, 2]]), torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.zeros(1), torch.tensor([True])
    )
    logits, labels = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([0])
    for truncation in ("tail", "renormalize"):
        found = fusion_loss(logits, labels, targets, loss="kl", truncation=truncation, lm_weight=1.0, fusion_weight=1.0)
        assert float(found.lm) == pytest.approx(0.69315, abs=5e-6)
        assert float(found.fusion) == pytest.approx(0.08512, abs=5e-6)
        assert float(found.total) == pytest.approx(0.77827, abs=5e-6)


def test_every_epoch_has_the_examples_of_its_stage_once_and_ends_with_a_step() -> None:
    found = scheduled()
    answers, both, again = found.order[:8], found.order[8:28], found.order[28:]
    assert sorted(answers) == [-1, -1, *range(12, 18)]
    assert sorted(both) == sorted(again) == [-1, -1, *range(18)]
    assert list(both) != list(again)
    assert len(found) == 48
    weights = {0: [], 1: []}
    for at in range(8, 28):
        example = found[at]
        if "part" in example:
            weights[example["part"]].append(example["weight"])
            part = found.parts[example["part"]]
            np.testing.assert_array_equal(
                example["input_ids"], part[found.order[at] - 12 * example["part"]]["input_ids"]
            )
    assert weights == {0: [1.0] * 12, 1: [0.1] * 6}
    assert len(found[8]["counts"]) == len(found.count_names)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
def test_a_step_is_the_weighted_sum_of_the_means_of_its_parts(batch: int, accumulation: int, tmp_path: Path) -> None:
    examples = scheduled([ScheduleStage(responses=0.1, data=1.0)], 8)
    step = [examples[at] for at in range(8)]
    assert {example["part"] for example in step} == {0, 1}
    model = random_model("llama")
    before, expected = runs.weights(model), runs.weights(model)
    for part, weight in enumerate((1.0, 0.1)):
        chosen = [example for example in step if example["part"] == part]
        for name, gradient in gradients_by_loop(copy.deepcopy(model), chosen, 0.7).items():
            expected[name] = expected[name] - weight * gradient
    how = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    made = trained(
        tmp_path, examples, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **how
    )
    made.train()
    found = runs.weights(made.model)
    assert runs.different({name: found[name] for name in before}, expected, CLOSE) == []


def test_the_logged_loss_is_that_of_the_stage(tmp_path: Path) -> None:
    """L_infer 1.3 and L_train .9 give 1.30 in the first stage and 1.03 in the second: here with measured ones."""
    losses = {}
    for stage in (ScheduleStage(responses=1.0), ScheduleStage(data=1.0), ScheduleStage(responses=0.1, data=1.0)):
        made = trained(tmp_path, scheduled([stage], 18), per_device_train_batch_size=18, max_steps=1)
        made.train()
        losses[stage.responses, stage.data] = made.state.log_history[0]["loss"]
    assert losses[0.1, 1.0] == pytest.approx(0.1 * losses[1.0, 0.0] + losses[0.0, 1.0], rel=1e-5)


def test_a_resumed_schedule_ends_in_the_same_weights(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine"}
    how["gradient_accumulation_steps"] = 2
    whole = trained(tmp_path, scheduled(), **how)
    whole.train()
    assert whole.state.global_step == 12
    for step in (1, 5):  # of the first stage and of the second
        resumed = trained(tmp_path / "again", scheduled(), **how)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert runs.different(whole.model.state_dict(), resumed.model.state_dict()) == []


def test_an_answer_is_taught_by_its_writer() -> None:
    """The pivot has read it too, and knows it better."""
    given = runs.data()
    key = given.rows[0].key
    for writer, chosen in (("pivot", [1.0, 0.0]), ("other", [0.0, 1.0])):
        said = {"pivot": given.pivot, "sources": given.sources, "projections": given.projections}
        made = FusionDataset(given.rows, **said, writers={key: writer})
        counts = dict(zip(made.count_names, made[0]["counts"], strict=True))
        assert [counts["chosen/pivot"], counts["chosen/other"]] == chosen
        assert len(made[0]["cross_entropies"]) == 1
        assert len(made[1]["cross_entropies"]) == 2


def test_the_preset_has_the_weights_of_the_paper() -> None:
    settings = DistillSettings.of("profuser").training
    assert settings.passes == 3
    assert [(stage.responses, stage.data) for stage in settings.schedule or []] == [(1.0, 0.0), (0.1, 1.0)]
    assert (1 - settings.lm_weight) / settings.lm_weight == 1.0
