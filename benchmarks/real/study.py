"""Fusion on real pretrained models: SmolLM2-135M-Instruct taught by Gemma-3-270M, over several seeds.

    python -m benchmarks.real.fetch ../fusekit-real
    python -m benchmarks.real.study ../fusekit-real --jobs 2       # at the top of a checkout

Every arm trains on the same examples for the same steps; a seed draws the examples and their order. Settings were
chosen on the validation text alone. What is complete is not made again: the same command resumes. The
figures go to benchmarks/results/real.csv after every unit, and the tables to the README beside this file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.fusion.arms import MERGES, of_preset
from benchmarks.fusion.scores import file_of, keep, kept, read, write
from benchmarks.real.tables import put_tables

CHECKOUT = Path(__file__).parents[2]
RECIPE = CHECKOUT / "recipes" / "real-135m.yml"
FIGURES = CHECKOUT / "benchmarks" / "results" / "real.csv"
README = Path(__file__).parent / "README.md"
TUNED_ON = ("es", "fr")
"""What the second source of the pairwise setting is fine-tuned on."""


@dataclass(frozen=True)
class Setting:
    """What a comparison is made on. data: folder of examples beside the models. examples: of each kind and seed.
    chat: whether they are conversations."""

    data: str
    examples: int
    sources: tuple[str, ...] = ("gemma",)


SETTINGS = {
    "text": Setting("text", 12),
    "chat": Setting("chat", 12),
    "pairwise": Setting("text", 12, ("gemma", "tuned")),
}

_JOINT = ("fusion.mode=joint",)
_HALF = ("distill.lm_weighting=constant", "distill.lm_weight=0.5")
_TEXT_ALONE = ("distill.lm_weighting=constant", "distill.lm_weight=1")
ARMS: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {
        "fine-tuning": _TEXT_ALONE,
        "fusekit": (),
        "grouped KL": of_preset("grouped_kl"),
        "FuseLLM": (*_HALF, *of_preset("fusellm", tokens="dtw")),
        "ULD, λ 0.5": (*_HALF, *of_preset("uld"), *_JOINT),
        "GOLD, λ 0.5": (*_HALF, *of_preset("gold"), *_JOINT),
        "P-KL, λ 0.5": (*_HALF, *of_preset("p_kl"), *_JOINT),
        "ALM, λ 0.5": (*_HALF, *of_preset("alm"), *_JOINT),
    },
    "chat": {"fine-tuning": _TEXT_ALONE, "fusekit": ()},
    "pairwise": {"fusekit": ("fusion.mode=pairwise",)},
}
"""Setting -> arm -> what it changes in the recipe."""

MERGED_BY = {"linear": "linear", "TIES": "ties", "VaRM": "varm", "SCE": "sce-paper-1.0"}


@dataclass(frozen=True)
class Work:
    """Where everything is. folder: what benchmarks.real.fetch filled. epochs: of every training."""

    folder: Path
    epochs: float

    @property
    def out(self) -> Path:
        """The folder of what the study makes."""
        return self.folder / "study"

    def recipe(self, setting: str, changes: Sequence[str] = (), seed: int = 0):  # type: ignore[no-untyped-def]
        """The recipe of an arm. Raises RecipeError."""
        from fusekit.recipe.loading import load_recipe

        models = self.folder / "models"
        known = {"gemma": _source("gemma", models / "gemma"), "tuned": _source("tuned", self.out / "tuned" / "sft")}
        sources = [known[name] for name in SETTINGS[setting].sources]
        if setting == "chat":
            sources[0]["chat_template"] = "gemma"
        common = [
            f"pivot={json.dumps({'model': str(models / 'smollm2')})}",
            f"sources={json.dumps(sources)}",
            f"data.path={json.dumps(str(self.folder / SETTINGS[setting].data / 'train'))}",
            f"distill.num_train_epochs={self.epochs}",
            f"distill.seed={seed}",
            'distill.save_strategy="no"',
            'distill.logging_strategy="no"',
            "distill.disable_tqdm=true",
        ]
        return load_recipe(RECIPE, [*common, *changes])

    def captured(self, setting: str):  # type: ignore[no-untyped-def]
        """What every model says about the examples: the same for every arm and seed."""
        from fusekit.layout import Layout

        return Layout(self.out / f"captured-{SETTINGS[setting].data}")


def _source(name: str, model: Path) -> dict[str, str]:
    return {"model": str(model), "name": name}


def prepare(work: Work, settings: Sequence[str]) -> None:
    """Dequantise the models, capture what they say about the examples, fine-tune the second source, score both."""
    from fusekit.pipeline.run import run

    work.out.mkdir(parents=True, exist_ok=True)
    dequantise(work.folder / "models")
    for setting in ("text", "chat"):
        if not {setting, "pairwise" if setting == "text" else setting} & set(settings):
            continue
        run(work.recipe(setting), work.captured(setting).out, until="align", say=click.echo, quiet=True)
        for name in ("smollm2", "gemma"):
            template = "gemma" if (setting, name) == ("chat", "gemma") else "own"
            _score(work, setting, f"{setting}/{name}", None, work.folder / "models" / name, template)
    if "pairwise" not in settings:
        return
    _tune(work)
    _score(work, "pairwise", "pairwise/tuned", None, work.out / "tuned" / "sft")
    run(work.recipe("pairwise"), work.captured("pairwise").out, until="align", say=click.echo, quiet=True)


def dequantise(models: Path) -> None:
    """Plain checkpoints of the two GGUF files, which every process then loads faster."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from benchmarks.real.fetch import PIVOT, SOURCE

    for name, file in (("smollm2", PIVOT), ("gemma", SOURCE)):
        if (models / name).exists():
            continue
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            models, gguf_file=file, dtype="bfloat16", quantization_config=config
        )
        model.save_pretrained(models / f"{name}.part")
        AutoTokenizer.from_pretrained(models, gguf_file=file).save_pretrained(models / f"{name}.part")
        (models / f"{name}.part").rename(models / name)


