"""Everything that decides what a distillation run computes, as models that refuse what they do not know."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from fusekit.errors import DistillationError
from fusekit.layout import PIVOT, TRAINING
from fusekit.settings import Settings
from fusekit.yaml import Mistake, nearest, setting_problem

Preset = dict[str, dict[str, Any]]

# As the papers do it: source entries that meet on one pivot entry keep the largest, and positions without a row get a
# one-hot on the label. Tokens are aligned exactly; `tokens: dtw` is the papers' own.
_PAPERS_ALIGNMENT: dict[str, Any] = {"conditioning": False, "tail": "keep", "one_hot": True, "collisions": "max"}

# Rows in the source's own vocabulary, which the pivot's opinion cannot stand beside, nor be judged with.
_OWN_VOCABULARY: dict[str, Any] = {"mode": "pairwise", "include_pivot": False, "metric": "bits_per_byte"}

PRESETS: dict[str, Preset] = {
    # Chosen on validation text of a real pair of models: benchmarks/real.
    "fusekit": {"training": {"lm_weight": 0.0, "lm_weighting": "relative", "loss": "kl"}},
    # arXiv 2401.10491, sections 3 and 4.1.
    "fusellm": {
        "alignment": {**_PAPERS_ALIGNMENT, "vocabulary": "mined"},
        "fusion": {"mode": "joint", "function": "min_ce", "metric": "token_ce"},
        "training": {
            "lm_weight": 0.9,
            "loss": "ce",
            "truncation": "renormalize",
            "num_train_epochs": 1.0,
            "learning_rate": 1e-5,
            "warmup_steps": 0.008,
            "weight_decay": 0.1,
            "batch_size": 128,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "max_grad_norm": 1.0,
        },
    },
    # arXiv 2408.07990, sections 3 and 4.1.
    "fusechat": {
        "alignment": {**_PAPERS_ALIGNMENT, "vocabulary": "ms"},
        "fusion": {"mode": "pairwise", "function": "min_ce", "metric": "token_ce"},
        "training": {
            "lm_weight": 0.9,
            "loss": "ce",
            "truncation": "renormalize",
            "num_train_epochs": 3.0,
            "learning_rate": 5e-6,
            "warmup_steps": 0.03,
            "weight_decay": 0.0,
            "batch_size": 128,
        },
    },
    # The default, but in groups of the pivot's tokens that the source can tell apart.
    "grouped_kl": {
        "alignment": {"vocabulary": "grouped"},
        "training": {"lm_weight": 0.0, "lm_weighting": "relative", "loss": "grouped_kl"},
    },
    # X-Token's projection of the student into the source's vocabulary (arXiv 2605.21699).
    "p_kl": {"alignment": {"vocabulary": "pieces"}, "fusion": _OWN_VOCABULARY, "training": {"loss": "p_kl"}},
    # Approximate likelihood matching (arXiv 2503.20083).
    "alm": {"alignment": {"vocabulary": "chunks"}, "fusion": _OWN_VOCABULARY, "training": {"loss": "alm"}},
    # arXiv 2408.04998; the weights of the stages are published, the other values are not. Beta is (1 - lm_weight) /
    # lm_weight.
    "profuser": {
        "alignment": {**_PAPERS_ALIGNMENT, "vocabulary": "mined"},
        "fusion": {"mode": "joint", "function": "min_ce", "metric": "token_ce"},
        "training": {
            "lm_weight": 0.5,
            "loss": "kl",
            "truncation": "renormalize",
            "schedule": [{"epochs": 1, "responses": 1.0}, {"epochs": 2, "responses": 0.1, "data": 1.0}],
            "learning_rate": 5e-6,
            "warmup_steps": 0.03,
            "weight_decay": 0.0,
            "batch_size": 128,
        },
    },
    # Plain fine-tuning on the same rows, in the same order.
    "sft": {"fusion": {"mode": "joint"}, "training": {"lm_weight": 1.0}},
    # Universal logit distillation (arXiv 2402.12030): sorted probabilities, at the positions where both have read the
    # same text, cut off after the top k.
    "uld": {"alignment": {"vocabulary": "none"}, "fusion": _OWN_VOCABULARY, "training": {"loss": "uld_topk"}},
    # As uld, but entries whose string is a token of the pivot are compared with that token; after the hybrid loss of
    # TRL's GOLD trainer.
    "gold": {"alignment": {"vocabulary": "matched"}, "fusion": _OWN_VOCABULARY, "training": {"loss": "gold"}},
}


_LOSSES = ("ce", "kl", "reverse_kl", "js", "grouped_kl", "uld_topk", "gold", "p_kl", "alm")
"""Those that fusekit brings, known without importing torch."""
VOCABULARIES = {"gold": "matched", "grouped_kl": "grouped", "p_kl": "pieces", "alm": "chunks"}
"""Which vocabulary a loss needs, and no other loss can have."""
CHECKPOINTS_KEPT = 2
"""Checkpoints that a run keeps, unless ``save_total_limit`` says otherwise."""


class _Section(Settings):
    model_config = ConfigDict(validate_default=True, allow_inf_nan=False)


class AlignmentSettings(_Section):
    """How a source's rows come to stand in the pivot's vocabulary at the pivot's positions."""

    tokens: Literal["span", "dtw"] = Field(
        default="span",
        description="Which tokens correspond: `span` where both have read the same bytes (exact), `dtw` by time "
        "warping (the papers').",
    )
    vocabulary: Literal[
        "em", "mined", "ms", "ms_released", "prefix", "grouped", "matched", "pieces", "chunks", "none"
    ] = Field(
        default="prefix",
        description="The vocabulary map: `em` equal strings, `mined` least edit distance (FuseLLM), `ms` mapping "
        "statistics (FuseChat), `ms_released` by the released code's formula, `prefix` the first token of the pivot's "
        "own tokenisation; `grouped`: as `prefix`, into groups of tokens that the source cannot tell apart, for the "
        "loss `grouped_kl`; `matched`: rows stay as they are, and entries without an equal string have no id, for the "
        "loss `gold`; `pieces` and `chunks`: means of rows, and likelihoods, of the stretches between common ends, for "
        "the losses `p_kl` and `alm`; `none`: rows stay in the source's vocabulary, for the loss `uld_topk`.",
    )
    conditioning: bool = Field(
        default=True,
        description="Where the pivot stands within a source token, condition the source's row on what is read of it.",
    )
    tail: Literal["back_off", "pivot_share", "listed_share", "drop", "keep"] = Field(
        default="back_off",
        description="What becomes of the probability outside a source's top k. Inside a source token only the part "
        "that begins with the bytes consumed may stay: `pivot_share` estimates it by the pivot's probability of them, "
        "`listed_share` by the top k, `drop` as zero; `keep` keeps all of it. `back_off` is `pivot_share`, and "
        "distributes the tail like the pivot's own prediction.",
    )
    one_hot: bool = Field(
        default=False, description="A one-hot on the label where no row is; `dtw` always has it, as in the papers."
    )
    collisions: Literal["add", "max"] = Field(
        default="add",
        description="What source entries that meet on one pivot token become: the sum of their probabilities, or the "
        "largest (the papers').",
    )

    @property
    def map_method(self) -> str | None:
        """How the vocabulary map is made, as :func:`fusekit.alignment.build_vocabulary_map` takes it."""
        made_by = {"none": None, "grouped": "prefix", "matched": "em", "pieces": "em", "chunks": "em"}
        return made_by.get(self.vocabulary, self.vocabulary)

    @property
    def as_they_are(self) -> bool:
        """Whether rows stay the source's own, so that they have no probability of the pivot's labels."""
        return self.vocabulary in ("none", "matched", "pieces", "chunks")


