"""What fusion adds to plain fine-tuning on the same rows, over several seeds.

    python demo/fusion.py out/fusion                 # recipes/demo-pairwise.yml with three seeds, and a table

Each seed is a run of its own (``fusekit run``) in a folder of the output; what does not depend on the seed is copied
from the first. Runs that are there already are read, not repeated.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import click

from fusekit.capturing.store import Store
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from fusekit.types import Message, Row

RECIPE = Path(__file__).parents[1] / "recipes" / "demo-pairwise.yml"
SHARED = ("data", "captures", "alignment")


def results(out: Path, seed: int, recipe: Path, overrides: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Bits per byte by model and skill of one seed."""
    folder, first = out / f"seed{seed}", out / "seed0"
    for name in SHARED:
        if seed and (first / name).is_dir() and not (folder / name).exists():
            shutil.copytree(first / name, folder / name)
    loaded = load_recipe(recipe, [*overrides, f"distill.seed={seed}"])
    document = run(loaded, folder, say=lambda line: click.echo(f"seed {seed}: {line}", err=True)).results
    assert document is not None
    return {model: found["bits_per_byte"] for model, found in document["models"].items()}


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """A row per model, a column per skill: mean over seeds, and the standard deviation where there is one."""
    skills = sorted(runs[0]["pivot"])
    lines = [f"| bits per byte | {' | '.join([*skills, 'mean'])} |", f"|---|{'---:|' * (len(skills) + 1)}"]
    for model in runs[0]:
        cells = []
        for skill in [*skills, "mean"]:
            values = [statistics.fmean(r[model].values()) if skill == "mean" else r[model][skill] for r in runs]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.3f}" + (f" ± {deviation:.3f}" if deviation else ""))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def choices(out: Path) -> str:
    """Per skill the share of training rows on which MinCE prefers each source to the pivot, wrong labels apart.

    Bold where the source is the better model of the skill's held-out rows.
    """
    held_out = {
        name: found["bits_per_byte"]
        for name, found in json.loads((out / "seed0" / "results.json").read_text())["models"].items()
    }
    nats = {}
    for name in ("pivot", *(name.removeprefix("sources/") for name in held_out if name.startswith("sources/"))):
        store = Store.open(out / "seed0" / "captures" / name)
        nats[name] = dict(zip(store.keys, store.summary.cross_entropy.tolist(), strict=True))
    kind: dict[str, list[str]] = {}
    for line in (RECIPE.parents[1] / "demo" / "rows" / "train.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = Row(tuple(Message(m["role"], m["content"]) for m in record["messages"])).key
        kind.setdefault(record["dataset"] + (", wrong label" if record["noisy"] else ""), []).append(key)
    sources = [name for name in nats if name != "pivot"]
    lines = [f"| rows | number | {' | '.join(sources)} |", f"|---|---:|{'---:|' * len(sources)}"]
    for skill, keys in sorted(kind.items()):
        cells = []
        for source in sources:
            share = statistics.fmean(nats[source][key] < nats["pivot"][key] for key in keys if key in nats["pivot"])
            name = skill.partition(",")[0]
            better = held_out[f"sources/{source}"][name] < held_out["pivot"][name]
            cells.append(f"**{share:.2f}**" if better else f"{share:.2f}")
        lines.append(f"| {skill} | {len(keys)} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seeds", default=3, show_default=True, help="0, 1, ... up to so many.")
@click.option("--recipe", default=RECIPE, show_default=False, type=click.Path(exists=True, path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the recipe.")
def main(out: Path, seeds: int, recipe: Path, overrides: tuple[str, ...]) -> None:
    runs = [results(out, seed, recipe, overrides) for seed in range(seeds)]
    (out / "fusion.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    click.echo(table(runs))
    click.echo("\n" + choices(out))


if __name__ == "__main__":
    main()
