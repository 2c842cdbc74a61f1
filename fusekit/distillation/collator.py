"""Rows of a batch side by side: padded tokens, and the targets of all labels one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusekit.distillation.sampling import IGNORED

_NOBODY = np.zeros(0)


@dataclass(frozen=True)
class FusionCollator:
    """Makes a batch out of examples (:class:`fusekit.distillation.targets.Example`).

    Padding is told by length alone, so it does not matter what the padding token is, or that it is the end-of-text
    token too: the last end of text of a row is attended to and learnt like any other.

    Attributes:
        pad_id: what padding is written as; any id below the vocabulary.
        pad_to_multiple_of: pad to a multiple of this many tokens.
    """

    pad_id: int = 0
    pad_to_multiple_of: int = 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch of B rows, padded on the right to T tokens, with n labels in all.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` int64 [B, T] (``labels`` -100 where nothing is learnt);
            ``predicting`` int64 [n], the places in the flattened [B * T] whose outputs predict the labels, row by row;
            ``label_ids`` int64 [n]; and where an example has targets ``target_ids`` int64 [n, k] (-1 for none),
            ``target_logprobs`` float32 [n, k], ``target_tail`` float32 [n], ``target_taught`` bool [n]. On the host, as
            numpy: ``sizes`` int64 [B], labels of each row; ``cross_entropies`` and ``typical``, an array per row;
            ``counts``, the sum of the examples' counts.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        B, longest = len(examples), max(lengths)
        T = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = np.full((B, T), self.pad_id, np.int64)
        mask = np.zeros((B, T), np.int64)
        labels = np.full((B, T), IGNORED, np.int64)
        for b, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            ids[b, :length], mask[b, :length], labels[b, :length] = example["input_ids"], 1, example["labels"]
        labels[:, 0] = IGNORED  # nothing predicts the first token
        learnt = np.flatnonzero(labels != IGNORED)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            "predicting": torch.from_numpy(learnt - 1),
            "label_ids": torch.from_numpy(labels.ravel()[learnt]),
            "sizes": (labels != IGNORED).sum(axis=1),
            **{name: [example.get(name, _NOBODY) for example in examples] for name in ("cross_entropies", "typical")},
        }
        if any("target_ids" in example for example in examples):
            batch |= _targets(examples)
        counted = [example["counts"] for example in examples if "counts" in example]
        if counted:
            batch["counts"] = np.sum(counted, axis=0)
        return batch


def _targets(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The targets of all labels; a label of an example without any is not taught."""
    sizes = [int((np.asarray(example["labels"])[1:] != IGNORED).sum()) for example in examples]
    n = sum(sizes)
    width = max(example["target_ids"].shape[1] for example in examples if "target_ids" in example)
    ids, logprobs = np.full((n, width), -1, np.int64), np.full((n, width), -np.inf, np.float32)
    tail, taught = np.ones(n, np.float32), np.zeros(n, bool)
    start = 0
    for example, size in zip(examples, sizes, strict=True):
        if "target_ids" in example:
            part, k = slice(start, start + size), example["target_ids"].shape[1]
            ids[part, :k], logprobs[part, :k] = example["target_ids"], example["target_logprobs"]
            tail[part], taught[part] = example["target_tail"], example["target_taught"]
        start += size
    return {
        "target_ids": torch.from_numpy(ids),
        "target_logprobs": torch.from_numpy(logprobs),
        "target_tail": torch.from_numpy(tail),
        "target_taught": torch.from_numpy(taught),
    }
