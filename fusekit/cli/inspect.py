"""``fusekit inspect``: what an alignment links and loses and why; what is in a store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from fusekit.errors import AlignmentError, DistillationError
from fusekit.gguf import split

if TYPE_CHECKING:
    from fusekit.alignment.alignment import TokenAlignment
    from fusekit.alignment.quality import AlignmentQuality
    from fusekit.alignment.worth import TeacherWorth


@click.group()
def inspect() -> None:
    """Look at an alignment or a store."""


@inspect.command()
@click.argument("pivot")
@click.argument("source")
@click.option("--text", "texts", multiple=True, help="A text to align; may be given several times.")
@click.option(
    "--data",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Texts to align: .txt (one), .json or .jsonl with 'text', 'messages' or 'conversations'.",
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with both tokenisations.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@click.option("--limit", default=1000, show_default=True, type=click.IntRange(min=1), help="Most texts to read.")
@click.option("--samples", default=3, show_default=True, type=click.IntRange(min=0), help="Texts to show.")
@click.option(
    "--stores",
    type=(click.Path(exists=True, file_okay=False, path_type=Path),) * 2,
    metavar="PIVOT_STORE SOURCE_STORE",
    help="Measure what the source is worth as a teacher, over the rows of --data that both stores have.",
)
@click.option("--vocabulary", help="The vocabulary map, with --stores.  [default: prefix]")
@click.option("--tail", help="What becomes of the source's tail, with --stores.  [default: back_off]")
def alignment(
    pivot: str,
    source: str,
    *,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    html: Path | None,
    json_file: Path | None,
    limit: int,
    samples: int,
    stores: tuple[Path, Path] | None,
    vocabulary: str | None,
    tail: str | None,
) -> None:
    """Align the tokenizers PIVOT and SOURCE over texts: what links, what is lost and why.

    PIVOT and SOURCE are folders or hub names that transformers can load, or GGUF or tokenizer.json files.
    """
    from fusekit.alignment import vocabulary_surfaces
    from fusekit.alignment.alignment import align
    from fusekit.alignment.html import page
    from fusekit.alignment.quality import AlignmentQuality

    if not texts and not files:
        raise click.UsageError("give texts with --text or --data")
    if stores is not None and not files:
        raise click.UsageError("--stores needs the rows that they were captured from: give them with --data")
    if stores is None and (vocabulary or tail):
        raise click.UsageError("--vocabulary and --tail say how --stores are read: give both stores")
    pivot_tokenizer, source_tokenizer = load_tokenizer(pivot), load_tokenizer(source)
    surfaces = vocabulary_surfaces(pivot_tokenizer), vocabulary_surfaces(source_tokenizer)
    quality = AlignmentQuality(pivot, source)
    shown: list[TokenAlignment] = []
    for text, data in islice(_texts(texts, files), limit):
        found = align(text, pivot_tokenizer, source_tokenizer)
        quality.add(found, data)
        if len(shown) < samples:
            shown.append(found)
    if not quality.texts:
        raise AlignmentError(f"no text in {', '.join(map(str, files))}")
    if stores is not None:
        how = {name: value for name, value in (("vocabulary", vocabulary), ("tail", tail)) if value is not None}
        quality.worth = _worth((pivot_tokenizer, source_tokenizer), stores, files, how, limit)
    for found in shown:
        click.echo(f"{_shortened(found)}\n")
    click.echo(_summary(quality))
    if json_file is not None:
        json_file.write_text(quality.to_json() + "\n", encoding="utf-8")
        click.echo(f"figures: {json_file}")
    if html is not None:
        html.write_text(page(quality, shown, surfaces), encoding="utf-8")
        click.echo(f"page: {html}")


@inspect.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rows", "shown", default=2, show_default=True, type=click.IntRange(min=0), help="Rows to show.")
@click.option("--labels", default=12, show_default=True, type=click.IntRange(min=0), help="Labels to show of a row.")
@click.option("--key", "keys", multiple=True, help="Show the row with this key; may be given several times.")
@click.option("--tokenizer", default=None, help="Of the model, if it is no longer where it was.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, without rows.")
def store(path: Path, *, shown: int, labels: int, keys: tuple[str, ...], tokenizer: str | None, as_json: bool) -> None:
    """Say what is in the store PATH: sizes, cross-entropy by source of data, and rows with the model's predictions."""
    from fusekit.capturing.store import Store
    from fusekit.cli.store_report import figures, row_lines, summary_lines

    opened = Store.open(path, incomplete=True)
    if as_json:
        click.echo(json.dumps(figures(opened), indent=1))
        return
    click.echo("\n".join(summary_lines(opened)))
    rows = [opened.get(key) for key in keys] or [opened[i] for i in range(min(shown, len(opened)))]
    if not rows:
        return
    try:
        reads = load_tokenizer(tokenizer or opened.spec.model)
    except AlignmentError as error:
        if tokenizer or keys:
            raise
        click.echo(f"\nno rows shown: {error}; give it with --tokenizer")
        return
    for row in rows:
        click.echo("\n" + "\n".join(row_lines(row, reads, labels)))


