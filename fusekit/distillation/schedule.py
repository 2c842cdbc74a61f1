"""Training in stages that weigh two parts of data, examples and models' own answers: ProFuser (arXiv 2408.04998)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fusekit.distillation.batching import BLANK, EpochSampler
from fusekit.distillation.dataset import Example, FusionDataset
from fusekit.distillation.settings import ScheduleStage
from fusekit.types import IntArray

RESPONSES = "responses/"
"""Before the names of counts over the answers."""


class Scheduled(Dataset[Example]):
    """All examples of a training in their order, over all stages and epochs: it is read once, from start to end.

    An epoch of a stage has every example of the parts that weigh something in it, shuffled together; blanks fill up its
    last optimizer step, so that no step belongs to two stages. An example has, besides what it has in its part,
    ``part`` (0 for data, 1 for answers) and ``weight``.

    Args:
        data: the examples.
        responses: the winners' own answers.
        schedule: the stages in order.
        seed: of the order.
        step: examples of an optimizer step, over all processes.
    """

    def __init__(
        self, data: FusionDataset, responses: FusionDataset, schedule: Sequence[ScheduleStage], seed: int, step: int
    ) -> None:
        self.parts = data, responses
        self.count_names = (*data.count_names, *(RESPONSES + name for name in responses.count_names))
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
