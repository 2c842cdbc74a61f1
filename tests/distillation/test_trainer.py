"""The training step against a plain loop, however the batch is split; runs that are killed; numbers that are none."""

from __future__ import annotations

import copy
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model

from fusekit.alignment.vocabulary_map import build_vocabulary_map
from fusekit.capturing.teacher import Teacher
from fusekit.cli import cli
from fusekit.distillation import outputs
from fusekit.distillation.batching import EpochSampler, FusionCollator, Scheduled
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.losses import SparseTargets, fusion_loss
from fusekit.distillation.projections import Projection
from fusekit.distillation.settings import DistillSettings, FusionSettings, ScheduleStage, TrainingSettings
from fusekit.distillation.trainer import Tally, label_weights
from fusekit.errors import DistillationError
from fusekit.settings import Selection
from tests.capture.random_models import random_model
from tests.distillation import reference as slow
from tests.distillation import runs, worlds
from tests.helpers import refused
from tests.pipeline.worlds import flip
from tests.processes import Process

Weights = dict[str, torch.Tensor]


CLOSE = 2e-6  # of weights after steps that add up the same numbers in another order


def gradients_by_loop(model: Any, examples: list[dict[str, Any]], lm_weight: float) -> Weights:
    """Row by row without padding, by the dense form of the loss, in float64."""
    model = model.double()
    n = sum(int((example["labels"][1:] != -100).sum()) for example in examples)
    weights = {"lm_weight": lm_weight / n, "fusion_weight": (1 - lm_weight) / n}
    for example in examples:
        labels, fields = torch.from_numpy(example["labels"][1:]), ("ids", "logprobs", "tail", "taught")
        learned = labels != -100
        logits = model(torch.tensor(example["input_ids"])[None]).logits[0, :-1][learned]
        targets = SparseTargets(*(torch.from_numpy(example[f"target_{name}"]) for name in fields))
        logits.backward(slow.fusion_loss(logits, labels[learned], targets, **weights)[3])
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def reference() -> Weights:
    """The weights after one step of gradient descent on the first eight rows, by the loop."""
    model = random_model("llama")
    before = runs.weights(model)
    gradients = gradients_by_loop(copy.deepcopy(model), runs.first(8), 0.7)
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
    found = runs.one_step(tmp_path, batch, accumulation, runs.first(8))
    assert runs.different(found, reference, CLOSE) == []


@pytest.mark.slow
def test_a_step_of_two_processes_is_that_of_one(reference: Weights, together: Path, tmp_path: Path) -> None:
    odd = runs.one_step(tmp_path, 7, 1, runs.first(7))
    for rank in "01":
        assert runs.different(torch.load(together / f"even-{rank}.pt"), reference, CLOSE) == []
        assert runs.different(torch.load(together / f"odd-{rank}.pt"), odd, CLOSE) == []


@pytest.mark.slow
def test_a_sharded_model_has_the_gradients_and_the_step_of_a_whole_one(reference: Weights, together: Path) -> None:
    expected = gradients_by_loop(random_model("llama"), runs.first(8), 0.7)
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
    optimizer = tmp_path / "checkpoint-6" / "optimizer.pt"
    sound = CliRunner().invoke(cli, ["verify", str(tmp_path)])
    assert sound.exit_code == 0, sound.output
    assert re.search(rf"{optimizer.parent}: \d+ files of the stage 'checkpoint', all as committed", sound.output)
    flip(optimizer)
    flipped = CliRunner().invoke(cli, ["verify", "--quiet", str(tmp_path)])
    assert flipped.exit_code == 1
    assert f"{optimizer}: its content is not what was written" in flipped.output
    with refused(DistillationError, optimizer.parent, optimizer):
        runs.long_run(tmp_path).train(resume_from_checkpoint=str(optimizer.parent))
    optimizer.write_bytes(b"")
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


