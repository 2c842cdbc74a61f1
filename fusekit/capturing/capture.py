"""A model and examples to a store: prepared, estimated, compared with what is there, captured shard by shard."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import xxhash
from pydantic import ValidationError

from fusekit.artifacts import differences, refuse_changes
from fusekit.capturing.engines import Opening, spread
from fusekit.capturing.models import (
    Checkpoint,
    ModelChoice,
    find_checkpoint,
    load_tokenizer,
    loading_mistakes,
    parameters,
    text_config,
    valid_ids,
)
from fusekit.capturing.server import Scorer
from fusekit.capturing.shards import Columns
from fusekit.capturing.store import Setting, Store, StoreSpec, date_of, manifest_of
from fusekit.capturing.teacher import head_dtype, memory_needs, rows_per_shard
from fusekit.capturing.writer import ShardPlan, StoreWriter, remove_store
from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import DataCounts, rows_of
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Need, Processes, disk, progress, refuse_lacking, worth_saying
from fusekit.disk import counted, output_lock, refuse_file, remove
from fusekit.errors import CaptureError, DataError, ModelError
from fusekit.settings import CaptureSettings, DataSettings, EngineSettings
from fusekit.types import Row, TokenizedRow
from fusekit.yaml import nearest, setting_problem

_SAMPLED_ROWS = 200

PATIENCE = 600.0
"""Seconds that a rank waits for the others to begin or to complete a store."""


class Tokenizes(Protocol):
    """Reads rows for one model, as RowTokenizer does."""

    def tokenize(self, row: Row) -> TokenizedRow: ...


class Capture:
    """A model and rows that are captured into a store, or what is missing of it. Every process of a run makes the same.

    It keeps the model when it runs for several ranks in turn.

    Args:
        checkpoint: the model, found but not loaded.
        tokenizer: the model's own, under the template of the run.
        rows: prepared, so that every model of the run reads the same bytes (:func:`fusekit.data.prepare.prepare`).
        out: folder of the store.
        settings: what is kept of the distributions, and how they are captured.
        details: what else decides what the store holds, to be compared when the capture is resumed.
        overwrite: start over where there is a store.
        ignore_estimates: start although disk or memory do not seem to suffice.
        quiet: show no progress.
        notify: called with lines for the user, in process 0.

    Raises:
        CaptureError: the engine cannot capture what is asked for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: RowTokenizer,
        rows: Sequence[Row],
        out: Path | str,
        settings: CaptureSettings | None = None,
        *,
        details: Mapping[str, Setting] | None = None,
        overwrite: bool = False,
        ignore_estimates: bool = False,
        quiet: bool = False,
        notify: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.checkpoint, self.tokenizer, self.rows, self.out = checkpoint, tokenizer, rows, Path(out)
        self.details, self.overwrite, self.ignore_estimates = dict(details or {}), overwrite, ignore_estimates
        self.quiet, self.notify = quiet, notify
        for field, mistake in loading_mistakes(checkpoint.choice):
            raise CaptureError(f"{checkpoint.choice.model}: {field}: {mistake}")
        settings = settings or CaptureSettings()
        self.vocabulary = vocabulary_size(checkpoint, tokenizer)
        changes = {
            "top_k": min(settings.top_k, self.vocabulary),
            "head_dtype": head_dtype(settings, checkpoint.config, parameters(checkpoint)),
        }
        self.settings = settings.model_copy(update=changes)
        self._opening = Opening(checkpoint, tokenizer, self.settings, self.vocabulary, self._say)
        self._processes: Processes | None = None
        self._spec: StoreSpec | None = None
        self._scorer: Scorer | None = None

    def run(self, processes: Processes | None = None) -> Store:
        """Capture this process's share.

        processes: of the run; by default those of the launcher.

        Raises:
            CaptureError: the model cannot be loaded or does not fit; see :func:`capture_rows` for the rest.
            StorageError: the store cannot be written, or was made from other inputs.
        """
        self._processes = processes = processes or Processes.current()
        choice = self.checkpoint.choice
        if choice.device_map and processes.world > 1 and processes.connected:
            raise CaptureError(
                f"a model that --device-map spreads over the devices runs in one process, not in {processes.world}: "
                "start without a launcher, or leave the option out to load a whole model in every process"
            )
        if self._spec is None and not all(row.is_text for row in self.rows):
            facts = self.tokenizer.facts
            day = f", which prints the date {facts['date']}" if "date" in facts else ""
            self._say(f"chat template of {choice.model}: {facts['chat_template']}{day}")
        return capture_rows(
            self.rows,
            self.tokenizer,
            self._load,
            self.out,
            self._made_from,
            max_quarantined=self.settings.max_quarantined,
            overwrite=self.overwrite,
            quiet=self.quiet,
            processes=processes,
        )

    def _say(self, line: str) -> None:
        if self._processes is not None and self._processes.is_first:
            self.notify(line)

    @cached_property
    def _tokens(self) -> int:
        """How many tokens the rows have, about, from some of them."""
        some = spread(self.rows, _SAMPLED_ROWS)
        return sum(len(self.tokenizer.tokenize(row)) for row in some) * len(self.rows) // max(len(some), 1)

    def _made_from(self) -> StoreSpec:
        """What the store is made from; refuses what does not fit, before anything is written. Weights may be read."""
        if self._spec is not None:
            return self._spec
        assert self._processes is not None
        known = None if self.overwrite else manifest_of(self.out)
        there = known.files.items() if known is not None and known.complete else None
        whole = there is not None and all(record.is_at(self.out / name) for name, record in there)
        if not whole:
            self._refuse_what_does_not_fit(self._processes)
        in_shards = known.spec.rows_per_shard if known is not None else None
        if in_shards is None:
            # A server is taken to have an accelerator.
            device = "cuda" if self.checkpoint.choice.engine.url else self._processes.device.type
            in_shards = rows_per_shard(parameters(self.checkpoint), self._tokens / max(len(self.rows), 1), device)
        settings = self.settings.model_copy(update={"rows_per_shard": self.settings.rows_per_shard or in_shards})
        if known is not None and whole:  # its engine may be gone
            engine = {name: one for name, one in known.spec.details.items() if name.startswith("engine_")}
        else:
            engine = self._opening.details()
        details = self.details | engine
        self._spec = store_spec(self.checkpoint, self.tokenizer, self.rows, self.vocabulary, settings, details=details)
        return self._spec

    def _refuse_what_does_not_fit(self, processes: Processes) -> None:
        checkpoint, tokens = self.checkpoint, self._tokens
        sizes = {"rows": len(self.rows), "tokens": tokens, "labels": tokens}  # if every token is a label
        store = store_bytes(**sizes, vocabulary=self.vocabulary, top_k=self.settings.top_k)
        if self.out.is_dir():  # what an interrupted run has written already
            store = max(0, store - sum(file.stat().st_size for file in self.out.glob("shard-*.parquet")))
        wanted = [(self.out, store, f"{len(self.rows)} captured examples, at most")]
        if checkpoint.snapshot and (size := checkpoint.download_bytes):
            wanted.append((checkpoint.snapshot.cache, size, f"download of {checkpoint.choice.model}"))
        needs = disk(wanted)
        if checkpoint.choice.engine.probe is None:  # else transformers loads no model
            needs += memory_needs(checkpoint, self.settings, processes)
        for line in worth_saying(needs):
            self._say(line)
        if not self.ignore_estimates:
            refuse(needs)
        checkpoint.fetch(bar=not self.quiet)

    def _load(self) -> Scorer:
        assert self._processes is not None
        if self._scorer is None:
            if self._spec is not None:  # made from what a whole store says, of which a shard turned out to be damaged
                changed = differences(self._spec.details, self._spec.details | self._opening.details())
                refuse_changes(self.out, changed, f"remove {self.out} to start over")
            self.checkpoint.fetch()
            self._scorer = self._opening.start(self.rows, self._processes.device)
        return self._scorer


