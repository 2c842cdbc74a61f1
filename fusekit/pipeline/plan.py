"""What a run would do, and the tokens, disk, memory and operations it takes; the stages add their steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fusekit import artifacts as artifact
from fusekit.capturing import estimate as capture
from fusekit.capturing.capture import vocabulary_size
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Need, Processes, disk_need, memory_limits
from fusekit.disk import counted, existing_parent, free_bytes, human
from fusekit.distillation import estimate as training
from fusekit.errors import FusekitError
from fusekit.hub import HubUnreachableError
from fusekit.layout import PIVOT
from fusekit.pipeline.context import NOWHERE, Context, choice_of
from fusekit.pipeline.plan_data import Counts
from fusekit.pipeline.stage import DONE, STALE, Stage, Status, Step
from fusekit.recipe.sections import ModelSize, Pivot

_CHANGES_SHOWN = 4


@dataclass
class Plan:
    """What `fusekit run` would do.

    Attributes:
        recipe, out: as given; out may be None.
        steps: in order.
        needs: what the stages ask for before they start, and the whole run of each disk.
        refused: lines: what is known to stop the run.
        unknown: lines: what could not be found out, so that sums are "at least".
        basis: lines: what the figures are based on.
        machine: what there is.
    """

    recipe: str
    out: str | None
    steps: list[Step] = field(default_factory=list)
    needs: list[Need] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    basis: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def lacking(self) -> list[Need]:
        """What does not fit."""
        return [need for need in self.needs if not need.fits]

    @property
    def can_run(self) -> bool:
        """Whether nothing is known that would stop it."""
        return not self.refused and not self.lacking

    def total(self, figure: str) -> tuple[float, bool]:
        """The sum (the maximum, of memory) of a figure over the steps that have work, and whether all had it."""
        found = [getattr(step, figure) for step in self.steps if step.work]
        known = [value for value in found if value is not None]
        return max(known, default=0) if figure == "memory" else sum(known), len(known) == len(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON: bytes, 1e15 operations."""
        figures = {figure: self.total(figure) for figure in ("disk", "disk_at_most", "memory", "pflop")}
        totals = {figure: {"value": value, "complete": complete} for figure, (value, complete) in figures.items()}
        needs = [asdict(need) | {"fits": need.fits} for need in self.needs]
        return asdict(self) | {"can_run": self.can_run, "totals": totals, "needs": needs}


