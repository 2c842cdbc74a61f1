"""The training step against a plain loop, however the batch is split; runs that are killed; numbers that are none."""

from __future__ import annotations

import copy
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset, Subset

from fusekit.alignment.vocabulary_map import build_vocabulary_map
from fusekit.capturing.engine import Teacher
from fusekit.capturing.settings import Selection
from fusekit.distillation.batching import EpochSampler, FusionCollator
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.projections import Projection
from fusekit.distillation.settings import FusionSettings, TrainingSettings
from fusekit.distillation.trainer import label_weights
from fusekit.errors import DistillationError
from tests.capture.random_models import random_model
from tests.distillation import runs, worlds
from tests.processes import Process

Weights = dict[str, torch.Tensor]


CLOSE = 2e-6  # of weights after steps that add up the same numbers in another order


def gradients_by_loop(model: Any, examples: list[dict[str, Any]], lm_weight: float) -> Weights:
    """Row by row without padding, label by label over the whole vocabulary, in float64."""
    model = model.double()
    n = sum(int((example["labels"][1:] != -100).sum()) for example in examples)
    loss = torch.zeros((), dtype=torch.float64)
    for example in examples:
        logprobs = model(torch.tensor(example["input_ids"])[None]).logits[0].log_softmax(-1)
        positions = [p for p in range(1, len(example["labels"])) if example["labels"][p] != -100]
        for j, p in enumerate(positions):
            row = logprobs[p - 1]
            loss = loss - lm_weight * row[example["labels"][p]] / n
            if "target_taught" in example and example["target_taught"][j]:
                ids = [int(i) for i in example["target_ids"][j] if i >= 0]
                shares = [math.exp(float(example["target_logprobs"][j][at])) for at in range(len(ids))]
                others = torch.ones(len(row), dtype=torch.bool)
                others[ids] = False
                score = sum(share * row[i] for share, i in zip(shares, ids, strict=True))
                tail = float(example["target_tail"][j])
                loss = loss - (1 - lm_weight) * (score + tail * row[others].logsumexp(0)) / n
    loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def reference() -> Weights:
    """The weights after one step of gradient descent on the first eight rows, by the loop."""
    model = random_model("llama")
    before = runs.weights(model)
    gradients = gradients_by_loop(copy.deepcopy(model), [runs.data()[i] for i in range(8)], 0.7)
    return {name: before[name] - gradients[name] for name in gradients}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made together (runs.py)."""
    out = tmp_path_factory.mktemp("together")
    runs.start_two(out)
    return out


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (1, 8), (2, 4)])
def test_a_step_is_the_same_however_it_is_split(
    batch: int, accumulation: int, reference: Weights, tmp_path: Path
) -> None:
    found = runs.one_step(tmp_path, batch, accumulation, Subset(runs.data(), range(8)))
    assert runs.different(found, reference, CLOSE) == []


@pytest.mark.slow
def test_a_step_of_two_processes_is_that_of_one(reference: Weights, together: Path, tmp_path: Path) -> None:
    odd = runs.one_step(tmp_path, 7, 1, Subset(runs.data(), range(7)))
    for rank in "01":
        assert runs.different(torch.load(together / f"even-{rank}.pt"), reference, CLOSE) == []
        assert runs.different(torch.load(together / f"odd-{rank}.pt"), odd, CLOSE) == []


@pytest.mark.slow
def test_a_sharded_model_has_the_gradients_and_the_step_of_a_whole_one(reference: Weights, together: Path) -> None:
    expected = gradients_by_loop(random_model("llama"), [runs.data()[i] for i in range(8)], 0.7)
    assert runs.different(torch.load(together / "sharded.pt"), expected, CLOSE) == []
    assert runs.different(torch.load(together / "stepped.pt"), reference, CLOSE) == []


def test_the_order_of_rows_is_the_seeds_and_the_epochs() -> None:
    sampler = EpochSampler(range(7), seed=3, multiple=4)
    first = list(sampler)
    assert sorted(first[:7]) == list(range(7))
    assert first[7:] == [7]
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(EpochSampler(range(7), seed=None)) == list(range(7))


def test_a_step_has_the_same_rows_sorted_by_length() -> None:
    lengths = np.array([5, 1, 9, 3, 3, 8, 2, 7, 4, 6])
    plain = list(EpochSampler(range(10), seed=1, multiple=4))
    found = list(EpochSampler(range(10), seed=1, multiple=4, lengths=lengths, step=4))
    assert len(found) == 12
    for start in range(0, 12, 4):
        step = found[start : start + 4]
        assert sorted(step) == sorted(plain[start : start + 4])
        sizes = [lengths[i] if i < 10 else 0 for i in step]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole = runs.long_run(tmp_path / "whole")
    whole.train()
    killed = Process(runs.killed_run, tmp_path / "killed", 5).wait(240)
    assert killed.exitcode == -signal.SIGKILL, killed.output
    resumed = runs.long_run(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert runs.different(whole.model.state_dict(), resumed.model.state_dict()) == []


def test_a_run_that_resumes_goes_on_counting_who_taught_and_passes_over_what_is_damaged(tmp_path: Path) -> None:
    whole = runs.long_run(tmp_path)
    whole.train()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    said: list[str] = []
    again = runs.long_run(tmp_path, say=said.append)
    again.train(resume_from_checkpoint=True)
    assert any("checkpoint-6 is not used" in line for line in said)
    assert again.state.global_step == 6
    assert again.tally.so_far() == pytest.approx(whole.tally.so_far())
    assert whole.tally.so_far()["rows"] == 24
    with pytest.raises(DistillationError, match="nothing"):
        runs.long_run(tmp_path / "nothing").train(resume_from_checkpoint=True)


BURSTING = 500  # a token that no row has


def bursting_model() -> Any:
    """A model whose numbers overflow at one token, as after a step that went too far."""
    model = random_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[BURSTING] = 3e38
    return model


class Spoilt(Dataset[Any]):
    """Twelve rows, some with the token that the model cannot stand."""

    def __init__(self, spoilt: set[int]) -> None:
        self.spoilt = spoilt

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = dict(runs.data()[index])
        if index in self.spoilt:
            example["input_ids"] = example["input_ids"].copy()
            example["input_ids"][1] = BURSTING
        return example


def test_a_loss_that_is_no_number_skips_its_step(tmp_path: Path) -> None:
    said: list[str] = []
    plain = {"train_sampling_strategy": "sequential", "say": said.append}
    made = runs.trainer(tmp_path / "a", bursting_model(), Spoilt({5}), **plain)
    made.train()
    assert (made.skipped, made.skipped_in_row) == (1, 0)
    (warning,) = [line for line in said if line.startswith("warning")]
    assert "step 2 is skipped" in warning
    good = runs.trainer(tmp_path / "b", bursting_model(), Subset(Spoilt(set()), [0, 1, 2, 3, 8, 9, 10, 11]), **plain)
    good.train()
    assert runs.different(runs.weights(made.model), runs.weights(good.model)) == []
    assert all(torch.isfinite(tensor).all() for tensor in runs.weights(made.model).values())


def test_too_many_in_a_row_stop_the_run_and_keep_the_checkpoint(tmp_path: Path) -> None:
    made = runs.trainer(
        tmp_path,
        bursting_model(),
        Spoilt(set(range(4, 12))),
        train_sampling_strategy="sequential",
        settings=TrainingSettings(lm_weight=0.7, max_skipped_steps=2),
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    with pytest.raises(DistillationError, match=r"step 3: 2 optimizer steps in a row.*checkpoint-1"):
        made.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert all(torch.isfinite(tensor).all() for tensor in runs.weights(made.model).values())


def test_a_batch_without_a_label_is_zero(tmp_path: Path) -> None:
    made = runs.trainer(tmp_path)
    blank = FusionCollator()([{"input_ids": np.zeros(3, np.int64), "labels": np.full(3, -100)}])
    loss = made.compute_loss(made.model, blank, num_items_in_batch=0)
    loss.backward()
    assert loss.item() == 0.0
    assert all(not parameter.grad.any() for parameter in made.model.parameters() if parameter.grad is not None)
    assert made.model.lm_head.weight.grad is not None


def test_padding_does_not_matter(tmp_path: Path) -> None:
    made = runs.trainer(tmp_path)
    examples = [runs.data()[i] for i in range(3)]
    eos = examples[0]["input_ids"][-1]
    values = [made.compute_loss(made.model, FusionCollator(pad)(examples), num_items_in_batch=50) for pad in (0, eos)]
    torch.testing.assert_close(values[1], values[0])


def test_the_final_end_is_learnt() -> None:
    example = runs.data()[1]
    batch = FusionCollator(pad_id=int(example["input_ids"][-1]))([example, runs.data()[0]])
    length = len(example["input_ids"])
    assert batch["labels"][0, length - 1] == example["input_ids"][-1]
    assert batch["attention_mask"][0].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert (batch["labels"][0, length:] == -100).all()


def test_lambda_is_the_rows_and_the_runs() -> None:
    batch = FusionCollator()([runs.data()[i] for i in range(3)])
    sizes = [int((runs.data()[i]["labels"][1:] >= 0).sum()) for i in range(3)]
    assert label_weights(TrainingSettings(lm_weight=0.8), 0.5, batch) == 0.8
    rising = label_weights(TrainingSettings(lm_weight=0.8, lm_weighting="hard_and_decay"), 0.5, batch)
    np.testing.assert_allclose(rising, np.full(sum(sizes), 0.9))
    soft = label_weights(TrainingSettings(lm_weight=0.8, lm_weighting="soft"), 0.5, batch)
    best = [runs.data()[i]["cross_entropies"].min() for i in range(3)]
    np.testing.assert_allclose(soft, np.repeat([1 - math.exp(-x) for x in best], sizes))


def test_a_weight_of_every_row_is_in_the_step(tmp_path: Path) -> None:
    """With λ 0 at the start, rising: the first step learns from the targets alone, the last from the text too."""
    made = runs.trainer(tmp_path, settings=TrainingSettings(lm_weight=0.0, lm_weighting="hard_and_decay"))
    made.train()
    for step, line in enumerate(runs.lines(made)):
        weight = step / 3
        assert line["loss"] == pytest.approx(weight * line["lm_loss"] + (1 - weight) * line["fusion_loss"], rel=1e-5)


@pytest.mark.parametrize("own", [True, False], ids=["the pivot", "another"])
def test_a_teacher_that_is_the_pivot_teaches_nothing_new(own: bool, tmp_path: Path) -> None:
    """With the tail as an outcome: every label is linked and taught, and the gradient is zero; another's is not."""
    pivot = worlds.tokenizer(320)
    model = random_model("llama", seed=0)
    rows = worlds.conversations(6)
    teacher = Teacher(model if own else random_model("llama", seed=1), selection=Selection(k=10))
    said = teacher.score([worlds.read(row, pivot) for row in rows]).rows
    same = build_vocabulary_map(pivot, pivot, method="prefix", source_size=teacher.vocabulary, pivot_size=515)
    data = FusionDataset(
        rows,
        sources={"s": worlds.by_key(said)},
        projections={"s": Projection(same)},
        tokenizer=worlds.Reader(pivot),
        fusion=FusionSettings(include_pivot=False),
    )
    counts = dict(zip(data.count_names, sum(data[i]["counts"] for i in range(6)), strict=True))
    assert counts["linked"] == counts["taught"] == counts["labels"] > 50
    made = runs.trainer(tmp_path, model, data, TrainingSettings(lm_weight=0.0))
    batch = made.data_collator([data[i] for i in range(6)])
    made.compute_loss(made.model, batch, num_items_in_batch=1).backward()
    size = max(float(parameter.grad.abs().max()) for parameter in made.model.parameters())
    assert size < 1e-3 if own else size > 1.0


