"""Whole systems on the demo's models, three epochs each: what ProFuser and on-policy steps add to FuseLLM and FuseChat.

    python -m benchmarks.fusion.systems --work /tmp/systems            # at the top of a checkout

Every system is a shipped recipe with some values changed, run by ``fusekit.run``; a seed changes the order of the
examples. What is complete is not made again. Figures go to benchmarks/results/systems.csv after every run.
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import click

import fusekit
from benchmarks.fusion.arms import of_preset
from demo.check_fusion import means

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / "benchmarks" / "results" / "systems.csv"
EPOCHS = 3
"""ProFuser's schedule has one of answers and two of data."""

_ON_POLICY = ("distill.on_policy=0.5",)
_REVERSE = ("distill.loss=reverse_kl",)
_FUSEAI = ('merge.parameters={"select_topk": 0.1, "variant": "fuseai"}',)
SYSTEMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fine-tuning": ("demo.yml", ("distill.lm_weight=1",)),
    "FuseLLM": ("demo.yml", of_preset("fusellm", tokens="dtw")),
    "FuseChat": ("demo-pairwise.yml", (*of_preset("fusechat"), *_FUSEAI)),
    "ProFuser": ("profuser-demo.yml", ()),
    "fusekit": ("demo.yml", ()),
    "fusekit, half on-policy": ("demo.yml", _ON_POLICY),
    "fusekit, reverse KL": ("demo.yml", _REVERSE),
    "fusekit, reverse KL, half on-policy": ("demo.yml", _REVERSE + _ON_POLICY),
}


def run(system: str, seed: int, work: Path) -> float:
    """Bits per byte of the merged model, the mean over skills."""
    name, changes = SYSTEMS[system]
    out = work / f"{system.replace(', ', '-').replace(' ', '_')}.{seed}"
    epochs = () if "profuser" in name else (f"distill.num_train_epochs={EPOCHS}",)
    common = (f"distill.seed={seed}", 'distill.save_strategy="no"', "evaluate.baseline=false", *epochs)
    recipe = fusekit.load_recipe(CHECKOUT / "recipes" / name, [*common, *changes])
    fusekit.run(recipe, out, quiet=True)
    return means(out / "results.json")["merged"]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option("--system", "systems", multiple=True, type=click.Choice(list(SYSTEMS)), help="Only these.")
def main(work: Path, seeds: int, systems: tuple[str, ...]) -> None:
    found = read()
    for seed in range(seeds):
        for system in systems or SYSTEMS:
            found[system, seed] = run(system, seed, work)
            write(found)
            click.echo(f"{system}, seed {seed}: {found[system, seed]:.4f}")
    for system in SYSTEMS:
        values = [value for (name, _), value in found.items() if name == system]
        if len(values) > 1:
            click.echo(f"| {system} | {statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f} |")


def read() -> dict[tuple[str, int], float]:
    """The figures that are there."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return {(row["system"], int(row["seed"])): float(row["bits_per_byte"]) for row in csv.DictReader(file)}


def write(found: dict[tuple[str, int], float]) -> None:
    """All figures, in order."""
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["system", "seed", "bits_per_byte"])
        order = list(SYSTEMS)
        for (system, seed), value in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
            writer.writerow([system, seed, round(value, 5)])


if __name__ == "__main__":
    main()
