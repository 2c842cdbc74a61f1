"""What a trainer counts about its examples, and the sums that its log lines are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fusekit.alignment.cases import Case
from fusekit.types import FloatArray

CHOSEN, CASE, DATA = "chosen/", "case/", "data/"
CASES = [case.name.lower() for case in Case]


def count_names(candidates: Sequence[str], data: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of an example's counts.

    ``rows`` and ``labels``; ``asked``: labels times sources, of which ``linked`` have a source position that has read
    the same text, and ``given`` have a row; ``taught``: labels with a target; how many rows each candidate was chosen
    for (shares of a row where several are weighed); labels times sources by case; and ``rows`` and ``chosen`` again for
    each source of data (:func:`of_data`).
    """
    chosen = [CHOSEN + name for name in candidates]
    by_data = [of_data(name, count) for name in data for count in ("rows", *chosen)]
    by_case = [CASE + name for name in CASES]
    return ("rows", "labels", "asked", "linked", "given", "taught", *chosen, *by_case, *by_data)


def of_data(data: str, count: str) -> str:
    """The name of a count over one source of data: ``data/NAME/rows``, ``data/NAME/chosen/CANDIDATE``."""
    return f"{DATA}{data}/{count}"


def counts_by_data(counts: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The counts of each source of data, by its name and theirs, of all counts."""
    found: dict[str, dict[str, float]] = {}
    for name, value in counts.items():
        if name.startswith(DATA):
            data, chosen, candidate = name.removeprefix(DATA).rpartition(f"/{CHOSEN}")
            if not chosen:
                data, _, candidate = name.removeprefix(DATA).rpartition("/")
            found.setdefault(data, {})[chosen.lstrip("/") + candidate] = value
    return found


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    """``linked_share``, ``row_share`` and ``taught_share`` of labels, and per candidate the share of rows."""
    asked, labels, rows = (max(counts.get(name, 0.0), 1.0) for name in ("asked", "labels", "rows"))
    found = {
        "linked_share": counts.get("linked", 0.0) / asked,
        "row_share": counts.get("given", 0.0) / asked,
        "taught_share": counts.get("taught", 0.0) / labels,
    }
    return found | {name: value / rows for name, value in counts.items() if name.startswith(CHOSEN)}


class RunningSums:
    """What this process has seen since the last line. names: of the counts."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._clear()

    def _clear(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._labels = 0
        self._counts = np.zeros(len(self.names))

    def add(self, lm: torch.Tensor, fusion: torch.Tensor, labels: int, counts: FloatArray | None) -> None:
        """Add a micro-batch, without waiting for its device: the sums of its losses over so many labels."""
        self._losses.append(torch.stack([lm.detach().float(), fusion.detach().float()]))
        self._labels += labels
        if counts is not None and self.names:
            self._counts = self._counts + counts

    def drain(self) -> torch.Tensor:
        """Everything as one float64 vector, and start over."""
        terms = torch.stack(self._losses).double().cpu().sum(0).tolist() if self._losses else [0.0, 0.0]
        vector = torch.tensor([*terms, float(self._labels), *self._counts.tolist()], dtype=torch.float64)
        self._clear()
        return vector

    def pending(self) -> torch.Tensor:
        """The counts since the last line, float64 [len(names)]."""
        return torch.from_numpy(np.array(self._counts))

    def read(self, vector: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """What the sum of drained vectors says: the values for a line of the log, and the counts by name.

        ``lm_loss`` and ``fusion_loss`` are per label, as in the loss.
        """
        lm, fusion, labels, *counts = vector.tolist()
        named = dict(zip(self.names, counts, strict=True))
        line = {"lm_loss": lm / max(labels, 1.0), "fusion_loss": fusion / max(labels, 1.0)}
        return line | (shares(named) if named else {}), named
