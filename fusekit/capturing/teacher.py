"""What a causal language model says about the labels of rows: its forward, in batches that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fusekit.capturing.forward import (
    CACHED_BYTES,
    GROUP,
    Scores,
    block_width,
    group_bytes,
    padding_error,
    plain_logits,
    score_blocks,
    score_logits,
    split_forward,
)
from fusekit.capturing.models import Checkpoint, device_of, itemsize, loaded_bytes, shape_of, stored_dtype
from fusekit.capturing.store import ROWS_PER_SHARD
from fusekit.devices import Need, Processes, is_out_of_memory, main_memory, memory_limits, release
from fusekit.disk import counted, human
from fusekit.errors import CaptureError
from fusekit.settings import CaptureSettings, Selection
from fusekit.types import CapturedRow, IntArray, TokenizedRow, TopK

BATCH_TOKENS = 16384
CPU_BATCH_TOKENS = 2048
"""Tokens of a forward pass on an accelerator, and on a CPU, where more take more memory and no less time."""

SHARD_SECONDS = 120.0
"""Seconds of work that an interruption may cost, about."""

FLOPS, CPU_FLOPS = 1e14, 5e10
"""Operations a second that are assumed of an accelerator, and of a CPU: a shard has to be the same on every machine."""


def batch_tokens_on(device: str) -> int:
    """Most tokens of a batch of forward passes, padding included. device: its type, as ``cuda``."""
    return CPU_BATCH_TOKENS if device == "cpu" else BATCH_TOKENS


def rows_per_shard(parameters: int, row_tokens: float, device: str) -> int:
    """Rows of a shard: :data:`SHARD_SECONDS` of work, or a batch where that is more, as a power of two.

    parameters: of the model; a token takes two operations for each. row_tokens: of a row, on average. device: its type.
    """
    rate = CPU_FLOPS if device == "cpu" else FLOPS
    tokens = max(SHARD_SECONDS * rate / (2 * max(parameters, 1)), batch_tokens_on(device))
    return min(1 << int(math.log2(max(tokens / max(row_tokens, 1), 1))), ROWS_PER_SHARD)


def plan_batches(lengths: Sequence[int], batch_tokens: int, padding: bool = True) -> list[list[int]]:
    """Batches of rows of similar length, padding included, as indices into ``lengths``; rows of length 0 are in none.

    The longest come first, so that memory runs out at the start if it does; one above ``batch_tokens`` is alone.
    padding: whether the rows of a batch may have different lengths.
    """
    batches: list[list[int]] = []
    for index in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i)):
        batch = batches[-1] if batches else []
        longest = lengths[batch[0]] if batch else 0  # the first row of a batch is its longest
        if batch and longest * (len(batch) + 1) <= batch_tokens and (padding or longest == lengths[index]):
            batch.append(index)
        else:
            batches.append([index])
    return batches


CHUNK_BYTES = 256 << 20
"""Bytes of float32 logits at a time."""


class Scored(NamedTuple):
    """Captured rows in their order, and by key why the model gives no distribution for the others."""

    rows: list[CapturedRow]
    quarantined: dict[str, str]


class Teacher:
    """A model that scores rows.

    Args:
        model: a transformers causal language model on its device(s), in any dtype.
        valid_ids: ids that are tokens; logits of all others, which only pad the matrix, get no mass. None: all are.
        selection: what is kept of each distribution.
        batch_tokens: most tokens per batch, padding included; None for what suits the device.
        name: of the model, for messages.
        notify: called with a line when something is done in another way than planned.
        longest: most tokens of a row that the model was made for.
        chunk_bytes: most bytes of float32 logits at a time.
        float32_head: compute logits in float32 from the hidden states of a model in 16 bits.

    Raises:
        CaptureError: a model that has no logits.
    """

    def __init__(
        self,
        model: Any,
        valid_ids: IntArray | None = None,
        selection: Selection | None = None,
        *,
        batch_tokens: int | None = None,
        name: str = "the model",
        notify: Callable[[str], None] = lambda _line: None,
        longest: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        float32_head: bool = True,
    ) -> None:
        self.model = model.eval()
        self.selection = selection or Selection()
        self.name, self.notify = name, notify
        self.longest, self._chunk_bytes = longest, chunk_bytes
        self.device = device_of(model)
        self.batch_tokens = batch_tokens or batch_tokens_on(self.device.type)
        self.input_rows: int = model.get_input_embeddings().weight.shape[0]
        sample = np.arange(self.input_rows) if valid_ids is None else valid_ids[valid_ids < self.input_rows]
        ids = torch.from_numpy(sample[np.linspace(0, len(sample) - 1, 24).astype(np.int64)].reshape(2, 12))
        with torch.inference_mode():
            ids = ids.to(self.device)
            self.vocabulary: int = plain_logits(model, ids, torch.ones_like(ids)).shape[-1]
            self._split, why = split_forward(model, ids, float32_head)
            error = padding_error(model, ids)
        if self._split is None:
            notify(f"{name}: {why}; the logits of all positions are computed, a few examples at a time")
            self.batch_tokens = min(self.batch_tokens, max(1, chunk_bytes // (4 * self.vocabulary)))
        self._padding = not error
        if error:
            notify(
                f"{name}: padding beside an example changes what it predicts by {error:.2g} nats: it ignores the "
                "attention mask. Only examples of one length share a batch"
            )
        padding = np.setdiff1d(np.arange(self.vocabulary), sample)
        self._invalid = torch.from_numpy(padding).to(self.device) if len(padding) else None

    def score(self, rows: Sequence[TokenizedRow], datasets: Sequence[str] | None = None) -> Scored:
        """What the model says about the labels of rows, read by its tokenizer. datasets: where each row is from.

        Raises CaptureError: one row does not fit into memory alone; ids that the model does not have.
        """
        found = {index: row for batch in self.score_batches(rows, datasets) for index, row in batch}
        captured = [row for _, row in sorted(found.items()) if isinstance(row, CapturedRow)]
        return Scored(captured, {rows[i].key: why for i, why in sorted(found.items()) if isinstance(why, str)})

    def score_batches(
        self, rows: Sequence[TokenizedRow], datasets: Sequence[str] | None = None
    ) -> Iterator[list[tuple[int, CapturedRow | str]]]:
        """As :meth:`score`, batch by batch: (index into ``rows``, the row or why it is quarantined), each index once.

        The same rows give the same bits on one machine, unless memory ran out in one of the runs: smaller batches round
        otherwise.
        """
        self._check(rows)
        # No label is predicted by what comes after the last but one token of a causal model's input.
        lengths = [int(row.label_positions[-1]) if row.labels.any() else 0 for row in rows]
        names = datasets or [""] * len(rows)
        nothing = np.zeros((0, self.selection.k))
        unlabelled = TopK(nothing.astype(np.int64), nothing, nothing[:, 0]), nothing[:, 0], 0.0
        yield [(i, CapturedRow(rows[i], names[i], *unlabelled)) for i, length in enumerate(lengths) if not length]
        for batch in self._fitting(plan_batches(lengths, self.batch_tokens, self._padding), lengths):
            with torch.inference_mode():
                scores = self._score_batch([rows[i] for i in batch])
            yield [(i, _captured(rows[i], names[i], one)) for i, one in zip(batch, scores, strict=True)]

    def _check(self, rows: Sequence[TokenizedRow]) -> None:
        for row in rows:
            if self.longest is not None and len(row) > self.longest:
                raise CaptureError(
                    f"example {row.key} has {len(row)} tokens, but {self.name} was made for {self.longest} (its "
                    f"config.json): cut or drop longer examples (--max-length {self.longest})"
                )
            highest, label = int(row.ids.max(initial=0)), int(row.ids[row.labels].max(initial=0))
            if highest >= self.input_rows or label >= self.vocabulary:
                raise CaptureError(
                    f"example {row.key} has the token id {highest}, but {self.name} has {self.input_rows} embeddings "
                    f"and {self.vocabulary} logits: is the tokenizer that of another model?"
                )

    def _fitting(self, batches: list[list[int]], lengths: list[int]) -> Iterator[list[int]]:
        """The batches, halved until they are within what has fitted so far."""
        waiting = batches[::-1]
        while waiting:
            batch = waiting.pop()
            if len(batch) > 1 and lengths[batch[0]] * len(batch) > self.batch_tokens:
                waiting += [batch[(len(batch) + 1) // 2 :], batch[: (len(batch) + 1) // 2]]
            else:
                yield batch

    def _score_batch(self, rows: list[TokenizedRow]) -> list[Sequence[Any]]:
        """Scores of a batch; in halves when memory runs out, and from then on no larger batch is tried."""
        failure = ""
        try:
            return self._forward(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
        release(self.device)
        longest = max(int(row.label_positions[-1]) for row in rows)
        if len(rows) == 1 and self._chunk_bytes <= self._row_bytes:
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            raise CaptureError(
                f"example {rows[0].key} of {len(rows[0])} tokens does not fit into memory even alone, and {self.name} "
                f"itself takes {weights / 1e9:.2f} GB ({failure}). Shorten the examples (--max-length), load the model "
                "smaller (--dtype bfloat16, --quantization) or spread it over several devices (--device-map auto)"
            )
        self._chunk_bytes = max(self._chunk_bytes // 2, self._row_bytes)
        if len(rows) == 1:
            return self._score_batch(rows)
        half = (len(rows) + 1) // 2
        self.batch_tokens = min(self.batch_tokens, half * longest)
        self.notify(
            f"{self.name}: memory ran out at {counted(len(rows), 'example')} of {longest} tokens, {half} are tried"
        )
        return self._score_batch(rows[:half]) + self._score_batch(rows[half:])

    def _forward(self, rows: list[TokenizedRow]) -> list[Sequence[Any]]:
        ids, mask = (each.to(self.device) for each in padded(rows))
        positions, width = [row.label_positions for row in rows], ids.shape[1]
        labels = torch.from_numpy(np.concatenate([row.ids[at] for row, at in zip(rows, positions, strict=True)]))
        at = torch.from_numpy(np.concatenate([i * width + p - 1 for i, p in enumerate(positions)]))
        # Of a model that cannot be split, its logits.
        hidden = self._split.hidden(ids, mask) if self._split else plain_logits(self.model, ids, mask)
        hidden, labels = hidden.flatten(0, 1)[at.to(hidden.device)], labels.to(self.device)
        most = max(1, self._chunk_bytes // self._row_bytes)
        # Chunks of equal size, so that none is much smaller than what the head is fast at.
        size = -(-len(hidden) // -(-len(hidden) // most))
        chunks = [slice(start, start + size) for start in range(0, len(hidden), size)]
        pieces = [self._score_hidden(hidden[chunk], labels[chunk]) for chunk in chunks]
        whole = [torch.cat(parts).cpu().numpy() for parts in zip(*pieces, strict=True)]
        stops = np.cumsum([len(at) for at in positions])[:-1]
        return list(zip(*(np.split(part, stops) for part in whole), strict=True))

    @property
    def _row_bytes(self) -> int:
        """Bytes of float32 at a time to score one position."""
        if self._split is None or self._split.head is None:
            return 4 * self.vocabulary
        return group_bytes(self.vocabulary, self.selection.k)

    def _score_hidden(self, hidden: torch.Tensor, labels: torch.Tensor) -> Scores:
        if self._split is None or self._split.head is None:
            logits = self._split.logits(hidden) if self._split else hidden
            invalid = self._invalid.to(logits.device) if self._invalid is not None else None
            return score_logits(logits, labels.to(logits.device), self.selection, invalid)
        most = self._chunk_bytes if self.device.type != "cpu" else min(CACHED_BYTES, self._chunk_bytes)
        device = self._split.head.weight.device
        invalid = self._invalid.to(device) if self._invalid is not None else None
        # As wide as the hidden states at most: the head's weights are copied too.
        blocks = self._split.blocks(hidden, block_width(max(hidden.shape), most))
        return score_blocks(blocks, labels.to(device), self.selection, invalid)


def _captured(row: TokenizedRow, dataset: str, scores: Sequence[Any]) -> CapturedRow | str:
    """The row, or why the model gives no distribution for it. scores: a row's :class:`Scores`, as numpy arrays."""
    ids, logprobs, tail, actual, nll, finite = scores
    if not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        return f"NaN or infinite logits at label {first} of {len(finite)} (token {row.label_positions[first]})"
    return CapturedRow(row, dataset, TopK(ids, logprobs, tail), actual, float(np.sum(nll)))


