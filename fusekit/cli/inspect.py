"""`fusekit inspect`: what an alignment of two tokenizers links and loses, and why; what a store holds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusekit.cli.common import given, options_of
from fusekit.disk import counted
from fusekit.distillation.settings import AlignmentSettings
from fusekit.errors import AlignmentError
from fusekit.gguf import split

if TYPE_CHECKING:
    from fusekit.alignment import TokenAlignment
    from fusekit.alignment.quality import AlignmentQuality
    from fusekit.distillation.worth import TeacherWorth
    from fusekit.types import CapturedRow

SHOWN = 3
_FILE = click.Path(dir_okay=False, path_type=Path)
_STORE = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def inspect() -> None:
    """Look at the alignment of two tokenizers, or at a store."""


@inspect.command()
@click.argument("pivot")
@click.argument("source")
@click.option("--text", "texts", multiple=True, help="A text to align; may be given several times.")
@click.option("--data", multiple=True, help="Examples to align: a file, a folder or a hub id; may be repeated.")
@click.option("--limit", default=1000, show_default=True, type=click.IntRange(min=1), help="Maximum examples to read.")
@click.option("--html", type=_FILE, help="Write a page that shows both tokenisations.")
@click.option("--json", "json_file", type=_FILE, help="Write the figures as JSON.")
@click.option(
    "--stores",
    type=(_STORE, _STORE),
    metavar="PIVOT_STORE SOURCE_STORE",
    help="Measure what the source is worth as a teacher, over the examples of --data that both stores have.",
)
@options_of(AlignmentSettings, "vocabulary", "tail")
def alignment(
    pivot: str,
    source: str,
    *,
    texts: tuple[str, ...],
    data: tuple[str, ...],
    limit: int,
    html: Path | None,
    json_file: Path | None,
    stores: tuple[Path, Path] | None,
    **options: Any,
) -> None:
    """Align the tokenizers PIVOT and SOURCE over texts: what is linked, what is lost, and why.

    PIVOT and SOURCE are folders or hub names that transformers can load, or GGUF or tokenizer.json files.
    --vocabulary and --tail apply to --stores.
    """
    from fusekit.alignment import align, vocabulary_surfaces
    from fusekit.alignment.quality import AlignmentQuality, sample_of
    from fusekit.data.reading import read_rows
    from fusekit.report.page import alignment_page

    how = given(options, AlignmentSettings)
    if not texts and not data:
        raise click.UsageError("give texts with --text or --data")
    if stores is not None and not data:
        raise click.UsageError("--stores needs the examples that were captured: give them with --data")
    if stores is None and how:
        raise click.UsageError(f"--{next(iter(how))} applies to --stores: give both stores")
    rows = list(read_rows(data, limit=limit))
    tokenizers = load_tokenizer(pivot), load_tokenizer(source)
    quality = AlignmentQuality(pivot, source)
    shown: list[TokenAlignment] = []
    contents = [(message.content, row.dataset) for row in rows for message in row.messages if message.content]
    for text, dataset in [*((text, "--text") for text in texts), *contents]:
        found = align(text, *tokenizers)
        quality.add(found, dataset)
        if len(shown) < SHOWN:
            shown.append(found)
    if not quality.texts:
        raise AlignmentError(f"there is no text in {', '.join(data)}")
    worth = None
    if stores is not None:
        from fusekit.capturing.store import Store
        from fusekit.distillation.worth import measure_stores

        names, opened = (str(stores[0]), str(stores[1])), (Store.open(stores[0]), Store.open(stores[1]))
        worth = measure_stores(rows, names, tokenizers, opened, AlignmentSettings.model_validate(how))
    for found in shown:
        lines = str(found).splitlines()
        more = [f"… {len(lines) - 15} more lines"] if len(lines) > 16 else lines[15:]
        click.echo("\n".join([*lines[:15], *more, ""]))
    click.echo("\n".join([_summary(quality), *(_worth_lines(worth) if worth is not None else [])]))
    if json_file is not None:
        figures = quality.to_dict() | ({"worth": worth.to_dict()} if worth is not None else {})
        json_file.write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        click.echo(f"figures: {json_file}")
    if html is not None:
        surfaces = vocabulary_surfaces(tokenizers[0]), vocabulary_surfaces(tokenizers[1])
        page = alignment_page(quality, [sample_of(found, surfaces) for found in shown], worth)
        html.write_text(page, encoding="utf-8", errors="backslashreplace")
        click.echo(f"page: {html}")


@inspect.command()
@click.argument("path", type=_STORE)
@click.option("--rows", default=2, show_default=True, type=click.IntRange(min=0), help="Examples to show.")
@click.option("--tokenizer", help="The model's tokenizer, if it is no longer where it was.")
def store(path: Path, *, rows: int, tokenizer: str | None) -> None:
    """Show what the store PATH holds: sizes, cross-entropy by source of data, and examples with what was expected."""
    from fusekit.capturing.store import Store
    from fusekit.cli.capture import summary

    opened = Store.open(path, incomplete=True)
    click.echo(summary(opened))
    reads = load_tokenizer(tokenizer or opened.spec.model) if rows else None
    for i in range(min(rows, len(opened))):
        click.echo("\n" + "\n".join(_row_lines(opened[i], reads)))


def _row_lines(row: CapturedRow, tokenizer: Any) -> Iterator[str]:
    """An example's text, and of its first labels the probability and the most probable tokens."""

    def shown(ids: Sequence[int], most: int = 24) -> str:
        # Control characters of somebody's data do not reach the terminal.
        return repr(tokenizer.decode(ids, skip_special_tokens=False))[:most]

    tokens, entries = row.tokens, zip(*row.rows[:2], row.actual.tolist(), strict=True)
    figures = f"{row.token_ce:.4f} nats per label, {row.bits_per_byte:.4f} bits per byte"
    yield f"example {tokens.key} ({row.dataset}), {figures}"
    yield f"  {shown(tokens.ids.tolist(), 600)}"
    for position, (ids, logprobs, actual) in zip(tokens.label_positions[:12].tolist(), entries, strict=False):
        best = zip(ids[:SHOWN].tolist(), map(math.exp, logprobs[:SHOWN]), strict=True)
        expected = ", ".join(f"{shown([id_])} {p:.3f}" for id_, p in best if id_ >= 0)
        yield f"  {position:>6} {shown([int(tokens.ids[position])]):<16} {math.exp(actual):.3f}   {expected}"