def capture_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizes,
    load: Callable[[], Scorer],
    out: Path | str,
    spec: Callable[[], StoreSpec],
    *,
    max_quarantined: float = 0.01,
    overwrite: bool = False,
    quiet: bool = False,
    processes: Processes | None = None,
) -> Store:
    """Capture what anything that scores rows says about them, or what is missing of it.

    Every process of the run calls it with the same arguments. Shard i is written by process i % world; the whole store
    is there when it returns, in all of them. What was written before a failure stays, and counts at the next call.
    Separate processes do not wait for each other: the last one completes the store, the others return what is there.

    Args:
        rows: each content once, in the order of the store.
        tokenizer: reads them for this model.
        load: the model; called only if there is something to capture.
        out: folder of the store.
        spec: what the store is made from; called in process 0.
        max_quarantined: share of all rows for which the model may give no distribution; one row always may.
        overwrite, quiet, processes: as of :class:`Capture`.

    Raises:
        CaptureError: see :meth:`Teacher.score`; too many rows without a distribution.
        StorageError: another run writes ``out``; it holds something else, or a store made from other inputs (says
            what differs); the disk failed.
    """
    processes = processes or Processes.current()
    path, keys, rank, world = Path(out).resolve(), [row.key for row in rows], processes.rank, processes.world
    if overwrite and not processes.connected:
        raise CaptureError(
            f"{out}: separate ranks cannot start over, as each would remove what the others wrote: remove the folder "
            "first, and leave --overwrite out"
        )

    def check_quarantined() -> None:
        refuse_quarantined(path, writer.quarantined(), len(keys), max_quarantined)

    def capture() -> None:
        if missing := writer.missing_shards():
            scorer, check = load(), check_quarantined
            _capture_shards(writer, missing, rows, tokenizer, scorer, check=check, processes=processes, quiet=quiet)

    with ExitStack() as held:
        if not processes.connected:
            # The same rank does not run twice.
            held.enter_context(output_lock(path.with_name(f"{path.name}.rank{rank}")))
            made_from = spec()  # each reads its own copy of the weights: not while the others wait for the lock
            with output_lock(path, PATIENCE):
                writer = StoreWriter(path, made_from, keys, rank, world)
            capture()
            with output_lock(path, PATIENCE):  # whoever is last completes the store
                known = manifest_of(path)
                if known is None or not known.complete:
                    check_quarantined()
                    if writer.lacking():
                        return Store.open(out, incomplete=True)
                    writer.finish()
                for lock in _rank_locks(path):
                    remove(lock)
                return Store.open(out)

        opened: list[StoreWriter] = []

        def start() -> StoreSpec:
            # Process 0 says what stands in the way before the others look; its lock is the run's.
            held.enter_context(output_lock(path))
            for lock in _rank_locks(path):
                with output_lock(path.with_name(lock.name.removeprefix(".").removesuffix(".fusekit.lock"))):
                    remove(lock)  # of a rank that is gone
            if overwrite or not any(path.glob("shard-*")):  # of a run that ended before its first shard
                remove_store(path)
            opened.append(StoreWriter(path, spec(), keys, world=world))
            return opened[0].spec

        def finish() -> None:
            check_quarantined()
            writer.finish()

        made_from = processes.first_then_all(start)
        writer = opened[0] if opened else StoreWriter(path, made_from, keys, rank, world)
        capture()
        processes.wait()
        processes.first_then_all(finish)
        return Store.open(out)  # errors and reports name it as the caller does


