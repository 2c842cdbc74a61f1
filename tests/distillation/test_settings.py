"""Settings that contradict each other or that no training can have, and what of them two runs have to share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from pydantic import ValidationError

from fusekit.artifacts import differences
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.distillation.arguments import problems
from fusekit.distillation.projections import Projection
from fusekit.distillation.run import facts_of_alignment, facts_of_run
from fusekit.distillation.settings import AlignmentSettings, DistillSettings, TrainingSettings, clashes
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
        ("alm", {"fusion": {"level": "token"}}, "at level token"),
        ("gold", {"fusion": {"function": "avg_ce"}}, "different vocabularies, so function avg_ce"),
        ("fusekit", {"fusion": {"function": "min_cee"}}, r"unknown fusion function 'min_cee'; did you mean 'min_ce'\?"),
        ("fusekit", {"training": {"loss": "reverse_kl", "truncation": "renormalize"}}, "use truncation tail"),
        ("fusekit", {"training": {"on_policy": 0.5, "lm_weight": 1.0, "lm_weighting": "constant"}}, "lm_weight 1"),
        ("fusekit", {"training": {"on_policy": 0.5, "train_sampling_strategy": "group_by_length"}}, "group_by_length"),
        ("fusekit", {"training": {"on_policy": 0.5, "dataloader_num_workers": 2}}, "dataloader_num_workers to 0"),
        ("profuser", {"training": {"on_policy": 0.5}}, "give one of them"),
        ("profuser", {"training": {"train_sampling_strategy": "random"}}, "leave train_sampling_strategy out"),
        ("profuser", {"training": {"data_seed": 1}}, "leave data_seed out"),
        ("profuser", {"training": {"schedule": [{"epochs": 1}]}}, "0"),
        ("profuser", {"fusion": {"mode": "pairwise"}}, "joint"),
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
        assert all("2 sources" in says for says, _ in found)
        assert bool(found) == clash


@pytest.mark.parametrize(
    "field", [{"seed": 2**32}, {"num_train_epochs": float("inf")}, {"learning_rate": float("inf")}]
)
def test_numbers_without_a_meaning_are_refused_when_they_are_read(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingSettings(**field)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora": {"target_modules": ["foo"]}}, ["lora.target_modules"]),
        ({"lora": {"target_modules": "*.q_proj"}}, ["lora.target_modules"]),
        ({"lora": {"r": 2, "target_modules": ["q_proj"]}}, []),
        ({"data_seed": 2**64}, ["data_seed"]),
        ({"max_grad_norm": float("nan")}, ["max_grad_norm"]),
        (
            {"optim": "foo", "adam_beta1": 2, "fsdp": "foo", "adam_beta3": 1, "lora": {"r": 0, "ranks": 1}},
            ["adam_beta3", "optim", "fsdp", "adam_beta1", "lora.ranks", "lora.r"],
        ),
    ],
    ids=str,
)
def test_every_setting_that_cannot_be_is_named(settings: dict[str, Any], expected: list[str]) -> None:
    found = [".".join(map(str, path)) for path, _ in problems(TrainingSettings(**settings), PIVOT)]
    assert found == [f"distill.{name}" for name in expected]


def test_without_the_pivot_its_modules_are_not_looked_up() -> None:
    assert not problems(TrainingSettings(lora={"r": 2, "target_modules": ["foo"]}))
    assert problems(TrainingSettings(lora={"r": 0}))


def test_examples_longer_than_the_model_was_made_for_are_refused() -> None:
    ((path, says),) = problems(TrainingSettings(), PIVOT, max_length=513)
    assert path == ("data", "max_length")
    assert "513" in says
    assert "512" in says
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
    assert any(line.startswith("projections.s.xxh3: ") for line in changed)
    # It is stated for each source: the section's value matters only where a source takes it.
    assert not differences(plain, facts(Projection(made), alignment={"tokens": "dtw"}))
    # Rows that are taken as they are have no conditioning, and warping always has the one-hots.
    assert not differences(matched, facts(Projection(em, "matched", one_hot=True)))
    assert differences(matched, facts(Projection(em)))
    assert not differences(facts(Projection(made, "dtw")), facts(Projection(made, "dtw", one_hot=True)))
    dtw = facts_of_alignment(AlignmentSettings(tokens="dtw", vocabulary="ms"))
    assert dtw.keys() == {"tokens", "vocabulary", "collisions"}
