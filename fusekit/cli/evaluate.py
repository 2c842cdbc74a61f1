"""``fusekit evaluate``: models on held-out rows, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fusekit.cli.represent import device_map as as_device_map
from fusekit.cli.represent import drop_noise
from fusekit.errors import StorageError

METRICS = ("bits_per_byte", "exact_match")


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--data",
    "files",
    multiple=True,
    required=True,
    help="Held-out rows: a file or a hub id; may be given several times.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    type=click.Choice(METRICS),
    default=METRICS,
    show_default=True,
    help="What to measure; may be given several times.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Most rows of each file.")
@click.option("--chat-template", default="own", show_default=True, help="own, a shipped template, or a jinja file.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the weights; auto: the checkpoint's.",
)
@click.option("--device-map", callback=as_device_map, help="`auto`, or a JSON object, as for transformers.")
@click.option("--batch-tokens", default=16384, show_default=True, type=click.IntRange(min=1))
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with these models.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights of these models.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the scores here."
)
def evaluate(
    models: tuple[str, ...],
    *,
    files: tuple[str, ...],
    metrics: tuple[str, ...],
    limit: int | None,
    chat_template: str,
    dtype: str,
    device_map: Any,
    batch_tokens: int,
    trust_remote_code: bool,
    allow_pickle: bool,
    json_file: Path | None,
) -> None:
    """Score MODELS on held-out rows: bits per byte of the answers, and exact match by greedy generation.

    Rows are counted by their `dataset` field, else by their file. Both figures compare models of any tokenizer.
    """
    from fusekit.evaluation.metrics import evaluate_model
    from fusekit.evaluation.table import table
    from fusekit.representation import read_rows
    from fusekit.representation.checkpoint import ModelChoice
    from fusekit.storage import commit_file

    if json_file is not None and not json_file.absolute().parent.is_dir():  # before hours of scoring, not after
        raise StorageError(f"{json_file}: there is no folder {json_file.parent} to write the scores to: make it first")
    drop_noise()
    rows = [row for file in files for row in read_rows(file, limit=limit)]
    results = {}
    for model in models:
        choice = ModelChoice(
            model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )
        results[model] = evaluate_model(
            choice, rows, metrics=list(dict.fromkeys(metrics)), template=chat_template, batch_tokens=batch_tokens
        )
    click.echo(table(results))
    if json_file is not None:
        document = {
            "models": {
                model: {
                    metric: {name: score.value for name, score in scores.items()} for metric, scores in found.items()
                }
                for model, found in results.items()
            }
        }
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        commit_file(json_file, lambda file: file.write(text.encode()))
