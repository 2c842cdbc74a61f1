"""Rows to a store: each process captures its shards, and a run that was stopped goes on with what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from fusekit.errors import CaptureError
from fusekit.representation.processes import Processes
from fusekit.representation.progress import Progress
from fusekit.representation.rows import Row
from fusekit.representation.teacher import Teacher
from fusekit.representation.tokenized_row import TokenizedRow
from fusekit.storage import output_lock
from fusekit.storage.manifest import StoreSpec
from fusekit.storage.shards import Blobs, Facts, facts_of
from fusekit.storage.store import Store
from fusekit.storage.writer import ShardPlan, StoreWriter, remove_store

MAX_QUARANTINED = 0.01
"""Share of the rows that may be quarantined before a capture stops."""


class Tokenizes(Protocol):
    """Reads rows for one model, as RowTokenizer does."""

    def tokenize(self, row: Row) -> TokenizedRow: ...


@dataclass(frozen=True)
class CaptureOptions:
    """How a capture runs; nothing here changes what a store holds.

    Attributes:
        overwrite: start anew where a store is.
        quiet: no progress.
        max_quarantined: share of all rows for which the model may give no distribution; one row always may.
        on_shard: called after each shard with its number and that of all shards that this process had to write.
    """

    overwrite: bool = False
    quiet: bool = False
    max_quarantined: float = MAX_QUARANTINED
    on_shard: Callable[[int, int], None] = lambda _done, _all: None


def data_fingerprint(rows: Sequence[Row]) -> str:
    """xxh3-128 of the rows in order: their keys, where they are cut, and their sources of data."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(f"{row.key} {row.cut} {row.dataset!r}\n".encode())
    return digest.hexdigest()


def capture(
    rows: Sequence[Row],
    tokenizer: Tokenizes,
    load: Callable[[], Teacher],
    *,
    out: Path | str,
    spec: Callable[[], StoreSpec],
    options: CaptureOptions | None = None,
    processes: Processes | None = None,
) -> Store:
    """Capture what a model says about rows into a store, or what is missing of it.

    Every process of the run calls it with the same arguments. Shard i is written by process i % world; the whole store
    is there when it returns, in all of them. What was written before a failure stays, and counts at the next call.

    Args:
        rows: each content once, in the order of the store.
        tokenizer: reads them for this model.
        load: the model; called only if there is something to capture.
        out: folder of the store.
        spec: what the store is made from; called in process 0.
        options, processes: see there; by default the processes of the launcher.

    Raises:
        CaptureError: see :meth:`Teacher.score`; too many rows without a distribution.
        StorageError: another run writes ``out``; it holds something else, or a store made from something else (says
            what differs); the disk failed.
    """
    options, processes = options or CaptureOptions(), processes or Processes.current()
    path, keys, world = Path(out).resolve(), [row.key for row in rows], processes.world
    with ExitStack() as held:
        opened: list[StoreWriter] = []

        def start() -> StoreSpec:
            # Process 0 says what stands in the way before the others look; its lock is the run's.
            held.enter_context(output_lock(path))
            if options.overwrite:
                remove_store(path)
            opened.append(StoreWriter(path, spec(), keys, world=world))
            _refuse_quarantined(opened[0], options.max_quarantined)
            return opened[0].spec

        agreed = processes.first_then_all(start)
        writer = opened[0] if opened else StoreWriter(path, agreed, keys, processes.rank, world)
        if missing := writer.missing_shards():
            _Shards(rows, tokenizer, load(), writer, options).write(missing)
        processes.wait()

        def finish() -> None:
            _refuse_quarantined(writer, options.max_quarantined)
            writer.finish()

        processes.first_then_all(finish)
    return Store.open(out)  # errors and reports name it as the caller does


@dataclass(frozen=True)
class _Shards:
    """Captures shards of rows and commits them."""

    rows: Sequence[Row]
    tokenizer: Tokenizes
    teacher: Teacher
    writer: StoreWriter
    options: CaptureOptions

    def write(self, missing: list[ShardPlan]) -> None:
        """Raises CaptureError when more rows have no distribution than may."""
        world = self.writer.world
        label = "capturing" if world == 1 else f"capturing (process 0 of {world})"
        total = sum(plan.stop - plan.start for plan in missing)
        with Progress(total, quiet=self.options.quiet or self.writer.rank > 0, label=label) as progress:
            for done, plan in enumerate(missing, 1):
                some = self._write_one(plan, progress)
                self.options.on_shard(done, len(missing))
                if some:
                    _refuse_quarantined(self.writer, self.options.max_quarantined)

    def _write_one(self, plan: ShardPlan, progress: Progress) -> int:
        """One shard; returns how many of its rows are quarantined."""
        rows = self.rows[plan.start : plan.stop]
        tokenized = [self.tokenizer.tokenize(row) for row in rows]
        encoded: dict[int, tuple[Facts, Future[bytes]]] = {}
        quarantined: dict[int, str] = {}
        # Encoded as they come, beside the next batch: the rows of a shard take a tenth of the memory then.
        with ThreadPoolExecutor(1) as pool:
            for batch in self.teacher.score_batches(tokenized, [row.dataset for row in rows]):
                for index, scored in batch:
                    if isinstance(scored, str):
                        quarantined[index] = scored
                    else:
                        encoded[index] = (facts_of(scored), pool.submit(self.writer.codec.encode, scored))
                progress.advance(len(batch), sum(len(tokenized[index]) for index, _ in batch))
        order = sorted(encoded)
        blobs = Blobs([encoded[i][1].result() for i in order], [encoded[i][0] for i in order])
        found = {rows[i].key: quarantined[i] for i in sorted(quarantined)}
        self.writer.write_blobs(plan, blobs, found)
        return len(found)


def _refuse_quarantined(writer: StoreWriter, share: float) -> None:
    """Raises CaptureError when more rows of all shards, those of earlier runs too, have no distribution than may."""
    quarantined, total = writer.quarantined(), len(writer.keys)
    allowed = max(1, int(share * total))
    if len(quarantined) > allowed:
        key, why = next(iter(quarantined.items()))
        raise CaptureError(
            f"{writer.path}: {len(quarantined)} rows have no distribution, more than the {allowed} of {total} that may "
            f"(--max-quarantined {share:g}); the first is {key}: {why}. Are the model's weights whole, and is its "
            "dtype one that it was trained for? If so many may be missing, raise the limit: what is captured stays"
        )
