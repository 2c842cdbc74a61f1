"""Training on what others know: transformers.Trainer with the loss, the checks and the logs of knowledge fusion."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fusekit.distillation import checkpoints
from fusekit.distillation.batching import EpochSampler, FusionCollator, LabelLogits, WithBlanks
from fusekit.distillation.config import FusionConfig
from fusekit.distillation.counts import RunningSums
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.fusion import LM_WEIGHTS
from fusekit.distillation.losses import SparseTargets, fusion_loss
from fusekit.distillation.settings import TrainingSettings
from fusekit.distillation.teachers import Student, fusion_dataset, text_dataset
from fusekit.errors import DistillationError
from fusekit.types import FloatArray


@dataclass(frozen=True)
class Objective:
    """L = λ L_CLM + (1 - λ) L_fusion.

    Attributes:
        lm_weight: λ.
        weighting: what becomes of λ over the run and from row to row, a name in
            :data:`fusekit.distillation.fusion.LM_WEIGHTS`.
        loss, truncation, temperature: see :func:`fusekit.distillation.losses.fusion_loss`.
        max_skipped_steps: stop once as many optimizer steps in a row were skipped because the loss or the gradient was
            non-finite.
    """

    lm_weight: float = 0.9
    weighting: str = "constant"
    loss: str = "ce"
    truncation: str = "tail"
    temperature: float = 1.0
    max_skipped_steps: int = 5

    @classmethod
    def of(cls, training: TrainingSettings) -> Objective:
        """The objective of the settings of a run."""
        return cls(
            training.lm_weight,
            training.lm_weighting,
            training.loss,
            training.truncation,
            training.temperature,
            training.max_skipped_steps,
        )

    def weights_at(self, progress: float, batch: Mapping[str, Any]) -> float | FloatArray:
        """λ of each label of a batch after this share of the run: float64 [n], or one number for all."""
        if self.weighting == "constant":
            return self.lm_weight
        weigh = LM_WEIGHTS[self.weighting]
        known = batch["typical" if self.weighting == "relative" else "cross_entropies"]
        by_row = [weigh(self.lm_weight, row.tolist(), progress) for row in known]
        return np.repeat(np.array(by_row, np.float64), batch["sizes"])


class FusionTrainer(Trainer):
    """Trains a model on examples and on what its teachers say about them: transformers' Trainer with the fusion loss.

    >>> from fusekit import FusionConfig, FusionTrainer
    >>> config = FusionConfig(folder, loss="kl", max_steps=2, save_strategy="no", disable_tqdm=True)
    >>> rows = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(8)]
    >>> trainer = FusionTrainer("demo/models/pivot", config, rows, teachers={"numbers": "demo/models/numbers"})
    >>> trainer.train().global_step
    2

    Both terms of the loss are sums over labels divided by the number of labels of the whole optimizer step, over all
    micro-batches and processes, so how a batch is split changes nothing but the last bits. A teacher that is a model is
    captured before training, into ``captures/`` of the output folder, and so is the model itself where the settings
    compare with it; a capture that is there already is resumed or used.

    Args:
        model: what is trained: a name on the hub, a path, or a loaded causal language model.
        args: a :class:`~fusekit.FusionConfig`, or TrainingArguments beside an ``objective``.
        train_dataset: a ``datasets.Dataset``, a list of records, or paths of files (messages, ShareGPT's conversations,
            instruction triples, text); or a :class:`~fusekit.distillation.dataset.FusionDataset`.
        teachers: by name, or one alone: a :class:`~fusekit.Store`, the path of one, or a model to capture.
        eval_dataset: examples as in ``train_dataset``, whose loss is that of the text alone.
        processing_class: the tokenizer; by default that of ``model``.
        peft_config: train an adapter: a peft config, or the fields of a LoraConfig.
        callbacks: as in transformers.
        objective: the loss, where ``args`` does not say it.
        facts: written into every checkpoint, and compared by whoever resumes from it.
        say: told what a user should know.

    Raises:
        DistillationError: an argument of a wrong kind (names what was given and what is wanted); teachers without the
            examples; too many skipped steps in a row, with the weights as they were before the first.
    """

    loss_is_scaled_for_ga = True  # read by transformers: the loss is normalised over the optimizer step already

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Any,
        teachers: Any = None,
        *,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        objective: Objective | None = None,
        facts: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not isinstance(args, FusionConfig) and (objective is None or not isinstance(args, TrainingArguments)):
            raise DistillationError(
                f"args is {type(args).__name__}: give a FusionConfig, FusionConfig(output_dir, ...)"
            )
        if isinstance(args, FusionConfig):
            student = Student.of(model, processing_class, args.settings.training.dtype)
            if isinstance(train_dataset, FusionDataset) and teachers is not None:
                raise DistillationError("train_dataset is a FusionDataset, which has its teachers: leave teachers out")
            if not isinstance(train_dataset, FusionDataset):
                train_dataset = fusion_dataset(student, train_dataset, teachers, args, say)
            if eval_dataset is not None:
                eval_dataset = text_dataset(student, eval_dataset, args)
            model, processing_class = student.with_adapter(peft_config), student.tokenizer
            objective = objective or Objective.of(args.settings.training)
        args.remove_unused_columns = False  # what the loss needs is no argument of the model
        args.prediction_loss_only = True
        if args.n_gpu > 1:
            args._n_gpu = 1  # DataParallel would scatter the targets; several devices are one process each
        pad_id = getattr(processing_class, "pad_token_id", None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=WithBlanks(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=FusionCollator(pad_id if pad_id is not None else 0),
            callbacks=[*(callbacks or []), _Epochs(self), _Lines(say)],
        )
        self.remove_callback(PrinterCallback)  # its lines are said
        # Read by transformers as `loss_is_scaled_for_ga` in versions that lack it.
        self.model_accepts_loss_kwargs = True
        assert objective is not None
        self.objective = objective
        self.facts = dict(facts or {})
        self.say = say
        self.skipped_in_row = 0
        self.skipped = 0
        self.counts: dict[str, float] = {}
        self._sums = RunningSums(getattr(train_dataset, "count_names", ()))
        self._sampler: EpochSampler | None = None
        compiled = args.torch_compile  # a hook that comes and goes would be compiled again
        self._label_logits = None if compiled else LabelLogits(self.accelerator.unwrap_model(model))

    # Data

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        shared = self.accelerator.num_processes > 1 and not self.args.dataloader_drop_last
        multiple = self._train_batch_size * self.accelerator.num_processes if shared else 1
        shuffled = self.args.train_sampling_strategy == "random"
        step = self._train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps
        self._sampler = EpochSampler(
            self.train_dataset,
            seed if shuffled else None,
            multiple,
            lengths=self.train_dataset.lengths if shuffled else None,
            step=step,
        )
        return self._sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The micro-batches of an optimizer step, and how many labels it has over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        labels = sum(len(batch["label_ids"]) for batch in batches)
        if self.accelerator.num_processes > 1:
            labels = int(self.accelerator.reduce(torch.tensor(labels, device=device), "sum"))
        return batches, labels

    # Loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """The micro-batch's share of the loss of its optimizer step.

        inputs: of :class:`fusekit.distillation.batching.FusionCollator`. num_items_in_batch: labels of the optimizer
        step over all processes; not used in evaluation, where the batch stands alone. A batch without a label gives
        zero, connected to all parameters, so that no process waits for another. A non-finite loss makes all
        gradients NaN, and the step is skipped on every process.
        """
        places, labels = inputs["predicting"], inputs["label_ids"]
        outputs, logits, positions = self._logits(model, inputs, places)
        lm_weight = self.objective.weights_at(self.state.global_step / max(self.state.max_steps, 1), inputs)
        if not model.training and "target_ids" not in inputs:
            lm_weight = 1.0  # nothing but the text is evaluated
        targets = self._targets(inputs) if np.any(np.less(lm_weight, 1)) else None
        # Gradients are averaged over processes; dividing by the labels of all of them asks for their sum.
        items = num_items_in_batch if model.training else None
        share = 1 / max(len(labels), 1) if items is None else self.accelerator.num_processes / max(items, 1)
        loss = fusion_loss(
            logits,
            labels,
            targets,
            positions=positions,
            loss=self.objective.loss,
            truncation=self.objective.truncation,
            temperature=self.objective.temperature,
            lm_weight=_weight(lm_weight * share, logits),
            fusion_weight=_weight((1 - lm_weight) * share, logits),
        )
        if items is not None:
            self._sums.add(loss.lm, loss.fusion, len(labels), inputs.get("counts"))
        value = loss.total * torch.where(torch.isfinite(loss.total.detach()), 1.0, math.nan)
        return (value, outputs) if return_outputs else value

    def _logits(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], places: torch.Tensor
    ) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """The model's outputs, logits, and which of them are the labels': None for all, in order."""
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self._label_logits is None:
            outputs = model(**tokens, use_cache=False)
            return outputs, outputs.logits, places
        with self._label_logits.at(places):
            outputs = model(**tokens, use_cache=False)
        return outputs, *self._label_logits.of(outputs.logits, places)

    def _targets(self, inputs: Mapping[str, Any]) -> SparseTargets | None:
        if "target_ids" not in inputs:
            return None
        ids, logprobs, tail, taught = (inputs[f"target_{name}"] for name in ("ids", "logprobs", "tail", "taught"))
        return SparseTargets(ids, logprobs, tail, taught, self.objective.temperature)

    # A non-finite loss or gradient

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Also drops non-finite gradients: they must not reach the weights.

        The norm is of all processes, so all of them decide alike. With float16 the loss scaler does it, by design now
        and then, and DeepSpeed steps on its own.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if getattr(self.accelerator, "scaler", None) is not None or self.is_deepspeed_enabled:
            return grad_norm
        if math.isfinite(float(grad_norm)):
            self.skipped_in_row = 0
            return grad_norm
        for parameter in model.parameters():
            parameter.grad = None
        self.skipped_in_row += 1
        self.skipped += 1
        step = self.state.global_step + 1
        self.say(f"warning: step {step} is skipped: its loss or gradient is non-finite (norm {float(grad_norm)})")
        if self.skipped_in_row >= self.objective.max_skipped_steps:
            good = checkpoints.checkpoints(Path(self.args.output_dir))
            kept = f"the last checkpoint is {good[0][1]}" if good else "there is no checkpoint yet"
            raise DistillationError(
                f"stopped at step {step}: {self.skipped_in_row} optimizer steps in a row had a non-finite "
                f"loss or gradient; {kept}. A lower learning rate, a warm-up or dtype float32 usually help"
            )
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a line of training the two terms of the loss and what the targets were, over all processes."""
        if "loss" in logs:
            vector = self._sums.drain()
            if self.accelerator.num_processes > 1:
                vector = self.accelerator.reduce(vector.to(self.args.device), "sum").cpu()
            line, counts = self._sums.read(vector)
            logs.update(line)
            if self.skipped:
                logs["skipped_steps"] = float(self.skipped)
            for name, value in counts.items():
                self.counts[name] = self.counts.get(name, 0.0) + value
        super().log(logs, start_time)

    # Checkpoints

    def resume_counts(self, facts: Mapping[str, Any]) -> None:
        """Continue the counts of the run that wrote a checkpoint with these facts."""
        self.counts, self.skipped = dict(facts.get("counts", {})), int(facts.get("skipped", 0))

    def counts_so_far(self) -> dict[str, float]:
        """The run's counts, those since the last line of the log too, over all processes. Every process calls it."""
        pending = self._sums.pending()
        if self.accelerator.num_processes > 1:
            pending = self.accelerator.reduce(pending.to(self.args.device), "sum").cpu()
        named = dict(zip(self._sums.names, pending.tolist(), strict=True))
        return {name: self.counts.get(name, 0.0) + value for name, value in named.items()}

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As transformers, then the list of its files, and only then may older checkpoints go."""
        if self.skipped_in_row:
            self.say(f"no checkpoint at step {self.state.global_step}: its step was skipped")
            return
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # one that was damaged or not finished
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        counts = self.counts_so_far()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            progress = {"step": self.state.global_step, "counts": counts, "skipped": self.skipped}
            checkpoints.seal(folder, {**self.facts, **progress})
            if limit:
                best = self.state.best_model_checkpoint
                checkpoints.rotate(folder.parent, limit, also=Path(best) if best else None)
        self.accelerator.wait_for_everyone()


def _weight(weight: float | FloatArray, logits: torch.Tensor) -> float | torch.Tensor:
    return weight if isinstance(weight, float) else torch.as_tensor(weight, dtype=torch.float32, device=logits.device)


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch begins: accelerate does not reach it in every combination of wrappers."""

    def __init__(self, trainer: FusionTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """``state.epoch`` is a whole number here, or that of the checkpoint resumed from."""
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))


class _Lines(TrainerCallback):
    """Says the lines of the log, and ends one where a checkpoint is written, and at the last step.

    What a line sums up starts over then, so a run that resumes from the checkpoint writes the same lines.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:  # noqa: ARG002
        """Of a line of training, not of its summary at the end."""
        if "loss" in logs and state.is_world_process_zero:
            parts = f"text {logs['lm_loss']:.4f}, fusion {logs['fusion_loss']:.4f}"
            self.say(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f} ({parts})")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After transformers has decided whether to save."""
        last = state.global_step >= state.max_steps
        control.should_log |= (control.should_save or last) and args.logging_strategy != "no"

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """As after a step."""
        self.on_step_end(args, state, control)
