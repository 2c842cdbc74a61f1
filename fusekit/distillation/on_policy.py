"""Answers that the trained model writes while it trains, and what teachers say about them (GKD, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xxhash

from fusekit.data.prepare import prepare
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation.batching import BLANK
from fusekit.distillation.dataset import Example, FusionDataset
from fusekit.distillation.live import LiveTeacher
from fusekit.distillation.settings import TrainingSettings
from fusekit.errors import DataError, DistillationError
from fusekit.generation.respond import questions_of, respond
from fusekit.generation.settings import RespondSettings


class OnPolicy:
    """Makes the examples of the optimizer steps that learn from the trained model's own answers.

    The model, in evaluation mode, samples an answer at temperature 1 to the last question of each conversation of the
    step. Teachers score the answers, and their rows are projected and fused as those of any example, with two
    exceptions, since what the trained model said before training about a new text is not known: it is no candidate, and
    the mass outside a teacher's entries is shared as by ``tail: listed_share``.

    Args:
        data: the examples, whose questions are asked.
        teachers: the models of ``data.sources``, by name, loaded.
        reader: how the trained model reads conversations.
        settings: ``on_policy``, ``max_new_tokens`` and ``seed``.
        max_length: most tokens of a question with its answer, for any of the models; longer ones are cut.

    Raises:
        DistillationError: no conversation ends with an answer.
    """

    def __init__(
        self,
        data: FusionDataset,
        teachers: Mapping[str, LiveTeacher],
        reader: RowTokenizer,
        settings: TrainingSettings,
        max_length: int,
    ) -> None:
        self.data, self.teachers, self.reader = data, dict(teachers), reader
        self.settings, self.max_length = settings, max_length
        if not questions_of(data.rows):
            raise DistillationError(
                f"on_policy is {settings.on_policy:g}, but none of the {len(data)} examples is a conversation that "
                "ends with an answer: set it to 0"
            )
        if not teachers:
            raise DistillationError(f"on_policy is {settings.on_policy:g}, but there is no teacher: set it to 0")
        tails = {
            name: replace(how, tail="listed_share") if how.needs_pivot else how
            for name, how in data.projections.items()
        }
        self._projections = tails
        self._fusion = data.fusion.model_copy(update={"include_pivot": False})

    def chosen(self, epoch: int, step: int) -> bool:
        """Whether a step of an epoch learns from own answers: drawn by the seed, the same in every process."""
        drawn = xxhash.xxh3_64_intdigest(f"{self.settings.seed} {epoch} {step}".encode())
        return drawn < self.settings.on_policy * 2.0**64

    def examples(self, model: Any, indices: Sequence[int], step: int) -> list[Example]:
        """New examples in place of those with these numbers; a blank where no answer can be learned from.

        The same weights, numbers and ``step`` give the same answers. Nothing else draws from another random state.

        Args:
            model: that is trained, unwrapped.
            indices: into ``data``; numbers beyond are blanks.
            step: number of the optimizer step in the run.
        """
        questions = [question for i in indices if i < len(self.data) for question in questions_of([self.data.rows[i]])]
        if not questions:
            return [dict(BLANK)]
        how = RespondSettings(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=1.0,
            seed=xxhash.xxh3_64_intdigest(f"{self.settings.seed} {step}".encode()) >> 1,
            batch_size=len(questions),
        )
        training = model.training
        model.eval()
        try:
            with torch.random.fork_rng():
                answers = respond(model, self.reader, questions, how)
        finally:
            model.train(training)
        written = [q.answered(a.text, whole=a.finish == "end") for q, a in zip(questions, answers, strict=True)]
        readers = [self.reader, *(teacher.reader for teacher in self.teachers.values())]
        try:
            rows = prepare(written, readers, self.max_length).rows
        except DataError:  # none is left: all are empty
            return [dict(BLANK)]
        said = {name: found for name, teacher in self.teachers.items() if (found := teacher.said(rows))}
        data = FusionDataset(
            rows,
            sources=said,
            projections={name: self._projections[name] for name in said},
            tokenizer=self.reader,
            fusion=self._fusion,
            relative=False,
        )
        return [self._counted(data, data[i]) for i in range(len(data))]

    def _counted(self, data: FusionDataset, example: Example) -> Example:
        """With the counts that the examples of the whole data have."""
        counts = dict(zip(data.count_names, example["counts"], strict=True))
        return {**example, "counts": np.array([counts.get(name, 0.0) for name in self.data.count_names])}
