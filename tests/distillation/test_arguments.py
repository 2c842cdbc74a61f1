"""Settings that no training can have: all of them at once, each by its name, before a model is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.distillation.arguments import problems
from fusekit.distillation.settings import TrainingSettings

PIVOT = find_checkpoint(ModelChoice("demo/models/pivot"))


def places(**settings: Any) -> list[str]:
    return [".".join(map(str, path)) for path, _ in problems(TrainingSettings(**settings), PIVOT)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"optim": "foo"}, ["distill.optim"]),
        ({"fsdp": "foo"}, ["distill.fsdp"]),
        ({"adam_beta1": 2}, ["distill.adam_beta1"]),
        ({"lora": {"r": 0}}, ["distill.lora.r"]),
        ({"lora": {"target_modules": ["foo"]}}, ["distill.lora.target_modules"]),
        ({"lora": {"target_modules": "*.q_proj"}}, ["distill.lora.target_modules"]),
        ({"lora": {"r": 2, "target_modules": ["q_proj"]}}, []),
        ({"data_seed": 2**64}, ["distill.data_seed"]),
        ({"max_grad_norm": float("nan")}, ["distill.max_grad_norm"]),
        ({"batch_size": 7, "per_device_train_batch_size": 2}, ["distill.batch_size"]),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, []),
        (
            {"optim": "foo", "adam_beta1": 2, "fsdp": "foo", "adam_beta3": 1, "lora": {"r": 0, "ranks": 1}},
            [f"distill.{name}" for name in ("adam_beta3", "optim", "fsdp", "adam_beta1", "lora.ranks", "lora.r")],
        ),
    ],
    ids=str,
)
def test_every_setting_that_cannot_be_is_named(settings: dict[str, Any], expected: list[str]) -> None:
    assert places(**settings) == expected


def test_without_the_pivot_its_modules_are_not_looked_up() -> None:
    assert not problems(TrainingSettings(lora={"r": 2, "target_modules": ["foo"]}))
    assert problems(TrainingSettings(lora={"r": 0}))


def test_examples_longer_than_the_model_was_made_for_are_refused() -> None:
    ((path, says),) = problems(TrainingSettings(), PIVOT, max_length=513)
    assert path == ("data", "max_length")
    assert "513" in says
    assert "512" in says
    assert not problems(TrainingSettings(), PIVOT, max_length=512)


@pytest.mark.parametrize(
    "field", [{"seed": 2**32}, {"num_train_epochs": float("inf")}, {"learning_rate": float("inf")}]
)
def test_numbers_without_a_meaning_are_refused_when_they_are_read(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingSettings(**field)
