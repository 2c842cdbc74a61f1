"""Preference training against what several models think of the answers: DPO with a fused reference, as InfiFPO has it.

An answer's log-probability is comparable between tokenizers once it is divided by its number of tokens, so nothing is
aligned: stores of the answers, of any ``top_k``, are all that is needed of the sources (docs/distillation.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import Trainer

from fusekit.capturing.store import Store, date_of
from fusekit.data.prepare import prepare
from fusekit.data.reading import DataCounts, rows_of
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation.arguments import OneDevice, with_adapter
from fusekit.distillation.batching import FusionCollator, LabelLogits
from fusekit.distillation.inputs import capture_student, own_folder
from fusekit.distillation.live import Loaded
from fusekit.distillation.losses import IGNORE
from fusekit.errors import DataError, DistillationError
from fusekit.settings import CaptureSettings
from fusekit.types import FloatArray, Part, Row, TokenizedRow

ANSWERS = ("chosen", "rejected")


def answers(pairs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The two answers of each pair as examples of their own, chosen before rejected: what the models are captured on.

    >>> from fusekit.distillation.preference import answers
    >>> answers([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}])
    [{'prompt': '2+2=', 'completion': '4'}, {'prompt': '2+2=', 'completion': '5'}]

    pairs: records as TRL has them, such as a ``datasets.Dataset``: ``chosen`` and ``rejected``, text or lists of
    messages, with a ``prompt`` of the same kind or, where they are messages, as the messages that both begin with.

    Raises DataError: a pair without a prompt, without one of the answers, or with two equal ones.
    """
    examples = []
    for number, pair in enumerate(pairs, 1):
        found: list[Any] = [pair.get(name) for name in ANSWERS] if isinstance(pair, Mapping) else [None, None]
        chosen, rejected = found
        prompt = pair.get("prompt") if isinstance(pair, Mapping) else None
        alike = type(chosen) is type(rejected) and isinstance(chosen, (str, list)) and chosen != rejected
        if alike and isinstance(chosen, list) and not isinstance(prompt, list):
            both = takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))
            prompt = [message for message, _ in both]
            found = [answer[len(prompt) :] for answer in found]
        if not alike or not prompt or type(prompt) is not type(chosen) or not all(found):
            raise DataError(
                f"pair {number} is {str(pair)[:200]}: give a record with a prompt and two different answers, chosen "
                "and rejected, all text or all lists of messages, and none empty"
            )
        examples += [{"prompt": prompt, "completion": answer} for answer in found]
    return examples


def fused_reference(pivot: FloatArray, sources: FloatArray, *, preferred: bool, clip: bool = True) -> FloatArray:
    """What the models together think of answers: for each answer, the model that differs most from the pivot.

    pivot: float64 [n], log-probabilities of n answers per token, nats, of the model before training. sources: float64
    [K, n], the same of K sources, each per token of its own. preferred: whether they are the chosen answers. clip: a
    source counts as the pivot where it thinks less of a chosen answer than the pivot does, or more of a rejected one.
    Returns float64 [n]; of sources that differ alike the first counts. Probability clipping and max-margin fusion of
    InfiFPO (arXiv 2505.13878).
    """
    if not len(sources):
        return pivot
    if clip:
        sources = np.maximum(sources, pivot) if preferred else np.minimum(sources, pivot)
    farthest = np.abs(sources - pivot).argmax(0)
    fused: FloatArray = np.take_along_axis(sources, farthest[None], 0)[0]
    return fused


