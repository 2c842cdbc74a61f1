"""Distil: from a pivot and stores of captured rows to published checkpoints."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

import fusekit
from fusekit import artifacts as artifact
from fusekit.artifacts import commit_file, disk_fault, output_lock, recover, staging
from fusekit.capturing.load import dequantise
from fusekit.capturing.models import find_checkpoint
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes, duration
from fusekit.distillation import checkpoints, estimate, provenance
from fusekit.distillation import outputs as models
from fusekit.distillation import outputs as overwriting
from fusekit.distillation.arguments import problems, training_arguments
from fusekit.distillation.dataset import PIVOT, FusionDataset
from fusekit.distillation.inputs import Inputs, Opened, open_inputs
from fusekit.distillation.live import LiveTeacher
from fusekit.distillation.on_policy import OnPolicy
from fusekit.distillation.outputs import FACTS, JOINT, PLAIN, Target, facts_begun, targets_of
from fusekit.distillation.schedule import Scheduled
from fusekit.distillation.settings import DistillSettings
from fusekit.distillation.teachers import on_policy_of
from fusekit.distillation.trainer import FusionTrainer
from fusekit.errors import DistillationError
from fusekit.gguf import split

STAGE = "distill"
__all__ = ["FACTS", "JOINT", "PLAIN", "Inputs", "Target", "distill", "targets_of"]

Say = Callable[[str], None]


def distill(
    inputs: Inputs,
    settings: DistillSettings,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    ignore_estimates: bool = False,
    quiet: bool = False,
    others: tuple[int, int] = (0, 0),
    say: Say = lambda _: None,
) -> list[Path]:
    """Train every target and publish each as a plain checkpoint in a folder of ``out``.

    Each is published in one step when it is whole; until then its checkpoints are in ``NAME.training`` beside it.
    Under ``torchrun`` or ``accelerate launch`` every process calls this.

    Args:
        inputs: the pivot, the rows and what each model said about them.
        settings: see :class:`fusekit.distillation.settings.DistillSettings`.
        out: folder for the targets.
        resume: continue what is there: targets that are published stay, others continue from their last good
            checkpoint.
        overwrite: start over, replacing what is there.
        ignore_estimates: start although disk or memory do not seem to suffice.
        quiet: draw no bar.
        others: how many models the caller trains before and after these, for the place that the bar names.
        say: told what a user should know, in the first process.

    Returns:
        The folders of the targets.

    Raises:
        DistillationError: inputs that do not fit, or that are not those of the run to resume (says what differs);
            training that does not get anywhere.
        StorageError: the output is in use, not empty, or the disk fails.
    """
    if resume and overwrite:
        raise DistillationError("resume continues what is there, overwrite replaces it: ask for one of them")
    out = Path(out).resolve()
    targets = targets_of(settings, list(inputs.sources), out)
    processes = Processes.current()
    tell: Say = lambda line: say(line) if processes.is_first else None  # noqa: E731
    with ExitStack() as stack:
        if found := problems(settings.training, find_checkpoint(inputs.pivot)):
            raise DistillationError("; ".join(says for _, says in found))
        processes.first_then_all(lambda: _claim(stack, out, targets, resume, overwrite))
        inputs = _with_plain_pivot(inputs, out, overwrite, ignore_estimates, tell)
        opened = open_inputs(inputs, settings, sorted({name for target in targets for name in target.sources}), tell)
        for number, target in enumerate(targets, others[0] + 1):
            label = f"distill {number} of {sum(others) + len(targets)}"
            work = _Work.of(target, inputs, opened, settings, tell)
            work.make(resume, ignore_estimates, None if quiet else label)
            gc.collect()  # what trained holds cycles, and memory that the next one needs
        processes.first_then_all(lambda: overwriting.finish(out))
    return [target.folder for target in targets]


def _with_plain_pivot(inputs: Inputs, out: Path, overwrite: bool, ignore_estimates: bool, say: Say) -> Inputs:
    """Dequantise a pivot that is a GGUF file beside the targets, unless a run has done so: each target begins as it."""
    if split(inputs.pivot.model) is None or inputs.pivot.dequantised is not None:
        return inputs
    folder = out / PIVOT
    Processes.current().first_then_all(
        lambda: dequantise(inputs.pivot, folder, overwrite=overwrite, ignore_estimates=ignore_estimates, say=say)
    )
    return replace(inputs, pivot=replace(inputs.pivot, dequantised=folder))


def _claim(stack: ExitStack, out: Path, targets: Sequence[Target], resume: bool, overwrite: bool) -> None:
    """Lock the output, clean up after runs that died, and refuse what is there unless asked to resume or start over."""
    stack.enter_context(output_lock(out))
    out.mkdir(exist_ok=True)
    for target in targets:
        recover(target.folder)
    there = [path for target in targets for path in (target.folder, target.work) if path.exists()]
    if there and not resume and not overwrite:
        raise DistillationError(
            f"{there[0]} is there already: resume continues it, overwrite replaces it; nothing was touched"
        )
    if resume:
        for target in targets:
            if not overwriting.is_former(target.folder):
                artifact.refuse_occupied(target.folder)
    if overwrite:
        for target in targets:
            shutil.rmtree(target.work, ignore_errors=True)
        overwriting.begin(out, [target.folder for target in targets])


@dataclass(frozen=True, eq=False)
class _Work:
    """One target, what it is made from, and who is told."""

    target: Target
    inputs: Inputs
    opened: Opened
    settings: DistillSettings
    data: FusionDataset
    examples: FusionDataset | Scheduled
    facts: dict[str, Any]
    say: Say

    @classmethod
    def of(cls, target: Target, inputs: Inputs, opened: Opened, settings: DistillSettings, say: Say) -> _Work:
        data = opened.dataset(target.sources)
        stores, training = opened.stores_of(target.sources), settings.training
        examples: FusionDataset | Scheduled = data
        if training.schedule is not None and (live := opened.live(target.sources)):
            raise DistillationError(
                f"a schedule reads stores, but {live[0].name} is scored on the fly: capture it, or drop the schedule"
            )
        if training.schedule is not None:
            answers = opened.answers(target.sources)
            examples = Scheduled(data, answers, training.schedule, training.seed, training.batch_size)
        facts = provenance.facts_of_run(
            target.name,
            settings,
            opened.pivot_fingerprint,
            data.rows,
            stores,
            projections=data.projections,
            writers=opened.responses.writers if training.schedule is not None and opened.responses else None,
        )
        return cls(target, inputs, opened, settings, data, examples, facts, lambda line: say(f"{target.name}: {line}"))

    def make(self, resume: bool, ignore_estimates: bool, label: str | None) -> None:
        """Train and publish; a target that is published already stays. label: of the bar, None for none."""
        target, facts, training = self.target, self.facts, self.settings.training
        started, first = time.monotonic(), Processes.current().first_then_all
        if resume and first(lambda: _is_done(target, facts)):
            self.say(f"done already, {target.folder}")
            return
        start = first(lambda: _start(target, facts, self.say)) if resume else None
        for line in self.data.joined.report():
            self.say(line)
        on_policy = self.on_policy()
        live = self.opened.live(target.sources) if on_policy is None else list(on_policy.teachers.values())
        if not ignore_estimates:
            first(lambda: self.refuse_what_does_not_fit(start, live))
        for teacher in live:
            teacher.open()
        set_seed(training.seed)  # an adapter begins with random values
        model = models.load_pivot(self.opened.checkpoint, training)
        if start is None:
            first(lambda: _begin(target, facts))
        else:
            self.say(f"resumes from {start.name}")
        trainer = self.trainer(model, label, on_policy)
        if start is not None:
            trainer.resume_counts(checkpoints.facts_of(start))
        try:
            trainer.train(resume_from_checkpoint=str(start) if start is not None else None)
        except Exception as error:
            raise disk_fault(error, target.work) or error from None
        state, counts = _gathered(trainer), trainer.counts_so_far()
        seconds = time.monotonic() - started
        first(lambda: self.publish(trainer, state, counts, round(seconds, 3)))
        for teacher in live:
            teacher.close()
        self.say(f"trained in {duration(seconds)}, published to {target.folder}")

    def refuse_what_does_not_fit(self, start: Path | None, live: Sequence[LiveTeacher]) -> None:
        """Raises DistillationError with the numbers. start: a checkpoint, whose like is on the disk already."""
        checkpoint, training, out = self.opened.checkpoint, self.settings.training, self.target.folder
        beside = [teacher.checkpoint for teacher in live if teacher.checkpoint]
        parts = self.examples.parts if isinstance(self.examples, Scheduled) else (self.data,)
        longest = max(len(part.read(int(part.lengths.argmax()))[2]) for part in parts if len(part))
        needs = estimate.memory_needs(checkpoint, training, longest, Processes.current(), beside)
        if start is None:
            needs += estimate.disk_needs(checkpoint, training, out, results=1, download=False)
        estimate.refuse(needs)

    def on_policy(self) -> OnPolicy | None:
        """What makes the examples of on-policy steps, None where there are none."""
        training, inputs = self.settings.training, self.inputs
        if not training.on_policy:
            return None
        stores, sources = self.opened.stores, inputs.sources
        models = {
            name: (sources[name].tokenizer_choice(stores[name].spec.model), sources[name].reader) for name in stores
        }
        known = inputs.row_tokenizer
        reader = known if isinstance(known, RowTokenizer) else RowTokenizer(self.opened.tokenizer)
        return on_policy_of(self.data, reader, training, inputs.max_length, models=models, say=self.say)

    def trainer(self, model: Any, label: str | None, on_policy: OnPolicy | None) -> FusionTrainer:
        """The trainer of the target."""
        args = training_arguments(self.settings.training, self.target.work)
        args.disable_tqdm |= label is None
        return FusionTrainer(
            model,
            args,
            self.examples,
            settings=self.settings.training,
            facts={"made_from": self.facts},
            say=self.say,
            label=label or "",
            on_policy=on_policy,
        )

    def publish(
        self, trainer: FusionTrainer, state: dict[str, Any] | None, counts: dict[str, float], seconds: float
    ) -> None:
        """Write the result with its manifest and move it to its place in one step; its checkpoints have served.

        seconds: that this process has trained. Times are in the manifest alone, so that equal runs leave equal files.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.config.use_cache = self.opened.checkpoint.config.get("use_cache", True)
        joined = self.data.joined
        record = {
            "target": self.target.name,
            "sources": list(self.target.sources),
            "settings": self.settings.model_dump(mode="json"),
            "made_from": self.facts,
            "rows": joined.report(),
            "unmatched": {name: list(match.missing) for name, match in joined.matches.items() if match.missing},
            "counts": counts,
            "skipped_steps": trainer.skipped,
            "log": [line for line in trainer.state.log_history if "train_runtime" not in line],
        }
        made = {"fusekit": fusekit.__version__, "seconds": seconds}
        if not overwriting.is_former(self.target.folder):
            artifact.refuse_occupied(self.target.folder)  # what came there while this was training
        with staging(self.target.folder) as stage:
            try:
                models.write_result(model, state, self.opened.checkpoint, self.settings.training, stage.path)
                self.opened.tokenizer.save_pretrained(stage.path)
                models.write_record(stage.path, record)
                artifact.seal(stage.path, STAGE, self.facts, made)
            except Exception as error:
                raise disk_fault(error, stage.path) or error from None
            stage.publish()
        shutil.rmtree(self.target.work, ignore_errors=True)


