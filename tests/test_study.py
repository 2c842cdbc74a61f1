"""The fusion study: its recipes load, its rows are disjoint, and its tables say what the file of figures says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from mergekit.config import MergeConfiguration

import fusekit.merge_methods  # noqa: F401  (registers fusechat_sce and varm)
from benchmarks.fusion import scores, tables
from benchmarks.fusion.arms import ARMS, MERGES, merges_of, recipe_of
from benchmarks.fusion.claims import CLAIMS, Claim
from benchmarks.fusion.memory import examples_in_memory
from benchmarks.fusion.rows import demo, training_set
from benchmarks.fusion.scores import Figure
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.settings import FusionSettings, targets_of
from fusekit.merging.lint import lint
from fusekit.yaml import loads
from tests.distillation import runs

README = Path(tables.__file__).parent / "README.md"


@pytest.mark.parametrize("arm", ARMS)
def test_a_recipe_of_an_arm_loads_and_makes_the_targets_that_are_merged(arm):
    recipe = recipe_of(arm, ("distill.num_train_epochs=1",), seed=5)
    names = [source.label for source in recipe.sources]
    targets = targets_of(recipe.settings, names, Path("out"))
    assert [target.name for target in targets] == (names if ARMS[arm].merged else [targets[0].name])
    assert (recipe.distill.seed, recipe.distill.num_train_epochs) == (5, 1)


@pytest.mark.parametrize("name", MERGES)
def test_a_recipe_of_a_merge_is_one_that_mergekit_reads(name, tmp_path):
    document = MERGES[name].recipe(tmp_path / "pivot", [tmp_path / "a", tmp_path / "b"])
    MergeConfiguration.model_validate(document)
    config, warnings = lint(loads(yaml.safe_dump(document), name="merge.yml"))
    assert not warnings
    assert len(config.models) == 2
    assert ("base_model" in document) == (name != "linear")


def test_training_rows_meet_no_held_out_question(monkeypatch):
    skills = [skill for skill in demo("rows").SKILLS if skill != "code"]  # whose text takes seconds to collect
    monkeypatch.setattr(demo("rows"), "SKILLS", skills)
    rows = training_set(40)
    assert len(rows) == 40 * len(skills)
    held_out = {row.prompt for skill in skills for row in demo("tasks").held_out_rows(skill, 50)}
    assert not {row["messages"][0]["content"] for row in rows} & held_out
    assert sum(row["noisy"] for row in rows) == 3 * 12


def test_every_claim_is_about_models_that_the_study_makes():
    merged = [arm for arm in ARMS if ARMS[arm].merged]
    known = {*ARMS, *(f"{arm}/{merge}" for arm in merged for merge in (*merges_of(arm), tables.TARGETS))}
    assert {name for claim in CLAIMS for name in (claim.better, claim.worse)} <= known - set(merged)
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)


def figures() -> list[Figure]:
    """Two seeds of two skills: plain at 2 and 4, fusion one lower in each seed, targets around it."""
    values = {"plain": (2.0, 3.0), "fusellm": (1.0, 2.25), "pairwise/targets/a": (1.0, 1.0)}
    values |= {"pairwise/targets/b": (3.0, 3.0), "pairwise/linear": (2.5, 1.5), "joint-prefix": (2.5, 2.5)}
    made = [
        Figure(str(seed), model, skill, "bits_per_byte", value + offset)
        for model, by_seed in values.items()
        for seed, value in enumerate(by_seed)
        for skill, offset in (("add", 0.0), ("draw", 1.0))
    ]
    made += [Figure(str(seed), "plain", "add", "exact_match", share) for seed, share in enumerate((0.25, 0.35))]
    return [Figure("", "pivot", skill, "bits_per_byte", 5.0) for skill in ("add", "draw")] + made


def test_figures_come_back_from_their_file(tmp_path):
    scores.write(tmp_path / "figures.csv", figures())
    assert scores.read(tmp_path / "figures.csv") == figures()
    lines = (tmp_path / "figures.csv").read_text().splitlines()
    assert lines[0] == "seed,model,skill,metric,value"
    assert ",pivot,add,bits_per_byte,5" in lines


def test_the_overview_has_means_and_deviations_over_seeds():
    lines = tables.overview(tables.Results.from_figures(figures())).splitlines()
    assert lines[2] == "| pivot | 5.000 | - | - | 1 |"
    assert lines[3] == "| plain fine-tuning | 3.000 ± 0.707 | - | 30.0 ± 7.1 | 2 |"
    assert "| pairwise: mean of the targets | 2.500 ± 0.000 | - | - | 2 |" in lines


def test_orderings_are_of_seeds_in_pairs():
    """Between the seeds plain fine-tuning differs more than fusion helps, but fusion helps in each of them."""
    results = tables.Results.from_figures(figures())
    difference = tables.differences(results, Claim("", "fusellm", "plain"), "bits_per_byte")
    assert difference == [-1.0, -0.75]
    assert tables.verdict(difference) == "holds"
    assert tables.verdict([-value for value in difference]) == "does not"
    assert tables.verdict(tables.differences(results, Claim("", "pairwise/linear", "plain"), "bits_per_byte")) == (
        "undecided"
    )
    assert tables.verdict([-1.0]) == "one seed"
    assert "| -0.875 ± 0.177 |" in tables.orderings(results)


def test_the_readmes_tables_are_those_of_the_committed_figures():
    file = Path(tables.__file__).parents[1] / "results" / "fusion-study.csv"
    text = README.read_text(encoding="utf-8")
    assert tables.put_between_marks(text, tables.tables(scores.read(file))) == text
    with pytest.raises(ValueError, match="there is no"):
        tables.put_between_marks("no marks", "")


def test_examples_in_memory_are_those_that_would_be_made():
    """Other settings are not answered from memory, and afterwards nothing is."""
    known = runs.data()

    def data(function: str) -> FusionDataset:
        return FusionDataset(
            known.rows,
            pivot=known.pivot,
            sources=known.sources,
            projections=known.projections,
            fusion=FusionSettings(function=function),
        )

    with examples_in_memory():
        first, again, other = data("min_ce")[3], data("min_ce")[3], data("avg_ce")[3]
    made = data("min_ce")[3]
    assert again is first
    assert made is not first
    assert made.keys() == first.keys()
    assert all(np.array_equal(made[name], first[name]) for name in made)
    assert other["target_ids"].shape != first["target_ids"].shape