def preference_loss(margins: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """-log σ(β (margin - reference)), the mean over pairs: DPO (arXiv 2305.18290, eq. 7), normalised by length.

    margins: float [n], log-probability per token of the chosen answer less that of the rejected one, nats. reference:
    float [n], the same of the reference model.
    """
    return -functional.logsigmoid(beta * (margins - reference)).mean()


@dataclass(repr=False)
class PreferenceConfig(OneDevice):
    """Arguments of :class:`PreferenceTrainer`: any of ``transformers.TrainingArguments``, and these.

    Attributes:
        beta: of :func:`preference_loss`; the default is fusekit's own, not a paper's.
        clip: whether :func:`fused_reference` ignores a source that judges an answer worse than the pivot does.
        max_length: most tokens of a prompt with its answer; longer pairs are refused.
        dtype: data type of the weights of a model that is given by name.
    """

    beta: float = field(default=2.5, metadata={"help": "Strength of a preference."})
    clip: bool = field(default=True, metadata={"help": "Ignore sources that judge an answer worse than the pivot."})
    max_length: int = field(default=2048, metadata={"help": "Most tokens of a prompt with its answer."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < float("inf"):
            raise DistillationError(f"beta is {self.beta!r}: give a finite number above 0")
        self.remove_unused_columns = False  # what the loss needs is no argument of the model


class PreferenceTrainer(Trainer):
    """Trains a model to prefer chosen answers more than its sources do: transformers' Trainer with DPO's loss.

    >>> from fusekit import capture
    >>> from fusekit.distillation.preference import PreferenceConfig, PreferenceTrainer, answers
    >>> pairs = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n)} for n in range(8)]
    >>> store = capture("demo/models/numbers", answers(pairs), folder + "/numbers", top_k=1, quiet=True)
    >>> config = PreferenceConfig(folder, max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True)
    >>> PreferenceTrainer("demo/models/pivot", config, pairs, {"numbers": store}).train().global_step
    {'train_runtime': ...}
    2

    The reference is the model itself before training, fused with the sources (:func:`fused_reference`); with no source
    this is DPO with length normalisation. What the model says of the answers before training is captured into
    ``captures/pivot`` of the output folder, or used where it is there.

    Args:
        model: what is trained: a name on the hub, a path, or a loaded causal language model.
        args: a :class:`PreferenceConfig`.
        train_dataset: pairs, as :func:`answers` takes them.
        sources: by name, a store of ``answers(train_dataset)``, or the path of one.
        processing_class: the tokenizer; by default that of ``model``.
        peft_config: train an adapter: a peft config, or the fields of a LoraConfig.
        kwargs: as in transformers (callbacks, optimizers); there is no evaluation.

    Raises:
        DataError: a pair that cannot be read.
        DistillationError: a pair is too long, or a store lacks an answer or has another part of it.
    """

    def __init__(
        self,
        model: Any,
        args: PreferenceConfig,
        train_dataset: Iterable[Mapping[str, Any]],
        sources: Mapping[str, Store | str | Path] | None = None,
        *,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, PreferenceConfig):
            raise DistillationError(f"args is {type(args).__name__}: give a PreferenceConfig")
        if not isinstance(sources, Mapping | None):
            raise DistillationError(f"sources is {type(sources).__name__}: give stores by name, {{name: store}}")
        stores = {
            name: store if isinstance(store, Store) else Store.open(store) for name, store in (sources or {}).items()
        }
        student = Loaded.of(model, processing_class, dtype=args.dtype)
        # A template that prints the day prints that of the capture that is there.
        reader = RowTokenizer(student.tokenizer, date=date_of(own_folder(args)))
        rows = list(rows_of(answers(train_dataset), DataCounts()))
        if not rows:
            raise DistillationError("train_dataset has no pairs")
        prepared = prepare(rows, [reader], args.max_length, "drop")
        own = capture_student(student, reader, prepared.rows, args, CaptureSettings(top_k=1))
        keys = [row.key for row in rows]
        pivot, *others = (_per_token(name, store, keys) for name, store in {"the model": own, **stores}.items())
        for name, store in stores.items():
            _refuse_other_parts(name, store, own, rows)
        known = np.array(others).reshape(len(others), len(rows))
        chosen, rejected = (
            fused_reference(pivot[at::2], known[:, at::2], preferred=not at, clip=args.clip) for at in (0, 1)
        )
        examples = []
        for row in rows:
            tokens = reader.tokenize(row)
            examples.append({"input_ids": tokens.ids, "labels": np.where(tokens.labels, tokens.ids, IGNORE)})
        super().__init__(
            model=student.model if peft_config is None else with_adapter(student.model, peft_config),
            args=args,
            train_dataset=list(zip(examples[::2], examples[1::2], (chosen - rejected).tolist(), strict=True)),
            processing_class=student.tokenizer,
            data_collator=_Pairs(getattr(student.tokenizer, "pad_token_id", None) or 0),
            **kwargs,
        )
        self._heads = LabelLogits(self.model)  # with its adapter, which may be on the output embedding
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs, and transformers' over micro-batches
        self._ahead: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """The mean loss of a batch of pairs."""
        places, sizes = inputs["predicting"], torch.as_tensor(inputs["sizes"], device=inputs["predicting"].device)
        with self._heads.at(places):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        logits, picked = self._heads.of(outputs.logits, places)
        logits = logits.reshape(-1, logits.shape[-1])
        of_labels = (logits if picked is None else logits[picked]).float()
        logprobs = -functional.cross_entropy(of_labels, inputs["label_ids"], reduction="none")
        answer = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        per_token = logprobs.new_zeros(len(sizes)).index_add(0, answer, logprobs) / sizes
        chosen, rejected = per_token.chunk(2)
        self._ahead.append((chosen - rejected > inputs["reference"]).float().mean())
        loss = preference_loss(chosen - rejected, inputs["reference"], self.args.beta)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds TRL's ``rewards/accuracies``: the share of this process's pairs where it is ahead of the reference."""
        if "loss" in logs and self._ahead:
            logs["rewards/accuracies"] = float(torch.stack(self._ahead).mean())
            self._ahead = []
        super().log(logs, start_time)


@dataclass(frozen=True)
class _Pairs:
    """Collates pairs (chosen, rejected, reference): all chosen answers, then all rejected ones."""

    pad_id: int

    def __call__(self, pairs: Any) -> dict[str, Any]:
        chosen, rejected, reference = zip(*pairs, strict=True)
        return {**FusionCollator(self.pad_id)([*chosen, *rejected]), "reference": torch.tensor(reference)}


def _per_token(name: str, store: Store, keys: list[str]) -> FloatArray:
    """Log-probabilities per token of the examples of these keys, float64 [n]."""
    if missing := [key for key in keys if key not in store]:
        raise DistillationError(
            f"{name} lacks {len(missing)} of {len(keys)} answers ({missing[0]}): they are longer than max_length, or "
            "it was captured from other examples; capture it from answers(pairs), with the same max_length"
        )
    at = [store.position(key) for key in keys]
    found: FloatArray = -store.summary.cross_entropy[at] / store.summary.labels[at]
    return found


def _refuse_other_parts(name: str, store: Store, own: Store, rows: Sequence[Row]) -> None:
    """Raise DistillationError where a source was captured on other messages than the model, or on cut answers.

    A template that drops how an answer begins is no reason: the source judges what it has read.
    """
    other = []
    for row in rows:
        theirs, ours = store.position(row.key), own.position(row.key)
        if store.summary.bytes[theirs] == own.summary.bytes[ours]:
            continue
        said, read = store[theirs].tokens, own[ours].tokens
        if {*said.message[said.labels]} != {*read.message[read.labels]} or _is_cut(row, said):
            other.append(row.key)
    if other:
        raise DistillationError(
            f"{name} has another part of {len(other)} of {len(rows)} answers ({other[0]}): it was captured with a "
            "smaller max_length, which cuts them, or with train_on all; capture it from answers(pairs), with the same "
            "max_length"
        )


def _is_cut(row: Row, tokens: TokenizedRow) -> bool:
    """Whether the tokens of the last message end before its text does."""
    last = len(row.messages) - 1
    ends = tokens.ends[(tokens.message == last) & (tokens.part == Part.CONTENT)]
    return bool(len(ends)) and int(ends.max()) < len(row.messages[last].content.rstrip().encode())
