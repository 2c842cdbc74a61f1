"""What a plan reads: models without loading one, and how many rows and tokens they are to read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fusekit.capturing.estimate import itemsize
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.data.counts import DataCounts
from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import READERS, Record, is_on_hub, read_rows, rows_of_records
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError, FusekitError
from fusekit.hub import HubUnreachableError
from fusekit.layout import PIVOT, Layout
from fusekit.pipeline.context import Readers, choice_of, paths_of
from fusekit.recipe import Recipe
from fusekit.recipe.sections import Data, ModelSize, Pivot
from fusekit.types import Row

READ_WHOLE_BYTES = 64 << 20
"""Files up to this size together are read from end to end; of larger ones a sample is."""
SAMPLED_BYTES = 1 << 20
"""Bytes of contents that are tokenized for every model, at most."""
SAMPLED_ROWS = 2000
_COUNTED_AT_A_TIME = 16 << 20


@dataclass
class Known:
    """What is known of a model.

    Attributes:
        name: ``pivot``, or the source's.
        model: as the recipe says it.
        checkpoint: None where nothing is known of it; made up from the recipe's size where ``said``.
        said: whether the recipe's ``size`` is all that is known.
        active: parameters that take part in a token, where the recipe says so.
    """

    name: str
    model: str
    checkpoint: Checkpoint | None = None
    said: bool = False
    active: int | None = None

    @property
    def download_bytes(self) -> int:
        """Bytes of weights that are not here yet, as far as is known."""
        if self.checkpoint is None:
            return 0
        return self.checkpoint.weight_bytes if self.said else self.checkpoint.download_bytes


@dataclass
class Models:
    """The models of a recipe by name, how each reads rows, and what went wrong on the way.

    refused: what stops a run. unknown: what is only not known here.
    """

    known: dict[str, Known]
    readers: Readers
    tokenizers: dict[str, RowTokenizer] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def pivot(self) -> Known:
        """The pivot."""
        return self.known[PIVOT]


def find_models(recipe: Recipe, layout: Layout | None = None) -> Models:
    """Look every model up, all at once: each waits for the hub no longer than one would.

    Nothing is loaded and no weights are fetched; the hub's client keeps the small files that it fetches in its cache.

    layout: of the run, None where it has no folder yet.
    """
    readers = Readers(recipe, layout)
    names = readers.names
    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(lambda name: _look_up(readers.choice(name)), names), strict=True))
    models = Models({}, readers)
    for name, checkpoint in found.items():
        section = readers.model(name)
        known = models.known[name] = Known(name, section.path)
        known.active = section.size.active_parameters if section.size is not None else None
        if isinstance(checkpoint, Checkpoint):
            readers.add(name, checkpoint)
            known.checkpoint = checkpoint
            models.unknown += checkpoint.notices
            continue
        unreachable = isinstance(checkpoint, HubUnreachableError)
        if not unreachable or section.size is None:
            hint = "" if section.size else "; `size:` in the recipe would let a plan count it"
            (models.unknown if unreachable else models.refused).append(f"{checkpoint}{hint}")
        if section.size is not None:
            known.checkpoint, known.said = _made_up(section, section.size), True
    for name, known in models.known.items():
        as_pivot = readers.model(name).chat_template == PIVOT and PIVOT not in models.tokenizers
        if known.checkpoint is None or known.said or as_pivot:
            continue
        try:
            models.tokenizers[name] = readers.reader(name)
        except FusekitError as error:
            models.refused.append(str(error))
    return models


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
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "dtype")
    config: dict[str, Any] = {name: getattr(size, name) for name in names if getattr(size, name) is not None}
    weights = {"model.safetensors": size.parameters * itemsize(size.dtype)}
    return Checkpoint(choice_of(section), Path("(not here)"), config, weights)


@dataclass
class Counts:
    """What is known of the rows of a run.

    Attributes:
        rows: how many will be kept, None where unknown.
        tokens, labels: of all of them, by model that can read them.
        longest: tokens of the longest row of the sample for any model, at most ``max_length``.
        content_bytes: of all rows, None where unknown.
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

    def tokens_of(self, name: str) -> int | None:
        """Of all rows for a model; the pivot's, or anyone's, for one whose tokenizer is not here."""
        return _of(self.tokens, name)

    def labels_of(self, name: str) -> int | None:
        """As :meth:`tokens_of`."""
        return _of(self.labels, name)


