"""Training on what others know: transformers.Trainer with the loss, the checks and the logs of knowledge fusion."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from fusekit.artifacts import MANIFEST
from fusekit.capturing.capture import refuse
from fusekit.capturing.teacher import memory_needs as scoring_needs
from fusekit.devices import Processes, progress
from fusekit.distillation import outputs
from fusekit.distillation.arguments import FusionConfig, OneDevice, memory_needs, refuse_needs, with_adapter
from fusekit.distillation.batching import EpochSampler, FusionCollator, LabelLogits, WithBlanks
from fusekit.distillation.dataset import CHOSEN, FusionDataset
from fusekit.distillation.fusion import LM_WEIGHTS
from fusekit.distillation.inputs import OnPolicy, fusion_dataset, text_dataset
from fusekit.distillation.live import Ahead, LiveTeacher, Loaded
from fusekit.distillation.losses import SparseTargets, fusion_loss
from fusekit.distillation.settings import TrainingSettings
from fusekit.errors import DistillationError
from fusekit.settings import CaptureSettings
from fusekit.types import FloatArray


class Tally:
    """The losses of a run since the last line of its log, and named counts of its examples from the beginning.

    Each process adds what it sees. :meth:`line` and :meth:`so_far` are over all of them, so every process calls them.
    """

    def __init__(self, names: Sequence[str], over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.names, self._over_processes = tuple(names), over_processes
        self.start({})

    def start(self, counts: Mapping[str, float]) -> None:
        """Start a run, or resume one that had these counts."""
        self._before = dict(counts)
        self._losses: list[torch.Tensor] = []
        self._counts = np.zeros(len(self.names))

    def add(self, losses: Sequence[torch.Tensor], labels: int, counts: FloatArray | None) -> None:
        """Add a micro-batch, without waiting for its device.

        losses: total, of the text and of the fusion, each the sum over so many labels; non-finite ones do not count.
        """
        of_batch = torch.stack([loss.detach().float() for loss in losses])
        of_batch = torch.cat([of_batch, torch.full_like(of_batch[:1], labels)])
        self._losses.append(torch.where(of_batch.isfinite().all(), of_batch, 0.0))
        if counts is not None and self.names:
            self._counts = self._counts + counts

    def _since(self) -> tuple[list[float], dict[str, float]]:
        """The losses with their labels, and the counts, since the last line."""
        losses = torch.stack(self._losses).cpu().double().sum(0) if self._losses else torch.zeros(4).double()
        values = self._over_processes(torch.cat([losses, torch.from_numpy(self._counts)])).tolist()
        return values[:4], dict(zip(self.names, values[4:], strict=True))

    def line(self) -> dict[str, float]:
        """What a line of the log says, which ends here: nats per label, and who taught what share."""
        (*losses, labels), counts = self._since()
        self.start(self._added(counts))
        said = dict(zip(("loss", "lm_loss", "fusion_loss"), (loss / max(labels, 1) for loss in losses), strict=True))
        if not labels:
            said = {}
        if counts:
            said["linked_share"] = counts["linked"] / max(counts["asked"], 1.0)
            said["taught_share"] = counts["taught"] / max(counts["labels"], 1.0)
            rows = max(counts["rows"], 1.0)
            said |= {name: value / rows for name, value in counts.items() if name.startswith(CHOSEN)}
        return said

    def so_far(self) -> dict[str, float]:
        """The counts of the run, those since the last line too."""
        return self._added(self._since()[1])

    def _added(self, counts: Mapping[str, float]) -> dict[str, float]:
        return {name: self._before.get(name, 0.0) + value for name, value in counts.items()}


def label_weights(training: TrainingSettings, progress: float, batch: Mapping[str, Any]) -> float | FloatArray:
    """λ of each label of a batch after this share of the run: float64 [n], or one number for all."""
    if training.lm_weighting == "constant":
        return training.lm_weight
    weigh = LM_WEIGHTS[training.lm_weighting]
    known = batch["typical" if training.lm_weighting == "relative" else "cross_entropies"]
    by_row = [weigh(training.lm_weight, row.tolist(), progress) for row in known]
    return np.repeat(np.array(by_row, np.float64), batch["sizes"])


def _refuse_what_does_not_fit(
    student: Loaded, args: FusionConfig, adapter: Any, longest: int, teachers: Sequence[LiveTeacher]
) -> None:
    """longest: tokens of the longest example. teachers: that are loaded beside the student."""
    own, processes = student.checkpoint, Processes.current()
    beside = [teacher.checkpoint for teacher in teachers if teacher.checkpoint]
    if own is None or own.choice.quantization or own.config.get("quantization_config") or own.choice.device_map:
        for teacher in beside:  # what the student takes cannot be told
            refuse(scoring_needs(teacher, CaptureSettings(), processes))
        return
    lora = adapter.to_dict() if hasattr(adapter, "to_dict") else adapter
    how = args.training.model_copy(update={"dtype": own.choice.dtype, "lora": lora})
    refuse_needs(memory_needs(own, how, longest, processes, beside, loaded=student.model.device.type))


class FusionTrainer(Trainer):
    """Trains a model on examples and on what its teachers say about them: transformers' Trainer with the fusion loss.

    >>> from fusekit import FusionConfig, FusionTrainer
    >>> config = FusionConfig(folder, loss="kl", max_steps=2, save_strategy="no", disable_tqdm=True)
    >>> rows = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(8)]
    >>> trainer = FusionTrainer("demo/models/pivot", config, rows, teachers={"numbers": "demo/models/numbers"})
    >>> trainer.train().global_step
    2

    Both terms of the loss are sums over labels divided by the number of labels of the whole optimizer step, over all
    micro-batches and processes. A teacher that is a model stays loaded and is scored while training reads, a step ahead
    of it. What the trained model said before training, where the settings compare with it, is captured into
    ``captures/`` of the output folder, or resumed or used where it is there.

    Args:
        model: what is trained: a name on the hub, a path, or a loaded causal language model.
        args: a :class:`~fusekit.FusionConfig`.
        train_dataset: a ``datasets.Dataset``, a list of records, or paths of files (messages, ShareGPT's conversations,
            instruction triples, text); or a :class:`~fusekit.distillation.dataset.FusionDataset`.
        teachers: by name, or one alone: a :class:`~fusekit.Store`, the path of one, or a model to score on the fly (its
            name, path, a :class:`~fusekit.capturing.models.ModelChoice`, or itself).
        eval_dataset: examples as in ``train_dataset``, whose loss is that of the text alone.
        processing_class: the tokenizer; by default that of ``model``.
        peft_config: train an adapter: a peft config, or the fields of a LoraConfig.
        callbacks: as in transformers.
        ignore_estimates: start although memory does not seem to suffice, as estimated for a model given by name and its
            teachers; for one given loaded, for its teachers alone.
        facts, label, on_policy: of a run: what is written into every checkpoint, the name of the bar, what writes the
            examples of on-policy steps.
        say: told what a user should know.

    Raises:
        DistillationError: an argument of a wrong kind (names what was given and what is wanted); teachers without the
            examples; a training that does not fit into memory; too many skipped steps in a row, with the weights as
            they were before the first.
    """

    loss_is_scaled_for_ga = True  # read by transformers: the loss is normalised over the optimizer step already

    def __init__(
        self,
        model: Any,
        args: OneDevice,
        train_dataset: Any,
        teachers: Any = None,
        *,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        ignore_estimates: bool = False,
        facts: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda _: None,
        label: str = "training",
        on_policy: OnPolicy | None = None,
    ) -> None:
        own = getattr(args, "training", None)
        if not isinstance(own, TrainingSettings):
            raise DistillationError(
                f"args is {type(args).__name__}: give a FusionConfig, FusionConfig(output_dir, ...)"
            )
        self.settings = own
        if isinstance(args, FusionConfig):
            student = Loaded.of(model, processing_class, dtype=own.dtype)
            fits: Callable[[int, Sequence[LiveTeacher]], None] = lambda *_: None  # noqa: E731
            if not ignore_estimates:
                fits = partial(_refuse_what_does_not_fit, student, args, peft_config)
            if not isinstance(train_dataset, FusionDataset):
                train_dataset = fusion_dataset(student, train_dataset, teachers, args, fits=fits, say=say)
            elif teachers is not None:
                raise DistillationError("train_dataset is a FusionDataset, which has its teachers: leave teachers out")
            else:
                fits(train_dataset.longest, ())
            if eval_dataset is not None:
                eval_dataset = text_dataset(student, eval_dataset, args)
            if own.on_policy:
                on_policy = OnPolicy(train_dataset, student.tokenizer, own, args.max_length, say=say)
                if more := [t for t in on_policy.teachers.values() if t not in train_dataset.sources.values()]:
                    fits(train_dataset.longest, more)
            model, processing_class = student.model, student.tokenizer
            if peft_config is not None:
                model = with_adapter(model, peft_config)
        sources = getattr(train_dataset, "sources", {}).values()
        self.live, self.on_policy = [source for source in sources if isinstance(source, LiveTeacher)], on_policy
        if self.live and args.dataloader_num_workers:
            raise DistillationError(
                f"dataloader_num_workers is {args.dataloader_num_workers}, but {self.live[0].name} is scored on the "
                "fly, which loader processes cannot do: set it to 0, or capture the teacher first and give its store"
            )
        args.remove_unused_columns = False  # what the loss needs is no argument of the model
        args.prediction_loss_only = True
        # Older checkpoints go once the newest is sealed, not before.
        self.checkpoints_kept, args.save_total_limit = args.save_total_limit, None
        super().__init__(
            model=model,
            args=args,
            train_dataset=WithBlanks(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=FusionCollator(getattr(processing_class, "pad_token_id", None) or 0),
            callbacks=[*(callbacks or []), _Steps(self, label)],
        )
        self.remove_callback(PrinterCallback)  # its lines are said
        self.remove_callback(ProgressCallback)  # and its bar drawn
        # Read by transformers as `loss_is_scaled_for_ga` in versions that lack it.
        self.model_accepts_loss_kwargs = True
        if on_policy is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise DistillationError("on_policy needs the whole model in each process: leave fsdp and deepspeed out")
        self.facts = dict(facts or {})
        self.say = say
        self.skipped_in_row = 0
        self.skipped = 0
        self.tally = Tally(getattr(train_dataset, "count_names", ()), self._over_processes)
        self._members = getattr(train_dataset, "members", None)
        self.sampler: EpochSampler | None = None
        self.ahead: Ahead | None = None
        compiled = args.torch_compile  # a hook that comes and goes would be compiled again
        self._label_logits = None if compiled else LabelLogits(self.accelerator.unwrap_model(model))

    def get_train_dataloader(self) -> Any:
        """The examples in an order that does not depend on how they are shared out, their teachers a step ahead."""
        args, world = self.args, self.accelerator.num_processes
        if self.live:  # all processes measure it together, which the thread that scores ahead could not
            _ = self.train_dataset.data.typical
        if args.train_sampling_strategy not in ("random", "sequential"):
            return super().get_train_dataloader()
        shuffled, batch = args.train_sampling_strategy == "random", args.train_batch_size
        seed = args.data_seed if args.data_seed is not None else args.seed
        self.sampler = EpochSampler(
            self.train_dataset,
            seed if shuffled else None,
            batch * world if world > 1 and not args.dataloader_drop_last else 1,
            lengths=self.train_dataset.lengths if shuffled else None,
            step=batch * world * args.gradient_accumulation_steps,
        )
        data: Any = self.train_dataset
        if self.live or self.on_policy:
            steps, asks = args.gradient_accumulation_steps, self.on_policy.chosen if self.on_policy else None
            processes = Processes.current()
            data = Ahead(data, self.live, self.sampler, batch=batch, steps=steps, processes=processes, asks=asks)
            self.ahead = data
        names = [field.name for field in dataclasses.fields(args) if field.name.startswith("dataloader_")]
        how = {name.removeprefix("dataloader_"): getattr(args, name) for name in names}
        loader = DataLoader(data, batch, sampler=self.sampler, collate_fn=self.data_collator, **how)
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self,
        epoch_iterator: Iterator[Any],
        num_batches: int,
        device: torch.device,  # noqa: ARG002
    ) -> tuple[list[Any], int]:
        """The micro-batches of an optimizer step, and how many labels it has over all processes.

        Answers that are asked for are written now. Of a schedule, each part's loss is the mean over its own labels.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if self.on_policy is not None:
            model, step = self.accelerator.unwrap_model(self.model_wrapped), self.state.global_step
            for at, batch in enumerate(batches):
                if "asked" in batch:
                    examples = self.on_policy.examples(model, batch["asked"], step)
                    batches[at] = {**self.data_collator(examples), "written": True}
        parts = [
            np.bincount(batch.get("part", np.zeros(len(batch["label_ids"]), int)), minlength=2) for batch in batches
        ]
        counts = self._over_processes(torch.from_numpy(sum(parts, np.zeros(2, np.int64))))
        labels = int(counts.sum())
        for batch in batches:
            if "weight" in batch:
                batch["weight"] = batch["weight"] * labels / counts.numpy()[batch["part"]]
        return batches, labels

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """The micro-batch's share of the loss of its optimizer step; in evaluation the batch stands alone.

        num_items_in_batch: labels of the step over all processes. A batch without a label gives zero, connected to all
        parameters, so that no process waits for another. A non-finite loss makes all gradients NaN, and the step is
        skipped on every process.
        """
        places, labels = inputs["predicting"], inputs["label_ids"]
        outputs, logits, positions = self._logits(model, inputs, places)
        if "written" in inputs:
            lm_weight: float | FloatArray = 0.0  # nobody says that the model's own answer is right
        elif not model.training and "targets" not in inputs:
            lm_weight = 1.0  # nothing but the text is evaluated
        else:
            lm_weight = label_weights(self.settings, self.state.global_step / max(self.state.max_steps, 1), inputs)
        targets = self._targets(inputs) if np.any(np.less(lm_weight, 1)) else None
        # Gradients are averaged over processes; dividing by the labels of all of them asks for their sum.
        items = num_items_in_batch if model.training else None
        share = 1 / max(len(labels), 1) if items is None else self.accelerator.num_processes / max(items, 1)
        weight = share * inputs["weight"] if items is not None and "weight" in inputs else share

        def on_device(given: float | FloatArray) -> float | torch.Tensor:
            if isinstance(given, float):
                return given
            return torch.as_tensor(given, dtype=torch.float32, device=logits.device)

        loss = fusion_loss(
            logits,
            labels,
            targets,
            positions=positions,
            loss=self.settings.loss,
            truncation=self.settings.truncation,
            temperature=self.settings.temperature,
            lm_weight=on_device(lm_weight * weight),
            fusion_weight=on_device((1 - lm_weight) * weight),
        )
        if items is not None:
            self.tally.add([loss.total / share, loss.lm, loss.fusion], len(labels), inputs.get("counts"))
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
        if "targets" not in inputs:
            return None
        device = inputs["label_ids"].device
        if self._members is not None:
            self._members = self._members.to(device)
        targets: SparseTargets = inputs["targets"].to(device)
        return dataclasses.replace(targets, temperature=self.settings.temperature, members=self._members)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Drop non-finite gradients: they must not reach the weights.

        Private, checked against transformers 5.16 and 5.23: no callback is told the norm before the optimizer steps.
        The norm is of all processes, so all of them decide alike. With float16 the loss scaler does it, by design now
        and then, and DeepSpeed steps on its own.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if getattr(self.accelerator, "scaler", None) is not None or self.is_deepspeed_enabled:
            return norm
        if math.isfinite(float(norm)):
            self.skipped_in_row = 0
            return norm
        for parameter in model.parameters():
            parameter.grad = None
        self.skipped_in_row += 1
        self.skipped += 1
        step = self.state.global_step + 1
        self.say(f"warning: step {step} is skipped: its loss or gradient is non-finite (norm {float(norm)})")
        if self.skipped_in_row >= self.settings.max_skipped_steps:
            good = outputs.checkpoints(Path(self.args.output_dir))
            kept = f"the last checkpoint is {good[0][1]}" if good else "there is no checkpoint yet"
            raise DistillationError(
                f"stopped at step {step}: {self.skipped_in_row} optimizer steps in a row had a non-finite "
                f"loss or gradient; {kept}. A lower learning rate, a warm-up or dtype float32 usually help"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the tally to a line of training; labels of skipped steps do not count."""
        if "loss" in logs:
            logs.update(self.tally.line())
        super().log(logs, start_time)

    def _over_processes(self, vector: torch.Tensor) -> torch.Tensor:
        """The sum of what each process has, on the host. Every process calls it."""
        if self.accelerator.num_processes == 1:
            return vector
        total: torch.Tensor = self.accelerator.reduce(vector.to(self.args.device), "sum").cpu()
        return total

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """As of transformers; ``resume_from_checkpoint=True`` takes the latest whose files are as they were written.

        Raises DistillationError for one that is damaged, or where there is none.
        """
        good = None
        if resume_from_checkpoint is True:
            folder, passed_over = Path(self.args.output_dir), list[str]()
            good = Processes.current().first_then_all(lambda: outputs.last_good(folder, passed_over.append))
            if good is None:
                raise DistillationError(
                    f"{folder} has no whole checkpoint to resume from: leave resume_from_checkpoint out to start over"
                    + "".join(f"\n  {line}" for line in passed_over)
                )
            for line in passed_over:
                self.say(line)
            resume_from_checkpoint = str(good)
        facts: Mapping[str, Any] = {}
        if resume_from_checkpoint and (Path(resume_from_checkpoint) / MANIFEST).is_file():
            if good is None and (wrong := outputs.problems_of(Path(resume_from_checkpoint))):
                raise DistillationError(
                    f"{resume_from_checkpoint} is not what was written; resume_from_checkpoint=True takes the latest "
                    "checkpoint that is:\n  " + "\n  ".join(wrong)
                )
            facts = outputs.facts_of(Path(resume_from_checkpoint))
        self.tally.start(facts.get("counts", {}))
        self.skipped, self.skipped_in_row = int(facts.get("skipped", 0)), 0
        return super().train(resume_from_checkpoint, *args, **options)


class _Steps(TrainerCallback):
    """What happens around steps: the sampler's epoch, the bar or the lines of the log, and sound checkpoints.

    A line of the log ends where a checkpoint is written, and at the last step: what it sums up starts over then, so a
    run that resumes from the checkpoint writes the same lines.
    """

    def __init__(self, trainer: FusionTrainer, label: str) -> None:
        self.trainer, self.label = trainer, label
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        quiet = args.disable_tqdm or not state.is_world_process_zero
        self._bar = progress(state.max_steps, self.label, "step", quiet=quiet, done=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._bar.close()
        if self.trainer.ahead is not None:  # steps that will not come are not scored
            self.trainer.ahead.close()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        # accelerate does not reach the sampler in every combination of wrappers
        if self.trainer.sampler is not None:  # the epoch is a whole number here, or that of the checkpoint resumed from
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:  # noqa: ARG002
        if "lm_loss" in logs and state.is_world_process_zero:  # not the summary at the end
            parts = f"text {logs['lm_loss']:.4f}, fusion {logs['fusion_loss']:.4f}"
            with tqdm.external_write_mode():
                self.trainer.say(
                    f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f} per label ({parts})"
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After transformers has decided whether to save. A skipped step leaves no checkpoint."""
        self._bar.update(state.global_step - self._bar.n)
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save and self.trainer.skipped_in_row:
            self.trainer.say(f"no checkpoint at step {state.global_step}: its step was skipped")
            control.should_save = False
        last = state.global_step >= state.max_steps
        control.should_log |= (control.should_save or last) and args.logging_strategy != "no"
        if control.should_save:
            if args.should_save:  # one that was damaged or not finished
                shutil.rmtree(Path(args.output_dir) / f"checkpoint-{state.global_step}", ignore_errors=True)
            self.trainer.accelerator.wait_for_everyone()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """List the files of the checkpoint, which are all there; only then may older ones go."""
        trainer, folder = self.trainer, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        counts = trainer.tally.so_far()
        facts = {**trainer.facts, "step": state.global_step, "counts": counts, "skipped": trainer.skipped}
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            outputs.seal(folder, facts)
            if trainer.checkpoints_kept:
                best = state.best_model_checkpoint
                outputs.rotate(folder.parent, trainer.checkpoints_kept, also=Path(best) if best else None)
        trainer.accelerator.wait_for_everyone()