def load_tokenizer(name: str) -> Any:
    """A tokenizer from a ``tokenizer.json`` or GGUF file, or a folder or hub name; code from a model is never run.

    Raises:
        AlignmentError: it cannot be loaded; says why.
    """
    path = Path(name)
    try:
        if split(name) is not None:
            from fusekit.capturing.load import load_tokenizer as load
            from fusekit.capturing.models import ModelChoice, find_checkpoint

            return load(find_checkpoint(ModelChoice(name), weights=False))
        if path.is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(path))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself; transformers several kinds
        raise AlignmentError(f"the tokenizer {name} cannot be loaded: {error}") from error


def _texts(texts: tuple[str, ...], files: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    """``(text, name of its source of data)``."""
    yield from ((text, "--text") for text in texts)
    for file in files:
        for text in _read(file):
            if text:
                yield text, file.name


def _read(file: Path) -> Iterator[str]:
    content = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".txt":
        yield content
        return
    if file.suffix not in (".json", ".jsonl"):
        raise AlignmentError(f"{file} is neither .txt, .json nor .jsonl")
    lines = enumerate(content.splitlines(), 1) if file.suffix == ".jsonl" else [(1, content)]
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise AlignmentError(f"{file}, line {number}, is not JSON: {error}") from error
        for row in value if isinstance(value, list) else [value]:
            yield from _texts_of(row, file, number)


def _texts_of(row: Any, file: Path, number: int) -> Iterator[str]:
    """The texts of one row: a string, its ``text``, or the contents of its messages."""
    if isinstance(row, str):
        yield row
        return
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        yield row["text"]
        return
    messages = row.get("messages", row.get("conversations")) if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise AlignmentError(f"{file}, line {number}: a row needs 'text', 'messages' or 'conversations'")
    for message in messages:
        content = message.get("content", message.get("value")) if isinstance(message, dict) else message
        if isinstance(content, str):
            yield content


def _shortened(found: TokenAlignment, lines: int = 16) -> str:
    shown = str(found).splitlines()
    return "\n".join(shown if len(shown) <= lines else [*shown[: lines - 1], f"… {len(shown) - lines + 1} more lines"])


def _summary(quality: AlignmentQuality) -> str:
    from fusekit.alignment.cases import Case
    from fusekit.alignment.samples import MEANING

    total = max(quality.pivot_tokens, 1)
    lines = [
        f"{quality.texts} texts, {quality.pivot_tokens} pivot and {quality.source_tokens} source tokens",
        f"  linked      {100 * quality.total.linked / total:5.1f} %   of the pivot's positions",
        f"  with a row  {100 * quality.total.rows / total:5.1f} %",
        "by case:",
    ]
    names = [case.name.lower() for case in Case if quality.cases[case.name.lower()]]
    lines += [f"  {name:<15}{100 * quality.cases[name] / total:5.1f} %   {MEANING[name]}" for name in names]
    lines.append("by script: positions, linked, with a row")
    for name, share in sorted(quality.scripts.items(), key=lambda item: -item[1].positions):
        part = share.to_dict()
        lines.append(
            f"  {name:<15}{share.positions:7d}  {100 * part['linked_share']:5.1f} %  {100 * part['row_share']:5.1f} %"
        )
    lines.append("groups: " + ", ".join(f"{shape} {count}" for shape, count in quality.shapes.most_common()))
    return "\n".join([*lines, *(_worth_lines(quality.worth) if quality.worth is not None else [])])


def _worth(
    tokenizers: tuple[Any, Any], stores: tuple[Path, Path], files: tuple[Path, ...], how: dict[str, str], limit: int
) -> TeacherWorth:
    """Raises DistillationError where stores, rows and tokenizers are not of each other, or for an unknown setting."""
    from fusekit.capturing.store import Store
    from fusekit.data.reading import read_rows
    from fusekit.distillation.settings import AlignmentSettings
    from fusekit.distillation.worth import Captured, measure_stores

    try:
        settings = AlignmentSettings.model_validate(how)
    except ValidationError as error:
        raise DistillationError(f"{how}: {error.errors()[0]['msg']}") from error
    rows = list(islice((row for file in files for row in read_rows(str(file))), limit))
    pivot, source = (Captured(str(p), t, Store.open(p)) for p, t in zip(stores, tokenizers, strict=True))
    return measure_stores(rows, pivot, source, settings)


def _worth_lines(worth: TeacherWorth) -> list[str]:
    from fusekit.alignment.cases import Case

    lines = ["nats per label by case: labels, teacher, pivot"]
    for case in Case:
        if n := int(worth.labels[case]):
            teacher, pivot = (f"{nats:8.3f}" if nats is not None else f"{'-':>8}" for nats in worth.per_label(case))
            worse = "   worse than the pivot" if worth.is_worse(case) else ""
            lines.append(f"  {case.name.lower():<15}{n:7d}  {teacher}  {pivot}{worse}")
    return [*lines, *worth.summary, *(f"warning: {line}" for line in worth.warnings)]
