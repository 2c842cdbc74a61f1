"""``fusekit capture``: parse, call, print."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from fusekit.cli.common import JSON, command_again, drop_noise, given, interruptible, options_of, print_json
from fusekit.disk import counted, human
from fusekit.errors import CaptureError
from fusekit.recipe.sections import Load
from fusekit.settings import CaptureSettings, DataSettings, EngineSettings

if TYPE_CHECKING:
    from fusekit.capturing.store import Store
    from fusekit.data.reading import DataCounts

_SHOWN_QUARANTINED = 5
_QUANTIZATIONS = {
    "4bit": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
    "8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def _quantization(_context: click.Context, _option: click.Parameter, value: Any) -> dict[str, Any] | None:
    if isinstance(value, str) and value not in _QUANTIZATIONS:
        raise click.BadParameter(f"{value!r} is neither {', '.join(_QUANTIZATIONS)} nor a JSON object")
    return _QUANTIZATIONS[value] if isinstance(value, str) else value


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
    type=JSON,
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
    from fusekit.devices import Processes

    drop_noise()
    processes = Processes.started(options["rank"], options["world"])
    silent, out = options["quiet"] or not processes.is_first, options["out"]

    def stopped() -> None:
        if processes.is_first:
            shards = len(list(out.glob("shard-*.parquet"))) if out.is_dir() else 0
            again = command_again("--overwrite")  # which would throw away what is there
            held = f"{out} has {counted(shards, 'whole shard')}"
            click.echo(f"fusekit: stopped; {held}. To resume:\n  {again}", err=True)

    with interruptible(stopped):
        store, counts = _run(options, processes, lambda line: None if silent else click.echo(line, err=True))
    if silent:
        return
    if options["as_json"]:
        print_json(figures(store) | {"data": dataclasses.asdict(counts)})
    else:
        click.echo(summary(store))


def _run(options: dict[str, Any], processes: Any, say: Callable[[str], None]) -> tuple[Store, DataCounts]:
    from fusekit.capturing.capture import CUTS, capture_job
    from fusekit.capturing.models import ModelChoice
    from fusekit.data.reading import DataCounts, read_rows

    of_data = {**options, "name": options["data_name"], "revision": options["data_revision"]}
    data = DataSettings(path=list(options["data"]), **given(of_data, DataSettings))
    try:
        engine = EngineSettings(**given(options, EngineSettings, "engine_"))
    except ValidationError as error:
        raise CaptureError("; ".join(f"engine: {found['msg']}" for found in error.errors())) from error
    names = ("model", "revision", "trust_remote_code", "allow_pickle")
    choice = ModelChoice(**{name: options[name] for name in names}, engine=engine, **given(options, Load))
    counts = DataCounts(data.on_bad_row)
    how = data.model_dump(include={"split", "revision", "name", "streaming", "limit"})
    rows = read_rows(data.path, counts=counts, **how)
    asked = {name: options[name] for name in ("chat_template", "others", "overwrite", "ignore_estimates", "quiet")}
    settings = data.model_dump(include=set(CUTS)) | given(options, CaptureSettings)
    job = capture_job(choice, rows, options["out"], counts=counts, say=say, **asked, **settings)
    return job.run(processes), counts


def figures(store: Store) -> dict[str, Any]:
    """What is in a store, in plain types: in all, and by data set."""
    summary = store.summary

    def share(rows: Any) -> dict[str, Any]:
        labels, content = int(summary.labels[rows].sum()), int(summary.bytes[rows].sum())
        nats = float(summary.cross_entropy[rows].sum())
        return {
            "rows": int(summary.labels[rows].size),
            "tokens": int(summary.tokens[rows].sum()),
            "labels": labels,
            "content_bytes": content,
            "cross_entropy_per_label": nats / max(labels, 1),
            "bits_per_byte": nats / math.log(2) / max(content, 1),
        }

    return {
        "path": str(store.path),
        "complete": store.complete,
        "made_from": store.spec.model_dump(),
        "total": share(slice(None)),
        "datasets": {name: share(summary.dataset == number) for number, name in enumerate(summary.datasets)},
        "shards": len(store.records),
        "file_bytes": sum(record.size for record in store.records.values()),
        "quarantined": {row.key: row.reason for row in store.quarantined},
    }


def summary(store: Store) -> str:
    """A table of a store by data set, and the examples that have no distribution."""
    found, spec = figures(store), store.spec
    size = f"{counted(found['shards'], 'shard')}, {human(found['file_bytes'])}"
    size += "" if store.complete else ", not finished"
    width = max(len(name) for name in ("all", *found["datasets"]))
    lines = [
        f"{store.path}: top {spec.top_k} of {spec.vocabulary} ids from {spec.model}, {size}",
        f"  {'':<{width}}  {'examples':>8} {'tokens':>10} {'labels':>10} {'nats/label':>10} {'bits/byte':>9}",
    ]
    for name, share in [*found["datasets"].items(), ("all", found["total"])]:
        lines.append(
            f"  {name:<{width}}  {share['rows']:>8} {share['tokens']:>10} {share['labels']:>10} "
            f"{share['cross_entropy_per_label']:>10.4f} {share['bits_per_byte']:>9.4f}"
        )
    if found["quarantined"]:
        lines.append(f"  {counted(len(found['quarantined']), 'example')} without a distribution:")
        lines += [f"    {key}  {reason}" for key, reason in list(found["quarantined"].items())[:_SHOWN_QUARANTINED]]
    return "\n".join(lines)
