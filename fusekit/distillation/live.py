"""Teachers without a store: scored while training reads, an optimizer step ahead of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fusekit.capturing.engine import Teacher
from fusekit.capturing.manifest import StoreSpec
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes
from fusekit.distillation.batching import BLANK, EpochSampler
from fusekit.errors import CaptureError
from fusekit.types import CapturedRow, IntArray, Row, TokenizedRow

AT_ONCE = 64
"""Examples that are scored together where no optimizer step says how many."""


class LiveTeacher:
    """What a loaded model says about examples, in place of a :class:`~fusekit.Store`: nothing is written.

    The log-probabilities are the model's own; those of a store are rounded, within its ``max_error``. Every epoch
    scores the examples again.

    Args:
        name: of the teacher.
        teacher: the model, which stays loaded.
        reader: how it reads examples.
        rows: the examples, each once, cut as this model reads them.
        spec: what a store of it would be made from.
        max_quarantined: share of the examples that may have NaN or infinite logits; one always may.

    Attributes:
        keys: of the examples.
        reader: how the model reads examples.
        records: none: there are no shards.
    """

    records: tuple[()] = ()

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        reader: RowTokenizer,
        rows: Sequence[Row],
        *,
        spec: StoreSpec,
        max_quarantined: float = 0.01,
    ) -> None:
        self.name, self.spec = name, spec
        self._teacher, self.reader = teacher, reader
        self._rows = {row.key: row for row in rows}
        self.keys = list(self._rows)
        self._allowed = max(1, int(max_quarantined * len(self.keys)))
        self._scored: dict[str, CapturedRow] = {}
        self._quarantined: dict[str, str] = {}
        self._lock = threading.Lock()  # a forward replaces parts of the model while it runs

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._rows and self.get(key) is not None

    def get(self, key: str) -> CapturedRow | None:
        """What the model says about an example; None where its logits are not finite."""
        if key not in self._scored and key not in self._quarantined:
            self.score([key])
        return self._scored.get(key)

    @property
    def tokenizer(self) -> Any:
        """The model's own, of transformers."""
        return self.reader.tokenizer

    def tokens(self, key: str) -> TokenizedRow:
        """An example as the model reads it."""
        return self.reader.tokenize(self._rows[key])

    def score(self, keys: Iterable[str]) -> None:
        """Score these examples together, and forget all others.

        Raises CaptureError: an example does not fit into memory; too many of them have NaN or infinite logits.
        """
        self._scored = self.said([self._rows[key] for key in keys if key in self._rows])

    def said(self, rows: Sequence[Row]) -> dict[str, CapturedRow]:
        """What the model says about any examples, by key, without those whose logits are not finite.

        Raises CaptureError as :meth:`score`.
        """
        with self._lock:
            scored = self._teacher.score([self.reader.tokenize(row) for row in rows], [row.dataset for row in rows])
        self._quarantined |= scored.quarantined
        if len(self._quarantined) > self._allowed:
            key, why = next(iter(self._quarantined.items()))
            raise CaptureError(
                f"{self.name}: {len(self._quarantined)} examples have no distribution, more than the {self._allowed} "
                f"of {len(self)} that may; the first is {key}: {why}. Are the model's weights whole, and is its dtype "
                "one that it was trained for?"
            )
        return {row.tokens.key: row for row in scored.rows}

    def bits_per_byte(self) -> dict[str, float]:
        """Of every example, by key, each process scoring its share: all processes call it."""
        from accelerate.utils import gather_object

        processes = Processes.current()
        own = self.keys[processes.rank :: processes.world]
        found: list[tuple[str, float]] = []
        for start in range(0, len(own), AT_ONCE):
            self.score(own[start : start + AT_ONCE])
            found += [(key, row.bits_per_byte) for key, row in self._scored.items()]
        return dict(gather_object(found) if processes.world > 1 else found)


class Ahead(Dataset[Any]):
    """A data set whose live teachers score the examples of an optimizer step together, in a thread of their own.

    While a step is trained on, the examples of the next are made. What is scored together follows from the seed and the
    epoch alone, so a run that resumes reads the same numbers.

    Args:
        data: the examples, a :class:`fusekit.distillation.batching.WithBlanks`.
        teachers: those of them that are to be scored.
        asks: whether a step of an epoch learns from answers that are not written yet; its examples are blanks that have
            their number under ``asked``. None: no step does.
        sampler: the order of an epoch, for all processes.
        batch: examples of a micro-batch of one process.
        steps: micro-batches of an optimizer step.
        processes: of the run.
    """

    def __init__(
        self,
        data: Any,
        teachers: Sequence[LiveTeacher],
        sampler: EpochSampler,
        *,
        batch: int,
        steps: int,
        processes: Processes,
        asks: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.data, self.teachers, self.sampler, self.asks = data, teachers, sampler, asks
        self.batch, self.steps, self.processes = batch, steps, processes
        self._pool = ThreadPoolExecutor(1, "teachers")
        self._epoch = -1
        self._blocks: list[list[int]] = []
        self._block_of: dict[int, int] = {}
        self._made: dict[int, Future[dict[int, Any]]] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if self._epoch != self.sampler.epoch:
            self._begin()
        block = self._block_of.get(index)
        if block is None:  # dropped from the epoch
            return self.data[index]
        self._made = {number: made for number, made in self._made.items() if number >= block}
        for number in (block, block + 1):
            if number < len(self._blocks) and number not in self._made:
                self._made[number] = self._pool.submit(self._make, number)
        return self._made[block].result()[index]

    def _begin(self) -> None:
        order = own_order(list(self.sampler), self.batch, self.processes).tolist()
        size = self.batch * self.steps
        self._epoch, self._made = self.sampler.epoch, {}
        self._blocks = [order[start : start + size] for start in range(0, len(order), size)]
        self._block_of = {index: number for number, block in enumerate(self._blocks) for index in block}

    def _make(self, number: int) -> dict[int, Any]:
        block = self._blocks[number]
        if self.asks is not None and self.asks(self._epoch, number):
            return {index: {**BLANK, "asked": index} for index in block}
        keys = [self.data.data.rows[index].key for index in block if index < len(self.data)]
        for teacher in self.teachers:
            teacher.score(keys)
        return {index: self.data[index] for index in block}


def own_order(order: Sequence[int], batch: int, processes: Processes) -> IntArray:
    """Of the examples of an epoch, those that accelerate gives to this process: micro-batches in turn, int64 [N]."""
    all_, together = np.asarray(order, np.int64), batch * processes.world
    if processes.world == 1:
        return all_
    whole = len(all_) // together * together
    own: IntArray = all_[:whole].reshape(-1, processes.world, batch)[:, processes.rank].ravel()
    return own