def _rank_locks(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.rank*.fusekit.lock"))


def _capture_shards(
    writer: StoreWriter,
    missing: Sequence[ShardPlan],
    rows: Sequence[Row],
    tokenizer: Tokenizes,
    scorer: Scorer,
    *,
    check: Callable[[], None],
    processes: Processes,
    quiet: bool,
) -> None:
    """Capture and commit what this process has to write, shard by shard."""
    seen, total = 0, sum(plan.stop - plan.start for plan in missing)
    label = "capturing" if processes.world == 1 else f"capturing (process {processes.rank} of {processes.world})"
    # Encoded as they come, beside the next batch: the rows of a shard take a third of the memory then.
    with progress(total, label, "example", quiet=quiet or not processes.is_first) as bar, ThreadPoolExecutor(1) as pool:
        for plan in missing:
            own = rows[plan.start : plan.stop]
            tokenized = [tokenizer.tokenize(row) for row in own]
            encoded: dict[int, Future[Columns]] = {}
            quarantined: dict[str, str] = {}
            for batch in scorer.score_batches(tokenized, [row.dataset for row in own]):
                for index, scored in batch:
                    seen += len(tokenized[index])
                    if isinstance(scored, str):
                        quarantined[own[index].key] = scored
                    else:
                        encoded[index] = pool.submit(writer.codec.encode, scored)
                if not bar.disable:
                    rate = seen / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(len(batch))
            writer.write_shard(plan, [encoded[index].result() for index in sorted(encoded)], quarantined)
            if quarantined:
                check()


def refuse_quarantined(what: object, quarantined: Mapping[str, str], total: int, share: float) -> None:
    """Refuse more than this share of ``total`` examples, and more than one, without a distribution: why, by key."""
    allowed = max(1, int(share * total))
    if len(quarantined) > allowed:
        key, why = next(iter(quarantined.items()))
        raise CaptureError(
            f"{what}: {counted(len(quarantined), 'example')} without a distribution, more than the {allowed} of "
            f"{total} that may (max_quarantined is {share:g}); the first is {key}: {why}. Are the model's weights "
            "whole, and is its dtype one that it was trained for? If so many may be missing, raise the limit: what is "
            "captured stays"
        )


def store_spec(
    checkpoint: Checkpoint,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    vocabulary: int,
    settings: CaptureSettings,
    *,
    details: Mapping[str, Setting] | None = None,
) -> StoreSpec:
    """What a store is made from: model, tokenizer and template, data, and every setting that changes a value.

    settings: with the rows per shard and the head's dtype.
    """
    assert settings.rows_per_shard is not None
    choice = checkpoint.choice
    return StoreSpec(
        model=choice.model,
        model_fingerprint=checkpoint.fingerprint(),
        tokenizer=tokenizer.fingerprint,
        data=data_fingerprint(rows),
        vocabulary=vocabulary,
        rows_per_shard=settings.rows_per_shard,
        details=details_of(choice, tokenizer.train_on, settings) | tokenizer.facts | dict(details or {}),
        **settings.kept(vocabulary),
    )


def details_of(choice: ModelChoice, train_on: str, settings: CaptureSettings) -> dict[str, Setting]:
    """How a model is loaded and run, and which tokens are supervised: what else decides the values of a store."""
    return {
        "dtype": choice.dtype,
        "quantization": json.dumps(choice.quantization, sort_keys=True) if choice.quantization else None,
        "attn_implementation": choice.attn_implementation,
        "engine": choice.engine.kind,
        "head_dtype": settings.head_dtype if choice.engine.kind == "transformers" else None,
        "train_on": train_on,
    }


def data_fingerprint(rows: Sequence[Row]) -> str:
    """xxh3-128 of the rows in order: their keys, where they are cut, and their sources of data."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(f"{row.key} {row.cut} {row.dataset!r}\n".encode())
    return digest.hexdigest()


def vocabulary_size(checkpoint: Checkpoint, tokenizer: RowTokenizer) -> int:
    """Above every id that can be stored: the configuration's, or the tokenizer's where that has more."""
    return max(text_config(checkpoint.config).get("vocab_size") or 0, int(valid_ids(tokenizer.tokenizer)[-1]) + 1)


_ROW_BYTES = 64
_TOKEN_BYTES = 12
_VALUE_BITS = 10
"""Sizes in a store: of an example beside its tokens; of a token (id, coordinates, label); of a log-probability."""


def refuse(needs: Sequence[Need]) -> None:
    """Raise CaptureError if something does not fit."""
    way_out = (
        "Free some, write elsewhere, load the model smaller (--dtype bfloat16, --quantization) or over several devices "
        "(--device-map auto), or take smaller batches (--batch-tokens); --ignore-estimates starts it all the same"
    )
    refuse_lacking(needs, "this capture does not fit:", way_out, CaptureError)


def store_bytes(*, rows: int, tokens: int, labels: int, vocabulary: int, top_k: int) -> int:
    """Bytes of a store at most: of so many rows and tokens, of which ``labels`` have ``top_k`` entries."""
    top_k = min(top_k, vocabulary)
    bits = top_k * (max(vocabulary // top_k, 1).bit_length() + 1 + _VALUE_BITS)
    return rows * _ROW_BYTES + tokens * _TOKEN_BYTES + labels * (bits // 8)


CUTS = ("max_length", "overlong", "train_on", "on_bad_row", "pack")
"""Fields of DataSettings that say what becomes of examples, wherever they are from."""


def capture_job(
    model: str | Path | ModelChoice,
    dataset: Any,
    out: str | Path,
    *,
    engine: str | Sequence[str] = "transformers",
    chat_template: str = "own",
    others: Sequence[str] = (),
    counts: DataCounts | None = None,
    say: Callable[[str], None] = lambda _line: None,
    overwrite: bool = False,
    ignore_estimates: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Capture:
    """What :func:`capture` does, before it is done. counts: what the reader of ``dataset`` counts."""
    if not isinstance(model, (str, PathLike, ModelChoice)):
        raise ModelError(f"model is {type(model).__name__}: give its name on the hub, its folder or a ModelChoice")
    refuse_file(Path(out))
    known = (*CUTS, *CaptureSettings.model_fields)
    if unknown := [name for name in settings if name not in known]:
        raise DataError(f"capture has no setting {unknown[0]!r}{nearest(unknown[0], known)}")
    try:
        data = DataSettings(path=".", **{name: settings.pop(name) for name in CUTS if name in settings})
        how = CaptureSettings(**settings)
        urls = [engine] if isinstance(engine, str) else list(engine)
        where = EngineSettings(**({"url": urls} if "://" in urls[0] else {"name": urls[0]}))
    except ValidationError as error:
        raise DataError("; ".join(map(setting_problem, error.errors()))) from error
    choice = model if isinstance(model, ModelChoice) else ModelChoice(str(model), engine=where)
    checkpoint = find_checkpoint(choice)
    beside = [find_checkpoint(ModelChoice(name), weights=False) for name in others]
    for line in [line for found in (checkpoint, *beside) for line in found.notices]:
        say(line)
    date = None if overwrite else date_of(Path(out))
    own = RowTokenizer(load_tokenizer(checkpoint), ChatTemplate.chosen(chat_template), data.train_on, date=date)
    readers = [own, *(RowTokenizer(load_tokenizer(one), None, data.train_on, date=own.date) for one in beside)]
    counts = DataCounts(data.on_bad_row) if counts is None else counts
    rows = rows_of(dataset, counts)
    if data.pack:
        rows = pack_text(rows, readers, data.max_length)
    prepared = prepare(rows, readers, data.max_length, data.overlong, counts)
    if not prepared.rows:
        raise DataError(f"no example is left: {prepared.counts}")
    for line in counts.lines:
        say(line)
    # The rows' cuts are compared when the capture is resumed; these say why they differ.
    details = {"max_length": data.max_length, "overlong": data.overlong}
    return Capture(
        checkpoint,
        own,
        prepared.rows,
        out,
        how,
        details=details,
        overwrite=overwrite,
        ignore_estimates=ignore_estimates,
        quiet=quiet,
        notify=say,
    )


def capture(model: str | Path | ModelChoice, dataset: Any, out: str | Path, **options: Any) -> Store:
    """Capture what a model says about examples: its top-k rows at every label. An unfinished store is resumed.

    >>> from fusekit import capture
    >>> messages = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    >>> store = capture("demo/models/numbers", [{"messages": messages}], folder, quiet=True)
    >>> len(store), store.spec.top_k
    (1, 10)

    Args:
        model: a folder, a name on the Hugging Face hub, the path of a GGUF file, or a ModelChoice that says how it is
            loaded (dtype, device_map, quantization, revision).
        dataset: a ``datasets.Dataset``, a list of records, or paths of files: messages, ShareGPT's conversations,
            instruction triples or text.
        out: folder of the store.
        engine: what runs a model that is given by name: ``transformers``, ``vllm``, or the URLs of servers of it.
        chat_template: ``own``, the name of a shipped template, or a jinja file.
        others: other models of the run: examples are cut where all of them read the same bytes.
        say: called with lines for the user.
        overwrite: start over where there is a store.
        ignore_estimates: start although disk or memory do not seem to suffice.
        quiet: show no progress.
        settings: fields of :class:`~fusekit.settings.CaptureSettings` (top_k, temperature, ...), and
            ``max_length``, ``overlong``, ``train_on``, ``on_bad_row`` and ``pack`` of
            :class:`~fusekit.settings.DataSettings`.

    Returns:
        The store, which :class:`~fusekit.FusionTrainer` takes as a teacher.

    Raises:
        CaptureError: the model cannot be found or loaded, or does not fit.
        DataError: there is no example that can be read; an unknown setting, with the nearest name.
        StorageError: the store was made from other inputs (says which), or the disk fails.
    """
    return capture_job(model, dataset, out, **options).run()
