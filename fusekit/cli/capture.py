"""``fusekit capture``: parse, call, print."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from fusekit.capturing.settings import CaptureSettings, EngineSettings
from fusekit.cli.options import given, options_of
from fusekit.cli.stopping import TerminatedError, command_again, sigterm_unwinds, status_of
from fusekit.data.settings import DataSettings
from fusekit.errors import CaptureError, DataError, FusekitError
from fusekit.recipe.sections import Load

if TYPE_CHECKING:
    from fusekit.capturing.models import Checkpoint
    from fusekit.capturing.store import Store
    from fusekit.data.counts import DataCounts
    from fusekit.data.prepare import Prepared
    from fusekit.data.tokenize import RowTokenizer
    from fusekit.types import Row

_QUANTIZATIONS = {
    "4bit": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
    "8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def _quantization(_context: click.Context, _option: click.Parameter, value: str | None) -> dict[str, Any] | None:
    if value is None or value in _QUANTIZATIONS:
        return _QUANTIZATIONS[value] if value else None
    try:
        fields = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"neither {', '.join(_QUANTIZATIONS)} nor JSON: {error}") from error
    if not isinstance(fields, dict):
        raise click.BadParameter("not a JSON object")
    return fields


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@options_of(CaptureSettings)
@options_of(DataSettings, "max_length", "overlong", "train_on", "pack", "split", "streaming", "limit", "on_bad_row")
@click.option("--data-name", help="Configuration of a data set on the hub.")
@click.option("--data-revision", help="Branch, tag or commit of a data set on the hub.")
@click.option(
    "--chat-template", default="own", show_default=True, help="`own`, the name of a shipped one, or a jinja file."
)
@click.option(
    "--with",
    "others",
    multiple=True,
    metavar="MODEL",
    help="Another model of the run: examples are cut where both read the same bytes. Repeatable.",
)
@options_of(Load, "dtype", "device_map", "attn_implementation")
@options_of(EngineSettings, prefix="engine_")
@click.option(
    "--quantization",
    callback=_quantization,
    metavar="4bit|8bit|JSON",
    help="Fields of transformers' quantization config; 4bit and 8bit are bitsandbytes'.",
)
@click.option("--revision", help="Branch, tag or commit of the model on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that comes with the model.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights of the model.")
@click.option("--rank", type=click.IntRange(0), help="Capture this share of --world, from 0, without a launcher.")
@click.option("--world", type=click.IntRange(1), help="Number of shares. The last process completes the store.")
@click.option("--overwrite", is_flag=True, help="Start over where there is a store.")
@click.option("--ignore-estimates", is_flag=True, help="Start although disk or memory do not seem to suffice.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def capture(**options: Any) -> None:
    """Capture what MODEL says about the examples of DATA into the store OUT.

    MODEL: a folder, a name on the hub or a GGUF file. DATA: files (.json, .jsonl, .parquet, .txt), folders or data
    sets on the hub, one or several. OUT: a folder; a capture that was stopped is resumed. Under `accelerate launch -m
    fusekit.cli` or `torchrun -m fusekit.cli` each process takes its share; so do processes with --rank and --world, or
    those of `srun`, which start and end when they like. `fusekit run RECIPE OUT --until capture` captures all models
    of a recipe.
    """
    from fusekit.devices import OtherProcessError, Processes

    drop_noise()
    processes = Processes.started(options["rank"], options["world"])
    silent = options["quiet"] or not processes.is_first
    try:
        with sigterm_unwinds():
            store, prepared = _run(options, processes, lambda line: None if silent else click.echo(line, err=True))
    except (KeyboardInterrupt, TerminatedError) as error:
        if processes.is_first:
            _stopped(options["out"])
        sys.exit(status_of(error))
    except OtherProcessError:
        sys.exit(1)  # process 0 has said why
    except FusekitError:
        logging.info("the capture failed", exc_info=True)
        raise
    if not silent:
        _report(store, prepared, options["as_json"])


def _run(options: dict[str, Any], processes: Any, say: Callable[[str], None]) -> tuple[Store, Prepared]:
    from fusekit.capturing.capture import capture as run
    from fusekit.data.counts import DataCounts
    from fusekit.data.prepare import prepare

    data = DataSettings(path=list(options["data"]), **given({**options, "revision": None}, DataSettings))
    checkpoint, tokenizers = _models(options, data.train_on, say)
    counts = DataCounts(data.on_bad_row)
    prepared = prepare(_rows(options, data, tokenizers, counts), tokenizers, data.max_length, data.overlong, counts)
    if not prepared.rows:
        raise DataError(f"{', '.join(options['data'])}: there are no rows")
    say("\n".join(counts.lines))
    store = run(
        checkpoint,
        tokenizers[0],
        prepared.rows,
        options["out"],
        CaptureSettings(**given(options, CaptureSettings)),
        # The rows' cuts are compared too; these say why they differ.
        details={"max_length": data.max_length, "overlong": data.overlong},
        overwrite=options["overwrite"],
        ignore_estimates=options["ignore_estimates"],
        quiet=options["quiet"],
        notify=say,
        processes=processes,
    )
    return store, prepared


def _models(
    options: dict[str, Any], train_on: str, say: Callable[[str], None]
) -> tuple[Checkpoint, list[RowTokenizer]]:
    """The model, and how it and the others of the run read rows."""
    from fusekit.capturing.load import load_tokenizer
    from fusekit.capturing.manifest import date_of
    from fusekit.capturing.models import ModelChoice, find_checkpoint
    from fusekit.data.templates import ChatTemplate
    from fusekit.data.tokenize import RowTokenizer

    names = ("model", "revision", "trust_remote_code", "allow_pickle")
    try:
        engine = EngineSettings(**given(options, EngineSettings, "engine_"))
    except ValidationError as error:
        raise CaptureError("; ".join(f"engine: {found['msg']}" for found in error.errors())) from error
    choice = ModelChoice(**{name: options[name] for name in names}, engine=engine, **given(options, Load))
    checkpoint = find_checkpoint(choice)
    others = [find_checkpoint(ModelChoice(name), weights=False) for name in options["others"]]
    for line in chain.from_iterable(found.notices for found in (checkpoint, *others)):
        say(line)
    date = None if options["overwrite"] else date_of(options["out"])
    own = RowTokenizer(load_tokenizer(checkpoint), ChatTemplate.chosen(options["chat_template"]), train_on, date=date)
    others_read = [RowTokenizer(load_tokenizer(found), None, train_on, date=own.date) for found in others]
    return checkpoint, [own, *others_read]


def _rows(
    options: dict[str, Any], data: DataSettings, tokenizers: list[RowTokenizer], counts: DataCounts
) -> Iterator[Row]:
    from fusekit.data.prepare import pack_text
    from fusekit.data.reading import read_rows

    how = {"revision": options["data_revision"], "name": options["data_name"], "streaming": data.streaming}
    files = (read_rows(path, split=data.split, counts=counts, **how) for path in options["data"])
    limited = islice(chain.from_iterable(files), data.limit)
    return pack_text(limited, tokenizers, data.max_length) if data.pack else limited


def drop_noise() -> None:
    """Bars for loading weights and advice about generation: nothing that a capture's user could act on."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _stopped(out: Path) -> None:
    """Say what is there, and the command that resumes."""
    shards = len(list(out.glob("shard-*.parquet"))) if out.is_dir() else 0
    again = command_again("--overwrite")  # which would throw away what is there
    click.echo(f"fusekit: stopped; {shards} shards are whole in {out}. To resume:\n  {again}", err=True)


def _report(store: Store, prepared: Prepared, as_json: bool) -> None:
    from fusekit.cli.store_report import figures, summary_lines

    if as_json:
        click.echo(json.dumps(figures(store) | {"data": prepared.counts.as_dict()}, indent=1))
    else:
        click.echo("\n".join(summary_lines(store)))