class FusionSettings(_Section):
    """What becomes of several models' rows at one label."""

    mode: Literal["pairwise", "joint"] = Field(
        default="pairwise",
        description="`pairwise`: a distilled model per source, from the pivot and that source; `joint`: one from all.",
    )
    function: str = Field(
        default="min_ce",
        description="`min_ce`: the rows of the model that knows the text best; `avg_ce`: all, weighed; others are in "
        "docs/losses.md.",
    )
    level: Literal["sequence", "token"] = Field(
        default="sequence", description="Choose or weigh once per example, or at every label."
    )
    metric: Literal["projected_ce", "bits_per_byte", "token_ce"] = Field(
        default="projected_ce",
        description="What a teacher is judged by: `projected_ce` is the cross-entropy of its projected rows on the "
        "pivot's labels; `bits_per_byte` and `token_ce` (the papers') are its own, in its own tokens.",
    )
    include_pivot: bool = Field(
        default=True, description="Whether what the pivot said before training is among the candidates."
    )
    pivot_teaches: bool = Field(
        default=True,
        description="Whether its own distribution is taught where it is the best, as in the papers; else such labels "
        "are learned from the text alone.",
    )

    @field_validator("function")
    @classmethod
    def _known(cls, name: str) -> str:
        from fusekit.distillation.fusion import FUSION_FUNCTIONS

        if name not in FUSION_FUNCTIONS:
            raise ValueError(f"unknown fusion function {name!r}{nearest(name, FUSION_FUNCTIONS)}")
        return name


