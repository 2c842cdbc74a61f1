"""Steps that learn from answers which the trained model writes itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusekit import FusionTrainer, Store, capture
from fusekit.capturing.capture import Capture
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer
from fusekit.data.prepare import prepare
from fusekit.data.reading import rows_of
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation.batching import IGNORED
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.inputs import Inputs, Source
from fusekit.distillation.run import distill
from fusekit.distillation.settings import DistillSettings
from fusekit.errors import DistillationError
from tests.distillation import test_live
from tests.distillation.runs import different, lines
from tests.distillation.test_live import NEOX, PIVOT, PLACE, RECORDS


def trainer(out: Path, teachers: Any = None, rows: Any = RECORDS, **fields: Any) -> FusionTrainer:
    how = {"lm_weight": 0.0, "on_policy": 1.0, "max_new_tokens": 8} | fields
    return test_live.trainer(out, {"neox": NEOX} if teachers is None else teachers, rows, **how)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> FusionTrainer:
    return trainer(tmp_path_factory.mktemp("policy"))


def written(made: FusionTrainer, step: int = 0) -> list[dict[str, Any]]:
    assert made.on_policy is not None
    return made.on_policy.examples(made.model, [0, 1, 2, 12], step)


def texts(examples: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example["labels"][example["labels"] != IGNORED]) for example in examples]


def test_an_answer_is_sampled_from_the_model_and_alone_is_learned(made: FusionTrainer) -> None:
    tokenizer = made.processing_class
    for example, record in zip(written(made), RECORDS, strict=False):
        learned = example["labels"] != IGNORED
        question = tokenizer.apply_chat_template(record["messages"][:1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(example["input_ids"][~learned]) == question
        assert 1 <= learned.sum() <= 9  # the end of turn is one of them
        np.testing.assert_array_equal(example["labels"][learned], example["input_ids"][learned])
    first, again, other = (texts(written(made, step), tokenizer) for step in (0, 0, 1))
    assert first == again != other


def test_targets_are_what_a_store_of_the_same_answers_gives(made: FusionTrainer, tmp_path: Path) -> None:
    examples = written(made)
    answers = [text.removesuffix("<|end|>") for text in texts(examples, made.processing_class)]
    whole = [text.endswith("<|end|>") for text in texts(examples, made.processing_class)]
    asked = [
        {"messages": [record["messages"][0], {"role": "assistant", "content": answer}]}
        for record, answer in zip(RECORDS, answers, strict=False)
    ]
    store = capture(NEOX, asked, tmp_path / "neox", quiet=True, max_error=0)
    assert made.on_policy is not None
    rows = list(rows_of(asked))
    data = FusionDataset(
        rows,
        sources={"neox": store},
        projections=made.on_policy._projections,
        tokenizer=made.on_policy.reader,
        fusion=made.on_policy._fusion,
    )
    assert any(whole)
    for index, (example, ended) in enumerate(zip(examples, whole, strict=True)):
        expected, n = data[index], len(example["target_tail"])
        assert n == len(expected["target_tail"]) - (not ended)
        np.testing.assert_array_equal(example["target_taught"], expected["target_taught"][:n])
        np.testing.assert_allclose(example["target_tail"], expected["target_tail"][:n], atol=1e-4)
        ours, theirs = example["target_logprobs"], expected["target_logprobs"][:n]
        width = min(ours.shape[1], theirs.shape[1])
        np.testing.assert_allclose(ours[:, :width], theirs[:, :width], atol=1e-4)


def test_nothing_else_draws_from_another_random_state(made: FusionTrainer) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    made.model.train()
    written(made)
    assert made.model.training
    assert torch.equal(torch.rand(2), expected)


def test_steps_are_chosen_by_seed_and_epoch_and_own_answers_are_not_labels(tmp_path: Path) -> None:
    some = trainer(tmp_path, on_policy=0.5, lm_weighting="constant", lm_weight=0.25)
    some.train()
    assert some.on_policy is not None
    chosen = [some.on_policy.chosen(epoch, step) for epoch in (0, 1) for step in range(3)]
    assert 0 < sum(chosen) < 6
    for line, own in zip(lines(some), chosen, strict=True):
        weight = 0.0 if own else 0.25
        expected = weight * line["lm_loss"] + (1 - weight) * line["fusion_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    share = sum(some.on_policy.chosen(0, step) for step in range(2000)) / 2000
    assert share == pytest.approx(0.5, abs=0.05)


def test_a_run_that_resumes_writes_the_same_answers(tmp_path: Path) -> None:
    how: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "on_policy": 0.5}
    whole = trainer(tmp_path, **how)
    whole.train()
    again = trainer(tmp_path, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert different(whole.model.state_dict(), again.model.state_dict()) == []


def test_a_store_names_the_model_that_judges_new_answers(tmp_path: Path) -> None:
    """Of a run without a recipe."""
    reader = RowTokenizer(load_tokenizer(find_checkpoint(ModelChoice(PIVOT))))
    rows = prepare(rows_of(RECORDS), [reader], 2048).rows
    capture(NEOX, RECORDS, tmp_path / "store", quiet=True)
    training = {"on_policy": 1.0, "max_new_tokens": 8, "lm_weight": 0.0, "loss": "reverse_kl", "num_train_epochs": 1}
    training |= {"batch_size": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    apart = {"fusion": {"include_pivot": False}, "alignment": {"tail": "listed_share"}}
    settings = DistillSettings.of("sft", {"training": training, **apart})
    inputs = Inputs(ModelChoice(PIVOT), rows, None, {"neox": Source(tmp_path / "store")}, reader)
    (folder,) = distill(inputs, settings, tmp_path / "out")
    record = json.loads((folder / "training.json").read_text())
    assert all(line["loss"] == pytest.approx(line["fusion_loss"]) for line in record["log"])
    before, after = (load_file(Path(place) / "model.safetensors") for place in (PIVOT, folder))
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)
    assert Store.open(tmp_path / "store").spec.model == PLACE


def test_a_model_that_changed_since_its_store_is_no_teacher(tmp_path: Path) -> None:
    shutil.copytree(PLACE, tmp_path / "model")
    store = capture(str(tmp_path / "model"), RECORDS, tmp_path / "store", quiet=True)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(DistillationError) as error:
        trainer(tmp_path / "out", {"neox": store})
    assert "neox" in str(error.value)
    assert store.spec.model_fingerprint in str(error.value)


def test_a_teacher_reads_answers_under_the_template_of_its_store(tmp_path: Path) -> None:
    rows = prepare(rows_of(RECORDS), [RowTokenizer(load_tokenizer(find_checkpoint(NEOX)))], 2048).rows
    reader = RowTokenizer(load_tokenizer(find_checkpoint(NEOX)), ChatTemplate.chosen("chatml"))
    store = Capture(find_checkpoint(NEOX), reader, rows, tmp_path / "store", quiet=True).run()
    with pytest.raises(DistillationError) as error:
        trainer(tmp_path / "out", {"neox": store})
    assert "chatml" in str(error.value)
    assert "neox" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rows": [{"text": "No question."}] * 3}, "on_policy is 1"),
        ({"on_policy": 1.5}, "on_policy"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(DistillationError) as error:
        trainer(tmp_path, **fields)
    assert named in str(error.value)
