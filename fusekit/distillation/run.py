"""Distil: from a pivot and stores of captured examples to published checkpoints."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import set_seed

import fusekit
from fusekit import artifacts as artifact
from fusekit.capturing.models import dequantise, find_checkpoint
from fusekit.capturing.store import Store
from fusekit.devices import Processes, duration
from fusekit.disk import disk_fault, output_lock, recover, staging
from fusekit.distillation import outputs
from fusekit.distillation.arguments import disk_needs, memory_needs, problems, refuse_needs, training_arguments
from fusekit.distillation.batching import Scheduled
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.inputs import Inputs, OnPolicy, Opened, Say, open_inputs
from fusekit.distillation.live import LiveTeacher
from fusekit.distillation.projections import Projection
from fusekit.distillation.settings import AlignmentSettings, DistillSettings, Target, targets_of
from fusekit.distillation.trainer import FusionTrainer
from fusekit.errors import DistillationError, StorageError
from fusekit.gguf import split
from fusekit.layout import PIVOT
from fusekit.types import Row

STAGE = "distill"


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
    """Train every distilled model and publish each as a plain checkpoint in a folder of ``out``.

    Each is published in one step when it is whole; until then its checkpoints are in ``NAME.training`` beside it.
    Under ``torchrun`` or ``accelerate launch`` every process calls this.

    Args:
        inputs: the pivot, the rows and what each model said about them.
        settings: see :class:`fusekit.distillation.settings.DistillSettings`.
        out: folder for the distilled models.
        resume: continue what is there: models that are published stay, others continue from their last good
            checkpoint.
        overwrite: start over, replacing what is there.
        ignore_estimates: start although disk or memory do not seem to suffice.
        quiet: draw no bar.
        others: how many models the caller trains before and after these, for the place that the bar names.
        say: told what a user should know, in the first process.

    Returns the folders of the distilled models.

    Raises:
        DistillationError: inputs that do not fit, or that are not those of the run to resume (says what differs);
            training that does not get anywhere.
        StorageError: the output is in use, not empty, or the disk fails.
    """
    if resume and overwrite:
        raise DistillationError("resume continues what is there, overwrite replaces it: ask for one of them")
    out, processes = Path(out).resolve(), Processes.current()
    targets = targets_of(settings, list(inputs.sources), out)
    tell: Say = lambda line: say(line) if processes.is_first else None  # noqa: E731
    with ExitStack() as stack:
        if found := problems(settings.training, find_checkpoint(inputs.pivot)):
            raise DistillationError("; ".join(says for _, says in found))
        processes.first_then_all(lambda: _claim(stack, out, targets, resume, overwrite))
        if split(inputs.pivot.model) is not None and inputs.pivot.dequantised is None:  # each model begins as it
            choice, options = inputs.pivot, {"overwrite": overwrite, "ignore_estimates": ignore_estimates}
            processes.first_then_all(lambda: dequantise(choice, out / PIVOT, **options, say=tell))
            inputs = replace(inputs, pivot=replace(choice, dequantised=out / PIVOT))
        opened = open_inputs(inputs, settings, sorted({name for target in targets for name in target.sources}), tell)
        for number, target in enumerate(targets, others[0] + 1):
            label = f"distill {number} of {sum(others) + len(targets)}"
            work = _Work(target, opened, tell)
            if resume and processes.first_then_all(work.is_done):
                work.say(f"done already, {target.folder}")
                continue
            work.make(resume, ignore_estimates, None if quiet else label)
            del work
            gc.collect()  # what trained holds cycles, and memory that the next one needs
    return [target.folder for target in targets]


def _claim(stack: ExitStack, out: Path, targets: Sequence[Target], resume: bool, overwrite: bool) -> None:
    """Lock the output, clean up after runs that died, and refuse what is there unless asked to resume or start over."""
    stack.enter_context(output_lock(out))
    out.mkdir(exist_ok=True)
    for target in targets:
        recover(target.folder)
    _refuse_result(out)
    for target in targets:
        _refuse_result(target.folder, STAGE)
    there = [path for target in targets for path in (target.folder, target.work) if path.exists()]
    if there and not resume and not overwrite:
        raise DistillationError(
            f"{there[0]} is there already: resume continues it, overwrite replaces it; nothing was touched"
        )
    for target in targets if resume else ():
        _refuse_occupied(target)
    if overwrite:
        outputs.begin_overwriting(targets)


def _refuse_result(folder: Path, but: str | None = None) -> None:
    known = None
    with suppress(StorageError):  # a damaged one may be replaced
        known = artifact.read(folder)
    if known is not None and known.stage != but:
        raise DistillationError(
            f"{folder} holds a result of the stage {known.stage!r}: choose another output; nothing was touched"
        )


def _refuse_occupied(target: Target) -> None:
    if not outputs.is_former(target):
        artifact.refuse_occupied(target.folder, STAGE)


class _Work:
    """One distilled model, and what it is made from."""

    def __init__(self, target: Target, opened: Opened, say: Say) -> None:
        self.target, self.opened = target, opened
        self.say: Say = lambda line: say(f"{target.name}: {line}")
        self.data, self.answers = opened.examples(target.sources)
        stores: dict[str, Store | LiveTeacher] = {PIVOT: opened.pivot_store} if opened.pivot_store is not None else {}
        self.facts = facts_of_run(
            target.name,
            opened.settings,
            opened.fingerprint,
            self.data.rows,
            stores | {name: opened.stores[name] for name in target.sources},
            projections=self.data.projections,
            writers=self.answers.writers if self.answers is not None else None,
        )

    def is_done(self) -> bool:
        """Whether the model is published already, and not one that is being replaced. Raises if its inputs changed."""
        folder = self.target.folder
        known = None if outputs.is_former(self.target) else artifact.read(folder)
        if known is not None:
            _refuse_changes(folder, known.inputs, self.facts)
        return known is not None

    def make(self, resume: bool, ignore_estimates: bool, label: str | None) -> None:
        """Train and publish. label: of the bar, if there is to be one."""
        target, facts, training = self.target, self.facts, self.opened.settings.training
        started, first = time.monotonic(), Processes.current().first_then_all
        start = first(lambda: _start(target, facts, self.say)) if resume else None
        for line in self.data.joined.report:
            self.say(line)
        inputs, tokenizer, on_policy = self.opened.inputs, self.opened.tokenizer, None
        if training.on_policy:
            on_policy = OnPolicy(
                self.data, tokenizer, training, inputs.max_length, sources=inputs.sources, say=self.say
            )
        live = on_policy.teachers if on_policy is not None else self.data.sources
        teachers = [teacher for teacher in live.values() if isinstance(teacher, LiveTeacher)]
        if not ignore_estimates:
            first(lambda: self.refuse_what_does_not_fit(start, teachers))
        for teacher in teachers:
            teacher.open()
        set_seed(training.seed)  # an adapter begins with random values
        model = outputs.load_pivot(self.opened.checkpoint, training)
        if start is None:
            first(lambda: artifact.begin(target.work, facts))
        else:
            self.say(f"resumes from {start.name}")
        examples: FusionDataset | Scheduled = self.data
        if self.answers is not None and training.schedule is not None:
            examples = Scheduled(self.data, self.answers, training.schedule, training.seed, training.batch_size)
        args = training_arguments(training, target.work)
        args.disable_tqdm |= label is None
        made_from, label = {"made_from": facts}, label or ""
        trainer = FusionTrainer(model, args, examples, facts=made_from, say=self.say, label=label, on_policy=on_policy)
        try:
            trainer.train(resume_from_checkpoint=str(start) if start is not None else None)
        except Exception as error:
            raise disk_fault(error, target.work) or error from None
        state = None
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # each process has a part of the tensors
            state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        counts, seconds = trainer.tally.so_far(), time.monotonic() - started
        first(lambda: self.publish(trainer, state, counts, round(seconds, 3)))
        for teacher in teachers:
            teacher.close()
        self.say(f"trained in {duration(seconds)}, published to {target.folder}")

    def refuse_what_does_not_fit(self, start: Path | None, teachers: Sequence[LiveTeacher]) -> None:
        """Raise DistillationError where disk or memory do not suffice."""
        # Where the run starts from a checkpoint, the like of it is on the disk already.
        checkpoint, training, out = self.opened.checkpoint, self.opened.settings.training, self.target.folder
        beside = [teacher.checkpoint for teacher in teachers if teacher.checkpoint]
        longest = max(part.longest for part in (self.data, self.answers) if part is not None and len(part))
        needs = memory_needs(checkpoint, training, longest, Processes.current(), beside)
        if start is None:
            needs += disk_needs(checkpoint, training, out)
        refuse_needs(needs)

    def publish(
        self, trainer: FusionTrainer, state: dict[str, Any] | None, counts: dict[str, float], seconds: float
    ) -> None:
        """Write the result with its manifest and move it to its place in one step; its checkpoints have served."""
        target, opened, joined = self.target, self.opened, self.data.joined
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.config.use_cache = opened.checkpoint.config.get("use_cache", True)
        record = {
            "target": target.name,
            "sources": list(target.sources),
            "settings": opened.settings.model_dump(mode="json"),
            "made_from": self.facts,
            "rows": joined.report,
            "unmatched": joined.missing,
            "counts": counts,
            "skipped_steps": trainer.skipped,
            "log": [line for line in trainer.state.log_history if "train_runtime" not in line],
        }
        _refuse_occupied(target)  # what came there while this was training
        with staging(target.folder) as folder:
            try:
                outputs.write_result(model, state, opened.checkpoint, opened.settings.training, folder)
                opened.tokenizer.save_pretrained(folder)
                text = json.dumps(record, indent=1, default=str) + "\n"
                (folder / outputs.RECORD).write_text(text, encoding="utf-8")
                # In the manifest alone, so that equal runs leave equal files.
                made = {"fusekit": fusekit.__version__, "seconds": seconds}
                artifact.seal(folder, STAGE, self.facts, made)
            except Exception as error:
                raise disk_fault(error, folder) or error from None
        (target.work / outputs.OVERWRITING).unlink(missing_ok=True)  # or the new one would be taken for the former
        shutil.rmtree(target.work, ignore_errors=True)


def _refuse_changes(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = artifact.differences(dict(before), dict(now))
    artifact.refuse_changes(folder, changed, f"remove {folder} to start over", DistillationError)


def _start(target: Target, facts: Mapping[str, Any], say: Say) -> Path | None:
    """The checkpoint to resume from, None for the beginning."""
    before = artifact.begun(target.work)
    if before is None:
        return None
    _refuse_changes(target.work, before, facts)
    good = outputs.last_good(target.work, say)
    if good is not None:
        _refuse_changes(target.work, outputs.facts_of(good).get("made_from", {}), facts)
    return good


Facts = dict[str, Any]

# How the work is split, watched and kept does not change what comes out.
_FREE = {"per_device_train_batch_size", "activation_checkpointing", "max_skipped_steps"}
_FREE_FIELDS = (
    "logging_",
    "save_",
    "report_to",
    "run_name",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_p",  # pinning, prefetching, persistent workers; not drop_last, which leaves examples out
    "log_level",
    "ddp_",
    "push_",
)


def facts_of_run(
    target: str,
    settings: DistillSettings,
    pivot: str,
    rows: Sequence[Row],
    stores: Mapping[str, Store | LiveTeacher],
    *,
    projections: Mapping[str, Projection] | None = None,
    writers: Mapping[str, str] | None = None,
) -> Facts:
    """Everything that decides the weights of a distilled model, and nothing else.

    pivot: fingerprint of its weights. writers: of a schedule, who wrote the answers, by key, in order.
    """
    unused = _FREE | ({"loss", "truncation", "temperature"} if settings.plain else set())
    unused |= {"schedule"} if settings.training.schedule is None else {"num_train_epochs"}
    unused |= set() if settings.training.on_policy else {"on_policy", "max_new_tokens"}
    training = settings.training.model_dump(mode="json", exclude=unused)
    hashed = artifact.joined_hash
    nested: dict[str, Any] = {
        "target": target,
        "pivot": pivot,
        "rows": {"count": len(rows), "xxh3": hashed(row.key for row in rows)},
        **({} if writers is None else {"responses": hashed(f"{key} {name}" for key, name in writers.items())}),
        **({} if settings.plain else {"fusion": settings.fusion.model_dump(mode="json")}),
        "training": {name: value for name, value in training.items() if not name.startswith(_FREE_FIELDS)},
        "stores": {
            name: {
                **store.spec.model_dump(mode="json"),
                "shards": hashed(record.xxh3 for record in store.records.values()),
            }
            for name, store in stores.items()
        },
        "projections": {name: facts_of_alignment(how) for name, how in (projections or {}).items()},
    }
    return artifact.flat(nested)


def facts_of_alignment(how: AlignmentSettings | Projection) -> Facts:
    """What of how a source is aligned decides its rows; of settings what no map has to be made for."""
    facts: Facts = {"vocabulary": how.vocabulary}
    if not how.as_they_are:
        tokens = "dtw" if how.tokens == "dtw" else "span"
        facts = {"tokens": tokens, **facts, "collisions": how.collisions}
        if tokens == "span":
            facts |= {"conditioning": how.conditioning, "tail": how.tail, "one_hot": how.one_hot}
    made = how.vocabulary_map if isinstance(how, Projection) else None
    return facts if made is None else facts | {"map": made.fingerprint}
