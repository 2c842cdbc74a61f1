"""Which coefficients a merge used: recorded per tensor, as JSON and as a section of the model card."""

from __future__ import annotations

import atexit
import html
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusekit import __version__
from fusekit.disk import commit_file, counted
from fusekit.errors import StorageError

ENVIRONMENT_VARIABLE = "FUSEKIT_PROVENANCE"


@dataclass(frozen=True)
class TensorRecord:
    """How one tensor was merged. Mappings are keyed by model; shares lie in [0, 1].

    coefficients: η (SCE) or W (VaRM), summing to 1, or mean scores (WIDEN). selected: share of the elements that Select
    kept. erased: per model, share of its merged entries that Erase dropped. unit: the VaRM unit of the coefficients.
    """

    method: str
    parameters: dict[str, Any]
    coefficients: dict[str, float]
    selected: float | None = None
    erased: dict[str, float] | None = None
    unit: str | None = None


@dataclass(eq=False)
class MergeRecord:
    """The coefficients of all tensors of a merge. False as long as no method of fusekit has merged anything."""

    base: str | None = None
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def add(self, name: str, base: str | None, record: TensorRecord) -> None:
        """Take down one tensor; a later record of the same name replaces it."""
        with self._lock:
            self.base = base or self.base
            self.tensors[name] = record

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: {"fusekit": version, "base": model, "tensors": {name: record without empty fields}}."""
        with self._lock:
            tensors = {
                name: {key: value for key, value in asdict(record).items() if value is not None}
                for name, record in sorted(self.tensors.items())
            }
        return {"fusekit": __version__, "base": self.base, "tensors": tensors}

    def markdown(self) -> str:
        """A section for a model card: mean, least and greatest coefficient of every model, and the selected share."""
        with self._lock:
            records = list(self.tensors.values())
        models = sorted({model for record in records for model in record.coefficients})
        methods = ", ".join(sorted({record.method for record in records}))
        lines = [
            "### Merge coefficients",
            "",
            f"{methods} by fusekit {__version__}, {counted(len(records), 'tensor')}. "
            "The coefficients of every tensor are in `coefficients.json`.",
            "",
            "| model | mean coefficient | least | greatest | erased |",
            "|---|---|---|---|---|",
        ]
        for model in models:
            values = [record.coefficients[model] for record in records if model in record.coefficients]
            erased = [record.erased[model] for record in records if record.erased and model in record.erased]
            erased_mean = f"{np.mean(erased):.1%}" if erased else "-"
            name = html.escape(model, quote=False).replace("|", "&#124;")
            lines.append(f"| {name} | {np.mean(values):.4f} | {min(values):.4f} | {max(values):.4f} | {erased_mean} |")
        selected = [record.selected for record in records if record.selected is not None]
        if selected:
            lines += ["", f"Selected: {np.mean(selected):.1%} of the elements of a tensor, on average."]
        return "\n".join(lines) + "\n"


_process_records: list[MergeRecord] = []  # at most one, asked for by the environment
# Of the process, not of a context: mergekit's multi-GPU executor merges on threads of its own.
_active: list[MergeRecord] = []


def active_records() -> tuple[MergeRecord, ...]:
    """The records that a merge running now writes to; empty if nobody asked for one."""
    return (*_process_records, *_active)


@contextmanager
def record_coefficients() -> Iterator[MergeRecord]:
    """Record the coefficients of every tensor that a method of fusekit merges inside the block, on any thread."""
    record = MergeRecord()
    _active.append(record)
    try:
        yield record
    finally:
        _active.remove(record)


def record_to_environment_path() -> None:
    """If the environment variable FUSEKIT_PROVENANCE names a path, record the whole process and write it there at exit.

    This is how `mergekit-yaml` itself leaves its coefficients behind. The file is written in one step.
    """
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path or _process_records:
        return
    target = Path(path).expanduser().absolute()
    record = MergeRecord()
    _process_records.append(record)
    atexit.register(_write_at_exit, record, target)


def _write_at_exit(record: MergeRecord, path: Path) -> None:
    if not record:
        return
    try:
        write_json(record.as_dict(), path)
    except (OSError, StorageError) as error:
        print(
            f"fusekit: the coefficients could not be written to {path}, which {ENVIRONMENT_VARIABLE} names: {error}. "
            "The merge itself is not affected.",
            file=sys.stderr,
        )


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON to `path` in one step; the folder is made if it is missing. Raises StorageError or OSError."""
    data = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    commit_file(path, lambda file: file.write(data.encode()))
