"""The arguments of a fusion trainer: transformers' own, and what a model learns from its teachers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from pydantic import BaseModel
from transformers import TrainingArguments

from fusekit.capturing.settings import CaptureSettings
from fusekit.data.settings import DataSettings
from fusekit.distillation.arguments import IMPOSSIBLE, OneDevice
from fusekit.distillation.settings import DistillSettings, TrainingSettings
from fusekit.errors import DistillationError


def _declared(section: type[BaseModel], name: str) -> Any:
    """A field that is declared in a section of the recipe: its help is said there, None is the preset's value."""
    return field(default=None, metadata={"help": section.model_fields[name].description})


@dataclass
class FusionConfig(OneDevice):
    """Arguments of :class:`~fusekit.FusionTrainer`: any of ``transformers.TrainingArguments``, and these.

    ``preset`` gives the values of the loss, of ``alignment`` and of ``fusion`` that are not given; the learning rate,
    epochs and batches are those of TrainingArguments. The values are checked as those of a recipe, where the same names
    stand in the sections ``distill``, ``alignment`` and ``fusion`` (docs/distillation.md).

    >>> FusionConfig("out", loss="kl", lm_weight=0.5).lm_weighting
    'relative'

    Attributes:
        preset: a named set of values: fusekit, fusechat, fusellm, uld, gold, grouped_kl, p_kl, alm or sft.
        lm_weight, lm_weighting, loss, truncation, temperature: of L = λ L_CLM + (1 - λ) L_fusion.
        on_policy, max_new_tokens: share of the steps that learn from the model's own answers, and their length.
        alignment: how teachers' rows come into the model's tokens and vocabulary, by name.
        fusion: what becomes of several teachers' rows, by name.
        top_k: entries per label of what is captured here; a store that is given has its own.
        max_length: most tokens of an example; longer ones are cut.
        dtype: data type of the weights of a model that is given by name.
        max_skipped_steps: stop after so many steps in a row with a non-finite loss or gradient.

    Raises:
        DistillationError: an unknown name or an impossible value, with the nearest name; an argument of transformers
            that cannot work with a fusion loss.
    """

    preset: str = field(default="fusekit", metadata={"help": "Named set of values for what is not given."})
    lm_weight: float | None = _declared(TrainingSettings, "lm_weight")
    lm_weighting: str | None = _declared(TrainingSettings, "lm_weighting")
    loss: str | None = _declared(TrainingSettings, "loss")
    truncation: str | None = _declared(TrainingSettings, "truncation")
    temperature: float | None = _declared(TrainingSettings, "temperature")
    dtype: str | None = _declared(TrainingSettings, "dtype")
    on_policy: float | None = _declared(TrainingSettings, "on_policy")
    max_new_tokens: int | None = _declared(TrainingSettings, "max_new_tokens")
    max_skipped_steps: int | None = _declared(TrainingSettings, "max_skipped_steps")
    alignment: dict[str, Any] | None = field(default=None, metadata={"help": "Settings of the section alignment."})
    fusion: dict[str, Any] | None = field(default=None, metadata={"help": "Settings of the section fusion."})
    top_k: int | None = _declared(CaptureSettings, "top_k")
    max_length: int | None = _declared(DataSettings, "max_length")

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()
        defaults = {item.name: item.default for item in fields(TrainingArguments)}
        for name, why in IMPOSSIBLE.items():
            # The trainer sets the first itself, and can evaluate, where a run holds nothing out.
            if name in ("remove_unused_columns", "eval_strategy") or name not in defaults:
                continue
            if getattr(self, name) != defaults[name]:
                raise DistillationError(f"{name} cannot be set: {why}")
        if mode := (self.fusion or {}).get("mode"):
            raise DistillationError(
                f"fusion.mode is {mode!r}, but a trainer trains one model: leave mode out, and make one trainer per "
                "teacher for pairwise fusion"
            )
        checked = (*_LOSS, "dataloader_num_workers", "train_sampling_strategy")
        own = {name: getattr(self, name) for name in checked if getattr(self, name) is not None}
        sections = {"training": own, "alignment": self.alignment or {}, "fusion": self.fusion or {}}
        self.settings = DistillSettings.of(self.preset, sections)
        if self.settings.training.schedule is not None:
            raise DistillationError(
                f"preset {self.preset} trains on the answers of all models, which a trainer does not make: use a recipe"
            )
        for name in _LOSS:
            setattr(self, name, getattr(self.settings.training, name))
        self.top_k = (CaptureSettings() if self.top_k is None else CaptureSettings(top_k=self.top_k)).top_k
        self.max_length = self.max_length or DataSettings.model_fields["max_length"].default


_LOSS = tuple(item.name for item in fields(FusionConfig) if item.name in TrainingSettings.model_fields)
_LOSS = tuple(name for name in _LOSS if name not in {item.name for item in fields(TrainingArguments)})