class Planner:
    """What the stages are told to plan their steps with.

    Attributes:
        context, recipe, plan: of the run; what is said of it.
        there: whether there is an output.
        place: where there will be one.
        rows: what is known of the examples, once the stage ``data`` is planned.
        models: those of whose size is known.
        as_said: names of models of which the recipe says the size, and nothing else is known.
        tokenizers: how models read examples, of those that are at hand.
        processes: this one alone.
    """

    def __init__(self, context: Context, plan: Plan) -> None:
        self.context, self.recipe, self.plan = context, context.recipe, plan
        self.there = context.layout.out.is_dir()
        self.place = existing_parent(Path.cwd() if context.layout is NOWHERE else context.layout.out)
        self.rows = Counts()
        self.models: dict[str, Checkpoint] = {}
        self.as_said: set[str] = set()
        self.tokenizers: dict[str, RowTokenizer] = {}
        self.processes = Processes(0, 1, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def find_models(self) -> None:
        """Look every model up, all at once: each waits for the hub no longer than one would.

        Nothing is loaded and no weights are fetched; the hub's client keeps the small files that it fetches in its
        cache.
        """
        names, plan = self.context.names, self.plan
        with ThreadPoolExecutor(len(names)) as pool:
            found = dict(zip(names, pool.map(lambda name: _look_up(self.context.choice(name)), names), strict=True))
        for name, checkpoint in found.items():
            section = self.context.model(name)
            if isinstance(checkpoint, Checkpoint):
                self.context.checkpoints[name] = self.models[name] = checkpoint
                plan.unknown += checkpoint.notices
                continue
            unreachable = isinstance(checkpoint, HubUnreachableError)
            if section.size is None:
                says = f"{checkpoint}; `size:` in the recipe would let a plan count it"
                (plan.unknown if unreachable else plan.refused).append(says)
            else:
                plan.refused += [] if unreachable else [str(checkpoint)]
                self.models[name] = _made_up(section, section.size)
                self.as_said.add(name)
        for name in [name for name in names if name in self.context.checkpoints]:
            if self.context.model(name).chat_template == PIVOT and PIVOT not in self.tokenizers:
                continue
            try:
                self.tokenizers[name] = self.context.reader(name)
            except FusekitError as error:
                plan.refused.append(str(error))

    def step(self, stage: Stage, name: str) -> Step:
        """A new step in the state of its artifact. Of one that cannot be compared yet only the place is looked at."""
        step = Step(stage.name, name)
        self.plan.steps.append(step)
        if not self.there:
            return step

        def look() -> Status:
            stage.check_place(self.context, name)
            if stage.can_compare(self, name):
                return stage.status(self.context, name)
            folder = stage.artifacts(self.context)[name]
            there = (folder / artifact.MANIFEST).is_file()
            return Status(folder, note="it is there; it is compared once the stages before it are done" * there)

        status = self.tried(step, look)
        if status is not None:
            step.state, step.rows = status.state, status.left
            step.notes += [status.note] if status.note else []
            if status.changed:
                more = len(status.changed) - _CHANGES_SHOWN
                changed = "; ".join(status.changed[:_CHANGES_SHOWN]) + (f" and {more} more" if more > 0 else "")
                step.notes.append(f"its inputs changed: {changed}")
        return step

    def tried(self, step: Step, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; an error becomes the step's."""
        try:
            return work()
        except (FusekitError, OSError, ValueError) as error:
            step.state = STALE
            step.notes.append(str(error))
            return None

    def done(self, stage: str) -> bool:
        """Whether all artifacts of a stage are there and up to date."""
        return all(step.state == DONE for step in self.plan.steps if step.stage == stage)

    def vocabulary(self, name: str) -> int:
        """Size of a model's vocabulary, 0 where it is not known."""
        if name not in self.models:
            return 0
        reader = self.tokenizers.get(name)
        if reader is None:
            return capture.shape_of(self.models[name].config).vocabulary
        return vocabulary_size(self.models[name], reader)

    def active(self, name: str) -> int:
        """Parameters that take part in a token."""
        size = self.context.model(name).size
        return (size.active_parameters if size is not None else None) or capture.parameters(self.models[name])

    def sum_up(self) -> None:
        """Whole disks against what is free, the machine, and what the sums leave out."""
        plan = self.plan
        if said := [self.context.model(name).path for name in self.context.names if name in self.as_said]:
            plan.basis.append(f"not cached and not reachable, so as large as the recipe says: {', '.join(said)}")
        self._need_disks()
        plan.basis.append("operations are 2 per parameter and token forward, 6 in training; attention comes on top")
        refused = [step for step in plan.steps if step.state == STALE]
        plan.refused += [f"{step.stage} {step.name}: {note}" for step in refused for note in step.notes[-1:]]
        limits = min(memory_limits(), key=lambda limit: limit.available)
        gpus = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            gpus.append({"name": torch.cuda.get_device_name(index), "free": free, "memory": total})
        plan.machine = {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_free": limits.available,
            "memory_of": limits.source,
            "gpus": gpus,
            "disk_free": free_bytes(self.place),
            "disk_of": str(self.place),
        }

    def _need_disks(self) -> None:
        """What the whole run writes, and downloads, by disk."""
        from huggingface_hub import constants

        pivot, to_do = self.models.get(PIVOT), [step for step in self.plan.steps if step.work]
        written = sum(step.disk or 0 for step in to_do)
        trains = pivot is not None and any(step.stage == "distill" for step in to_do)
        work = training.kept_bytes(pivot, self.recipe.distill) if pivot is not None and trains else 0
        what = f"disk for the whole run ({human(written)} that stay, {human(work)} for checkpoints while it trains"
        cache, needed = existing_parent(Path(constants.HF_HUB_CACHE)), written + work
        sizes = {
            self.context.model(name).path: size
            for name, known in self.models.items()
            if (size := known.weight_bytes if name in self.as_said else known.download_bytes)
        }
        downloaded = sum(sizes.values())
        download = f"download of {counted(len(sizes), 'model')}, {human(downloaded)}"
        together = bool(sizes) and cache.stat().st_dev == self.place.stat().st_dev
        if together:
            self.plan.needs.append(disk_need(f"{what}, {download})", needed + downloaded, self.place))
            return
        self.plan.needs.append(disk_need(f"{what})", needed, self.place))
        if sizes:
            self.plan.needs.append(disk_need(download, downloaded, cache))


def _look_up(choice: ModelChoice) -> Checkpoint | FusekitError:
    try:
        return find_checkpoint(choice, download=False)
    except HubUnreachableError as error:
        return error
    except FusekitError as error:
        return _without_weights(choice) or error


def _without_weights(choice: ModelChoice) -> Checkpoint | None:
    """A model of which only the small files are cached, where the hub does not answer: as large as its index says."""
    try:
        found = find_checkpoint(choice, weights=False, download=False)
        if found.snapshot is None or found.snapshot.online:
            return None
        index = json.loads((found.folder / "model.safetensors.index.json").read_bytes())
        total = int(index["metadata"]["total_size"])
    except (FusekitError, OSError, ValueError, KeyError, TypeError):
        return None
    notices = [*found.notices, f"{choice.model}: its weights are not in the cache, so a run has to reach the hub"]
    return replace(found, weights={"model.safetensors": total}, notices=notices)


def _made_up(section: Pivot, size: ModelSize) -> Checkpoint:
    """A checkpoint as large as the recipe says, in no folder."""
    names = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "dtype"}
    weights = {"model.safetensors": size.parameters * capture.itemsize(size.dtype)}
    return Checkpoint(
        choice_of(section), Path("(not here)"), size.model_dump(include=names, exclude_none=True), weights
    )
