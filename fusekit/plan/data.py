"""How many rows and tokens a run reads: counted on all rows where they are few, else on a sample, and said so."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from fusekit.data.formats import form_of, parse_record
from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import READERS, is_on_hub, read_rows
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError, FusekitError
from fusekit.pipeline.layout import PIVOT
from fusekit.plan.models import Models
from fusekit.recipe.sections import Data
from fusekit.types import Row

READ_WHOLE_BYTES = 64 << 20
"""Files up to this size together are read from end to end; of larger ones a sample is."""

SAMPLED_BYTES = 1 << 20
"""Of contents that are tokenized for every model, at most."""

SAMPLED_ROWS = 2000
_COUNTED_AT_A_TIME = 16 << 20


@dataclass
class Rows:
    """What is known of the rows of a run.

    Attributes:
        count: of rows that will be kept, None where unknown.
        tokens, labels: of all of them, by model that can read them.
        sample: prepared rows, evenly spread over the data.
        longest: tokens of the longest row of the sample for any model, at most ``max_length``.
        content_bytes: of all rows, None where unknown.
        seconds: to read all rows for all models, None where that was not measured.
        exact: whether all rows were tokenized, so that the figures are what a run finds.
        said: lines about what they are based on.
        problems: lines: why a run would be refused.
    """

    count: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    sample: list[Row] = field(default_factory=list)
    longest: int = 0
    content_bytes: int | None = None
    seconds: float | None = None
    exact: bool = False
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


def count_rows(section: Data, models: Models, prepared: list[Row] | None = None) -> Rows:
    """Count the rows of a recipe.

    Args:
        section: of the recipe.
        models: those whose tokenizers are at hand read the rows.
        prepared: the rows of the run's own artifact, where that is there.
    """
    readers = models.tokenizers
    try:
        if prepared is not None:
            return _counted(prepared, len(prepared), readers, section, ready=True)
        paths = [section.path] if isinstance(section.path, str) else section.path
        if remote := [path for path in paths if is_on_hub(path)]:
            return _as_said(section, remote[0])
        rows, total, said = _read(paths, section)
        found = _counted(rows, total, readers, section)
        found.said = said + found.said
        return found
    except FusekitError as error:
        return Rows(problems=[f"data: {error}"])


def _as_said(section: Data, name: str) -> Rows:
    size = section.size
    if size is None:
        line = f"{name} is on the hub, and a plan downloads no data: say `data.size: {{rows: ..., tokens: ...}}`"
        return Rows(said=[line])
    rows = size.rows if section.limit is None else min(size.rows, section.limit)
    share = rows / size.rows
    found = Rows(count=rows, longest=section.max_length, said=[f"{name} is not read: rows and tokens are the recipe's"])
    if size.tokens is not None:
        found.tokens[PIVOT] = round(size.tokens * share)
        found.labels[PIVOT] = round((size.labels or size.tokens) * share)
        if section.pack:
            found.count = math.ceil(found.tokens[PIVOT] / section.max_length)
    return found


def _read(paths: Sequence[str], section: Data) -> tuple[list[Row], int, list[str]]:
    """Rows, how many there are in all, and what to say if those are not all."""
    files = list(chain.from_iterable(_files(Path(path).expanduser()) for path in paths))
    size = sum(file.stat().st_size for file in files)
    limit = section.limit
    if size <= READ_WHOLE_BYTES:
        rows = list(islice(chain.from_iterable(read_rows(path) for path in paths), limit))
        return rows, len(rows), []
    total, rows = 0, []
    for file in files:
        count, some = _sampled(file, max(1, SAMPLED_ROWS * file.stat().st_size // size))
        total, rows = total + count, rows + some
    total = total if limit is None else min(total, limit)
    return rows, total, [f"{len(rows)} rows of {total} were read, spread over the files; the rest is scaled"]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return [path]


def _sampled(file: Path, wanted: int) -> tuple[int, list[Row]]:
    """How many rows a large file has, and some of them; of JSON lines from everywhere, of others the first."""
    if file.suffix.lower() == ".jsonl":
        return _lines(file), list(_spread(file, wanted))
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        count: int = pyarrow.parquet.ParquetFile(file).metadata.num_rows
        return count, list(read_rows(file, limit=wanted))
    rows = list(read_rows(file))
    return len(rows), rows[:: max(1, len(rows) // wanted)]


def _lines(file: Path) -> int:
    count, last = 0, b"\n"
    with file.open("rb") as opened:
        while piece := opened.read(_COUNTED_AT_A_TIME):
            count, last = count + piece.count(b"\n"), piece[-1:]
    return count + (last != b"\n")


def _spread(file: Path, wanted: int) -> Iterator[Row]:
    """The lines after so many places, evenly spread over the file."""
    size, parse = file.stat().st_size, None
    with file.open("rb") as opened:
        for number in range(wanted):
            opened.seek(size * number // wanted)
            if number:
                opened.readline()  # the rest of the line that the place is in
            line = opened.readline()
            if not line.strip():
                continue
            where = f"{file}, near byte {opened.tell()}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: no JSON: {error}") from error
            parse = parse or form_of(record, where)
            yield parse_record(record, parse, where, file.stem)


def _counted(rows: list[Row], total: int, readers: dict[str, RowTokenizer], section: Data, ready: bool = False) -> Rows:
    """Tokenize what is enough of ``rows``, which stand for ``total``. ready: they are prepared already."""
    if not rows:
        return Rows(problems=["data: there are no rows"])
    if not ready and len(rows) == total and not section.pack:
        rows = list({row.key: row for row in rows}.values())
        total = len(rows)
    sample = _thinned(rows)
    found = Rows(exact=len(sample) == total)
    if not readers:
        found.count = total
        found.said.append("no model's tokenizer is at hand: tokens are not known")
        return found
    started = time.perf_counter()
    tokenizers = list(readers.values())
    taken = len(sample)
    content = sum(len(message.content.encode()) for row in sample for message in row.messages)
    if not ready:
        if section.pack:
            sample = list(pack_text(sample, tokenizers, section.max_length))
        made = prepare(sample, tokenizers, section.max_length, section.overlong)
        sample = made.rows
        if made.counts.dropped or "cut" in made.counts.reasons:
            found.said.append(f"rows: {made.counts}" + ("" if found.exact else ", of the sample"))
    scale = total / taken
    found.count = round(len(sample) * scale)
    found.sample = sample
    for name, reader in readers.items():
        read = [reader.tokenize(row) for row in sample]
        found.tokens[name] = round(sum(map(len, read)) * scale)
        found.labels[name] = round(sum(len(row.label_positions) for row in read) * scale)
        found.longest = max([found.longest, *map(len, read)])
    found.content_bytes = round(content * scale)
    found.seconds = (time.perf_counter() - started) * scale
    if not found.exact:
        found.said.append(f"tokens are those of {taken} rows, scaled to {total}")
    return found


def _thinned(rows: list[Row]) -> list[Row]:
    """Rows spread evenly over all, so many that their contents are about :data:`SAMPLED_BYTES`."""
    size = sum(len(message.content) for row in rows for message in row.messages)
    wanted = max(1, min(len(rows), len(rows) * SAMPLED_BYTES // max(size, 1), SAMPLED_ROWS))
    return [rows[i * len(rows) // wanted] for i in range(wanted)]
