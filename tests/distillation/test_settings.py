"""Settings that contradict each other, and what of them two runs have to share."""

from __future__ import annotations

import pytest

from fusekit.distillation.label_rows import Projection
from fusekit.distillation.provenance import differences, facts_of_run
from fusekit.distillation.settings import DistillSettings
from fusekit.errors import DistillationError


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


def test_dropping_the_last_rows_is_another_run_and_pinning_memory_is_not() -> None:
    def facts(**trainer: object) -> dict:
        return facts_of_run("s", DistillSettings.of(changes={"training": {"trainer": trainer}}), "pivot", [], {})

    assert differences(facts(), facts(dataloader_drop_last=True))
    assert not differences(facts(), facts(dataloader_pin_memory=False, dataloader_persistent_workers=True))


def test_a_sources_own_alignment_is_a_fact_of_the_run() -> None:
    def facts(how: Projection) -> dict:
        return facts_of_run("s", DistillSettings.of(), "pivot", [], {}, projections={"s": how})

    assert differences(facts(Projection(None)), facts(Projection(None, one_hot=True))) == [
        "projections.s.one_hot: False, now True"
    ]
