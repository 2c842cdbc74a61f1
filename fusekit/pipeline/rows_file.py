"""Prepared rows on disk, so that every later stage reads what the first one read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fusekit.errors import StorageError
from fusekit.types import Cut, Message, Row

NAME = "rows.jsonl"


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line: key, dataset, messages, cut."""
    with (folder / NAME).open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            record = {
                "key": row.key,
                "dataset": row.dataset,
                "messages": [list(message) for message in row.messages],
                "cut": list(row.cut) if row.cut else None,
            }
            # Escaped, so that lone surrogates and line separators come back as they were.
            file.write(json.dumps(record) + "\n")


def read_rows_file(folder: Path) -> list[Row]:
    """The rows that :func:`write_rows` wrote. Raises StorageError naming the line that is not one."""
    rows: list[Row] = []
    path = folder / NAME
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                cut = Cut(*record["cut"]) if record["cut"] else None
                row = Row(tuple(Message(*message) for message in record["messages"]), record["dataset"], cut)
                if row.key != record["key"]:
                    raise ValueError(f"its key is {row.key}, not {record['key']}")
                rows.append(row)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path}, line {len(rows) + 1}, is damaged: {error}; remove {folder} and run again"
        ) from error
    return rows
