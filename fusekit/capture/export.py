"""A store as a Parquet file, for pandas, Polars or DuckDB."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fusekit.artifacts import commit_file
from fusekit.capture.store import Store
from fusekit.errors import StorageError
from fusekit.types import CapturedRow

_ROWS_PER_GROUP = 256


def export_parquet(store: Store, path: Path | str) -> int:
    """Write one record per label; returns how many. ``pandas.read_parquet(path)`` reads it.

    ============== ============= =================================================================
    key            string        of the row
    dataset        string        source of data
    position       int32         of the label among the row's tokens
    message        int32         which message it belongs to
    end            int64         bytes of the message's content consumed once the label is read
    label          int32         its token id
    logprob        float32       its log-probability
    ids            list<int32>   the entries, by falling probability
    logprobs       list<float32> their natural log-probabilities
    tail           float32       the probability of everything else
    ============== ============= =================================================================

    Raises:
        StorageError: a damaged row, an output that is there already, the disk failed.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    if path.exists():
        raise StorageError(f"{path} is there already: choose another file")
    if not path.parent.is_dir():
        raise StorageError(f"{path.parent} is no folder")
    written = 0

    def write(file: BinaryIO) -> None:
        nonlocal written
        with pq.ParquetWriter(file, _schema(), compression="zstd") as writer:
            for table in _tables(store):
                writer.write_table(table)
                written += len(table)

    commit_file(path, write)
    return written


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("key", pa.string()),
            ("dataset", pa.string()),
            ("position", pa.int32()),
            ("message", pa.int32()),
            ("end", pa.int64()),
            ("label", pa.int32()),
            ("logprob", pa.float32()),
            ("ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float32())),
            ("tail", pa.float32()),
        ]
    )


def _tables(store: Store) -> Iterator[Any]:
    rows = iter(store)
    while group := list(islice(rows, _ROWS_PER_GROUP)):
        yield _table(group)


def _table(group: list[CapturedRow]) -> Any:
    import pyarrow as pa

    counts = [len(row.actual) for row in group]
    positions = [row.tokens.label_positions for row in group]
    used = [row.rows.ids >= 0 for row in group]

    def of_tokens(name: str) -> Any:
        return np.concatenate([getattr(row.tokens, name)[at] for row, at in zip(group, positions, strict=True)])

    def entries(name: str, dtype: Any) -> Any:
        flat = np.concatenate([getattr(row.rows, name)[mask] for row, mask in zip(group, used, strict=True)])
        lengths = np.concatenate([mask.sum(axis=1) for mask in used])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat.astype(dtype)))

    columns = {
        "key": np.repeat([row.tokens.key for row in group], counts),
        "dataset": np.repeat([row.dataset for row in group], counts),
        "position": np.concatenate(positions),
        "message": of_tokens("message"),
        "end": of_tokens("ends"),
        "label": of_tokens("ids"),
        "logprob": np.concatenate([row.actual for row in group]),
        "ids": entries("ids", np.int32),
        "logprobs": entries("logprobs", np.float32),
        "tail": np.concatenate([row.rows.tail for row in group]),
    }
    schema = _schema()
    arrays = [
        column if isinstance(column, pa.ListArray) else pa.array(column).cast(schema.field(name).type)
        for name, column in columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
