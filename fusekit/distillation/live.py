"""Teachers without a store: scored while training reads, an optimizer step ahead of it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, Dataset

from fusekit.alignment.surfaces import vocabulary_surfaces
from fusekit.capturing.capture import data_fingerprint, refuse_quarantined, store_spec, vocabulary_size
from fusekit.capturing.engines import Opening
from fusekit.capturing.models import (
    Checkpoint,
    ModelChoice,
    find_checkpoint,
    load_model,
    load_tokenizer,
    longest_input,
    valid_ids,
)
from fusekit.capturing.server import Scorer
from fusekit.capturing.store import StoreSpec
from fusekit.capturing.teacher import Teacher, head_dtype
from fusekit.data.prepare import prepare
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes
from fusekit.distillation.batching import BLANK, EpochSampler
from fusekit.errors import DistillationError
from fusekit.settings import CaptureSettings
from fusekit.types import CapturedRow, Row, TokenizedRow

AT_ONCE = 64
"""Examples that are scored together where no optimizer step says how many."""


class LiveTeacher:
    """What a loaded model says about examples, in place of a :class:`~fusekit.Store`: nothing is written.

    Every epoch scores the examples again. load: what scores them, called once, and kept until :meth:`close`. rows: each
    once, cut as this model reads them. spec: what a store of it would be made from. max_quarantined: share of the
    examples that may have NaN or infinite logits; one always may. checkpoint: the model's files, if it was not given
    loaded.
    """

    records: Mapping[str, Any] = {}  # of shards, which a store has

    def __init__(
        self,
        name: str,
        load: Callable[[], Scorer],
        reader: RowTokenizer,
        rows: Sequence[Row],
        *,
        spec: StoreSpec,
        max_quarantined: float = 0.01,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.name, self.spec, self.checkpoint, self.reader = name, spec, checkpoint, reader
        self._load = load
        self._scorer: Scorer | None = None
        self._rows = {row.key: row for row in rows}
        self.keys = list(self._rows)
        self._max_quarantined = max_quarantined
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

    def tokens(self, key: str) -> TokenizedRow:
        """An example as the model reads it."""
        return self.reader.tokenize(self._rows[key])

    def score(self, keys: Iterable[str]) -> None:
        """Score these examples together, and forget all others."""
        self._scored = self.said([self._rows[key] for key in keys if key in self._rows])

    def said(self, rows: Sequence[Row]) -> dict[str, CapturedRow]:
        """What the model says about any examples, by key, without those whose logits are not finite.

        Raises CaptureError: too many of them are not.
        """
        self.open()
        assert self._scorer is not None
        found: dict[str, CapturedRow] = {}
        with self._lock:
            read = [self.reader.tokenize(row) for row in rows]
            for batch in self._scorer.score_batches(read, [row.dataset for row in rows]):
                for index, scored in batch:
                    if isinstance(scored, str):
                        self._quarantined[rows[index].key] = scored
                    else:
                        found[rows[index].key] = scored
        refuse_quarantined(self.name, self._quarantined, len(self), self._max_quarantined)
        return found

    def open(self) -> None:
        """Load what scores, if it is not loaded."""
        with self._lock:
            if self._scorer is None:
                self._scorer = self._load()

    def close(self) -> None:
        """Free what scores; the next use loads it again."""
        self._scorer, self._scored = None, {}
        gc.collect()

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
    epoch alone, so a run that resumes reads the same numbers. batch: examples of a micro-batch of one process; steps:
    micro-batches of an optimizer step. asks: whether a step of an epoch learns from answers that are not written yet;
    its examples are blanks that have their number under ``asked``.
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
            order, size = list(self.sampler), self.batch * self.steps
            if self.processes.world > 1:  # the micro-batches that accelerate gives to this process
                batches: Any = BatchSampler(self.sampler, self.batch, drop_last=True)
                batches = BatchSamplerShard(batches, self.processes.world, self.processes.rank)
                order = [index for batch in batches for index in batch]
            self._epoch, self._made = self.sampler.epoch, {}
            self._blocks = [order[start : start + size] for start in range(0, len(order), size)]
            self._block_of = {index: number for number, block in enumerate(self._blocks) for index in block}
        block = self._block_of.get(index)
        if block is None:  # dropped from the epoch
            return self.data[index]
        self._made = {number: made for number, made in self._made.items() if number >= block}
        for number in (block, block + 1):
            if number < len(self._blocks) and number not in self._made:
                self._made[number] = self._pool.submit(self._make, number)
        return self._made[block].result()[index]

    def close(self) -> None:
        """Score nothing more. A block that is being made is waited for."""
        self._pool.shutdown(cancel_futures=True)

    def _make(self, number: int) -> dict[int, Any]:
        block = self._blocks[number]
        if self.asks is not None and self.asks(self._epoch, number):
            return {index: {**BLANK, "asked": index} for index in block}
        keys = [self.data.data.rows[index].key for index in block if index < len(self.data)]
        for teacher in self.teachers:
            teacher.score(keys)
        return {index: self.data[index] for index in block}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model with its tokenizer. checkpoint: the files of its weights; None for a model that was given loaded."""

    model: Any
    tokenizer: Any
    checkpoint: Checkpoint | None = None

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None, *, dtype: str = "auto", name: str = "model") -> Loaded:
        """From a name, a path, a ModelChoice or a loaded model. name: of the argument, for messages."""
        if isinstance(model, (str, Path)):
            model = ModelChoice(str(model), dtype=dtype)
        if isinstance(model, ModelChoice):
            checkpoint, processes = find_checkpoint(model), Processes.current()
            processes.first_then_all(checkpoint.fetch)
            device = processes.device if model.device_map or model.quantization else torch.device("cpu")
            own = tokenizer if tokenizer is not None else load_tokenizer(checkpoint)
            return cls(load_model(checkpoint, device), own, checkpoint)
        if not (isinstance(model, torch.nn.Module) and hasattr(model, "get_output_embeddings")):
            raise DistillationError(
                f"{name} is {type(model).__name__}: give a causal language model of transformers, or its name or path"
                + ("" if name == "model" else ", a Store or the path of one")
            )
        if tokenizer is None:
            place = getattr(getattr(model, "config", None), "_name_or_path", "")
            if not place:
                hint = "give processing_class" if name == "model" else "give its name or path"
                raise DistillationError(f"{name} is loaded and does not say where it came from: {hint}")
            tokenizer = load_tokenizer(find_checkpoint(ModelChoice(place), weights=False))
        return cls(model, tokenizer)

    def fingerprint(self) -> str:
        """What identifies the weights: as a capture names files, else the xxh3-128 of the tensors."""
        if self.checkpoint is not None:
            return self.checkpoint.fingerprint()
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return f"xxh3:{digest.hexdigest()}"

    def spec(self, reader: RowTokenizer, rows: Sequence[Row], settings: CaptureSettings) -> StoreSpec:
        """What a store of its own predictions is made from."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        vocabulary = max(vocabulary, len(vocabulary_surfaces(self.tokenizer)))
        name = self.checkpoint.choice.model if self.checkpoint else getattr(self.model.config, "_name_or_path", "")
        return StoreSpec(
            model=str(name or type(self.model).__name__),
            model_fingerprint=self.fingerprint(),
            tokenizer=reader.fingerprint,
            data=data_fingerprint(rows),
            vocabulary=vocabulary,
            details={**reader.facts, "head_dtype": self._head_dtype(settings)},
            **settings.kept(vocabulary),
        )

    def teacher(self, settings: CaptureSettings, top_k: int, name: str, say: Callable[[str], None]) -> Teacher:
        """The model as it scores rows, on the device that it is on."""
        return Teacher(
            self.model,
            valid_ids(self.tokenizer),
            settings.model_copy(update={"top_k": top_k}).selection,
            batch_tokens=settings.batch_tokens,
            name=name,
            notify=say,
            longest=longest_input(self.checkpoint) if self.checkpoint else None,
            float32_head=self._head_dtype(settings) == "float32",
        )

    def _head_dtype(self, settings: CaptureSettings) -> str:
        return head_dtype(settings, self.model.config.to_dict(), self.model.num_parameters())


def live_teacher(
    name: str,
    model: Any,
    rows: Sequence[Row],
    settings: CaptureSettings,
    *,
    max_length: int | None = None,
    reader: RowTokenizer | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> LiveTeacher:
    """A teacher that is scored on the fly, on this process's device, once it is opened.

    model: its name or path, a ModelChoice (which may name an engine), or a loaded model. max_length: most tokens of an
    example, if they are not cut for this model. reader: its tokenizer and template; by default its own.
    """
    processes, settings = Processes.current(), settings.model_copy(update={"max_error": 0.0, "rows_per_shard": 1})
    choice = ModelChoice(str(model)) if isinstance(model, (str, Path)) else model
    is_named = isinstance(choice, ModelChoice)
    if is_named:
        checkpoint = find_checkpoint(choice)
        reader = reader or RowTokenizer(load_tokenizer(checkpoint))
    else:
        loaded = Loaded.of(choice, reader.tokenizer if reader is not None else None, name=f"the teacher {name}")
        reader = reader or RowTokenizer(loaded.tokenizer)
    if max_length is not None:
        rows = prepare(rows, [reader], max_length).rows
    if is_named:
        processes.first_then_all(checkpoint.fetch)
        vocabulary = vocabulary_size(checkpoint, reader)
        spec = store_spec(checkpoint, reader, rows, vocabulary, settings)
        opening = Opening(checkpoint, reader, settings.model_copy(update={"top_k": spec.top_k}), vocabulary, say)
        load: Callable[[], Scorer] = partial(opening.start, rows, processes.device)
        say(f"{name} ({choice.model}) is scored while training reads")
    else:
        loaded.model.to(processes.device)
        spec = loaded.spec(reader, rows, settings)
        scorer = loaded.teacher(settings, spec.top_k, name, say)
        load = lambda: scorer  # noqa: E731
    own = checkpoint if is_named and choice.engine.kind == "transformers" else None
    share = settings.max_quarantined
    return LiveTeacher(name, load, reader, rows, spec=spec, max_quarantined=share, checkpoint=own)
