"""How many examples and tokens the models of a plan are to read: counted where they are few, else from a sample."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import DataCounts, Record, files_of, is_on_hub, read_rows, rows_of_records
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError, FusekitError
from fusekit.layout import PIVOT
from fusekit.recipe.sections import Data
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