def _tune(work: Work) -> None:
    from benchmarks.fusion.work import inputs_of
    from fusekit.distillation.run import distill

    recipe = work.recipe("text", ARMS["text"]["fine-tuning"], seed=7)
    rows = [row for row in _rows(work, "text") if row.dataset in TUNED_ON]
    inputs = inputs_of(recipe, rows, work.captured("text"), ())
    distill(inputs, recipe.settings, work.out / "tuned", resume=True)


def _rows(work: Work, setting: str):  # type: ignore[no-untyped-def]
    from fusekit.pipeline.stage import read_rows_file

    return read_rows_file(work.captured(setting).data)


def _drawn(work: Work, setting: str, seed: int):  # type: ignore[no-untyped-def]
    """The examples of a seed: as many of each kind as the setting says."""
    by_kind: dict[str, list[object]] = {}
    for row in sorted(_rows(work, setting), key=lambda row: row.key):
        by_kind.setdefault(row.dataset, []).append(row)
    chosen = random.Random(seed)
    return [row for kind in sorted(by_kind) for row in chosen.sample(by_kind[kind], SETTINGS[setting].examples)]


def unit(work: Work, setting: str, arm: str, seed: int) -> None:
    """Train an arm, merge where it makes several models, and score everything on validation and test text."""
    from benchmarks.fusion.work import inputs_of
    from fusekit.distillation.run import distill

    name = f"{setting}/{arm}"
    wanted = [name] if setting != "pairwise" else [f"{name}/{merge}" for merge in MERGED_BY]
    if all(file_of(work.out / "scores", model, seed).exists() for model in wanted):
        return
    recipe = work.recipe(setting, ARMS[setting][arm], seed)
    inputs = inputs_of(recipe, _drawn(work, setting, seed), work.captured(setting), SETTINGS[setting].sources)
    out = work.out / "trained" / f"{setting}-{arm}-{seed}"
    trained = distill(inputs, recipe.settings, out, resume=True)
    if setting != "pairwise":
        _score(work, setting, name, seed, trained[0])
    else:
        for folder in trained:
            _score(work, setting, f"{name}/{folder.name}", seed, folder)
        for title, merge in MERGED_BY.items():
            merged = _merged(work, merge, trained, out / merge)
            _score(work, setting, f"{name}/{title}", seed, merged)
    shutil.rmtree(out)


def _merged(work: Work, name: str, trained: Sequence[Path], out: Path) -> Path:
    import yaml
    from mergekit.options import MergeOptions

    from fusekit.merging import Settings, merge

    if not out.exists():
        recipe = out.with_suffix(".yml")
        recipe.write_text(yaml.safe_dump(MERGES[name].recipe(work.folder / "models" / "smollm2", trained)), "utf-8")
        merge(recipe, out, MergeOptions(quiet=True), Settings(say=lambda _line: None))
    return out


def _score(work: Work, setting: str, name: str, seed: int | None, model: Path, template: str = "own") -> None:
    from fusekit.capturing.models import ModelChoice
    from fusekit.data.reading import read_rows
    from fusekit.evaluation.metrics import evaluate_model

    if file_of(work.out / "scores", name, seed).exists():
        return
    found: dict[str, dict[str, float]] = {}
    for split in ("validation", "test"):
        folder = work.folder / SETTINGS[setting].data / split
        rows = [row for file in sorted(folder.glob("*.jsonl")) for row in list(read_rows(str(file)))[:16]]
        scores = evaluate_model(ModelChoice(str(model), dtype="bfloat16"), rows, template=template)
        found[split] = scores["bits_per_byte"]
    keep(work.out / "scores", name, seed, found)


def _begin() -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)


def _unit(work: Work, setting: str, arm: str, seed: int) -> str:
    try:
        unit(work, setting, arm, seed)
    except Exception:  # the others go on, and what went wrong is printed
        return traceback.format_exc()
    return "done"


def _write(work: Work) -> None:
    """The figures of this folder take the place of those that the file has of the same arm and seed; others stay."""
    made = kept(work.out / "scores")
    again = {(figure.seed, figure.model) for figure in made}
    figures = sorted([*made, *(figure for figure in read(FIGURES) if (figure.seed, figure.model) not in again)])
    write(FIGURES, figures)
    put_tables(README, figures)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--epochs", default=3.0, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Processes of one thread each; 7 GB of memory each.")
@click.option("--setting", "settings", multiple=True, type=click.Choice(list(SETTINGS)), help="Only this one.")
@click.option("--arm", "arms", multiple=True, help="Only this arm.")
def main(folder: Path, epochs: float, seeds: int, jobs: int, settings: Sequence[str], arms: Sequence[str]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    work = Work(folder.resolve(), epochs)
    settings = settings or tuple(SETTINGS)
    prepare(work, settings)
    units = [
        (setting, arm, seed)
        for setting in settings
        for seed in range(seeds)
        for arm in ARMS[setting]
        if not arms or arm in arms
    ]
    failed = False
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin) as pool:
        running = {pool.submit(_unit, work, *each): each for each in units}
        for done in as_completed(running):
            click.echo(f"{', '.join(map(str, running[done]))}: {done.result()}")
            failed |= done.result() != "done"
            _write(work)
    if failed:
        raise click.ClickException("some units failed: the same command resumes")


if __name__ == "__main__":
    main()
