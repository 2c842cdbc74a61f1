"""Preference training on stores: the reference that several models make, the loss, and the trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusekit import Store, capture
from fusekit.distillation.preference import (
    PreferenceConfig,
    PreferenceTrainer,
    answers,
    fused_reference,
    preference_loss,
)
from fusekit.errors import DataError, DistillationError

PIVOT, NEOX = "demo/models/pivot", "demo/sources/neox"
PAIRS = [
    {"prompt": f"Reverse: {a} {b}", "chosen": f"{b} {a}", "rejected": f"{a} {b} {a} {b}"}
    for a in "abcd"
    for b in "wxyz"
]


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def test_all_forms_of_a_pair_are_read_alike() -> None:
    forms: list[dict[str, Any]] = [
        {"prompt": messages("a"), "chosen": messages("", "b")[1:], "rejected": messages("", "c")[1:]},
        {"chosen": messages("a", "b"), "rejected": messages("a", "c")},
        {"prompt": "a", "chosen": messages("a", "b"), "rejected": messages("a", "c"), "score_chosen": 3.0},
    ]
    expected = [{"prompt": messages("a"), "completion": messages("", answer)[1:]} for answer in "bc"]
    assert [answers([form]) for form in forms] == [expected] * 3
    assert answers([{"prompt": "a", "chosen": "b", "rejected": "c", "id": 7}]) == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "c"},
    ]


@pytest.mark.parametrize(
    "pair",
    [
        {"prompt": "a", "chosen": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": messages("a", "c")},
        {"chosen": "b", "rejected": "c"},
        {"prompt": "", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": ""},
        {"chosen": messages("x", "b"), "rejected": messages("y", "c")},
        "pairs.jsonl",
    ],
    ids=str,
)
def test_a_pair_that_is_none_is_refused_by_its_number(pair: Any) -> None:
    with pytest.raises(DataError, match="pair 2 is"):
        answers([PAIRS[0], pair])


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("preferred", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_reference_is_the_models_farthest_from_the_pivot(clip: bool, preferred: bool, count: int) -> None:
    values = np.random.default_rng(count).choice([-3.0, -2.5, -1.0, -0.5, -np.inf], (count + 1, 60))
    values[0, values[0] == -np.inf] = -4.0  # a pivot is finite, or its example is quarantined
    pivot, sources = values[0], values[1:]
    expected = []
    for own, others in zip(pivot, sources.T, strict=True):
        best = own
        for other in others:
            bounded = (max(own, other) if preferred else min(own, other)) if clip else other
            if abs(bounded - own) > abs(best - own):
                best = bounded
        expected.append(best)
    assert fused_reference(pivot, sources, preferred=preferred, clip=clip).tolist() == expected


def test_the_loss_is_that_of_dpo() -> None:
    margins, reference = torch.tensor([0.5, -0.25], dtype=torch.float64), torch.tensor([0.1, 0.3], dtype=torch.float64)
    margins.requires_grad_()
    loss = preference_loss(margins, reference, 2.0)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(1.1))) / 2, rel=1e-12)
    assert torch.autograd.gradcheck(lambda given: preference_loss(given, reference, 2.0), margins)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return capture(NEOX, answers(PAIRS), tmp_path_factory.mktemp("preference") / "neox", top_k=1, quiet=True)


def trainer(out: Path, sources: Any = None, pairs: Any = PAIRS, lora: Any = None, **fields: Any) -> PreferenceTrainer:
    how = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no", "report_to": "none"}
    how |= {"max_steps": 12, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "dtype": "float32"} | fields
    return PreferenceTrainer(PIVOT, PreferenceConfig(str(out), **how), pairs, sources, peft_config=lora)


def test_a_model_learns_to_prefer_what_was_chosen_beyond_its_sources(store: Store, tmp_path: Path) -> None:
    made = trainer(tmp_path, {"neox": store})
    own = Store.open(tmp_path / "captures" / "pivot")
    for index in (0, 7):
        chosen, rejected, reference = made.train_dataset[index]
        margin = 0.0
        for example, better in ((chosen, max), (rejected, min)):
            row = next(row for row in own if row.tokens.ids.tolist() == example["input_ids"].tolist())
            per_token = [-known.get(row.tokens.key).token_ce for known in (own, store)]
            margin += better(per_token) * (1 if example is chosen else -1)
        assert reference == pytest.approx(margin, rel=1e-12)
    made.train()
    lines = [line for line in made.state.log_history if "rewards/accuracies" in line]
    assert len(lines) == 12
    assert np.mean([line["loss"] for line in lines[-4:]]) < np.mean([line["loss"] for line in lines[:4]]) - 0.2
    assert lines[0]["rewards/accuracies"] < 0.5
    assert np.mean([line["rewards/accuracies"] for line in lines[-4:]]) > 0.9


def test_accumulated_batches_learn_what_one_batch_learns(store: Store, tmp_path: Path) -> None:
    losses = []
    for size, times in ((8, 1), (2, 4)):
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 3}
        made = trainer(tmp_path, {"neox": store.path}, **fields)
        made.train()
        losses.append([line["loss"] for line in made.state.log_history if "rewards/accuracies" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_answers_that_a_store_lacks_are_refused_before_training(store: Store, tmp_path: Path) -> None:
    other = [{"prompt": "Reverse: q q", "chosen": "q q", "rejected": "z"}]
    with pytest.raises(DistillationError, match="no pairs"):
        trainer(tmp_path / "none", pairs=[])
    with pytest.raises(DistillationError, match="neox lacks 2 of 34"):
        trainer(tmp_path / "a", {"neox": store}, [*PAIRS, *other])
    with pytest.raises(DistillationError, match="the model lacks 1 of 34"):
        trainer(tmp_path / "b", pairs=[*PAIRS, other[0] | {"rejected": "long " * 60}], max_length=64)
    with pytest.raises(DistillationError, match="sources is Store"):
        trainer(tmp_path / "c", store)
    with pytest.raises(DistillationError, match="inf"):
        PreferenceConfig(str(tmp_path), beta=math.inf)


@pytest.mark.parametrize("modules", [["lm_head"], "all-linear"])
def test_an_adapter_is_trained_alone_from_a_loss_of_log_2(modules: Any, tmp_path: Path) -> None:
    """Without a source; also an adapter of the output embedding, whose input is picked."""
    made = trainer(tmp_path, max_steps=1, lora={"r": 2, "target_modules": modules})
    assert made.train().training_loss == pytest.approx(math.log(2), rel=1e-4)
    trained = [name for name, parameter in made.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


@pytest.mark.parametrize("how", [{"max_length": 20}, {"train_on": "all"}])
def test_a_store_of_another_part_of_the_answers_is_refused(how: dict[str, Any], tmp_path: Path) -> None:
    pairs = [*PAIRS, {"prompt": "Say:", "chosen": "a b " * 20, "rejected": "z " * 20}]
    other = capture(NEOX, answers(pairs), tmp_path / "other", top_k=1, quiet=True, **how)
    with pytest.raises(DistillationError, match=r"neox has another part of \d+ of 34"):
        trainer(tmp_path / "out", {"neox": other}, pairs)
    whole = capture(NEOX, answers(pairs), tmp_path / "whole", top_k=1, quiet=True)
    assert len(trainer(tmp_path / "out", {"neox": whole}, pairs).train_dataset) == 17
