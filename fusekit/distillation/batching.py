"""The order of the examples of an epoch and of stages, the same for every split over devices, and their batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from fusekit.distillation.distances import SparseTargets
from fusekit.distillation.losses import IGNORE
from fusekit.distillation.settings import ScheduleStage
from fusekit.types import IntArray

if TYPE_CHECKING:
    from fusekit.distillation.dataset import FusionDataset

Example = dict[str, Any]
"""An example to train on: ``input_ids`` and ``labels`` int64 [T]; ``counts``; and where it has targets, for its n
labels ``target_ids`` int64 [n, k], ``target_logprobs`` float32 [n, k], ``target_tail`` float32 [n], ``target_taught``
bool [n] and for losses of stretches of text ``target_chunks`` int64 [n]
(:class:`fusekit.distillation.distances.SparseTargets`), the candidates' ``cross_entropies`` by the metric, and the
``typical`` bits per byte of its data set, the pivot's and the best models', float64 [2] (empty without the pivot's)."""

BLANK = {"input_ids": np.zeros(1, np.int64), "labels": np.full(1, IGNORE, np.int64)}
"""An example of one token and no label."""


class EpochSampler(Sampler[int]):
    """A permutation of the examples from seed and epoch alone, filled up with blanks to a multiple of ``multiple``.

    accelerate makes the batches of all processes equal by training the first examples of the epoch once more, so the
    number of processes would change what is learned. Blanks (numbers from ``len(data)`` on) weigh nothing.

    seed: None for the data's own order. lengths: of each example, in any unit; those of an optimizer step (``step``)
    are then taken from the longest to the shortest, so that micro-batches have little padding.
    """

    def __init__(
        self, data: Sized, seed: int | None, multiple: int = 1, *, lengths: IntArray | None = None, step: int = 1
    ) -> None:
        self.size = len(data)
        self.seed = seed
        self.lengths, self.step = lengths, step
        self.length = -(-self.size // multiple) * multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.length)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order[: self.size] = torch.randperm(self.size, generator=generator).numpy()
        if self.lengths is not None and self.step > 1:
            tokens = np.concatenate([self.lengths, np.zeros(self.length - self.size, np.int64)])
            for start in range(0, self.length, self.step):
                block = order[start : start + self.step]
                order[start : start + self.step] = block[np.argsort(-tokens[block], kind="stable")]
        yield from order.tolist()


class WithBlanks(Dataset[Any]):
    """A data set that also has the blanks of :class:`EpochSampler`."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    @property
    def lengths(self) -> IntArray | None:
        return getattr(self.data, "lengths", None)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.data):
            return self.data[index]
        return dict(BLANK)


_NOBODY = np.zeros(0)


@dataclass(frozen=True)
class FusionCollator:
    """Makes a batch out of examples (:data:`Example`).

    Padding is told by length alone, so it does not matter what the padding token is, or that it is the end-of-text
    token too: the last end of text of a row is attended to and learned like any other.
    """

    pad_id: int = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch of B rows, padded on the right to T tokens, with n labels in all.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` int64 [B, T] (``labels`` -100 where nothing is learned);
            ``predicting`` int64 [n], the places in the flattened [B * T] whose outputs predict the labels, row by row;
            ``label_ids`` int64 [n]; and where an example has any ``targets``
            (:class:`~fusekit.distillation.distances.SparseTargets`). On the host, as numpy: ``sizes`` int64 [B], labels
            of each row; ``cross_entropies`` and ``typical``, an array per row; ``counts``, the sum of the examples'
            counts; and of a schedule, for each label, ``part`` int64 [n] and ``weight`` float64 [n]; ``asked``, numbers
            of examples whose answers are to be written.
        """
        shape = len(examples), max(len(example["input_ids"]) for example in examples)
        ids, mask, labels = np.full(shape, self.pad_id), np.zeros(shape, np.int64), np.full(shape, IGNORE)
        for b, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[b, :length], mask[b, :length], labels[b, :length] = example["input_ids"], 1, example["labels"]
        labels[:, 0] = IGNORE  # nothing predicts the first token
        learned, sizes = np.flatnonzero(labels != IGNORE), (labels != IGNORE).sum(axis=1)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            "predicting": torch.from_numpy(learned - 1),
            "label_ids": torch.from_numpy(labels.ravel()[learned]),
            "sizes": sizes,
            **{name: [example.get(name, _NOBODY) for example in examples] for name in ("cross_entropies", "typical")},
        }
        if any("target_ids" in example for example in examples):
            batch["targets"] = _targets(examples, sizes.tolist())
        if any("weight" in example for example in examples):
            for name in ("part", "weight"):
                batch[name] = np.repeat([example.get(name, 0) for example in examples], sizes)
        if asked := [example["asked"] for example in examples if "asked" in example]:
            batch["asked"] = asked
        if counted := [example["counts"] for example in examples if "counts" in example]:
            batch["counts"] = np.sum(counted, axis=0)
        return batch


def _targets(examples: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> SparseTargets:
    """The targets of all labels; a label of an example without any is not taught. Stretches are numbered apart."""
    n, k = sum(sizes), max(example["target_ids"].shape[1] for example in examples if "target_ids" in example)
    ids, logprobs = np.full((n, k), -1), np.full((n, k), -np.inf, np.float32)
    tail, taught, chunks = np.ones(n, np.float32), np.zeros(n, bool), np.full(n, -1)
    start = numbered = 0
    for example, size in zip(examples, sizes, strict=True):
        if "target_ids" in example:
            part, width = slice(start, start + size), example["target_ids"].shape[1]
            ids[part, :width], logprobs[part, :width] = example["target_ids"], example["target_logprobs"]
            tail[part], taught[part] = example["target_tail"], example["target_taught"]
            if (own := example.get("target_chunks")) is not None:
                chunks[part] = np.where(own >= 0, own + numbered, -1)
                numbered += int(own.max(initial=-1)) + 1
        start += size
    of_chunks = any("target_chunks" in example for example in examples)
    return SparseTargets(
        torch.from_numpy(ids),
        torch.from_numpy(logprobs),
        torch.from_numpy(tail),
        torch.from_numpy(taught),
        chunks=torch.from_numpy(chunks) if of_chunks else None,
    )


class Scheduled(Dataset[Example]):
    """Training in stages that weigh two parts of data, examples and models' own answers: ProFuser (arXiv 2408.04998).

    It has all examples in their order, over all stages and epochs, and is read once, from start to end. An epoch of a
    stage has every example of the parts that weigh something in it, shuffled together; blanks fill up its last
    optimizer step (of ``step`` examples), so that no step belongs to two stages. An example has, besides what it has in
    its part, ``part`` (0 for data, 1 for answers) and ``weight``.
    """

    def __init__(
        self, data: FusionDataset, responses: FusionDataset, schedule: Sequence[ScheduleStage], seed: int, step: int
    ) -> None:
        self.parts = data, responses
        self.count_names = (*data.count_names, *("responses/" + name for name in responses.count_names))
        lengths = np.concatenate([part.lengths for part in self.parts])
        part_of = np.repeat([0, 1], [len(part) for part in self.parts])
        order, weights, epoch = [], [], 0
        for stage in schedule:
            weight = np.array([stage.data, stage.responses])[part_of]
            members = np.append(np.flatnonzero(weight), [-1] * step)  # the last are blanks
            sampler = EpochSampler(members[:-step], seed, step, lengths=lengths[members[:-step]], step=step)
            for _ in range(stage.epochs):
                sampler.set_epoch(epoch)
                order.append(members[list(sampler)])
                weights.append(np.append(weight, 0.0)[order[-1]])
                epoch += 1
        self.order: IntArray = np.concatenate(order)
        self.weights = np.concatenate(weights)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:
        number, count = int(self.order[index]), len(self.parts[0])
        if number < 0:
            return dict(BLANK)
        part = int(number >= count)
        example: dict[str, Any] = self.parts[part][number - count * part]
        none = [np.zeros(len(known.count_names)) for known in self.parts]
        none[part] = example["counts"]
        return {**example, "counts": np.concatenate(none), "part": part, "weight": float(self.weights[index])}


class LabelLogits:
    """Has a causal language model, before it is wrapped, compute the logits of chosen positions only.

    A hook on the output embedding picks the hidden states before they are multiplied. It runs within the model's own
    forward pass, so it works under DDP, FSDP and adapters, for every model whose logits come from calling the module
    that ``get_output_embeddings`` names; for others the logits are picked afterwards.
    """

    def __init__(self, model: Any) -> None:
        self._places: torch.Tensor | None = None
        self._picked = False
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None:
            head.register_forward_pre_hook(self._pick)

    def _pick(self, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._places is None or self._picked or not args:
            return None
        hidden = args[0]
        self._picked = True
        return (hidden.reshape(-1, hidden.shape[-1])[self._places].unsqueeze(0), *args[1:])

    @contextmanager
    def at(self, places: torch.Tensor) -> Iterator[None]:
        """Within it a forward pass gives logits [1, n, V] of ``places`` (int64 [n], of the flattened [B * T])."""
        self._places, self._picked = places, False
        try:
            yield
        finally:
            self._places = None

    def of(self, logits: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the forward pass gave, and which rows of it are the places': None for all of them, in order."""
        return logits, None if self._picked else places
