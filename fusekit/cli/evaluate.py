"""``fusekit evaluate``: models on held-out rows, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusekit.cli.capture import drop_noise
from fusekit.cli.options import options_of
from fusekit.errors import StorageError
from fusekit.recipe.sections import Load

if TYPE_CHECKING:
    from fusekit.evaluation.metrics import Score
    from fusekit.evaluation.settings import LmEval

METRICS = ("bits_per_byte", "exact_match")


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--data",
    "files",
    multiple=True,
    help="Held-out rows: a file, a folder or a hub id; may be given several times.",
)
@click.option("--split", default="test", show_default=True, help="Of a data set on the hub.")
@click.option("--data-name", help="Configuration of a data set on the hub.")
@click.option("--data-revision", help="Revision of a data set on the hub.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    type=click.Choice(METRICS),
    default=METRICS,
    show_default=True,
    help="What to measure; may be given several times.",
)
@click.option(
    "--lm-eval",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="A task of lm-eval (pip install 'mergekit-fusekit[lm-eval]'); may be given several times.",
)
@click.option("--include-path", multiple=True, metavar="FOLDER", help="Tasks of your own for --lm-eval (YAML).")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in a prompt of --lm-eval; else the task's.")
@click.option("--apply-chat-template", is_flag=True, help="Put prompts of --lm-eval into the model's chat template.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Rows, for --lm-eval.")
@click.option("--run-unsafe-code", is_flag=True, help="Run code that a model wrote, where a task of --lm-eval does so.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Most rows of each file, also of each in a folder, and of each task."
)
@click.option("--chat-template", default="own", show_default=True, help="own, a shipped template, or a jinja file.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the weights; auto: the checkpoint's.",
)
@options_of(Load, "device_map")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    help="Most tokens of a batch, padding included; by default what suits the device.",
)
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
    batch_tokens: int | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Score MODELS on held-out rows: bits per byte of the answers, and exact match by greedy generation.

    Rows are counted by their `dataset` field, else by their file. Both figures compare models of any tokenizer.
    With --lm-eval also, or without --data only, on tasks of lm-eval.
    """
    if not files and not options["tasks"]:
        raise click.UsageError("give held-out rows (--data), or tasks of lm-eval (--lm-eval)")
    if not all(options["tasks"]):
        raise click.UsageError("--lm-eval names no task: give one, or leave the option out")
    from fusekit.capturing.models import ModelChoice
    from fusekit.evaluation import lm_eval
    from fusekit.evaluation.held_out import held_out_rows
    from fusekit.evaluation.metrics import Score, ends_counted, evaluate_model
    from fusekit.evaluation.table import table

    if json_file is not None and not json_file.absolute().parent.is_dir():  # before hours of scoring, not after
        raise StorageError(f"{json_file}: there is no folder {json_file.parent} to write the scores to: make it first")
    drop_noise()
    split, name, revision = options["split"], options["data_name"], options["data_revision"]
    rows = [
        row for file in files for row in held_out_rows(file, limit=limit, split=split, name=name, revision=revision)
    ]
    settings = _lm_eval_settings(options, limit)
    results: dict[str, dict[str, dict[str, Score]]] = {}
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    names = ("dtype", "device_map", "trust_remote_code", "allow_pickle")
    for model in models:
        choice = ModelChoice(model, **{name: options[name] for name in names})
        results[model] = {}
        if files:
            chosen = list(dict.fromkeys(metrics))
            results[model] = evaluate_model(
                choice, rows, metrics=chosen, template=chat_template, batch_tokens=batch_tokens
            )
        if settings is not None:
            figures[model] = lm_eval.scores(choice, chat_template, settings, lambda line: click.echo(line, err=True))
            results[model]["lm_eval"] = {
                task: Score(shown["value"], shown["documents"]) for task, shown in figures[model].items()
            }
    more: dict[str, Any] = {}
    if "bits_per_byte" in metrics and files:
        more["ends_counted"] = ends_counted(rows)
    if figures:
        more["lm_eval"] = lm_eval.described(figures)
    click.echo(table(results, more.get("lm_eval"), more.get("ends_counted")))
    if json_file is not None:
        _write(json_file, results, more)


def _lm_eval_settings(options: dict[str, Any], limit: int | None) -> LmEval | None:
    """What is asked of lm-eval, None for nothing. Raises RecipeError where it cannot be done."""
    if not options["tasks"]:
        return None
    from fusekit.evaluation.lm_eval import check
    from fusekit.evaluation.settings import LmEval

    settings = LmEval.model_validate(
        {
            "tasks": list(dict.fromkeys(options["tasks"])),
            "limit": limit,
            "num_fewshot": options["num_fewshot"],
            "include_path": list(options["include_path"]),
            "chat_template": options["apply_chat_template"],
            "batch_size": options["batch_size"],
            "run_unsafe_code": options["run_unsafe_code"],
        }
    )
    check(settings, "--lm-eval")
    return settings


def _write(file: Path, results: dict[str, dict[str, dict[str, Score]]], more: dict[str, Any]) -> None:
    from fusekit.artifacts import commit_file

    document: dict[str, Any] = {
        "models": {
            model: {metric: {name: score.value for name, score in scores.items()} for metric, scores in found.items()}
            for model, found in results.items()
        }
    }
    text = json.dumps(document | more, indent=2, ensure_ascii=False) + "\n"
    commit_file(file, lambda out: out.write(text.encode()))
