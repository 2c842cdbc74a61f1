"""``fusekit represent``: parse, call, print."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusekit.cli.recipe import is_recipe, refuse_options
from fusekit.cli.stopping import TerminatedError, command_again, sigterm_unwinds, status_of
from fusekit.errors import DataError, FusekitError

if TYPE_CHECKING:
    from fusekit.capture.capture import Settings
    from fusekit.capture.models import Checkpoint
    from fusekit.capture.store import Store
    from fusekit.data.prepare import Prepared
    from fusekit.data.tokenize import RowTokenizer
    from fusekit.types import Row

SHORTHANDS = {
    "4bit": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
    "8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def _quantization(_context: click.Context, _option: click.Parameter, value: str | None) -> dict[str, Any] | None:
    if value is None or value in SHORTHANDS:
        return SHORTHANDS[value] if value else None
    try:
        fields = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"neither {', '.join(SHORTHANDS)} nor JSON: {error}") from error
    if not isinstance(fields, dict):
        raise click.BadParameter("not a JSON object")
    return fields


def device_map(_context: click.Context, _option: click.Parameter, value: str | None) -> Any:
    """Of an option: a word as it is, a JSON object as a mapping."""
    if value is None or not value.startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"no JSON: {error}") from error


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--top-k", default=10, show_default=True, type=click.IntRange(min=1), help="Most entries per label.")
@click.option(
    "--keep-mass",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Fewer entries once they hold this probability.",
)
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Of the distributions that are kept; the cross-entropy is always of temperature 1.",
)
@click.option(
    "--max-error",
    default=None,
    type=click.FloatRange(0, 1),
    help="Bound of the rounding of stored log-probabilities in nats, 0 for float32; by default the store's.",
)
@click.option("--max-length", default=2048, show_default=True, type=click.IntRange(min=2), help="Most tokens of a row.")
@click.option("--overlong", default="cut", show_default=True, type=click.Choice(["cut", "drop"]), help="Longer rows.")
@click.option(
    "--train-on",
    default="assistant",
    show_default=True,
    type=click.Choice(["assistant", "all"]),
    help="Which tokens are labels. Of plain text all are.",
)
@click.option(
    "--chat-template", default="own", show_default=True, help="`own`, the name of a shipped one, or a jinja file."
)
@click.option(
    "--with",
    "others",
    multiple=True,
    metavar="MODEL",
    help="Another model of the run: rows are cut where both read the same bytes. Repeatable.",
)
@click.option("--pack", is_flag=True, help="Pack plain text into blocks of --max-length tokens.")
@click.option("--split", default="train", show_default=True, help="Of a data set on the hub.")
@click.option("--data-name", default=None, help="Configuration of a data set on the hub.")
@click.option("--data-revision", default=None, help="Revision of a data set on the hub.")
@click.option("--streaming", is_flag=True, help="Read a data set on the hub without downloading all of it.")
@click.option("--limit", default=None, type=click.IntRange(min=1), help="Most rows to read of the data.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the weights; auto: the checkpoint's.",
)
@click.option("--device-map", default=None, callback=device_map, help="`auto`, or a JSON object, as for transformers.")
@click.option(
    "--quantization",
    default=None,
    callback=_quantization,
    metavar="4bit|8bit|JSON",
    help="Fields of transformers' quantization config; 4bit and 8bit are bitsandbytes'.",
)
@click.option("--attn-implementation", default=None, help="`sdpa`, `flash_attention_2`, ..., as for transformers.")
@click.option("--revision", default=None, help="Branch, tag or commit of the model on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with the model.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights of the model.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    help="Most tokens of a batch, padding included; by default what suits the device.",
)
@click.option(
    "--rows-per-shard",
    type=click.IntRange(min=1),
    help="Rows that are captured anew at most when a run is interrupted; by default some minutes of work.",
)
@click.option(
    "--max-quarantined",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of the rows that may have NaN or infinite logits.",
)
@click.option("--overwrite", is_flag=True, help="Start anew where a store is.")
@click.option("--ignore-estimates", is_flag=True, help="Start although disk or memory do not seem to suffice.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--quiet", is_flag=True, help="Errors only.")
@click.pass_context
def represent(context: click.Context, /, **options: Any) -> None:
    """Capture what MODEL says about the rows of DATA into the store OUT; or all models of a recipe: RECIPE.yml OUT.

    With a recipe its own settings hold, as in the stage represent of fusekit run.

    MODEL: a folder, a name on the hub or a GGUF file. DATA: files (.json, .jsonl, .parquet, .txt), folders or data
    sets on the hub, one or several. OUT: a folder; a run that was stopped goes on there. Under `accelerate launch -m
    fusekit.cli` or `torchrun -m fusekit.cli` each process takes its share.
    """
    from fusekit.devices import OtherProcessError, Processes

    if is_recipe(options["model"]):
        _all_of_recipe(context, options)
        return
    if not options["data"]:
        raise click.UsageError("give MODEL, DATA and OUT; or a recipe (.yml) and OUT")
    drop_noise()
    processes = Processes.current()
    say = _speaker(options["quiet"] or not processes.is_first)
    try:
        with sigterm_unwinds():
            store, prepared = _run(options, processes, say)
    except (KeyboardInterrupt, TerminatedError) as error:
        if processes.is_first:
            _stopped(options["out"])
        sys.exit(status_of(error))
    except OtherProcessError:
        sys.exit(1)  # process 0 has said why
    except FusekitError:
        logging.info("the capture failed", exc_info=True)
        raise
    if processes.is_first and not options["quiet"]:
        _report(store, prepared, options["as_json"])


def _all_of_recipe(context: click.Context, options: dict[str, Any]) -> None:
    """Run a recipe up to its captures. Settings belong into the recipe, so options beside --quiet are refused."""
    from fusekit.cli.run import run_recipe

    refuse_options(context, {"model", "out", "quiet"})
    run_recipe(Path(options["model"]), options["out"], only=("data", "represent"), quiet=options["quiet"])


def _run(options: dict[str, Any], processes: Any, say: Callable[[str], None]) -> tuple[Store, Prepared]:
    from fusekit.capture.capture import represent as run
    from fusekit.data.prepare import prepare

    checkpoint, tokenizers = _models(options, say)
    prepared = prepare(_rows(options, tokenizers), tokenizers, options["max_length"], options["overlong"])
    if not prepared.rows:
        raise DataError(f"{', '.join(options['data'])}: there are no rows")
    say(str(prepared.counts))
    settings = _settings(options)
    return run(
        checkpoint, tokenizers[0], prepared.rows, options["out"], settings, notify=say, processes=processes
    ), prepared


def _models(options: dict[str, Any], say: Callable[[str], None]) -> tuple[Checkpoint, list[RowTokenizer]]:
    """The model, and how it and the others of the run read rows."""
    from fusekit.capture.load import load_tokenizer
    from fusekit.capture.models import ModelChoice, find_checkpoint
    from fusekit.data.templates import ChatTemplate
    from fusekit.data.tokenize import RowTokenizer

    names = ("model", "revision", "dtype", "device_map", "quantization", "attn_implementation")
    choice = ModelChoice(
        **{name: options[name] for name in names},
        trust_remote_code=options["trust_remote_code"],
        allow_pickle=options["allow_pickle"],
    )
    checkpoint = find_checkpoint(choice)
    others = [find_checkpoint(ModelChoice(name), weights=False) for name in options["others"]]
    for line in chain.from_iterable(found.notices for found in (checkpoint, *others)):
        say(line)
    train_on = options["train_on"]
    date = None if options["overwrite"] else _date_of(options["out"])
    own = RowTokenizer(load_tokenizer(checkpoint), ChatTemplate.chosen(options["chat_template"]), train_on, date=date)
    others_read = [RowTokenizer(load_tokenizer(found), None, train_on, date=own.date) for found in others]
    return checkpoint, [own, *others_read]


def _date_of(out: Path) -> datetime.date | None:
    """The day that templates printed when a store was begun; None for a new one. Raises StorageError."""
    from fusekit.capture.manifest import MANIFEST, Manifest, read_json
    from fusekit.data.templates import kept_date

    known = read_json(out / MANIFEST, Manifest)
    return None if known is None else kept_date(known.spec.details.get("date"))


def _rows(options: dict[str, Any], tokenizers: list[RowTokenizer]) -> Iterator[Row]:
    from fusekit.data.prepare import pack_text
    from fusekit.data.reading import read_rows

    rows = chain.from_iterable(
        read_rows(
            path,
            split=options["split"],
            revision=options["data_revision"],
            streaming=options["streaming"],
            name=options["data_name"],
        )
        for path in options["data"]
    )
    limited = rows if options["limit"] is None else islice(rows, options["limit"])
    return pack_text(limited, tokenizers, options["max_length"]) if options["pack"] else limited


def _settings(options: dict[str, Any]) -> Settings:
    from fusekit.capture.capture import CaptureOptions, Settings
    from fusekit.capture.settings import DEFAULT_MAX_ERROR
    from fusekit.capture.topk import Selection

    max_error = options["max_error"]
    return Settings(
        selection=Selection(options["top_k"], options["keep_mass"], options["temperature"]),
        max_error=DEFAULT_MAX_ERROR if max_error is None else max_error,
        batch_tokens=options["batch_tokens"],
        rows_per_shard=options["rows_per_shard"],
        ignore_estimates=options["ignore_estimates"],
        # The rows' cuts are compared too; these say why they differ.
        details={"max_length": options["max_length"], "overlong": options["overlong"]},
        options=CaptureOptions(options["overwrite"], options["quiet"], options["max_quarantined"]),
    )


def _speaker(silent: bool) -> Callable[[str], None]:
    return lambda line: None if silent else click.echo(line, err=True)


def drop_noise() -> None:
    """Bars for loading weights and advice about generation: nothing that a capture's user could act on."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _stopped(out: Path) -> None:
    """Say what is there and how to go on."""
    shards = len(list(out.glob("shard-*.parquet"))) if out.is_dir() else 0
    again = command_again("--overwrite")  # which would throw away what is there
    click.echo(f"fusekit: stopped; {shards} shards are whole in {out}. To go on:\n  {again}", err=True)


def _report(store: Store, prepared: Prepared, as_json: bool) -> None:
    from fusekit.cli.store_report import figures, summary_lines

    if as_json:
        click.echo(json.dumps(figures(store) | {"data": prepared.counts.as_dict()}, indent=1))
    else:
        click.echo("\n".join(summary_lines(store)))