class ScheduleStage(_Section):
    """A stage of training, and what each part of the data weighs in it."""

    epochs: int = Field(default=1, ge=1, description="Passes over the examples of the parts that weigh something.")
    responses: float = Field(
        default=0.0, ge=0, description="Weight of the loss on the winners' own answers (ProFuser's inference mode)."
    )
    data: float = Field(default=0.0, ge=0, description="Weight of the loss on the data (its training mode).")

    @model_validator(mode="after")
    def _weighs(self) -> ScheduleStage:
        if not self.responses + self.data:
            raise ValueError("responses and data are both 0, so this stage would learn nothing: give one a weight")
        return self


class TrainingSettings(_Section):
    """The loss and the training run."""

    lm_weight: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="λ in L = λ L_CLM + (1 - λ) L_fusion; 1 is plain fine-tuning. `lm_weighting: soft` has its own.",
    )
    lm_weighting: Literal["constant", "soft", "hard_and_decay", "relative"] = Field(
        default="constant",
        description="How λ changes: `hard_and_decay` rises to 1 over the run, `soft` is 1 - max exp(-cross-entropy) of "
        "each example, `relative` is λ + (1 - λ) r, where r is the bits per byte of the best model of each "
        "example divided by the pivot's, over the example's data set.",
    )
    loss: str = Field(default="ce", description="L_fusion.", json_schema_extra={"enum": list(_LOSSES)})
    truncation: Literal["tail", "renormalize"] = Field(
        default="tail",
        description="What is done about the mass outside the entries: one more outcome, or the entries renormalised "
        "(the papers').",
    )
    temperature: float = Field(default=1.0, gt=0, description="Temperature of L_fusion; captures must have the same.")
    num_train_epochs: float = Field(
        default=3.0, gt=0, description="Passes over the examples; `schedule` has its own instead."
    )
    schedule: Annotated[list[ScheduleStage], Field(min_length=1)] | None = Field(
        default=None,
        description="Stages of training that also learn from the answers of the section `respond`; null: the data "
        "alone.",
    )
    on_policy: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the optimizer steps that learn from answers which the model writes itself, from L_fusion "
        "alone. The teachers are loaded beside it.",
    )
    max_new_tokens: int = Field(default=128, ge=1, description="Most tokens of an answer for `on_policy`.")
    learning_rate: float = Field(default=5e-6, gt=0, description="Peak learning rate.")
    lr_scheduler_type: str = Field(
        default="cosine", description="Learning rate schedule, a name that transformers knows."
    )
    warmup_steps: float = Field(default=0.03, ge=0, description="Warm-up: a share of the steps below 1, else steps.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of the optimizer.")
    batch_size: int = Field(
        default=128, ge=1, description="Examples per optimizer step, over all processes; accumulation follows from it."
    )
    per_device_train_batch_size: int = Field(
        default=1,
        ge=1,
        description="Examples at once on one device; changes memory and speed, and the result of `p_kl` and "
        "`on_policy` alone.",
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32", description="Data type of the weights while training; `auto`: the checkpoint's."
    )
    bf16: bool = Field(default=False, description="Compute in bfloat16; the weights stay as they are.")
    activation_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass, to save memory."
    )
    lora: dict[str, Any] | None = Field(
        default=None, description="Train an adapter with these fields of peft's LoraConfig; null: all weights."
    )
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="Random seed.")
    dataloader_num_workers: int = Field(default=0, ge=0, description="Data loader processes.")
    max_skipped_steps: int = Field(
        default=5, ge=1, description="Stop after so many steps in a row with a non-finite loss or gradient."
    )

    model_config = ConfigDict(extra="allow")  # any further field of transformers.TrainingArguments, checked by it

    @property
    def plain(self) -> bool:
        """Whether nothing but the text is learned."""
        return self.lm_weight == 1 and self.lm_weighting != "soft"

    @property
    def passes(self) -> float:
        """Epochs of all stages."""
        return sum(stage.epochs for stage in self.schedule) if self.schedule is not None else self.num_train_epochs

    @property
    def trainer(self) -> dict[str, Any]:
        """The fields of TrainingArguments that are given beside those declared here."""
        return dict(self.model_extra or {})

    @field_validator("loss")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in _LOSSES:
            return name
        from fusekit.distillation.distances import DISTANCES

        if name not in DISTANCES:
            raise ValueError(f"unknown loss {name!r}{nearest(name, DISTANCES)}")
        return name


