"""A short measurement: a few batches of each model that is here and small enough, and a few of training the pivot."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fusekit.capturing.codec import Codec
from fusekit.capturing.engine import Teacher
from fusekit.capturing.estimate import loaded_bytes
from fusekit.capturing.load import load_model, longest_input, valid_ids
from fusekit.capturing.settings import CaptureSettings, Selection
from fusekit.capturing.shards import shard_bytes
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation import outputs as distilled
from fusekit.distillation.batching import FusionCollator, LabelLogits
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.label_rows import Projection
from fusekit.distillation.losses import SparseTargets, fusion_loss
from fusekit.distillation.settings import FusionSettings, TrainingSettings
from fusekit.hub import memory_limits
from fusekit.plan.models import Known
from fusekit.resources import Need
from fusekit.types import CapturedRow, Row

BUDGET_SECONDS = 2.0
"""Of forwards per model, and of training; a batch that has begun is finished."""

LARGEST_BYTES = 8 << 30
"""Of loaded weights: larger models would take minutes to load, for a plan."""


_ROWS_TO_GENERATE = 16


@dataclass
class Speed:
    """What was measured of a model.

    Attributes:
        load: seconds to load it.
        tokens: per second of a capture.
        store: bytes per row, tokens and labels of the rows that were captured.
        captured: them, by key.
        generate: seconds per held-out row of exact match, None where it was not measured.
    """

    load: float
    tokens: float
    store: float
    labels: int
    captured: dict[str, CapturedRow]
    generate: float | None = None


def fits(known: Known, needs: Sequence[Need]) -> bool:
    """Whether a model may be loaded for a plan: here, small, and taking no more than half of what is free."""
    if not known.here or known.checkpoint is None or loaded_bytes(known.checkpoint) > LARGEST_BYTES:
        return False
    free = min(limit.available for limit in memory_limits())
    return all(2 * need.needed <= need.free for need in needs) and 2 * loaded_bytes(known.checkpoint) <= free


def device() -> torch.device:
    """Where a run would put a model."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_capture(
    known: Known,
    reader: RowTokenizer,
    rows: Sequence[Row],
    section: CaptureSettings,
    generate: Callable[[Any], float | None] = lambda _model: None,
) -> Speed:
    """Load a model and capture what fits the budget of ``rows``, in ever larger batches; the last one is the speed.

    generate: called with the loaded model; seconds per row of exact match.
    """
    assert known.checkpoint is not None
    started = time.perf_counter()
    model = load_model(known.checkpoint, device())
    ids = valid_ids(reader.tokenizer)
    teacher = Teacher(
        model,
        ids,
        Selection(min(section.top_k, len(ids)), section.keep_mass, section.temperature),
        batch_tokens=section.batch_tokens,
        name=known.model,
        longest=longest_input(known.checkpoint),
    )
    load = time.perf_counter() - started
    captured: dict[str, CapturedRow] = {}
    speed, at, size, left = 0.0, 0, 4, BUDGET_SECONDS
    while at < len(rows) and left > 0:
        some = rows[at : at + size]
        begun = time.perf_counter()
        scored = teacher.score([reader.tokenize(row) for row in some], [row.dataset for row in some])
        took = time.perf_counter() - begun
        captured |= {row.tokens.key: row for row in scored.rows}
        tokens = sum(len(row.tokens) for row in scored.rows)
        if tokens:  # the first batch warms up: it counts only if there is no other
            speed = tokens / took
        at, size, left = at + len(some), 2 * size, left - took
    codec = Codec(teacher.vocabulary, teacher.selection.k, section.max_error)
    store = len(shard_bytes([codec.encode(row) for row in captured.values()], codec.exact))
    labels = sum(len(row.actual) for row in captured.values())
    seconds = generate(model)
    del teacher, model
    gc.collect()
    return Speed(load, speed, store, labels, captured, seconds)


def measure_alignment(pivot: RowTokenizer, source: RowTokenizer, texts: Sequence[str]) -> float:
    """Seconds per text of counting what the alignment of a pair links, its first text aside."""
    from fusekit.alignment.alignment import align

    align(texts[0], pivot.tokenizer, source.tokenizer)
    started = time.perf_counter()
    for text in texts:
        align(text, pivot.tokenizer, source.tokenizer)
    return (time.perf_counter() - started) / len(texts)


