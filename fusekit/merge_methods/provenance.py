"""Which coefficients a merge used: recorded per tensor, as JSON and as a section of the model card."""

from __future__ import annotations

import atexit
import html
import json
import os
import sys
from collections.abc import Iterator
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
    """The coefficients of all tensors of a merge by name; empty if no method of fusekit has merged anything."""

    base: str | None = None
    tensors: dict[str, TensorRecord] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: {"fusekit": version, "base": model, "tensors": {name: record without empty fields}}."""
        tensors = {
            name: {key: value for key, value in asdict(record).items() if value is not None}
            for name, record in sorted(self.tensors.items())
        }
        return {"fusekit": __version__, "base": self.base, "tensors": tensors}

    def to_json(self) -> str:
        """The text of ``coefficients.json``."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def markdown(self) -> str:
        """A section for a model card: mean, least and greatest coefficient of every model, and the selected share."""
        records = self.tensors.values()
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
        for model in sorted({model for record in records for model in record.coefficients}):
            values = [record.coefficients[model] for record in records if model in record.coefficients]
            erased = [record.erased[model] for record in records if record.erased and model in record.erased]
            erased_mean = f"{np.mean(erased):.1%}" if erased else "-"
            name = html.escape(model, quote=False).replace("|", "&#124;")
            lines.append(f"| {name} | {np.mean(values):.4f} | {min(values):.4f} | {max(values):.4f} | {erased_mean} |")
        selected = [record.selected for record in records if record.selected is not None]
        if selected:
            lines += ["", f"Selected: {np.mean(selected):.1%} of the elements of a tensor, on average."]
        return "\n".join(lines) + "\n"


# Of the process, not of a context: mergekit's multi-GPU executor merges on threads of its own.
_active: list[MergeRecord] = []


def active_records() -> tuple[MergeRecord, ...]:
    """The records that a merge running now writes to; empty if nobody asked for one."""
    return tuple(_active)


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
    if path:
        record = MergeRecord()
        _active.append(record)
        atexit.register(_write_at_exit, record, Path(path).expanduser().absolute())


def _write_at_exit(record: MergeRecord, path: Path) -> None:
    try:
        if record.tensors:
            path.parent.mkdir(parents=True, exist_ok=True)
            commit_file(path, record.to_json().encode())
    except (OSError, StorageError) as error:
        print(
            f"fusekit: the coefficients could not be written to {path}, which {ENVIRONMENT_VARIABLE} names: {error}. "
            "The merge itself is not affected.",
            file=sys.stderr,
        )