def _clash(says: str, *values: str) -> Mistake:
    return Mistake(says, *(tuple(value.split(".")) for value in values))


def clashes(
    alignment: AlignmentSettings, fusion: FusionSettings, training: TrainingSettings, sources: int = 1
) -> Iterator[Mistake]:
    """What of these sections, each right by itself, does not go together. sources: how many teach.

    The paths are of section and field, ``("training", "loss")``.
    """
    loss, vocabulary, raw, schedule = training.loss, alignment.vocabulary, alignment.as_they_are, training.schedule
    if loss == "reverse_kl" and training.truncation == "renormalize":
        says = "reverse_kl with renormalize is infinite: the renormalised target is zero where the student is not; use "
        yield _clash(f"{says}truncation tail", "training.loss", "training.truncation")
    needed = VOCABULARIES.get(loss)
    if vocabulary != needed and (needed is not None or vocabulary in VOCABULARIES.values()):
        owner = loss if needed else next(name for name, own in VOCABULARIES.items() if own == vocabulary)
        says = (
            f"loss {owner} and vocabulary {VOCABULARIES[owner]} need each other, but the loss is {loss} and the "
            f"vocabulary {vocabulary}: preset {owner} has both"
        )
        yield _clash(says, "training.loss", "alignment.vocabulary")
    if schedule is not None and fusion.mode != "joint":
        says = "a schedule trains one model on the answers of the best of all models: set fusion.mode to joint"
        yield _clash(says, "training.schedule", "fusion.mode")
    ordered = [name for name in ("train_sampling_strategy", "data_seed") if name in training.trainer]
    if schedule is not None and ordered:
        says = f"a schedule orders the examples itself, by seed: leave {' and '.join(ordered)} out"
        yield _clash(says, f"training.{ordered[0]}", "training.schedule")
    if training.on_policy > 0:
        order = training.trainer.get("train_sampling_strategy", "random")
        clash = {
            "schedule": schedule is not None,
            "dataloader_num_workers": training.dataloader_num_workers > 0,
            "lm_weight": training.plain,
            "train_sampling_strategy": order not in ("random", "sequential"),
        }
        says = (
            "on_policy asks the models during training and learns from teachers alone, so it works with no schedule, "
            "no dataloader_num_workers, no lm_weight 1 and no train_sampling_strategy but random and sequential"
        )
        yield from (_clash(says, "training.on_policy", f"training.{name}") for name, found in clash.items() if found)
    if fusion.function == "reward_softmax":
        says = "reward_softmax needs rewards, which no recipe or store has: give FusionDataset rewards, or use avg_ce"
        yield _clash(says, "fusion.function")
    with_it = f"with vocabulary {vocabulary}"
    if raw and fusion.metric == "projected_ce":
        says = f"{with_it} no row is projected, so metric projected_ce does not exist: use bits_per_byte"
        yield _clash(says, "fusion.metric", "alignment.vocabulary")
    if vocabulary == "none" and needed is None and loss != "uld_topk":
        says = f"loss {loss} compares probabilities token by token, so it needs a vocabulary map, not vocabulary none"
        yield _clash(says, "training.loss", "alignment.vocabulary")
    if alignment.tokens != "span" and (raw or vocabulary == "grouped"):
        says = f"{with_it} rows are taken where tokens is span, not {alignment.tokens}"
        yield _clash(says, "alignment.tokens", "alignment.vocabulary")
    if raw and (fusion.function != "min_ce" or fusion.level != "sequence"):
        says = f"{with_it} the candidates' entries cannot be added or compared: use min_ce at level sequence, not"
        field = "level" if fusion.function == "min_ce" else "function"
        yield _clash(f"{says} {getattr(fusion, field)}", f"fusion.{field}", "alignment.vocabulary")
    if vocabulary in ("pieces", "chunks") and fusion.include_pivot:
        says = f"{with_it} rows are of stretches of text, and the pivot's own are not: set include_pivot to false"
        yield _clash(says, "fusion.include_pivot", "alignment.vocabulary")
    if vocabulary in ("grouped", "pieces") and fusion.mode == "joint" and sources > 1:
        says = f"loss {loss} compares in the vocabulary of one source, not of {sources}: use mode pairwise"
        yield _clash(says, "fusion.mode", "alignment.vocabulary")