def generating(reader: RowTokenizer, rows: Sequence[Row], batch_tokens: int | None) -> Callable[[Any], float | None]:
    """For :func:`measure_capture`: times exact match on a few held-out rows."""

    def measure(model: Any) -> float | None:
        from fusekit.errors import FusekitError
        from fusekit.evaluation.metrics import exact_match

        some = rows[:_ROWS_TO_GENERATE]
        started = time.perf_counter()
        try:
            exact_match(model, reader, some, batch_tokens=batch_tokens)
        except FusekitError:
            return None  # the evaluation will say why
        return (time.perf_counter() - started) / len(some)

    return measure


@dataclass
class Training:
    """What was measured of training: seconds to load, per micro-batch, and per optimizer step besides."""

    load: float
    micro_batch: float
    step: float


def measure_training(
    known: Known,
    captured: dict[str, CapturedRow],
    rows: Sequence[Row],
    settings: TrainingSettings,
    fusion: FusionSettings,
) -> Training:
    """Train the pivot on its own captured rows for the budget, with the run's loss, and throw the result away."""
    assert known.checkpoint is not None
    started = time.perf_counter()
    where = device()
    model = distilled.load_pivot(known.checkpoint, settings).to(where).train()
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    load = time.perf_counter() - started
    step = _Step(model, settings, where)
    batches = _batches(captured, rows, settings, fusion)
    times: list[float] = []
    took = 0.0
    begun = time.perf_counter()
    for number, batch in enumerate(batches):
        took = _timed(partial(_train, step, batch), where)
        if number == 0:
            _timed(optimizer.step, where)  # makes its moments
        else:
            times.append(took)
        if time.perf_counter() - begun > BUDGET_SECONDS and times:
            break
    update = _timed(lambda: (optimizer.step(), optimizer.zero_grad()), where)
    step.logits.remove()
    return Training(load, statistics.fmean(times) if times else took, update)


def _batches(
    captured: dict[str, CapturedRow], rows: Sequence[Row], settings: TrainingSettings, fusion: FusionSettings
) -> list[Callable[[], dict[str, Any]]]:
    """Micro-batches of rows of like length, as an optimizer step has them, in an order that mixes lengths."""
    some = [row for row in rows if row.key in captured]
    some.sort(key=lambda row: -sum(len(message.content) for message in row.messages))
    own = fusion.model_copy(update={"include_pivot": True, "level": "sequence", "metric": "token_ce"})
    data = FusionDataset(
        some, pivot=captured, sources={"itself": captured}, projections={"itself": Projection(None)}, fusion=own
    )
    collate, size = FusionCollator(0), settings.per_device_train_batch_size
    starts = list(range(0, max(len(some) - size, 0) + 1, size))
    mixed = [start for offset in range(4) for start in starts[offset::4]]
    return [
        lambda start=start: collate([data[i] for i in range(start, min(start + size, len(some)))])  # type: ignore[misc]
        for start in mixed
    ]


def _train(step: _Step, batch: Callable[[], dict[str, Any]]) -> None:
    step(batch())


class _Step:
    """Forward, loss and backward of a micro-batch, as the trainer does them."""

    def __init__(self, model: Any, settings: TrainingSettings, where: torch.device) -> None:
        self.model, self.settings, self.where = model, settings, where
        self.logits = LabelLogits(model)

    def __call__(self, batch: dict[str, Any]) -> None:
        inputs = {k: v.to(self.where) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        places, settings = inputs["predicting"], self.settings
        autocast = torch.autocast(self.where.type, torch.bfloat16) if settings.bf16 else nullcontext()
        with autocast:
            with self.logits.at(places):
                outputs = self.model(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
                )
            logits, positions = self.logits.of(outputs.logits, places)
        targets = None
        if settings.lm_weight < 1 and "target_ids" in inputs:
            ids, logprobs, tail, taught = (inputs[f"target_{name}"] for name in ("ids", "logprobs", "tail", "taught"))
            targets = SparseTargets(ids, logprobs, tail, taught, settings.temperature)
        loss: Any = fusion_loss(
            logits,
            inputs["label_ids"],
            targets,
            positions=positions,
            loss=settings.loss,
            truncation=settings.truncation,
            temperature=settings.temperature,
            lm_weight=settings.lm_weight,
            fusion_weight=1 - settings.lm_weight,
        )
        loss.total.backward()


def _timed(work: Callable[[], Any], where: torch.device) -> float:
    started = time.perf_counter()
    work()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - started
