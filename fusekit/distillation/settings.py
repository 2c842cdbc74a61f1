"""Everything that decides what a distillation run computes, as models that refuse what they do not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fusekit.distillation.presets import PRESETS
from fusekit.errors import DistillationError
from fusekit.problems import nearest

CHECKPOINTS_KEPT = 2
"""Of a run, unless ``trainer.save_total_limit`` says otherwise."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class AlignmentSettings(_Section):
    """How a source's rows come to stand in the pivot's vocabulary at the pivot's positions.

    Attributes:
        tokens: ``span`` (exact) or ``dtw`` (the papers').
        vocabulary: the map; see :func:`fusekit.alignment.build_vocabulary_map`. ``none``: rows stay in the source's
            vocabulary, for ``uld_topk``, which compares sorted probabilities.
        conditioning, one_hot, collisions: see :func:`fusekit.alignment.project_rows`; ``dtw`` always has the one-hots.
    """

    tokens: Literal["span", "dtw"] = "span"
    vocabulary: Literal["em", "mined", "ms", "ms_released", "prefix", "none"] = "prefix"
    conditioning: bool = True
    one_hot: bool = False
    collisions: Literal["add", "max"] = "add"


class FusionSettings(_Section):
    """What becomes of several models' rows at one label.

    Attributes:
        mode: ``pairwise``: one target per source, from the pivot and that source. ``joint``: one target from all.
        function: a name in :data:`fusekit.distillation.fusion.FUSION_FUNCTIONS`.
        level: choose or weigh once per row (``sequence``) or at every label (``token``).
        metric: what rows are judged by: ``bits_per_byte`` or ``token_ce`` (the papers').
        include_pivot: whether what the pivot said before training is among the candidates.
        pivot_teaches: whether its own distribution is taught where it is the best, as in the papers; else such labels
            are learnt from the text alone, and nothing holds the pivot back at what nobody knew.
    """

    mode: Literal["pairwise", "joint"] = "pairwise"
    function: str = "min_ce"
    level: Literal["sequence", "token"] = "sequence"
    metric: Literal["bits_per_byte", "token_ce"] = "bits_per_byte"
    include_pivot: bool = True
    pivot_teaches: bool = True

    @field_validator("function")
    @classmethod
    def _known(cls, name: str) -> str:
        from fusekit.distillation.fusion import FUSION_FUNCTIONS

        if name not in FUSION_FUNCTIONS:
            raise ValueError(f"unknown fusion function {name!r}{nearest(name, FUSION_FUNCTIONS)}")
        return name


class TrainingSettings(_Section):
    """The loss and the training run.

    Attributes:
        lm_weight: λ in L = λ L_CLM + (1 - λ) L_fusion; 1 is plain fine-tuning.
        lm_weighting: what becomes of λ over the run and from row to row, a name in
            :data:`fusekit.distillation.fusion.LM_WEIGHTS`.
        loss, truncation, temperature: of L_fusion; see :func:`fusekit.distillation.losses.fusion_loss`.
        epochs: passes over the rows.
        learning_rate, scheduler, warmup, weight_decay: of AdamW; warmup is a share of the steps below 1, else steps.
        batch_size: rows per optimizer step, over all processes and accumulation.
        micro_batch_size: rows at once on one device; changes memory and speed, not the result.
        dtype: of the weights while training: ``float32``, ``bfloat16`` or ``auto`` (the checkpoint's).
        bf16: compute in bfloat16 with weights as they are.
        activation_checkpointing: recompute activations going backward.
        lora: fields of peft's LoraConfig; None for full fine-tuning.
        seed: of the order of rows, and of everything else that is drawn.
        workers: data loader processes.
        max_skipped_steps: stop once as many optimizer steps in a row had a loss or gradient that is no number.
        trainer: any further fields of transformers.TrainingArguments.
    """

    lm_weight: float = Field(default=0.9, ge=0, le=1)
    lm_weighting: Literal["constant", "soft", "hard_and_decay"] = "constant"
    loss: Literal["ce", "kl", "reverse_kl", "js", "uld_topk"] = "ce"
    truncation: Literal["tail", "renormalize"] = "tail"
    temperature: float = Field(default=1.0, gt=0)
    epochs: float = Field(default=3.0, gt=0)
    learning_rate: float = Field(default=5e-6, gt=0)
    scheduler: str = "cosine"
    warmup: float = Field(default=0.03, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=128, ge=1)
    micro_batch_size: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    bf16: bool = False
    activation_checkpointing: bool = False
    lora: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)
    max_skipped_steps: int = Field(default=5, ge=1)
    trainer: dict[str, Any] = Field(default_factory=dict)


class DistillSettings(_Section):
    """All settings of a run but its inputs. ``preset`` names where the values came from; they are all written out."""

    preset: str = "fusekit"
    alignment: AlignmentSettings = AlignmentSettings()
    fusion: FusionSettings = FusionSettings()
    training: TrainingSettings = TrainingSettings()

    @model_validator(mode="after")
    def _one_vocabulary(self) -> DistillSettings:
        if self.alignment.vocabulary == "none" and self.training.loss != "uld_topk":
            raise ValueError(
                f"loss {self.training.loss} compares probabilities token by token, so it needs a vocabulary map, not "
                "vocabulary none"
            )
        if self.alignment.vocabulary == "none":
            if self.alignment.tokens != "span":
                raise ValueError("without a vocabulary map rows are taken where tokens is span, not dtw")
            if self.fusion.function != "min_ce" or self.fusion.level != "sequence":
                raise ValueError(
                    f"with vocabulary none the candidates' ids are of different vocabularies, so function "
                    f"{self.fusion.function} at level {self.fusion.level} cannot add or compare them: use min_ce at "
                    "level sequence"
                )
        return self

    @property
    def plain(self) -> bool:
        """Whether nothing but the text is learnt."""
        return self.training.lm_weight == 1 and self.training.lm_weighting != "soft"

    @classmethod
    def of(cls, preset: str = "fusekit", changes: Mapping[str, Mapping[str, Any]] | None = None) -> DistillSettings:
        """A preset with changes.

        Args:
            preset: a name in :data:`fusekit.distillation.presets.PRESETS`.
            changes: section to field to value; ``trainer`` fields are added to the preset's.

        Raises:
            DistillationError: unknown preset, section or field, with the nearest name; a value that cannot be.
        """
        if preset not in PRESETS:
            raise DistillationError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}")
        sections: dict[str, Any] = {name: dict(values) for name, values in PRESETS[preset].items()}
        for section, values in (changes or {}).items():
            merged = sections.setdefault(section, {})
            trainer = {**merged.get("trainer", {}), **values.get("trainer", {})}
            merged.update(values)
            if trainer:
                merged["trainer"] = trainer
        try:
            return cls(preset=preset, **sections)
        except ValidationError as error:
            raise DistillationError(_explained(error)) from error


_SECTIONS: dict[str, type[BaseModel]] = {
    "alignment": AlignmentSettings,
    "fusion": FusionSettings,
    "training": TrainingSettings,
}


def _explained(error: ValidationError) -> str:
    """Every problem on a line of its own, unknown keys with the nearest known one."""
    lines = []
    for problem in error.errors(include_url=False):
        *parents, key = [str(part) for part in problem["loc"]] or ["settings"]
        where = ".".join([*parents, key])
        if problem["type"] == "extra_forbidden":
            section = _SECTIONS.get(parents[0]) if parents else DistillSettings
            known = section.model_fields if section is not None else {}
            lines.append(f"unknown setting {where}{nearest(key, known)}")
        else:
            lines.append(f"{where} = {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)