class DistillSettings(_Section):
    """All settings of a run but its inputs. ``preset`` names where the values came from; they are all written out."""

    preset: str = "fusekit"
    alignment: AlignmentSettings = AlignmentSettings()
    fusion: FusionSettings = FusionSettings()
    training: TrainingSettings = TrainingSettings()

    @model_validator(mode="after")
    def _fit_together(self) -> DistillSettings:
        if found := [clash.says for clash in clashes(self.alignment, self.fusion, self.training)]:
            raise ValueError("; ".join(found))
        return self

    @property
    def plain(self) -> bool:
        """Whether nothing but the text is learned."""
        return self.training.plain

    @classmethod
    def of(cls, preset: str = "fusekit", changes: Mapping[str, Mapping[str, Any]] | None = None) -> DistillSettings:
        """A preset of :data:`PRESETS` with changes, section to field to value.

        Raises DistillationError: an unknown preset, section or field, with the nearest name; a value that cannot be.
        """
        if preset not in PRESETS:
            raise DistillationError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}")
        sections: dict[str, Any] = {name: dict(values) for name, values in PRESETS[preset].items()}
        for section, values in (changes or {}).items():
            sections.setdefault(section, {}).update(values)
        try:
            made = cls(preset=preset, **sections)
        except ValidationError as error:
            raise DistillationError("; ".join(map(_explained, error.errors(include_url=False)))) from error
        if made.training.trainer:
            from fusekit.distillation.arguments import wrong_fields

            if wrong := wrong_fields(made.training.trainer):
                raise DistillationError("; ".join(wrong.values()))
        return made


def _explained(problem: Any) -> str:
    """A problem that pydantic found; an unknown key with the nearest known one."""
    if problem["type"] != "extra_forbidden":
        return setting_problem(problem)
    *sections, key = problem["loc"]
    known: Any = DistillSettings.model_fields
    known = known[sections[0]].annotation.model_fields if sections else known
    return f"unknown setting {'.'.join(map(str, problem['loc']))}{nearest(key, known)}"


JOINT, PLAIN = "joint", "sft"


@dataclass(frozen=True)
class Target:
    """A model that a run makes. ``sources`` are the names of those that teach it."""

    name: str
    folder: Path
    sources: tuple[str, ...]

    @property
    def work(self) -> Path:
        """Where its checkpoints are until it is published."""
        return self.folder.parent / f"{self.name}{TRAINING}"


def refuse_names(sources: Iterable[str]) -> None:
    """Raise DistillationError for names of sources that cannot be those of folders of the output."""
    for name in sources:
        taken = name in ("", JOINT, PLAIN, PIVOT)
        if taken or not isinstance(name, str) or "/" in name or name.startswith("."):
            raise DistillationError(f"a source cannot be called {name!r}: its name becomes a folder of the output")


def refuse_nobody(settings: DistillSettings, sources: Collection[str]) -> None:
    """Raise DistillationError for settings that learn from sources where there is none."""
    if not sources and not settings.plain:
        raise DistillationError("there is no source to learn from: name one, or set lm_weight to 1 (preset sft)")


def targets_of(settings: DistillSettings, sources: Sequence[str], out: Path) -> list[Target]:
    """The models that settings ask for: one per source, one from all, or (plain settings) one from the text."""
    refuse_names(sources)
    refuse_nobody(settings, sources)
    if settings.plain:
        return [Target(PLAIN, out / PLAIN, ())]
    if settings.fusion.mode == "joint":
        return [Target(JOINT, out / JOINT, tuple(sources))]
    return [Target(name, out / name, (name,)) for name in sources]