def padded(rows: list[TokenizedRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, int64 [B, T], of the rows' tokens up to the last that predicts a label."""
    lengths = [int(row.label_positions[-1]) for row in rows]
    ids = np.empty((len(rows), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, :length] = row.ids[:length]
        # A token of the row's own: one with a broken embedding would spread NaN even to where it is masked.
        ids[i, length:] = row.ids[length - 1]
        mask[i, :length] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


_BLOCK_COPIES = 3
"""Copies of a block of logits: itself, its exponentials, and the head's weights or what the model makes of it."""

_GROUP_BYTES = 28
"""Bytes for a group of ids while the best groups of a position are sought."""

_HIDDEN_COPIES = 6
"""Tensors as wide as the hidden states that live at one time within a layer, its residual included."""


def memory_needs(checkpoint: Checkpoint, settings: CaptureSettings, processes: Processes) -> list[Need]:
    """Memory for the loaded model and one batch: on this process's device, or on all together for a device map."""
    batch_tokens = settings.batch_tokens or batch_tokens_on(processes.device.type)
    weights = loaded_bytes(checkpoint)
    working = working_bytes(checkpoint, batch_tokens, processes.device.type, settings.top_k)
    needed = weights + working
    what = f"memory of {checkpoint.choice.model} ({human(weights)} of weights) and a batch of {batch_tokens} tokens"
    if processes.device.type == "cuda":
        count = torch.cuda.device_count()
        devices = range(count) if checkpoint.choice.device_map else [processes.device.index or 0]
        free = sum(torch.cuda.mem_get_info(i)[0] for i in devices)
        if checkpoint.choice.device_map:  # what does not fit on the GPUs stays in main memory
            free += min(limit.available for limit in memory_limits())
        needs = [Need(what, needed, free, f"free on {processes.device if len(devices) == 1 else f'{count} GPUs'}")]
        if checkpoint.gguf is not None:  # it is dequantised on the CPU
            needs.append(main_memory(f"main memory to dequantise {checkpoint.choice.model}", weights))
        return needs
    if processes.device.type != "cpu":
        return []
    what += f" in {processes.local} processes" if processes.local > 1 else ""
    return [main_memory(what, needed, processes.local, mapped=max(checkpoint.weights.values(), default=0))]


def working_bytes(checkpoint: Checkpoint, batch_tokens: int, device: str, top_k: int) -> int:
    """Bytes of one batch: hidden states of a layer, its feed-forward, and blocks of logits. device: its type."""
    shape = shape_of(checkpoint.config)
    width = itemsize(stored_dtype(checkpoint) if checkpoint.choice.dtype == "auto" else checkpoint.choice.dtype)
    row = group_bytes(shape.vocabulary, top_k)
    rows = min(batch_tokens, max(1, CHUNK_BYTES // row))
    block = min(CACHED_BYTES if device == "cpu" else CHUNK_BYTES, rows * 4 * shape.vocabulary)
    scoring = rows * (row + _GROUP_BYTES * shape.vocabulary // GROUP) + _BLOCK_COPIES * block
    # What a layer takes is free again when the logits are computed from the last hidden states.
    layer = batch_tokens * (_HIDDEN_COPIES * shape.hidden + 2 * shape.wide) * width
    return max(layer, batch_tokens * shape.hidden * (2 * width + 4) + scoring)


def head_dtype(settings: CaptureSettings, config: Mapping[str, Any], parameters: int) -> str:
    """As set; else float32 where that costs little beside the rest of the model, whatever the machine."""
    shape = shape_of(config)
    small = 8 * shape.hidden * shape.vocabulary <= parameters
    return settings.head_dtype or ("float32" if small else "model")
