"""``fusekit inspect``: what an alignment links and loses, and why; what a store holds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from fusekit.cli.common import given, options_of, print_json
from fusekit.disk import counted, human
from fusekit.distillation.settings import AlignmentSettings
from fusekit.errors import AlignmentError
from fusekit.gguf import split

if TYPE_CHECKING:
    from fusekit.alignment import TokenAlignment
    from fusekit.alignment.quality import AlignmentQuality
    from fusekit.capturing.store import Store
    from fusekit.distillation.worth import TeacherWorth
    from fusekit.types import CapturedRow

_FILE = click.Path(dir_okay=False, path_type=Path)
_STORE = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def inspect() -> None:
    """Look at an alignment or a store."""


@inspect.command()
@click.argument("pivot")
@click.argument("source")
@click.option("--text", "texts", multiple=True, help="A text to align; may be given several times.")
@click.option("--data", multiple=True, help="Examples to align: a file, a folder or a hub id; may be repeated.")
@click.option("--limit", default=1000, show_default=True, type=click.IntRange(min=1), help="Most examples to read.")
@click.option("--samples", default=3, show_default=True, type=click.IntRange(min=0), help="Texts to show.")
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
    samples: int,
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
    contents = [message.content for row in rows for message in row.messages if message.content]
    for text in [*texts, *contents]:
        found = align(text, *tokenizers)
        quality.add(found)
        if len(shown) < samples:
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
@click.option("--rows", "shown", default=2, show_default=True, type=click.IntRange(min=0), help="Examples to show.")
@click.option("--labels", default=12, show_default=True, type=click.IntRange(min=0), help="Labels to show of each.")
@click.option("--key", "keys", multiple=True, help="Show the example with this key; may be given several times.")
@click.option("--tokenizer", help="The model's tokenizer, if it is no longer where it was.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, without examples.")
def store(path: Path, *, shown: int, labels: int, keys: tuple[str, ...], tokenizer: str | None, as_json: bool) -> None:
    """Show what the store PATH holds: sizes, cross-entropy by source of data, and examples with the predictions."""
    from fusekit.capturing.store import Store

    opened = Store.open(path, incomplete=True)
    if as_json:
        print_json(figures(opened))
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
        click.echo("\n" + "\n".join(_row_lines(row, reads, labels)))


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

    total = quality.total.to_dict()
    lines = [
        f"{quality.texts} texts, {quality.pivot_tokens} pivot and {quality.source_tokens} source tokens",
        f"  linked      {100 * total['linked_share']:5.1f} %   of the pivot's positions",
        f"  with a row  {100 * total['row_share']:5.1f} %",
        "by case:",
    ]
    for name in (case.name.lower() for case in Case):
        if count := quality.cases[name]:
            lines.append(f"  {name:<15}{100 * count / quality.pivot_tokens:5.1f} %   {MEANING[name]}")
    lines.append("by script: positions, linked, with a row")
    for name, share in sorted(quality.scripts.items(), key=lambda item: -item[1].positions):
        part = share.to_dict()
        shares = f"{100 * part['linked_share']:5.1f} %  {100 * part['row_share']:5.1f} %"
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


_SHOWN_QUARANTINED = 5
_SHOWN_ENTRIES = 3


def figures(store: Store) -> dict[str, Any]:
    """What is in a store, in plain types."""
    summary, spec = store.summary, store.spec
    sources = {
        name: _share(store, np.flatnonzero(summary.dataset == number)) for number, name in enumerate(summary.datasets)
    }
    return {
        "path": str(store.path),
        "complete": store.complete,
        "made_from": spec.model_dump(),
        "total": _share(store, np.arange(len(store))),
        "datasets": sources,
        "shards": len(store.records),
        "file_bytes": sum(record.size for record in store.records),
        "quarantined": {row.key: row.reason for row in store.quarantined},
    }


def _share(store: Store, rows: Any) -> dict[str, Any]:
    summary = store.summary
    labels, content = int(summary.labels[rows].sum()), int(summary.bytes[rows].sum())
    nats = float(summary.cross_entropy[rows].sum())
    return {
        "rows": len(rows),
        "tokens": int(summary.tokens[rows].sum()),
        "labels": labels,
        "content_bytes": content,
        "cross_entropy_per_label": nats / max(labels, 1),
        "bits_per_byte": nats / math.log(2) / max(content, 1),
    }


def summary_lines(store: Store) -> Iterator[str]:
    """A page about a store."""
    found, spec = figures(store), store.spec
    state = "complete" if store.complete else "not finished; the same command resumes it"
    yield f"{store.path}: {state}"
    mass = f", until they hold {spec.keep_mass:g}" if spec.keep_mass else ""
    yield f"  model        {spec.model} ({spec.model_fingerprint})"
    yield f"  rows kept    up to {spec.top_k} of {spec.vocabulary} ids{mass}, temperature {spec.temperature:g}"
    bound = f"rounded by at most {spec.max_error:g} nats" if spec.max_error else "float32"
    yield f"  values       {bound}"
    per_label = found["file_bytes"] / max(found["total"]["labels"], 1)
    shards = counted(found["shards"], "shard")
    yield f"  on disk      {human(found['file_bytes'])} in {shards}, {per_label:.1f} bytes per label"
    yield ""
    width = max(len(name) for name in ("all", *found["datasets"]))
    head = f"{'examples':>8} {'tokens':>10} {'labels':>10} {'nats/label':>10} {'bits/byte':>9}"
    yield f"  {'':<{width}}  {head}"
    for name, share in [*found["datasets"].items(), ("all", found["total"])]:
        yield (
            f"  {name:<{width}}  {share['rows']:>8} {share['tokens']:>10} {share['labels']:>10} "
            f"{share['cross_entropy_per_label']:>10.4f} {share['bits_per_byte']:>9.4f}"
        )
    if found["quarantined"]:
        yield ""
        yield f"  {counted(len(found['quarantined']), 'example')} without a distribution:"
        for key, reason in list(found["quarantined"].items())[:_SHOWN_QUARANTINED]:
            yield f"    {key}  {reason}"


def _row_lines(row: CapturedRow, tokenizer: Any, most: int) -> Iterator[str]:
    """A row as people read it: its text, then ``most`` labels with what the model expected there."""
    tokens = row.tokens
    yield f"row {tokens.key} ({row.dataset or 'no dataset'})"
    size = f"{counted(len(tokens), 'token')}, {counted(len(row.actual), 'label')}"
    yield f"  {size}, {row.token_ce:.4f} nats per label, {row.bits_per_byte:.4f} bits per byte"
    yield f"  {_shown(tokenizer.decode(tokens.ids.tolist()), 600)}"
    positions = tokens.label_positions.tolist()
    for j, position in enumerate(positions[:most]):
        expected = [
            f"{_token(tokenizer, int(id_))} {math.exp(logprob):.3f}"
            for id_, logprob in zip(row.rows.ids[j], row.rows.logprobs[j], strict=True)
            if id_ >= 0
        ]
        rest = max(1.0 - float(np.exp(row.rows.logprobs[j, :_SHOWN_ENTRIES]).sum()), 0.0)
        yield (
            f"  {position:>6} {_token(tokenizer, int(tokens.ids[position])):<16} {math.exp(row.actual[j]):.3f}   "
            f"{', '.join(expected[:_SHOWN_ENTRIES])}; the rest {rest:.3f}"
        )
    if len(positions) > most:
        yield f"  ... and {len(positions) - most} labels more"


def _token(tokenizer: Any, id_: int) -> str:
    return _shown(repr(tokenizer.decode([id_])), 24)


def _shown(text: str, most: int) -> str:
    # Control characters of somebody's data do not reach the terminal.
    safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return safe if len(safe) <= most else f"{safe[: most - 3]}..."
