"""``fusekit generate``: several models write each answer together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from fusekit.cli.common import given, options_of
from fusekit.errors import DataError, StorageError
from fusekit.generation.settings import Generation, GenerationError, GenerationSettings, Segment
from fusekit.recipe.sections import Load

COLOURS = ("blue", "yellow", "green", "magenta", "red", "cyan")


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--prompt", help="A prompt; without --prompt and --prompts it is read from standard input.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSONL file of prompts: texts, or objects with `prompt` or `messages`; a last answer is left out.",
)
@options_of(GenerationSettings)
@options_of(Load, "dtype")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with these models.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights of these models.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the answers to a JSONL file that a recipe's data.path reads; one that is begun is continued.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per prompt, with its segments and scores.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page that shows who wrote what."
)
def generate(
    models: tuple[str, ...],
    *,
    prompt: str | None,
    file: Path | None,
    out: Path | None,
    as_json: bool,
    html: Path | None,
    **options: Any,
) -> None:
    """Let MODELS of any architecture and tokenizer write each answer together, the main model first.

    On a terminal text appears as it is written, in the colour of the model that wrote it.
    """
    if len(models) < 2:
        raise click.UsageError(f"an ensemble takes at least two models; given: {', '.join(models)}")
    if prompt is not None and file is not None:
        raise click.UsageError("give --prompt or --prompts, not both")
    settings = GenerationSettings.of(given(options, GenerationSettings))
    for path in (html, out):
        if path is not None and not path.absolute().parent.is_dir():
            raise StorageError(f"{path}: the folder {path.absolute().parent} does not exist; create it first")
    asked = read_prompts(file) if file is not None else [prompt if prompt is not None else sys.stdin.read()]
    if not asked[0]:
        raise GenerationError("the prompt is empty")

    from fusekit.capturing.models import ModelChoice
    from fusekit.disk import output_lock
    from fusekit.generation.ensemble import generate as write
    from fusekit.generation.output import AnswerFile, page
    from fusekit.generation.reader import load_readers

    answered = None
    if out is not None:
        click.get_current_context().with_resource(output_lock(out.resolve()))
        made = {"models": list(models), "dtype": options["dtype"] or "auto", **settings.model_dump()}
        answered = AnswerFile(out, asked, made, raw=settings.raw)
        asked = asked[answered.done :]
        if not asked:
            return
    done = answered.done if answered is not None else 0
    load = given(options, Load) | {name: options[name] for name in ("trust_remote_code", "allow_pickle")}
    readers = load_readers([ModelChoice(model, **load) for model in models])
    names = [reader.name for reader in readers]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}

    def show(_: int, segment: Segment) -> None:
        click.echo(click.style(segment.text, fg=colours[segment.model]), nl=False)
        sys.stdout.flush()

    if not as_json and sys.stdout.isatty():
        click.echo(" ".join(click.style(name, fg=colour) for name, colour in colours.items()), err=True)
    answers: list[Generation] = []
    for number, one in enumerate(asked, done):
        if not as_json and len(asked) > 1:
            click.echo(click.style(f"{shown(one)}\n", dim=True), nl=False)
        # The seed of a prompt is that of its place in the file.
        answers += write(readers, [one], on_segment=None if as_json else show, first=number, **settings.model_dump())
        if answered is not None:
            answered.add(answers[-1])
        segments = [segment._asdict() for segment in answers[-1].segments]
        record = {"prompt": one, **answers[-1]._asdict(), "segments": segments}
        click.echo(json.dumps(record, ensure_ascii=False) if as_json else "")
    if html is not None:
        from fusekit.disk import commit_file

        text = page([shown(one) for one in asked], answers, names, settings.mode)
        commit_file(html, lambda out: out.write(text.encode()))


def shown(prompt: Any) -> str:
    """A prompt for people: the text, or the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def read_prompts(file: Path) -> list[Any]:
    """Texts and conversations of a JSONL file. Raises DataError or GenerationError with file and line."""
    from fusekit.data.reading import json_lines

    found: list[Any] = []
    for where, record in json_lines(file):
        if isinstance(record, DataError):
            raise record
        value = record.get("prompt", record.get("messages")) if isinstance(record, dict) else record
        if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
            value = value[:-1]
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(m, dict) for m in value)):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise GenerationError(f"{where}: expected a text, `prompt` or `messages`; found {keys}")
        if not value:
            raise GenerationError(f"{where}: the prompt is empty")
        found.append(value)
    if not found:
        raise GenerationError(f"{file} has no prompt")
    return found
