"""Merge the demo's targets with every method, score everything, and print the table of demo/README.md.

    python demo/table.py                                   # print it
    python demo/table.py --write demo/README.md            # and put it between the README's two table marks

Every merge is an ordinary mergekit recipe over demo/models, written to a temporary folder that goes away at the end.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from evaluate import QUESTIONS, Scores, evaluate, markdown
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

import fusekit.merge_methods  # noqa: F401  (registers fusechat_sce and varm)

MODELS = Path(__file__).parent / "models"
TARGETS = ("numbers", "strings", "facts")
MARKS = ("<!-- table: written by demo/table.py -->", "<!-- end of table -->")

# title -> (method, parameters, parameters of each target)
MERGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear, 1/3 each": ("linear", {}, {"weight": 1.0}),
    "task arithmetic, 0.3": ("task_arithmetic", {"normalize": False}, {"weight": 0.3}),
    "task arithmetic, 0.5": ("task_arithmetic", {"normalize": False}, {"weight": 0.5}),
    "TIES, density 0.6": ("ties", {"normalize": True}, {"density": 0.6, "weight": 0.2}),
    "SCE of mergekit, select_topk 0.1": ("sce", {"select_topk": 0.1}, {}),
    "SCE of mergekit, select_topk 1": ("sce", {"select_topk": 1.0}, {}),
    "fusechat_sce, select_topk 0.1": ("fusechat_sce", {"select_topk": 0.1}, {}),
    "fusechat_sce, select_topk 1": ("fusechat_sce", {"select_topk": 1.0}, {}),
    "fusechat_sce renormalized, select_topk 1": ("fusechat_sce", {"select_topk": 1.0, "variant": "renormalized"}, {}),
    "fusechat_sce fuseai, select_topk 0.1": ("fusechat_sce", {"select_topk": 0.1, "variant": "fuseai"}, {}),
    "varm, matrix": ("varm", {}, {}),
}


def recipe(folder: Path, method: str, parameters: dict[str, Any], per_target: dict[str, Any]) -> dict[str, Any]:
    """A mergekit configuration that merges the three targets in a folder of demo models."""
    models = [{"model": str(folder / name), "parameters": per_target} for name in TARGETS]
    config = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "bfloat16"}
    return config if method == "linear" else {**config, "base_model": str(folder / "pivot")}


def mean(scores: list[Scores]) -> Scores:
    """The mean of every column."""
    return {column: sum(each[column] for each in scores) / len(scores) for column in scores[0]}


def all_results(folder: Path, count: int) -> dict[str, Scores]:
    """Scores of the pivot, the targets, their mean, and every merge, by row title."""
    results = {name: evaluate(folder / name, count) for name in ("pivot", *TARGETS)}
    results["mean of the targets"] = mean([results[name] for name in TARGETS])
    for title, (method, parameters, per_target) in MERGES.items():
        click.echo(f"merging: {title}", err=True)
        config = MergeConfiguration.model_validate(recipe(folder, method, parameters, per_target))
        with tempfile.TemporaryDirectory() as merged:
            run_merge(config, merged, MergeOptions(quiet=True))
            results[title] = evaluate(merged, count)
    return results


def put_between_marks(text: str, table: str) -> str:
    """The text with everything between the two marks replaced by the table."""
    first, last = (re.escape(mark) for mark in MARKS)
    return re.sub(f"({first}).*({last})", lambda found: f"{found[1]}\n{table}\n{found[2]}", text, flags=re.DOTALL)


@click.command(help=__doc__)
@click.option("--models", default=MODELS, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--write", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file with table marks.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write scores here.")
@click.option("--count", default=QUESTIONS, show_default=True, help="Held-out questions per skill.")
def main(models: Path, write: Path | None, json_file: Path | None, count: int) -> None:
    torch.use_deterministic_algorithms(True)
    results = all_results(models, count)
    table = markdown(results)
    click.echo(table)
    if write:
        write.write_text(put_between_marks(write.read_text(encoding="utf-8"), table), encoding="utf-8")
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
