"""What a run would do, and the tokens, disk, memory and operations it takes; the stages add their steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from fusekit import artifacts as artifact
from fusekit.capturing import models as capture
from fusekit.capturing.capture import vocabulary_size
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import DataCounts, Record, files_of, is_on_hub, read_rows, rows_of_records
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Need, Processes, disk_need, memory_limits
from fusekit.disk import counted, existing_parent, free_bytes, human
from fusekit.distillation import arguments as training
from fusekit.errors import DataError, FusekitError
from fusekit.hub import HubUnreachableError
from fusekit.layout import PIVOT
from fusekit.pipeline.stage import DONE, NOWHERE, STALE, Context, Stage, Status, Step, choice_of
from fusekit.recipe.sections import Data, ModelSize, Pivot
from fusekit.types import Row

READ_WHOLE_BYTES = 64 << 20
"""Files up to this size together are read from end to end; of larger ones a sample is."""
SAMPLED_BYTES, SAMPLED_ROWS = 1 << 20, 2000
"""Contents, and examples, that are tokenized for every model, at most."""
_COUNTED_AT_A_TIME = 16 << 20


@dataclass
class Counts:
    """What is known of the examples of a run.

    Attributes:
        rows: how many will be kept, None where unknown.
        tokens, labels: of all of them, by model that can read them.
        longest: tokens of the longest of the sample for any model, at most ``max_length``.
        content_bytes: of all examples, None where unknown.
        said: lines about what the figures are based on.
        problems: lines: why a run would be refused.
    """

    rows: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    content_bytes: int | None = None
    said: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def of(self, figures: dict[str, int], name: str) -> int | None:
        """Tokens or labels for a model; the pivot's, or anyone's, for one whose tokenizer is not here."""
        return figures.get(name, figures.get(PIVOT, next(iter(figures.values()), None)))


def count_rows(section: Data, readers: dict[str, RowTokenizer], prepared: list[Row] | None = None) -> Counts:
    """Count the examples of a recipe: all of them where they are few, else a sample, and say so.

    Args:
        section: of the recipe.
        readers: by model, those that are at hand.
        prepared: the examples of the run's own artifact, where that is there.
    """
    try:
        if prepared is not None:
            return _counted(prepared, len(prepared), readers, section, ready=True)
        paths = section.paths
        if remote := [path for path in paths if is_on_hub(path)]:
            return _as_said(section, remote[0])
        rows, total, said = _read(paths, section)
        found = _counted(rows, total, readers, section)
        found.said = said + found.said
        return found
    except FusekitError as error:
        return Counts(problems=[f"data: {error}"])


def _as_said(section: Data, name: str) -> Counts:
    size = section.size
    if size is None:
        line = f"{name} is on the hub, and a plan downloads no data: say `data.size: {{rows: ..., tokens: ...}}`"
        return Counts(said=[line])
    rows = size.rows if section.limit is None else min(size.rows, section.limit)
    said = [f"{name} is not read: examples and tokens are those that the recipe states"]
    found = Counts(rows, longest=section.max_length, said=said)
    if size.tokens is not None:
        share = rows / size.rows
        found.tokens[PIVOT] = round(size.tokens * share)
        found.labels[PIVOT] = round((size.labels or size.tokens) * share)
        if section.pack:
            found.rows = math.ceil(found.tokens[PIVOT] / section.max_length)
    return found


def _read(paths: Sequence[str], section: Data) -> tuple[list[Row], int, list[str]]:
    """Examples, how many there are in all, and what to say if those are not all."""
    files = [Path(file).expanduser() for path in paths for file in files_of(path)]
    if missing := [file for file in files if not file.exists()]:
        raise DataError(f"{missing[0]} does not exist")
    size, limit, counts = sum(file.stat().st_size for file in files), section.limit, DataCounts(section.on_bad_row)
    if size <= READ_WHOLE_BYTES:
        rows = list(islice(chain.from_iterable(read_rows(path, counts=counts) for path in paths), limit))
        return rows, len(rows), counts.lines[1:]
    total, rows = 0, []
    for file in files:
        count, some = _sampled(file, max(1, SAMPLED_ROWS * file.stat().st_size // size), counts)
        total, rows = total + count, rows + some
    total = total if limit is None else min(total, limit)
    said = f"{len(rows)} examples of {total} were read, spread over the files; the rest is scaled"
    return rows, total, [said, *counts.lines[1:]]


def _sampled(file: Path, wanted: int, counts: DataCounts) -> tuple[int, list[Row]]:
    """How many examples a large file has, and some of them; of JSON lines from everywhere, of others the first."""
    if file.suffix.lower() == ".jsonl":
        count, last = 0, b"\n"
        with file.open("rb") as opened:
            while piece := opened.read(_COUNTED_AT_A_TIME):
                count, last = count + piece.count(b"\n"), piece[-1:]
        return count + (last != b"\n"), list(rows_of_records(_spread(file, wanted), file.stem, counts))
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(file).metadata.num_rows, list(read_rows(file, limit=wanted, counts=counts))
    rows = list(read_rows(file, counts=counts))
    return len(rows), rows[:: max(1, len(rows) // wanted)]


def _spread(file: Path, wanted: int) -> Iterator[Record]:
    """The lines after so many places, evenly spread over the file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        for number in range(wanted):
            opened.seek(size * number // wanted)
            if number:
                opened.readline()  # the rest of the line that the place is in
            line = opened.readline()
            where = f"{file}, near byte {opened.tell()}"
            try:
                if line.strip():
                    yield where, json.loads(line)
            except ValueError as error:
                yield where, DataError(f"{where}: not JSON: {error}")


def _counted(
    rows: list[Row], total: int, readers: dict[str, RowTokenizer], section: Data, ready: bool = False
) -> Counts:
    """Tokenize what is enough of ``rows``, which stand for ``total``. ready: they are prepared already."""
    if not rows:
        return Counts(problems=["data: there are no examples"])
    if not ready and len(rows) == total and not section.pack:
        rows = list({row.key: row for row in rows}.values())
        total = len(rows)
    # Evenly spread, and so many that their contents are about SAMPLED_BYTES.
    size = sum(len(message.content) for row in rows for message in row.messages)
    taken = max(1, min(len(rows), len(rows) * SAMPLED_BYTES // max(size, 1), SAMPLED_ROWS))
    sample = [rows[i * len(rows) // taken] for i in range(taken)]
    if not readers:
        return Counts(total, said=["no model's tokenizer is at hand: tokens are not known"])
    found, exact, scale = Counts(), taken == total, total / taken
    found.content_bytes = round(scale * sum(len(m.content.encode()) for row in sample for m in row.messages))
    if not ready:
        tokenizers = list(readers.values())
        if section.pack:
            sample = list(pack_text(sample, tokenizers, section.max_length))
        made = prepare(sample, tokenizers, section.max_length, section.overlong)
        sample = made.rows
        if made.counts.dropped or "cut" in made.counts.reasons:
            found.said.append(f"examples: {made.counts}" + ("" if exact else ", of the sample"))
    found.rows = round(len(sample) * scale)
    for name, reader in readers.items():
        read = [reader.tokenize(row) for row in sample]
        found.tokens[name] = round(sum(map(len, read)) * scale)
        found.labels[name] = round(sum(len(row.label_positions) for row in read) * scale)
        found.longest = max([found.longest, *map(len, read)])
    if not exact:
        found.said.append(f"tokens are those of {taken} examples, scaled to {total}")
    return found


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
