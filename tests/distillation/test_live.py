"""Teachers that are scored while training reads: the same targets as from a store, whatever is made ahead."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusekit import FusionConfig, FusionTrainer, Store, capture
from fusekit.capturing.capture import Capture
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer
from fusekit.data.prepare import prepare
from fusekit.data.reading import rows_of
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.inputs import Inputs, Source
from fusekit.distillation.live import LiveTeacher, live_teacher
from fusekit.distillation.losses import IGNORE
from fusekit.distillation.run import distill
from fusekit.distillation.settings import DistillSettings
from fusekit.errors import CaptureError, DistillationError
from fusekit.pipeline.distilling import Distill
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from fusekit.settings import CaptureSettings
from tests.capture.rows import by_id
from tests.distillation.runs import different, lines
from tests.helpers import refused
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


def test_rows_are_those_of_a_store_within_its_bound(stores: dict[str, Store]) -> None:
    found = live_teacher("neox", NEOX, list(rows_of(RECORDS)), CaptureSettings(), max_length=2048)
    for name, bound in (("exact", 1e-4), ("rounded", stores["rounded"].spec.max_error)):
        for key in found.keys:
            ours, theirs = found.get(key), stores[name].get(key)
            assert ours is not None
            for said, stored in zip(*(by_id(*row.rows[:2]) for row in (ours, theirs)), strict=True):
                assert said == pytest.approx(stored, rel=0, abs=bound)
            assert ours.cross_entropy == pytest.approx(theirs.cross_entropy, rel=1e-5)


@pytest.mark.parametrize(
    ("step", "how"), [(4, {"lm_weighting": "constant"}), (2, {"lm_weight": 0.0, "on_policy": 0.5, "max_new_tokens": 8})]
)
def test_a_run_that_resumes_reads_the_same_numbers(step: int, how: dict[str, Any], tmp_path: Path) -> None:
    """And writes the same answers."""
    whole, again = (trainer(tmp_path, {"neox": NEOX}, save_strategy="steps", save_steps=1, **how) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
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
    with refused(DistillationError, "neox"):
        FusionTrainer(own, FusionConfig(str(tmp_path)), RECORDS, teachers={"neox": own})


def test_loader_processes_have_no_teachers(tmp_path: Path) -> None:
    with refused(DistillationError, "dataloader_num_workers is 2", "neox"):
        trainer(tmp_path, {"neox": NEOX}, dataloader_num_workers=2)


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
    with refused(DistillationError, "stores.llama"):
        run(load_recipe(path, ["sources.0.on_the_fly=true"]), tmp_path / "false", start="distill", until="distill")
    workers = load_recipe(path, ["sources.0.on_the_fly=true", "distill.dataloader_num_workers=1"])
    assert any("llama" in mistake.says for mistake in Distill().mistakes(workers))


def policy_trainer(out: Path, teachers: Any = None, rows: Any = RECORDS, **fields: Any) -> FusionTrainer:
    how = {"lm_weight": 0.0, "on_policy": 1.0, "max_new_tokens": 8} | fields
    return trainer(out, {"neox": NEOX} if teachers is None else teachers, rows, **how)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> FusionTrainer:
    return policy_trainer(tmp_path_factory.mktemp("policy"))


def written(made: FusionTrainer, step: int = 0) -> list[dict[str, Any]]:
    assert made.on_policy is not None
    return made.on_policy.examples(made.model, [0, 1, 2, 12], step)


def texts(examples: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example["labels"][example["labels"] != IGNORE]) for example in examples]


def test_an_answer_is_sampled_from_the_model_and_alone_is_learned(made: FusionTrainer) -> None:
    tokenizer = made.processing_class
    for example, record in zip(written(made), RECORDS, strict=False):
        learned = example["labels"] != IGNORE
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
    some = policy_trainer(tmp_path, on_policy=0.5, lm_weighting="constant", lm_weight=0.25)
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
    with refused(DistillationError, "neox", store.spec.model_fingerprint):
        policy_trainer(tmp_path / "out", {"neox": store})


def test_a_teacher_reads_answers_under_the_template_of_its_store(tmp_path: Path) -> None:
    rows = prepare(rows_of(RECORDS), [RowTokenizer(load_tokenizer(find_checkpoint(NEOX)))], 2048).rows
    reader = RowTokenizer(load_tokenizer(find_checkpoint(NEOX)), ChatTemplate.chosen("chatml"))
    store = Capture(find_checkpoint(NEOX), reader, rows, tmp_path / "store", quiet=True).run()
    with refused(DistillationError, "chatml", "neox"):
        policy_trainer(tmp_path / "out", {"neox": store})


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with refused(DistillationError, "on_policy is 1"):
        policy_trainer(tmp_path, rows=[{"text": "No question."}] * 3)
    with refused(DistillationError, "on_policy", 1.5):
        policy_trainer(tmp_path, on_policy=1.5)
