"""Settings that cannot be, what of them two runs have to share, and what a training takes, against what torch holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from pydantic import ValidationError

from fusekit import FusionConfig, FusionTrainer
from fusekit.artifacts import differences
from fusekit.capturing.forward import GROUP, group_bytes
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer, shape_of
from fusekit.capturing.teacher import CHUNK_BYTES, working_bytes
from fusekit.data.reading import rows_of
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes, memory_limits, taken_bytes
from fusekit.distillation import arguments as estimate
from fusekit.distillation.arguments import problems
from fusekit.distillation.inputs import Inputs
from fusekit.distillation.live import Loaded
from fusekit.distillation.outputs import load_pivot
from fusekit.distillation.projections import Projection
from fusekit.distillation.run import distill, facts_of_alignment, facts_of_run
from fusekit.distillation.settings import AlignmentSettings, DistillSettings, TrainingSettings, clashes
from fusekit.distillation.trainer import _refuse_what_does_not_fit
from fusekit.errors import DistillationError
from tests.distillation import worlds

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
PIVOT = find_checkpoint(ModelChoice("demo/models/pivot"))


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("gold", {"training": {"loss": "kl"}}, "the loss is kl and the vocabulary matched"),
        ("gold", {"alignment": {"vocabulary": "em"}}, "the loss is gold and the vocabulary em"),
        ("uld", {"alignment": {"vocabulary": "matched"}}, "the loss is uld_topk and the vocabulary matched"),
        ("grouped_kl", {"training": {"loss": "kl"}}, "preset grouped_kl has both"),
        ("fusekit", {"training": {"loss": "grouped_kl"}}, "the loss is grouped_kl and the vocabulary prefix"),
        ("uld", {"training": {"loss": "kl"}}, "not vocabulary none"),
        ("uld", {"alignment": {"tokens": "dtw"}}, "vocabulary none .* where tokens is span"),
        ("grouped_kl", {"alignment": {"tokens": "dtw"}}, "vocabulary grouped .* where tokens is span"),
        ("p_kl", {"fusion": {"include_pivot": True}}, "include_pivot to false"),
        ("alm", {"fusion": {"metric": "projected_ce"}}, "projected_ce .* bits_per_byte"),
        ("alm", {"fusion": {"level": "token"}}, "sequence, not token"),
        ("gold", {"fusion": {"function": "avg_ce"}}, "min_ce at level sequence, not avg_ce"),
        ("fusekit", {"fusion": {"function": "min_cee"}}, r"unknown fusion function 'min_cee'; did you mean 'min_ce'\?"),
        ("fusekit", {"training": {"loss": "reverse_kl", "truncation": "renormalize"}}, "use truncation tail"),
        ("fusekit", {"training": {"on_policy": 0.5, "lm_weight": 1.0, "lm_weighting": "constant"}}, "no lm_weight 1"),
        ("fusekit", {"training": {"on_policy": 0.5, "train_sampling_strategy": "group_by_length"}}, "but random and"),
        ("fusekit", {"training": {"on_policy": 0.5, "dataloader_num_workers": 2}}, "no dataloader_num_workers"),
        ("profuser", {"training": {"on_policy": 0.5}}, "no schedule"),
        ("profuser", {"training": {"train_sampling_strategy": "random"}}, "leave train_sampling_strategy out"),
        ("profuser", {"training": {"data_seed": 1}}, "leave data_seed out"),
        ("profuser", {"training": {"schedule": [{"epochs": 1}]}}, "0"),
        ("profuser", {"fusion": {"mode": "pairwise"}}, "joint"),
        ("fusekit", {"fusion": {"function": "reward_softmax"}}, "give FusionDataset rewards"),
        ("fusekit", {"training": {"save_only_model": True}}, "save_only_model cannot be set"),
    ],
)
def test_values_that_cannot_be_had_together_are_refused(preset: str, changes: dict, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        DistillSettings.of(preset, changes)


@pytest.mark.parametrize("preset", ["grouped_kl", "p_kl"])
def test_several_sources_have_no_vocabulary_in_common(preset: str) -> None:
    for mode, sources, clash in (("joint", 2, True), ("joint", 1, False), ("pairwise", 2, False)):
        made = DistillSettings.of(preset, {"fusion": {"mode": mode}})
        found = list(clashes(made.alignment, made.fusion, made.training, sources))
        assert all("not of 2" in mistake.says for mistake in found)
        assert bool(found) == clash


@pytest.mark.parametrize(
    "field", [{"seed": 2**32}, {"num_train_epochs": float("inf")}, {"learning_rate": float("inf")}]
)
def test_numbers_without_a_meaning_are_refused_when_they_are_read(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingSettings(**field)


@pytest.mark.parametrize(
    ("settings", "place", "named"),
    [
        ({"adam_beta3": 1}, "adam_beta3", "adam_beta"),
        ({"optim": "foo"}, "", "foo"),
        ({"adam_beta1": 2}, "", "beta"),
        ({"adam_beta1": "much"}, "adam_beta1", "adam_beta1 is 'much'"),
        ({"batch_size": 4, "per_device_train_batch_size": 3}, "batch_size", "cannot be divided"),
        ({"lora": {"target_modules": ["foo"]}}, "lora", "foo"),
        ({"lora": {"target_modules": "*.q_proj"}}, "lora", "nothing to repeat"),
        ({"lora": {"ranks": 1}}, "lora", "ranks"),
    ],
    ids=str,
)
def test_every_setting_that_cannot_be_is_named(settings: dict[str, Any], place: str, named: str) -> None:
    """By transformers, torch or peft, before a model is loaded."""
    ((path, says),) = problems(TrainingSettings(**settings), PIVOT)
    assert ".".join(map(str, path)) == f"distill.{place}".strip(".")
    assert named in says


def test_what_can_be_is_not_refused() -> None:
    assert not problems(TrainingSettings(lora={"r": 2, "target_modules": ["q_proj"]}, adam_epsilon="1e-8"), PIVOT)
    assert not problems(TrainingSettings(lora={"r": 2, "target_modules": ["foo"]}))  # the pivot is not here
    assert problems(TrainingSettings(lora={"r": 0}))


def test_examples_longer_than_the_model_was_made_for_are_refused() -> None:
    ((path, says),) = problems(TrainingSettings(), PIVOT, max_length=513)
    assert path == ("data", "max_length")
    assert all(number in says for number in ("513", "512"))
    assert not problems(TrainingSettings(), PIVOT, max_length=512)


def test_the_shipped_configurations_of_accelerate_ask_for_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "fsdp2.yml"), "x.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    expected = {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    expected["ACCELERATE_MIXED_PRECISION"] = "bf16"
    assert expected.items() <= environment.items()
    config = ClusterConfig.from_yaml_file(CONFIGS / "deepspeed-zero3.yml")  # its launcher wants the package
    assert config.distributed_type == "DEEPSPEED"
    assert config.deepspeed_config["zero_stage"] == 3
    assert config.deepspeed_config["zero3_save_16bit_model"] is True


def facts(how: Projection | None = None, **changes: dict) -> dict:
    projections = {} if how is None else {"s": how}
    return facts_of_run("s", DistillSettings.of(changes=changes), "pivot", [], {}, projections=projections)


def test_what_a_target_does_not_use_is_no_fact_of_it() -> None:
    free = {"dataloader_pin_memory": False, "dataloader_persistent_workers": True}
    assert not differences(facts(), facts(training=free))
    assert differences(facts(), facts(training={"dataloader_drop_last": True}))
    text = {"training": {"lm_weight": 1.0, "lm_weighting": "constant"}}
    for change in ({"alignment": {"vocabulary": "ms"}}, {"fusion": {"function": "avg_ce"}}):
        assert not differences(facts(**text), facts(**text, **change))
    kl = {"training": {**text["training"], "loss": "kl", "truncation": "renormalize"}}
    assert not differences(facts(**text), facts(**kl))
    assert differences(facts(), facts(fusion={"function": "avg_ce"}))


def test_how_a_source_is_aligned_is_a_fact_of_the_run() -> None:
    made, em = worlds.vocabulary_map(), worlds.vocabulary_map("em")
    plain, matched = facts(Projection(made)), facts(Projection(em, "matched"))
    assert differences(plain, facts(Projection(made, one_hot=True))) == ["projections.s.one_hot: False, now True"]
    changed = differences(plain, facts(Projection(em)))
    assert changed[0] == "projections.s.vocabulary: 'prefix', now 'em'"
    # It is stated for each source: the section's value matters only where a source takes it.
    assert not differences(plain, facts(Projection(made), alignment={"tokens": "dtw"}))
    # Rows that are taken as they are have no conditioning, and warping always has the one-hots.
    assert not differences(matched, facts(Projection(em, "matched", one_hot=True)))
    assert differences(matched, facts(Projection(em)))
    assert not differences(facts(Projection(made, "dtw")), facts(Projection(made, "dtw", one_hot=True)))
    dtw = facts_of_alignment(AlignmentSettings(tokens="dtw", vocabulary="ms"))
    assert dtw.keys() == {"tokens", "vocabulary", "collisions"}


@pytest.mark.parametrize(
    "fields", [{}, {"dtype": "bfloat16"}, {"lora": {"r": 4}}, {"lora": {"r": 4}, "dtype": "bfloat16"}], ids=str
)
def test_states_are_those_of_a_step_of_adamw(fields):
    settings = TrainingSettings(**fields)
    model = load_pivot(PIVOT, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = estimate.states(PIVOT, settings)
    assert held.weights == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.1)
    assert held.gradients == pytest.approx(sum(p.nbytes for p in trained), rel=0.35 if settings.lora else 0.1)
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert held.optimizer == pytest.approx(moments, rel=0.35 if settings.lora else 0.1)


@pytest.mark.parametrize("fields", [{}, {"dtype": "bfloat16"}, {"bf16": True}], ids=str)
def test_activations_are_those_that_autograd_keeps(fields):
    settings = TrainingSettings(per_device_train_batch_size=2, **fields)
    model = load_pivot(PIVOT, settings).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or an address is used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Under autocast weights are kept as they are computed with: estimated with the weights.
        if storage.data_ptr() not in own and tuple(tensor.shape) not in copies:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16),
    ):
        logits = model(torch.zeros((2, 65), dtype=torch.int64), use_cache=False).logits
    expected = sum(kept.values()) + 2 * logits.numel() * (4 if settings.bf16 else logits.itemsize)
    assert estimate.activation_bytes(PIVOT, settings, 65) == pytest.approx(expected, rel=0.15)


def test_the_gradients_of_a_tied_head_are_there_twice_and_summed():
    one = PIVOT.config["vocab_size"] * PIVOT.config["hidden_size"] * 4
    own, tied = (
        dataclasses.replace(PIVOT, config=PIVOT.config | {"tie_word_embeddings": tie}) for tie in (False, True)
    )
    assert estimate.head_gradient_bytes(own, TrainingSettings()) == one
    assert estimate.head_gradient_bytes(tied, TrainingSettings()) == 3 * one
    assert estimate.head_gradient_bytes(tied, TrainingSettings(dtype="bfloat16")) == 3 * one // 2
    assert estimate.head_gradient_bytes(tied, TrainingSettings(lora={"r": 2})) == 0


def test_memory_is_that_of_the_whole_process():
    settings = TrainingSettings()
    alone, three = (Processes(0, n, n, torch.device("cpu")) for n in (1, 3))
    (need,) = estimate.memory_needs(PIVOT, settings, 64, alone)
    besides = sum(estimate.states(PIVOT, settings)[:3]) + estimate.activation_bytes(PIVOT, settings, 64)
    besides += estimate.head_gradient_bytes(PIVOT, settings)
    taken = taken_bytes()
    assert need.needed == pytest.approx(taken + 1.05 * besides, rel=0.05)
    assert need.free == pytest.approx(min(limit.available for limit in memory_limits()) + taken, rel=0.2)
    (together,) = estimate.memory_needs(PIVOT, settings, 64, three)
    assert together.needed == pytest.approx(3 * need.needed, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_capture_needs_no_more_logits_than_a_batch_has(device):
    checkpoint = find_checkpoint(ModelChoice("demo/models/pivot", dtype="bfloat16"))
    shape, tokens = shape_of(checkpoint.config), 100
    groups = group_bytes(shape.vocabulary, 10) + 28 * shape.vocabulary // GROUP
    found = working_bytes(checkpoint, tokens, device, 10)
    assert found == tokens * (8 * shape.hidden + 3 * 4 * shape.vocabulary + groups)
    most = working_bytes(checkpoint, 10**6, device, 10)
    assert 10**6 * 8 * shape.hidden < most < 10**6 * (8 * shape.hidden + 2 * shape.wide * 2) + 5 * CHUNK_BYTES


def test_what_does_not_fit_is_refused_with_the_numbers_before_anything_is_loaded(tmp_path):
    rows = list(rows_of([{"prompt": "1+1=", "response": "2"}]))
    inputs = Inputs(PIVOT.choice, rows, row_tokenizer=RowTokenizer(load_tokenizer(PIVOT)))
    huge = {"training": {"per_device_train_batch_size": 10**9, "batch_size": 10**9}}
    says = r"does not fit:\n.*1,000,000,000 examples of \d+ tokens\): about .* needed, .* free"
    with pytest.raises(DistillationError, match=says):
        distill(inputs, DistillSettings.of("sft", huge), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_weights_that_are_on_a_gpu_already_are_not_counted_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 10**9))
    gpu, settings = Processes(0, 1, 1, torch.device("cuda", 0)), TrainingSettings()
    found = {at: estimate.memory_needs(PIVOT, settings, 64, gpu, loaded=at) for at in (None, "cpu", "cuda")}
    assert {at: len(needs) for at, needs in found.items()} == {None: 2, "cpu": 1, "cuda": 1}
    assert found[None][0] == found["cpu"][0]
    assert found["cpu"][0].needed - found["cuda"][0].needed == estimate.states(PIVOT, settings).weights


def test_a_trainer_estimates_its_own_training_with_its_teachers(tmp_path):
    rows = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(4)]
    huge = FusionConfig(str(tmp_path), per_device_train_batch_size=10**9)
    how = {"teachers": {"numbers": "demo/models/numbers"}}
    says = r"does not fit:\n.*1,000,000,000 examples of \d+ tokens; .* for teachers"
    with pytest.raises(DistillationError, match=says):
        FusionTrainer(PIVOT.choice.model, huge, rows, **how)
    assert not list(tmp_path.iterdir())  # before anything is captured
    FusionTrainer(PIVOT.choice.model, huge, rows, **how, ignore_estimates=True)
    # Files of quantised weights say neither how many weights there are nor what each takes while it trains.
    own = dataclasses.replace(PIVOT, config={**PIVOT.config, "quantization_config": {"quant_method": "bitsandbytes"}})
    _refuse_what_does_not_fit(Loaded(SimpleNamespace(device=torch.device("cpu")), None, own), huge, None, 64, ())
