"""``fusekit generate``: several models write each answer together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from fusekit.cli.options import given, options_of
from fusekit.errors import StorageError
from fusekit.generation.settings import Generation, GenerationError, GenerationSettings, Segment

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
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Dtype of the weights; auto is the checkpoint's.",
)
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
    dtype: str,
    trust_remote_code: bool,
    allow_pickle: bool,
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

    from fusekit.artifacts import output_lock
    from fusekit.capturing.models import ModelChoice
    from fusekit.generation.answers import AnswerFile
    from fusekit.generation.ensemble import generate as write
    from fusekit.generation.reader import load_readers

    answered = None
    if out is not None:
        click.get_current_context().with_resource(output_lock(out.resolve()))
        made = {"models": list(models), "dtype": dtype, **settings.model_dump()}
        answered = AnswerFile(out, asked, made, raw=settings.raw)
        asked = asked[answered.done :]
        if not asked:
            return
    done = answered.done if answered is not None else 0
    choices = [
        ModelChoice(model, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        for model in models
    ]
    readers = load_readers(choices)
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
        click.echo(json.dumps({"prompt": one, **as_object(answers[-1])}, ensure_ascii=False) if as_json else "")
    if html is not None:
        from fusekit.artifacts import commit_file
        from fusekit.generation.page import page

        text = page([shown(one) for one in asked], answers, names, settings.mode)
        commit_file(html, lambda out: out.write(text.encode()))


def as_object(answer: Generation) -> dict[str, Any]:
    """An answer as a JSON object."""
    return answer._asdict() | {"segments": [segment._asdict() for segment in answer.segments]}


def shown(prompt: Any) -> str:
    """A prompt for people: the text, or the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def read_prompts(file: Path) -> list[Any]:
    """Texts and conversations of a JSONL file. Raises GenerationError with file and line."""
    found: list[Any] = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise GenerationError(f"{file}, line {number} is not JSON: {error}") from error
        value = record.get("prompt", record.get("messages")) if isinstance(record, dict) else record
        if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
            value = value[:-1]
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(m, dict) for m in value)):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise GenerationError(f"{file}, line {number}: expected a text, `prompt` or `messages`; found {keys}")
        if not value:
            raise GenerationError(f"{file}, line {number}: the prompt is empty")
        found.append(value)
    if not found:
        raise GenerationError(f"{file} has no prompt")
    return found
