"""``fusekit distill``: parse, call, print."""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from fusekit.cli.recipe import is_recipe, refuse_options
from fusekit.cli.run import run_recipe
from fusekit.cli.stopping import TerminatedError, sigterm_unwinds, status_of
from fusekit.errors import DistillationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusekit.data.tokenize import RowTokenizer
    from fusekit.distillation.inputs import Inputs, Source
    from fusekit.distillation.settings import DistillSettings
    from fusekit.types import Row

# option -> (section, field)
_FIELDS = {
    "mode": ("fusion", "mode"),
    "function": ("fusion", "function"),
    "level": ("fusion", "level"),
    "metric": ("fusion", "metric"),
    "tokens": ("alignment", "tokens"),
    "vocabulary": ("alignment", "vocabulary"),
    "loss": ("training", "loss"),
    "truncation": ("training", "truncation"),
    "lm_weight": ("training", "lm_weight"),
    "temperature": ("training", "temperature"),
    "num_train_epochs": ("training", "num_train_epochs"),
    "learning_rate": ("training", "learning_rate"),
    "batch_size": ("training", "batch_size"),
    "per_device_train_batch_size": ("training", "per_device_train_batch_size"),
    "dtype": ("training", "dtype"),
    "bf16": ("training", "bf16"),
    "activation_checkpointing": ("training", "activation_checkpointing"),
    "seed": ("training", "seed"),
    "dataloader_num_workers": ("training", "dataloader_num_workers"),
}


@click.command("distill")
@click.argument("pivot")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="Rows that were captured: files, folders or hub ids (repeatable). Not with a recipe, which names its own.",
)
@click.option("--split", default="train", show_default=True, help="Split of a data set on the hub.")
@click.option("--limit", type=click.IntRange(min=1), help="Most rows to read of the data.")
@click.option("--pack", is_flag=True, help="Pack plain text into blocks, as the stores were captured with --pack.")
@click.option(
    "--max-length", default=2048, show_default=True, type=click.IntRange(min=2), help="Tokens of a packed block."
)
@click.option("--pivot-store", type=click.Path(path_type=Path), help="What the pivot said about the rows.")
@click.option(
    "--source-store",
    "sources",
    multiple=True,
    metavar="NAME=STORE[:TOKENIZER]",
    help="What a source said, and its tokenizer if it is not that of the model that the store names (repeatable).",
)
@click.option(
    "--preset",
    default="fusekit",
    show_default=True,
    help="fusekit, fusechat, fusellm, uld, gold or sft: the values of every setting that is not given.",
)
@click.option("--mode", type=click.Choice(["pairwise", "joint"]), help="One target per source, or one from all.")
@click.option("--function", help="What becomes of several models' rows: min_ce, avg_ce, ...")
@click.option("--level", type=click.Choice(["sequence", "token"]), help="Choose per row or at every label.")
@click.option(
    "--metric", type=click.Choice(["projected_ce", "bits_per_byte", "token_ce"]), help="What a teacher is judged by."
)
@click.option("--tokens", type=click.Choice(["span", "dtw"]), help="Token alignment: exact, or the papers'.")
@click.option("--vocabulary", help="Vocabulary map: em, mined, ms or prefix; matched or none.")
@click.option("--loss", help="ce, kl, reverse_kl, js, uld_topk or gold.")
@click.option("--truncation", type=click.Choice(["tail", "renormalize"]), help="What is done about the rest of a row.")
@click.option("--lm-weight", type=float, help="The least weight of the text itself; 1 is plain fine-tuning.")
@click.option("--temperature", type=float, help="Of the rows and the loss.")
@click.option("--num-train-epochs", type=float, help="Passes over the rows.")
@click.option("--learning-rate", type=float, help="Of AdamW, at its highest.")
@click.option("--batch-size", type=int, help="Rows per optimizer step, over all processes.")
@click.option("--per-device-train-batch-size", type=int, help="Rows at once on one device.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "auto"]), help="Of the weights while training.")
@click.option("--bf16/--no-bf16", default=None, help="Compute in bfloat16.")
@click.option(
    "--activation-checkpointing/--no-activation-checkpointing", default=None, help="Spend time to save memory."
)
@click.option("--seed", type=int, help="Of everything that is drawn.")
@click.option("--dataloader-num-workers", type=int, help="Data loader processes.")
@click.option(
    "--lora",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Train an adapter; a field of peft's LoraConfig, r=16 for one (repeatable).",
)
@click.option(
    "--set",
    "extra",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Any other setting, as alignment.one_hot=true, or trainer.FIELD=VALUE for TrainingArguments (repeatable).",
)
@click.option("--chat-template", help="For rows that no store has: own, a shipped name, or a file.")
@click.option("--resume", is_flag=True, help="Go on with what is there.")
@click.option("--overwrite", is_flag=True, help="Begin anew, replacing what is there.")
@click.option("--ignore-estimates", is_flag=True, help="Start although disk or memory do not seem to suffice.")
@click.pass_context
def distill(
    context: click.Context,
    /,
    pivot: str,
    out: Path,
    *,
    resume: bool,
    overwrite: bool,
    ignore_estimates: bool,
    **options: Any,
) -> None:
    """Train PIVOT on what other models know, into folders of OUT; or the targets of a recipe: RECIPE.yml OUT.

    With a recipe its own settings hold, as in fusekit run --only distill; it always goes on with what is there.

    Each target appears in OUT in one step, as a plain checkpoint with its tokenizer. Under `torchrun` or `accelerate
    launch` it trains on several devices.
    """
    if is_recipe(pivot):
        refuse_options(context, {"pivot", "out", "resume"})
        run_recipe(Path(pivot), out, only="distill")
        return
    if not options["data"]:
        raise click.UsageError("give PIVOT, OUT and --data; or a recipe (.yml) and OUT")
    if resume and overwrite:
        raise click.UsageError("--resume goes on with what is there, --overwrite replaces it: give one")
    from fusekit.devices import is_main
    from fusekit.distillation.run import distill as run

    settings = _settings(options)
    inputs = _inputs(pivot, options)
    say = _say_to(sys.stderr)
    try:
        with sigterm_unwinds():
            made = run(
                inputs, settings, out, resume=resume, overwrite=overwrite, ignore_estimates=ignore_estimates, say=say
            )
    except (KeyboardInterrupt, TerminatedError) as error:
        say("fusekit: stopped; checkpoints and finished targets are kept. The same command with --resume goes on.")
        sys.exit(status_of(error))
    if is_main():
        click.echo("\n".join(map(str, made)))


def _say_to(stream: Any) -> Callable[[str], None]:
    return lambda line: click.echo(line, file=stream)


def _settings(options: dict[str, Any]) -> DistillSettings:
    from fusekit.distillation.settings import DistillSettings

    changes: dict[str, dict[str, Any]] = {}
    for option, (section, field) in _FIELDS.items():
        if options[option] is not None:
            changes.setdefault(section, {})[field] = options[option]
    if options["lora"]:
        changes.setdefault("training", {})["lora"] = dict(_assignment(text) for text in options["lora"])
    for text in options["extra"]:
        name, value = _assignment(text)
        section, dot, field = name.partition(".")
        if not dot:
            raise click.UsageError(f"--set {text}: write SECTION.FIELD=VALUE, for example training.warmup_steps=0.1")
        if section == "trainer":
            changes.setdefault("training", {}).setdefault("trainer", {})[field] = value
        else:
            changes.setdefault(section, {})[field] = value
    return DistillSettings.of(options["preset"], changes)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.UsageError(f"{text!r} is no NAME=VALUE")
    return name, _value(value)


def _value(text: str) -> Any:
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text):
        return float(text)  # YAML takes 1e-5 for a string
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise click.UsageError(f"{text!r} is no YAML value: {error}") from error