def spoilt(*numbers: int) -> list[dict[str, Any]]:
    """Twelve examples, of which these have the token that the model cannot stand."""
    examples = runs.first(12)
    for number in numbers:
        examples[number]["input_ids"] = examples[number]["input_ids"].copy()
        examples[number]["input_ids"][1] = BURSTING
    return examples


def test_a_loss_that_is_no_number_skips_its_step(tmp_path: Path) -> None:
    said: list[str] = []
    plain = {"train_sampling_strategy": "sequential", "say": said.append}
    made = runs.trainer(tmp_path / "a", bursting_model(), spoilt(5), **plain)
    made.train()
    assert (made.skipped, made.skipped_in_row) == (1, 0)
    (warning,) = [line for line in said if line.startswith("warning")]
    assert "step 2 is skipped" in warning
    examples = runs.first(12)
    good = runs.trainer(tmp_path / "b", bursting_model(), examples[:4] + examples[8:], **plain)
    good.train()
    assert runs.different(runs.weights(made.model), runs.weights(good.model)) == []
    assert all(torch.isfinite(tensor).all() for tensor in runs.weights(made.model).values())


def test_labels_whose_loss_is_no_number_are_not_in_the_log() -> None:
    tally = Tally((), lambda vector: vector)
    for losses in ((math.nan, 1.0, 1.0), (4.0, 3.0, 1.0)):
        tally.add([torch.tensor(loss) for loss in losses], 2, None)
    assert tally.line() == {"loss": 2.0, "lm_loss": 1.5, "fusion_loss": 0.5}
    assert tally.line() == {}


def test_deepspeed_may_have_no_norm(tmp_path: Path) -> None:
    made = runs.trainer(tmp_path)
    made.is_deepspeed_enabled = True
    made.accelerator.clip_grad_norm_ = lambda *_: None
    assert made._get_grad_norm(made.model) is None
    assert made.skipped == 0


def test_too_many_in_a_row_stop_the_run_and_keep_the_checkpoint(tmp_path: Path) -> None:
    made = runs.trainer(
        tmp_path,
        bursting_model(),
        spoilt(*range(4, 12)),
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
    examples = runs.first(3)
    pads = 0, examples[0]["input_ids"][-1]
    values = [made.compute_loss(made.model, FusionCollator(pad)(examples), num_items_in_batch=50) for pad in pads]
    torch.testing.assert_close(values[1], values[0])


def test_the_final_end_is_learnt() -> None:
    example = runs.data()[1]
    batch = FusionCollator(pad_id=int(example["input_ids"][-1]))([example, runs.data()[0]])
    length = len(example["input_ids"])
    assert batch["labels"][0, length - 1] == example["input_ids"][-1]
    assert batch["attention_mask"][0].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert (batch["labels"][0, length:] == -100).all()


def test_lambda_is_the_rows_and_the_runs() -> None:
    examples = runs.first(3)
    batch, sizes = FusionCollator()(examples), [int((example["labels"][1:] >= 0).sum()) for example in examples]
    assert label_weights(TrainingSettings(lm_weight=0.8), 0.5, batch) == 0.8
    rising = label_weights(TrainingSettings(lm_weight=0.8, lm_weighting="hard_and_decay"), 0.5, batch)
    np.testing.assert_allclose(rising, np.full(sum(sizes), 0.9))
    soft = label_weights(TrainingSettings(lm_weight=0.8, lm_weighting="soft"), 0.5, batch)
    best = [example["cross_entropies"].min() for example in examples]
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
    pivot, model, rows = worlds.PIVOT, random_model("llama", seed=0), worlds.conversations(6)
    teacher = Teacher(model if own else random_model("llama", seed=1), selection=Selection(k=10))
    said = teacher.score([worlds.read(row, pivot) for row in rows]).rows
    same = build_vocabulary_map(pivot, pivot, method="prefix", source_size=teacher.vocabulary)
    data = FusionDataset(
        rows,
        sources={"s": worlds.by_key(said)},
        projections={"s": Projection(same)},
        tokenizer=worlds.Reader(pivot),
        fusion=FusionSettings(include_pivot=False),
    )
    counts = runs.counts_of(data, *range(6))
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
    counts = runs.counts_of(runs.data(), *range(12))
    assert line["linked_share"] == pytest.approx(counts["linked"] / counts["asked"])
    assert line["taught_share"] == pytest.approx(counts["taught"] / counts["labels"])
    assert line["chosen/other"] == pytest.approx(counts["chosen/other"] / 12)
    assert line["chosen/other"] + line["chosen/pivot"] == pytest.approx(1)
    assert line["loss"] == pytest.approx(0.7 * line["lm_loss"] + 0.3 * line["fusion_loss"], rel=1e-5)


def test_evaluation_is_the_loss_of_a_batch_and_leaves_the_log_alone(tmp_path: Path) -> None:
    held_out = runs.first(12)[8:]
    made = runs.trainer(tmp_path, eval_dataset=held_out, learning_rate=1e-9, per_device_eval_batch_size=4)
    found = made.evaluate()["eval_loss"]
    made.train()
    batch = made.data_collator(held_out)
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
    batch = made.data_collator(runs.first(3))
    model.eval()  # no dropout
    _, logits, positions = made._logits(model, batch, batch["predicting"])
    assert positions is None
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits[0], whole.reshape(-1, whole.shape[-1])[batch["predicting"]])
    made.train()
    assert all(math.isfinite(line["loss"]) for line in runs.lines(made))