def test_the_log_says_what_taught(tmp_path: Path) -> None:
    made = runs.trainer(tmp_path, per_device_train_batch_size=12)
    made.train()
    line = made.state.log_history[0]
    counts = dict(zip(runs.data().count_names, sum(runs.data()[i]["counts"] for i in range(12)), strict=True))
    assert line["taught_share"] == pytest.approx(counts["taught"] / counts["labels"])
    assert line["chosen/other"] == pytest.approx(counts["chosen/other"] / 12)
    assert line["chosen/other"] + line["chosen/pivot"] == pytest.approx(1)
    assert line["loss"] == pytest.approx(0.7 * line["lm_loss"] + 0.3 * line["fusion_loss"], rel=1e-5)


def test_evaluation_is_the_loss_of_a_batch_and_leaves_the_log_alone(tmp_path: Path) -> None:
    held_out = Subset(runs.data(), [8, 9, 10, 11])
    made = runs.trainer(tmp_path, eval_dataset=held_out, learning_rate=1e-9, per_device_eval_batch_size=4)
    found = made.evaluate()["eval_loss"]
    made.train()
    batch = made.data_collator([held_out[i] for i in range(4)])
    assert found == pytest.approx(made.compute_loss(made.model.eval(), batch).item(), rel=1e-5)
    line = runs.lines(made)[0]
    assert line["loss"] == pytest.approx(0.7 * line["lm_loss"] + 0.3 * line["fusion_loss"], rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "gpt2", "gemma2"])
@pytest.mark.parametrize("head", [None, "adapted", "copied"])
def test_logits_of_the_labels_are_those_of_the_whole_model(architecture: str, head: Any, tmp_path: Path) -> None:
    model = random_model(architecture)
    if head is not None:
        name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        config = {"target_modules": [name]} if head == "adapted" else {"modules_to_save": [name]}
        model = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", **config}))
    made = runs.trainer(tmp_path, model)
    batch = made.data_collator([runs.data()[i] for i in range(3)])
    model.eval()  # no dropout
    _, logits, positions = made._logits(model, batch, batch["predicting"])
    assert positions is None
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits[0], whole.reshape(-1, whole.shape[-1])[batch["predicting"]])
    made.train()
    assert all(math.isfinite(line["loss"]) for line in runs.lines(made))


def test_deepspeed_may_have_no_norm(tmp_path: Path) -> None:
    """It steps on its own, and its engine does not always tell the norm."""
    made = runs.trainer(tmp_path)
    made.is_deepspeed_enabled = True
    made.accelerator.clip_grad_norm_ = lambda *_: None
    assert made._get_grad_norm(made.model) is None
    assert made.skipped == 0
