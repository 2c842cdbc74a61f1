"""Settings that contradict each other, and what of them two runs have to share."""

from __future__ import annotations

import pytest

from fusekit.artifacts import differences
from fusekit.distillation.projections import Projection
from fusekit.distillation.provenance import facts_of_alignment, facts_of_run
from fusekit.distillation.settings import AlignmentSettings, DistillSettings, clashes
from fusekit.errors import DistillationError
from tests.distillation import worlds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": {"tokens": "dtw"}}, "where tokens is span"),
        ({"fusion": {"function": "avg_ce"}}, "different vocabularies, so function avg_ce"),
        ({"fusion": {"level": "token"}}, "at level token"),
    ],
)
def test_rows_of_different_vocabularies_are_neither_warped_nor_added(changes: dict, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        DistillSettings.of("uld", changes)


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("gold", {"training": {"loss": "kl"}}, "the loss is kl and the vocabulary matched"),
        ("gold", {"alignment": {"vocabulary": "em"}}, "the loss is gold and the vocabulary em"),
        ("gold", {"alignment": {"vocabulary": "none"}}, "the loss is gold and the vocabulary none"),
        ("uld", {"alignment": {"vocabulary": "matched"}}, "the loss is uld_topk and the vocabulary matched"),
        ("grouped_kl", {"training": {"loss": "kl"}}, "preset grouped_kl has both"),
        ("fusekit", {"training": {"loss": "grouped_kl"}}, "the loss is grouped_kl and the vocabulary prefix"),
        ("grouped_kl", {"alignment": {"tokens": "dtw"}}, "vocabulary grouped .* where tokens is span"),
        ("p_kl", {"fusion": {"include_pivot": True}}, "include_pivot to false"),
        ("alm", {"fusion": {"metric": "projected_ce"}}, "projected_ce .* bits_per_byte"),
        ("alm", {"fusion": {"level": "token"}}, "at level token"),
        ("gold", {"alignment": {"tokens": "dtw"}}, "vocabulary matched .* where tokens is span"),
        ("gold", {"fusion": {"function": "avg_ce"}}, "different vocabularies, so function avg_ce"),
        ("gold", {"fusion": {"metric": "projected_ce"}}, "projected_ce .* bits_per_byte"),
        ("uld", {"fusion": {"metric": "projected_ce"}}, "projected_ce .* bits_per_byte"),
    ],
)
def test_gold_needs_its_vocabulary_and_rows_as_they_are_no_projection(preset: str, changes: dict, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        DistillSettings.of(preset, changes)


@pytest.mark.parametrize(
    ("preset", "training", "named"),
    [
        ("fusekit", {"on_policy": 0.5, "lm_weight": 1.0}, "lm_weight 1"),
        ("fusekit", {"on_policy": 0.5, "train_sampling_strategy": "group_by_length"}, "group_by_length"),
        ("profuser", {"train_sampling_strategy": "random"}, "train_sampling_strategy"),
        ("profuser", {"data_seed": 1}, "data_seed"),
    ],
)
def test_what_would_have_no_effect_is_refused(preset: str, training: dict, named: str) -> None:
    with pytest.raises(DistillationError, match=named):
        DistillSettings.of(preset, {"training": training})


@pytest.mark.parametrize("preset", ["grouped_kl", "p_kl"])
def test_several_sources_have_no_vocabulary_in_common(preset: str) -> None:
    for mode, sources, clash in (("joint", 2, True), ("joint", 1, False), ("pairwise", 2, False)):
        made = DistillSettings.of(preset, {"fusion": {"mode": mode}})
        found = clashes(made.alignment, made.fusion, made.training, sources)
        assert [says for says, _ in found if "2 sources" in says] == [says for says, _ in found]
        assert bool(found) == clash


def test_dropping_the_last_rows_is_another_run_and_pinning_memory_is_not() -> None:
    def facts(**trainer: object) -> dict:
        return facts_of_run("s", DistillSettings.of(changes={"training": trainer}), "pivot", [], {})

    assert differences(facts(), facts(dataloader_drop_last=True))
    assert not differences(facts(), facts(dataloader_pin_memory=False, dataloader_persistent_workers=True))


def test_a_sources_own_alignment_is_a_fact_of_the_run() -> None:
    made = worlds.vocabulary_map()
    other = worlds.vocabulary_map("em")

    def facts(how: Projection) -> dict:
        return facts_of_run("s", DistillSettings.of(), "pivot", [], {}, projections={"s": how})

    assert differences(facts(Projection(made)), facts(Projection(made, one_hot=True))) == [
        "projections.s.one_hot: False, now True"
    ]
    changed = differences(facts(Projection(made)), facts(Projection(other)))
    assert changed[0] == "projections.s.vocabulary: 'prefix', now 'em'"
    assert changed[1].startswith("projections.s.xxh3: ")


def test_what_a_target_does_not_use_is_no_fact_of_it() -> None:
    made = worlds.vocabulary_map()

    def facts(how: Projection | None = None, **changes: dict) -> dict:
        projections = {} if how is None else {"s": how}
        return facts_of_run("s", DistillSettings.of(changes=changes), "pivot", [], {}, projections=projections)

    plain, fused = {"training": {"lm_weight": 1.0}}, {}
    for change in ({"alignment": {"vocabulary": "ms"}}, {"fusion": {"function": "avg_ce"}}):
        assert not differences(facts(**plain), facts(**plain, **change))
    kl = {"training": {"lm_weight": 1.0, "loss": "kl", "truncation": "renormalize"}}
    assert not differences(facts(**plain), facts(**kl))
    assert differences(facts(**fused), facts(fusion={"function": "avg_ce"}))
    # How sources are aligned is stated for each: the section's value matters only where a source takes it.
    assert not differences(facts(Projection(made)), facts(Projection(made), alignment={"tokens": "dtw"}))
    # Rows that are taken as they are have no conditioning.
    made_em = worlds.vocabulary_map("em")
    assert not differences(facts(Projection(made_em, "matched")), facts(Projection(made_em, "matched", one_hot=True)))
    assert differences(facts(Projection(made_em, "matched")), facts(Projection(made_em)))
    # Warping always has the one-hots.
    assert not differences(facts(Projection(made, "dtw")), facts(Projection(made, "dtw", one_hot=True)))
    assert facts_of_alignment(AlignmentSettings(tokens="dtw", vocabulary="ms")).keys() == {
        "tokens",
        "vocabulary",
        "collisions",
    }