FILES = (
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoints of its last two steps, the last over what another run left there."""
    out = tmp_path_factory.mktemp("trained")
    stale = out / "checkpoint-6" / "model-00001-of-00002.safetensors"
    stale.parent.mkdir()
    stale.write_bytes(b"of another run")
    runs.long_run(out, facts={"made_from": {"pivot": "p"}}).train()
    return out


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_the_latest_whole_checkpoint_is_used(trained: Path) -> None:
    said: list[str] = []
    assert [step for step, _ in outputs.checkpoints(trained)] == [6, 5]
    assert outputs.last_good(trained, said.append) == trained / "checkpoint-6"
    assert said == []
    assert tuple(sorted(path.name for path in (trained / "checkpoint-6").iterdir())) == FILES
    facts = outputs.facts_of(trained / "checkpoint-6")
    assert (facts["made_from"], facts["step"], facts["skipped"]) == ({"pivot": "p"}, 6, 0)
    assert facts["counts"]["labels"] > 0  # what a resumed run goes on counting from


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(name: str, damage: str, folder: Path) -> None:
    path = folder / "checkpoint-6" / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    said: list[str] = []
    assert outputs.last_good(folder, said.append) == folder / "checkpoint-5"
    assert len(said) == 1
    assert "checkpoint-6 is not used" in said[0]
    assert name in said[0]


def test_rotation_never_deletes_the_last_good_one(folder: Path) -> None:
    (folder / "checkpoint-6" / "scheduler.pt").unlink()
    (folder / "checkpoint-7").mkdir()  # begun, not finished
    assert outputs.rotate(folder, keep=1) == []
    assert outputs.last_good(folder) == folder / "checkpoint-5"
    (folder / "checkpoint-5" / "scheduler.pt").unlink()
    assert outputs.rotate(folder, keep=1) == []
    assert outputs.last_good(folder) is None


def test_rotation_keeps_as_many_as_asked_and_the_best(folder: Path) -> None:
    for step in (1, 2, 3):
        shutil.copytree(folder / "checkpoint-5", folder / f"checkpoint-{step}")
    deleted = outputs.rotate(folder, keep=2, also=folder / "checkpoint-1")
    assert [path.name for path in deleted] == ["checkpoint-3", "checkpoint-2"]
    assert [step for step, _ in outputs.checkpoints(folder)] == [6, 5, 1]


def test_a_save_that_dies_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former checkpoint may go only once the new one is recorded, also when one is all that is kept."""
    seal = outputs.seal

    def dying(checkpoint: Path, facts: dict[str, Any]) -> None:
        if checkpoint.name == "checkpoint-2":
            raise OSError("the power went")
        seal(checkpoint, facts)

    monkeypatch.setattr(outputs, "seal", dying)
    with pytest.raises(OSError, match="the power went"):
        runs.long_run(tmp_path, save_total_limit=1).train()
    assert [step for step, _ in outputs.checkpoints(tmp_path)] == [2, 1]
    assert outputs.last_good(tmp_path) == tmp_path / "checkpoint-1"


STAGES = [ScheduleStage(epochs=1, responses=1.0), ScheduleStage(epochs=2, responses=0.1, data=1.0)]


def scheduled(stages: list[ScheduleStage] = STAGES, step: int = 4) -> Scheduled:
    """Twelve examples of data and six answers."""
    return Scheduled(runs.data(12), runs.data(6, seed=5), stages, 3, step)


def train_schedule(out: Path, examples: Scheduled, **arguments: Any) -> Any:
    model = random_model("llama", attention_dropout=0.3 if "save_steps" in arguments else 0.0)
    return runs.trainer(out, model, examples, train_sampling_strategy="sequential", **arguments)


def test_the_preset_has_the_weights_of_the_paper() -> None:
    settings = DistillSettings.of("profuser").training
    assert settings.passes == 3
    assert [(stage.responses, stage.data) for stage in settings.schedule or []] == [(1.0, 0.0), (0.1, 1.0)]
    assert (1 - settings.lm_weight) / settings.lm_weight == 1.0


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
    expected = runs.weights(model)
    for part, weight in enumerate((1.0, 0.1)):
        chosen = [example for example in step if example["part"] == part]
        for name, gradient in gradients_by_loop(copy.deepcopy(model), chosen, 0.7).items():
            expected[name] = expected[name] - weight * gradient
    found = runs.one_step(tmp_path, batch, accumulation, examples, train_sampling_strategy="sequential")
    assert runs.different(found, expected, CLOSE) == []


def test_the_logged_loss_is_that_of_the_stage(tmp_path: Path) -> None:
    losses = {}
    for stage in (ScheduleStage(responses=1.0), ScheduleStage(data=1.0), ScheduleStage(responses=0.1, data=1.0)):
        made = train_schedule(tmp_path, scheduled([stage], 18), per_device_train_batch_size=18, max_steps=1)
        made.train()
        losses[stage.responses, stage.data] = made.state.log_history[0]["loss"]
    assert losses[0.1, 1.0] == pytest.approx(0.1 * losses[1.0, 0.0] + losses[0.0, 1.0], rel=1e-5)


def test_a_resumed_schedule_ends_in_the_same_weights(tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine"}
    how["gradient_accumulation_steps"] = 2
    whole = train_schedule(tmp_path, scheduled(), **how)
    whole.train()
    assert whole.state.global_step == 12
    for step in (1, 5):  # of the first stage and of the second
        resumed = train_schedule(tmp_path / "again", scheduled(), **how)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert runs.different(whole.model.state_dict(), resumed.model.state_dict()) == []


def test_an_answer_is_taught_by_its_writer() -> None:
    """The pivot has read it too, and knows it better."""
    given = runs.data()
    key = given.rows[0].key
    for writer, chosen in (("pivot", [1.0, 0.0]), ("other", [0.0, 1.0])):
        said = {"pivot": given.pivot, "sources": given.sources, "projections": given.projections}
        made = FusionDataset(given.rows, **said, writers={key: writer})
        counts = runs.counts_of(made, 0)
        assert [counts["chosen/pivot"], counts["chosen/other"]] == chosen
        assert len(made[0]["cross_entropies"]) == 1
        assert len(made[1]["cross_entropies"]) == 2