def _is_done(target: Target, facts: Mapping[str, Any]) -> bool:
    """Whether the target is published already, and not one that is being replaced.

    Raises DistillationError when its inputs changed; StorageError when its manifest is damaged.
    """
    if overwriting.is_former(target.folder):
        return False
    known = artifact.read(target.folder)
    if known is None:
        return False
    _refuse_changes(target.folder, known.inputs, facts)
    return True


def _refuse_changes(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """folder: what was made from ``before``; without it the target is made again, whatever command it is made by."""
    changed = artifact.differences(dict(before), dict(now))
    if changed:
        raise DistillationError(
            f"{folder} cannot be resumed: its inputs changed ({'; '.join(changed)}). Go back to what "
            f"they were, or remove {folder} to start over"
        )


def _start(target: Target, facts: Mapping[str, Any], say: Say) -> Path | None:
    """The checkpoint to resume from, None for the beginning. Raises DistillationError when the inputs changed."""
    before = facts_begun(target)
    if before is None:
        return None
    _refuse_changes(target.work, before, facts)
    good = checkpoints.last_good(target.work, say)
    if good is not None:
        _refuse_changes(target.work, checkpoints.facts_of(good).get("made_from", {}), facts)
    return good


def _begin(target: Target, facts: Mapping[str, Any]) -> None:
    """Say what the checkpoints to come are made from."""
    target.work.mkdir(parents=True, exist_ok=True)
    data = json.dumps(dict(facts), indent=1, default=str).encode() + b"\n"
    commit_file(target.work / FACTS, lambda file: file.write(data))


def _gathered(trainer: FusionTrainer) -> dict[str, Any] | None:
    """The whole model's tensors where each process has a part of them, else None. Every process calls it."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return state
    return None
