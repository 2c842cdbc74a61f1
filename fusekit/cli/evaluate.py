"""``fusekit evaluate``: several models on held-out examples, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from fusekit.cli.common import drop_noise, given, options_of
from fusekit.errors import RecipeError, StorageError
from fusekit.recipe.sections import Load
from fusekit.settings import EvaluateSettings

_OPTIONS = ("split", "name", "revision", "metrics", "limit", "batch_tokens", "lm_eval")


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--data", "path", multiple=True, help="Held-out examples: a file, a folder or a hub id; may be given several times."
)
@options_of(EvaluateSettings, *_OPTIONS)
@click.option(
    "--chat-template", default="own", show_default=True, help="own, the name of a shipped template, or a jinja file."
)
@options_of(Load, "dtype", "device_map")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with these models.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights of these models.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the scores to this file."
)
def evaluate(models: tuple[str, ...], *, chat_template: str, json_file: Path | None, **options: Any) -> None:
    """Score MODELS on held-out examples (--data), on tasks of lm-eval (--lm-eval), or both.

    Scores are by skill: the `dataset` field of the examples, else their file. They compare models of any tokenizer.
    --lm-eval takes names (hellaswag,gsm8k) or a JSON object with the fields of a recipe's evaluate.lm_eval.
    """
    if not options["path"] and not options["lm_eval"]:
        raise click.UsageError("give held-out examples (--data), or tasks of lm-eval (--lm-eval)")
    if json_file is not None and not json_file.absolute().parent.is_dir():  # before hours of scoring, not after
        raise StorageError(f"{json_file}: the folder {json_file.parent} does not exist: create it first")
    try:
        settings = EvaluateSettings.model_validate(given(options, EvaluateSettings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RecipeError(f"--{'.'.join(map(str, first['loc'])).replace('_', '-')}: {first['msg']}") from error
    from fusekit.capturing.models import ModelChoice
    from fusekit.disk import commit_file
    from fusekit.evaluation.metrics import evaluate_all
    from fusekit.evaluation.table import table

    drop_noise()
    load = given(options, Load) | {name: options[name] for name in ("trust_remote_code", "allow_pickle")}
    choices = [ModelChoice(model, **load) for model in models]
    document = evaluate_all(choices, settings, chat_template)
    click.echo(table(document))
    if json_file is not None:
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        commit_file(json_file, text.encode())