def _of(figures: dict[str, int], name: str) -> int | None:
    return figures.get(name, figures.get(PIVOT, next(iter(figures.values()), None)))


def count_rows(section: Data, models: Models, prepared: list[Row] | None = None) -> Counts:
    """Count the rows of a recipe: all of them where they are few, else a sample, and say so.

    Args:
        section: of the recipe.
        models: those whose tokenizers are at hand read the rows.
        prepared: the rows of the run's own artifact, where that is there.
    """
    try:
        if prepared is not None:
            return _counted(prepared, len(prepared), models.tokenizers, section, ready=True)
        paths = paths_of(section.path)
        if remote := [path for path in paths if is_on_hub(path)]:
            return _as_said(section, remote[0])
        rows, total, said = _read(paths, section)
        found = _counted(rows, total, models.tokenizers, section)
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
    said = [f"{name} is not read: rows and tokens are those that the recipe states"]
    found = Counts(rows, longest=section.max_length, said=said)
    if size.tokens is not None:
        share = rows / size.rows
        found.tokens[PIVOT] = round(size.tokens * share)
        found.labels[PIVOT] = round((size.labels or size.tokens) * share)
        if section.pack:
            found.rows = math.ceil(found.tokens[PIVOT] / section.max_length)
    return found


def _read(paths: Sequence[str], section: Data) -> tuple[list[Row], int, list[str]]:
    """Rows, how many there are in all, and what to say if those are not all."""
    files = list(chain.from_iterable(_files(Path(path).expanduser()) for path in paths))
    size = sum(file.stat().st_size for file in files)
    limit, counts = section.limit, DataCounts(section.on_bad_row)
    if size <= READ_WHOLE_BYTES:
        rows = list(islice(chain.from_iterable(read_rows(path, counts=counts) for path in paths), limit))
        return rows, len(rows), counts.lines[1:]
    total, rows = 0, []
    for file in files:
        count, some = _sampled(file, max(1, SAMPLED_ROWS * file.stat().st_size // size), counts)
        total, rows = total + count, rows + some
    total = total if limit is None else min(total, limit)
    said = f"{len(rows)} rows of {total} were read, spread over the files; the rest is scaled"
    return rows, total, [said, *counts.lines[1:]]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return [path]


def _sampled(file: Path, wanted: int, counts: DataCounts) -> tuple[int, list[Row]]:
    """How many rows a large file has, and some of them; of JSON lines from everywhere, of others the first."""
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
        return Counts(problems=["data: there are no rows"])
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
    content = sum(len(message.content.encode()) for row in sample for message in row.messages)
    found.content_bytes = round(scale * content)
    if not ready:
        tokenizers = list(readers.values())
        if section.pack:
            sample = list(pack_text(sample, tokenizers, section.max_length))
        made = prepare(sample, tokenizers, section.max_length, section.overlong)
        sample = made.rows
        if made.counts.dropped or "cut" in made.counts.reasons:
            found.said.append(f"rows: {made.counts}" + ("" if exact else ", of the sample"))
    found.rows = round(len(sample) * scale)
    for name, reader in readers.items():
        read = [reader.tokenize(row) for row in sample]
        found.tokens[name] = round(sum(map(len, read)) * scale)
        found.labels[name] = round(sum(len(row.label_positions) for row in read) * scale)
        found.longest = max([found.longest, *map(len, read)])
    if not exact:
        found.said.append(f"tokens are those of {taken} rows, scaled to {total}")
    return found
