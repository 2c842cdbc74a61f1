"""Answers that the trained model writes while it trains, and what teachers say about them (GKD, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xxhash

from fusekit.capturing.manifest import StoreSpec
from fusekit.capturing.models import ModelChoice
from fusekit.capturing.settings import CaptureSettings
from fusekit.capturing.store import Store
from fusekit.data.prepare import prepare
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation.batching import BLANK, Example
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.inputs import Source
from fusekit.distillation.live import LiveTeacher, live_teacher
from fusekit.distillation.projections import needs_pivot
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
        data: the examples, whose questions are asked, with their teachers; one that is a store is loaded.
        tokenizer: the trained model's, which reads conversations under its own template unless ``data`` reads them.
        settings: ``on_policy``, ``max_new_tokens`` and ``seed``.
        max_length: most tokens of a question with its answer, for any of the models; longer ones are cut.
        sources: of teachers that are stores, where more is known than the stores say: the model, and how it reads.
        say: told what a user should know.

    Raises:
        CaptureError: a teacher cannot be loaded.
        DistillationError: nothing to ask, or nobody to teach; a model or its template is not that of a store.
    """

    def __init__(
        self,
        data: FusionDataset,
        tokenizer: Any,
        settings: TrainingSettings,
        max_length: int,
        *,
        sources: Mapping[str, Source] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.data, self.settings, self.max_length = data, settings, max_length
        self.reader = data.tokenizer if isinstance(data.tokenizer, RowTokenizer) else RowTokenizer(tokenizer)
        if not questions_of(data.rows):
            raise DistillationError(
                f"on_policy is {settings.on_policy:g}, but none of the {len(data)} examples is a conversation that "
                "ends with an answer: set it to 0"
            )
        self.teachers: dict[str, LiveTeacher] = {}
        for name, source in data.sources.items():
            if isinstance(source, LiveTeacher):
                self.teachers[name] = source
            elif isinstance(source, Store):
                self.teachers[name] = self._loaded(name, source.spec, (sources or {}).get(name), say)
        if not self.teachers:
            raise DistillationError(f"on_policy is {settings.on_policy:g}, but there is no teacher: set it to 0")
        self._projections = {
            name: replace(how, tail="listed_share") if needs_pivot(how) else how
            for name, how in data.projections.items()
        }
        self._fusion = data.fusion.model_copy(update={"include_pivot": False})

    def _loaded(self, name: str, spec: StoreSpec, source: Source | None, say: Callable[[str], None]) -> LiveTeacher:
        dtype = spec.details.get("dtype")
        choice = ModelChoice(spec.model, dtype=dtype if isinstance(dtype, str) else "auto")
        if source is not None:
            choice = source.tokenizer_choice(spec.model)
        how = CaptureSettings(top_k=spec.top_k, keep_mass=spec.keep_mass or 1.0, temperature=spec.temperature)
        reader = source.reader if source is not None else None
        made = live_teacher(name, choice, self.data.rows, how, max_length=self.max_length, reader=reader, say=say)
        if spec.model_fingerprint not in ("", made.spec.model_fingerprint):
            raise DistillationError(
                f"the store of {name} was captured from {spec.model} ({spec.model_fingerprint}), but {choice.model} is "
                f"{made.spec.model_fingerprint} now: capture it again, or set on_policy to 0"
            )
        captured, own = (facts.get("chat_template") for facts in (spec.details, made.reader.facts))
        if captured not in (None, own):
            raise DistillationError(
                f"the store of {name} was captured under the chat template {captured!r}, but {choice.model} would read "
                f"new answers under {own!r}: run a recipe, which says chat_template for each source, or set on_policy "
                "to 0"
            )
        return made

    def chosen(self, epoch: int, step: int) -> bool:
        """Whether a step of an epoch learns from own answers: drawn by the seed, the same in every process."""
        drawn = xxhash.xxh3_64_intdigest(f"{self.settings.seed} {epoch} {step}".encode())
        return drawn < self.settings.on_policy * 2.0**64

    def examples(self, model: Any, indices: Sequence[int], step: int) -> list[Example]:
        """New examples in place of those with these numbers; a blank where no answer can be learned from.

        The same weights, numbers and ``step`` (of the run) give the same answers, and nothing else draws from another
        random state. model: that is trained, unwrapped. indices: into ``data``; numbers beyond are blanks.
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
            projections=self._projections,
            tokenizer=self.reader,
            fusion=self._fusion,
            relative=False,
        )
        return [self._counted(data, data[i]) for i in range(len(data))]

    def _counted(self, data: FusionDataset, example: Example) -> Example:
        counts = dict(zip(data.count_names, example["counts"], strict=True))
        return {**example, "counts": np.array([counts.get(name, 0.0) for name in self.data.count_names])}