def _inputs(pivot: str, options: dict[str, Any]) -> Inputs:
    from fusekit.capturing.models import ModelChoice
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
    reader = None
    if options["pivot_store"] is None or options["pack"]:
        reader = _row_tokenizer(pivot, options["chat_template"], _date_of(sources.values()))
    rows = _rows(options, list(sources.values()), reader)
    return Inputs(
        ModelChoice(pivot),
        rows,
        options["pivot_store"],
        sources,
        reader if options["pivot_store"] is None else None,
    )


def _rows(options: dict[str, Any], sources: list[Source], reader: RowTokenizer | None) -> list[Row]:
    from fusekit.capturing.store import Store
    from fusekit.data.prepare import pack_text
    from fusekit.data.reading import read_rows

    rows = chain.from_iterable(read_rows(path, split=options["split"]) for path in options["data"])
    read = rows if options["limit"] is None else islice(rows, options["limit"])
    if not options["pack"] or reader is None:
        return list(read)
    models = [source.tokenizer_choice(Store.open(source.store).spec.model).model for source in sources]
    tokenizers = [reader, *(_row_tokenizer(model, None) for model in models)]
    return list(pack_text(read, tokenizers, options["max_length"]))


def _date_of(sources: Iterable[Source]) -> datetime.date | None:
    """The day that the sources' templates printed, if one's does. Raises StorageError."""
    from fusekit.capturing.store import Store
    from fusekit.data.templates import kept_date

    dates = (kept_date(Store.open(source.store).spec.details.get("date")) for source in sources)
    return next((date for date in dates if date is not None), None)


def _row_tokenizer(model: str, template: str | None, date: datetime.date | None = None) -> RowTokenizer:
    from fusekit.capturing.load import load_tokenizer
    from fusekit.capturing.models import ModelChoice, find_checkpoint
    from fusekit.data.tokenize import RowTokenizer

    tokenizer = load_tokenizer(find_checkpoint(ModelChoice(model), weights=False))
    return RowTokenizer(tokenizer, _template(template, tokenizer), date=date)


def _template(name: str | None, tokenizer: Any) -> Any:
    from fusekit.data.templates import ChatTemplate, template_names

    if name is None or name == "own":
        return None if name is None else ChatTemplate.own(tokenizer)
    return ChatTemplate.named(name) if name in template_names() else ChatTemplate.from_file(name)
