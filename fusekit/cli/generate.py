"""``fusekit generate``: several models write each answer together."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusekit.artifacts import differences
from fusekit.cli.common import given, options_of
from fusekit.disk import append, disk_errors, output_lock
from fusekit.errors import DataError, GenerationError
from fusekit.recipe.sections import Load
from fusekit.settings import GenerationSettings

if TYPE_CHECKING:
    from fusekit.generation import Generation, Segment

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
    help="Also write the answers to a JSONL file that a recipe's data.path reads; an unfinished one is resumed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per prompt, with its segments and scores.")
def generate(
    models: tuple[str, ...],
    *,
    prompt: str | None,
    file: Path | None,
    out: Path | None,
    as_json: bool,
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
    asked = read_prompts(file) if file is not None else [prompt if prompt is not None else sys.stdin.read()]
    if not asked[0]:
        raise GenerationError("the prompt is empty")

    from fusekit.capturing.models import ModelChoice
    from fusekit.generation.ensemble import generate as write
    from fusekit.generation.reader import load_readers

    made = {"models": list(models), "dtype": options["dtype"] or "auto", **settings.model_dump()}
    done = 0
    if out is not None:
        click.get_current_context().with_resource(output_lock(out.resolve()))
        done = answered(out, asked, made, raw=settings.raw)
        if done == len(asked):
            return
    load = given(options, Load) | {name: options[name] for name in ("trust_remote_code", "allow_pickle")}
    readers = load_readers([ModelChoice(model, **load) for model in models])
    colours = {reader.name: COLOURS[number % len(COLOURS)] for number, reader in enumerate(readers)}

    def show(_: int, segment: Segment) -> None:
        click.echo(click.style(segment.text, fg=colours[segment.model]), nl=False)
        sys.stdout.flush()

    if not as_json and sys.stdout.isatty():
        click.echo(" ".join(click.style(name, fg=colour) for name, colour in colours.items()), err=True)
    for number, one in enumerate(asked[done:], done):
        if not as_json and len(asked) > 1:
            text = one if isinstance(one, str) else str(one[-1]["content"])
            click.echo(click.style(f"{text}\n", dim=True), nl=False)
        # The seed of a prompt is that of its place in the file.
        [answer] = write(readers, [one], on_segment=None if as_json else show, first=number, **settings.model_dump())
        segments = [segment._asdict() for segment in answer.segments]
        if out is not None:
            record = {**_example(one, answer, settings.raw), "segments": segments, "made": made}
            append(out, json.dumps(record).encode() + b"\n")
        record = {"prompt": one, **answer._asdict(), "segments": segments}
        click.echo(json.dumps(record, ensure_ascii=False) if as_json else "")


def _messages(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _example(prompt: Any, answer: Generation, raw: bool) -> dict[str, Any]:
    """An answer as an example that ``data.path`` of a recipe reads."""
    if raw:
        return {"text": _messages(prompt)[0]["content"] + answer.text, "finish": answer.finish}
    said = [*_messages(prompt), {"role": "assistant", "content": answer.text}]
    return {"messages": said, "finish": answer.finish}


def answered(file: Path, prompts: Sequence[Any], made: dict[str, Any], *, raw: bool) -> int:
    """How many of the prompts a file of answers has; half a line, of a process that died, is cut off.

    Raises GenerationError for answers to other prompts, or made with other models or settings.
    """
    with disk_errors(file, "cannot be read"):
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(file, sum(map(len, lines[:-1])))
            lines.pop()
    for number, line in enumerate(lines):
        where = f"{file}, line {number + 1}"
        prompt = prompts[number] if number < len(prompts) else None
        try:
            record = json.loads(line)
            if changed := differences(record["made"], dict(made)):
                raise GenerationError(f"{where} was made differently ({'; '.join(changed)}): choose another file")
            known = record["text"] if raw else record["messages"][:-1]
            same = known.startswith(_messages(prompt)[0]["content"]) if raw else known == _messages(prompt)
        except (ValueError, KeyError, TypeError) as error:
            raise GenerationError(f"{where} is not an answer to {prompt!r:.80}: choose another file") from error
        if not same:
            raise GenerationError(f"{where} is not an answer to {prompt!r:.80}, but {line[:80]!r}: choose another file")
    return len(lines)


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