def load_tokenizer(name: str) -> Any:
    """A tokenizer from a ``tokenizer.json`` or GGUF file, or a folder or hub name; code from a model is never run."""
    name = os.path.expanduser(name)  # noqa: PTH111 - perhaps a name on the hub
    path = Path(name)
    try:
        if split(name) is not None:
            from fusekit.capturing.models import ModelChoice, find_checkpoint
            from fusekit.capturing.models import load_tokenizer as load

            return load(find_checkpoint(ModelChoice(name), weights=False))
        if path.is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(path))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself; transformers several kinds
        raise AlignmentError(f"the tokenizer {name} cannot be loaded: {error}") from error


def _summary(quality: AlignmentQuality) -> str:
    from fusekit.alignment.quality import MEANING
    from fusekit.alignment.rows import Case

    total = quality.total
    lines = [
        f"{counted(quality.texts, 'text')}, {quality.pivot_tokens} pivot and {quality.source_tokens} source tokens",
        f"  linked      {100 * total.linked_share:5.1f} %   of the pivot's positions",
        f"  with a row  {100 * total.row_share:5.1f} %",
        "by case:",
    ]
    for name in (case.name.lower() for case in Case):
        if count := quality.cases[name]:
            lines.append(f"  {name:<15}{100 * count / quality.pivot_tokens:5.1f} %   {MEANING[name]}")
    lines.append("by script: positions, linked, with a row")
    for name, share in sorted(quality.scripts.items(), key=lambda item: -item[1].positions):
        shares = f"{100 * share.linked_share:5.1f} %  {100 * share.row_share:5.1f} %"
        lines.append(f"  {name:<15}{share.positions:7d}  {shares}")
    lines.append("groups: " + ", ".join(f"{shape} {count}" for shape, count in quality.groups.most_common()))
    return "\n".join(lines)


def _worth_lines(worth: TeacherWorth) -> list[str]:
    from fusekit.alignment.rows import Case

    lines = ["nats per label by case: labels, teacher, pivot"]
    for case in Case:
        if n := int(worth.labels[case]):
            teacher, pivot = (f"{nats:8.3f}" if nats is not None else f"{'-':>8}" for nats in worth.per_label(case))
            worse = "   worse than the pivot" if worth.is_worse(case) else ""
            lines.append(f"  {case.name.lower():<15}{n:7d}  {teacher}  {pivot}{worse}")
    return [*lines, worth.summary, *(f"warning: {line}" for line in worth.warnings)]
