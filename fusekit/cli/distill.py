"""``fusekit distill``: parse, call, print."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from fusekit.cli.common import given, interruptible, options_of
from fusekit.disk import refuse_file
from fusekit.distillation.settings import PRESETS, AlignmentSettings, DistillSettings, FusionSettings, TrainingSettings
from fusekit.errors import DistillationError
from fusekit.settings import DataSettings

if TYPE_CHECKING:
    from fusekit.data.tokenize import RowTokenizer
    from fusekit.distillation.inputs import Inputs, Source
    from fusekit.types import Row


@click.command("distill")
@click.argument("pivot")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="Examples that were captured: files, folders or hub ids (repeatable).",
)
@options_of(DataSettings, "split", "limit", "on_bad_row")
@click.option("--pack", is_flag=True, help="Pack plain text into blocks, as the stores were captured with --pack.")
@click.option(
    "--max-length",
    default=2048,
    show_default=True,
    type=click.IntRange(min=2),
    help="Maximum tokens of a packed block, or of a question with its answer for --on-policy.",
)
@click.option("--pivot-store", type=click.Path(path_type=Path), help="Store of the pivot over the examples.")
@click.option(
    "--source-store",
    "sources",
    multiple=True,
    metavar="NAME=STORE[:TOKENIZER]",
    help="Store of a source, and its tokenizer if it is not that of the model that the store names (repeatable).",
)
@click.option(
    "--preset",
    default="fusekit",
    show_default=True,
    help=f"{', '.join(name for name in PRESETS if name != 'profuser')}: the values of every setting that is not given.",
)
@options_of(FusionSettings, "mode", "function", "level", "metric", defaults=False)
@options_of(AlignmentSettings, "tokens", "vocabulary", "tail", defaults=False)
@options_of(TrainingSettings, *(n for n in TrainingSettings.model_fields if n != "schedule"), defaults=False)
@click.option(
    "--set",
    "extra",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Any other setting of a recipe: alignment.one_hot=true, or distill.optim=adafactor for a field of "
    "TrainingArguments (repeatable).",
)
@click.option("--chat-template", help="Of a pivot without a store: own, a shipped name, or a jinja file.")
@click.option("--resume", is_flag=True, help="Resume what is there.")
@click.option("--overwrite", is_flag=True, help="Start over, replacing what is there.")
@click.option("--ignore-estimates", is_flag=True, help="Start although disk or memory do not seem to suffice.")
@click.option("--quiet", "-q", is_flag=True, help="Print the folders of the models and errors only.")
def distill(pivot: str, out: Path, **options: Any) -> None:
    """Train PIVOT on what other models know, into folders of OUT.

    Each distilled model appears in OUT in one step, as a plain checkpoint with its tokenizer. Under `torchrun` or
    `accelerate launch` it trains on several devices.
    """
    if not options["data"]:
        raise click.UsageError("give --data, the examples that the stores were captured from")
    if options["resume"] and options["overwrite"]:
        raise click.UsageError("--resume keeps what is there, --overwrite replaces it: give one")
    refuse_file(out)
    from fusekit.devices import Processes
    from fusekit.distillation.run import distill as run

    settings = _settings(options)
    inputs = _inputs(pivot, options)
    how = {name: options[name] for name in ("resume", "overwrite", "ignore_estimates", "quiet")}

    def say(line: str) -> None:
        if not options["quiet"]:
            click.echo(line, err=True)

    kept = "checkpoints and finished models are kept. To resume, give the same command with --resume."
    with interruptible(lambda: say(f"fusekit: stopped; {kept}")):
        made = run(inputs, settings, out, say=say, **how)
    if Processes.current().is_first:
        click.echo("\n".join(map(str, made)))


def _settings(options: dict[str, Any]) -> DistillSettings:
    changes: dict[str, dict[str, Any]] = {
        "fusion": given(options, FusionSettings),
        "alignment": given(options, AlignmentSettings),
        "distill": given(options, TrainingSettings),
    }
    for text in options["extra"]:
        name, equals, written = text.partition("=")
        section, dot, field = name.partition(".")
        if not equals or not dot:
            raise click.UsageError(f"--set {text}: write SECTION.FIELD=VALUE, such as distill.warmup_steps=0.1")
        try:  # YAML takes 1e-5 for a string
            is_power = re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", written)
            changes.setdefault(section, {})[field] = float(written) if is_power else yaml.safe_load(written)
        except yaml.YAMLError as error:
            raise click.UsageError(f"--set {text}: {written!r} is not a YAML value: {error}") from error
    changes["training"] = changes.pop("distill")
    return DistillSettings.of(options["preset"], changes)


def _inputs(pivot: str, options: dict[str, Any]) -> Inputs:
    from fusekit.capturing.models import ModelChoice
    from fusekit.capturing.store import date_of
    from fusekit.distillation.inputs import Inputs, Source

    sources = {}
    for text in options["sources"]:
        name, equals, place = text.partition("=")
        store, _, tokenizer = place.partition(":")
        if not name or not equals or not store:
            raise click.UsageError(f"--source-store {text}: write NAME=STORE or NAME=STORE:TOKENIZER")
        if name in sources:
            raise DistillationError(f"two sources are called {name!r}")
        sources[name] = Source(Path(store), tokenizer or None)
    pivot_store, reader = options["pivot_store"], None
    if pivot_store is None or options["pack"]:
        dates = (date_of(source.store) for source in sources.values() if source.store)
        reader = _row_tokenizer(pivot, options["chat_template"], next(filter(None, dates), None))
    rows, reads = _rows(options, list(sources.values()), reader), reader if pivot_store is None else None
    return Inputs(ModelChoice(pivot), rows, pivot_store, sources, reads, max_length=options["max_length"])


def _rows(options: dict[str, Any], sources: list[Source], reader: RowTokenizer | None) -> list[Row]:
    from fusekit.capturing.store import Store
    from fusekit.data.prepare import pack_text
    from fusekit.data.reading import DataCounts, read_rows

    data = DataSettings(path=list(options["data"]), **given(options, DataSettings))
    counts = DataCounts(data.on_bad_row)
    read = list(read_rows(data.path, split=data.split, limit=data.limit, counts=counts))
    if counts.seen or counts.unused:
        counts.seen += len(read)
        counts.kept = len(read)
        click.echo("\n".join(counts.lines), err=True)
    if not data.pack or reader is None:
        return read
    stored = [(source, Store.open(source.store).spec.model) for source in sources if source.store]
    models = [source.tokenizer_choice(model).model for source, model in stored]
    tokenizers = [reader, *(_row_tokenizer(model, None) for model in models)]
    return list(pack_text(read, tokenizers, data.max_length))


def _row_tokenizer(model: str, template: str | None, date: datetime.date | None = None) -> RowTokenizer:
    from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer
    from fusekit.data.templates import ChatTemplate
    from fusekit.data.tokenize import RowTokenizer

    tokenizer = load_tokenizer(find_checkpoint(ModelChoice(model), weights=False))
    return RowTokenizer(tokenizer, ChatTemplate.chosen(template or "own"), date=date)
