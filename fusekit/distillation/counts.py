"""What a trainer counts about its examples, and the sums that its log lines are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fusekit.alignment.cases import Case
from fusekit.types import FloatArray

CHOSEN, CASE, DATA = "chosen/", "case/", "data/"
CASES = [case.name.lower() for case in Case]


def count_names(candidates: Sequence[str], data: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of an example's counts.

    ``rows`` and ``labels``; ``asked``: labels times sources, of which ``linked`` have a source position that has read
    the same text, and ``given`` have a row; ``taught``: labels with a target; how many examples each candidate was
    chosen for (shares of one where several are weighed); labels times sources by case; and ``rows`` and ``chosen``
    again for each source of data.
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
    """``linked_share``, ``row_share`` and ``taught_share`` of labels, and per candidate the share of examples."""
    asked, labels, rows = (max(counts.get(name, 0.0), 1.0) for name in ("asked", "labels", "rows"))
    found = {
        "linked_share": counts.get("linked", 0.0) / asked,
        "row_share": counts.get("given", 0.0) / asked,
        "taught_share": counts.get("taught", 0.0) / labels,
    }
    return found | {name: value / rows for name, value in counts.items() if name.startswith(CHOSEN)}


LOSSES = ("loss", "lm_loss", "fusion_loss", "labels")


class Tally:
    """What a run counts: its losses since the last line of the log, and its named counts from the beginning.

    Each process adds what it sees. :meth:`line` and :meth:`so_far` are over all of them, so every process calls them.
    """

    def __init__(self, names: Sequence[str], over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.names, self._over_processes = tuple(names), over_processes
        self.start({})

    def start(self, counts: Mapping[str, float]) -> None:
        """Start a run, or resume one that had these counts."""
        self._before = dict(counts)
        self._losses: list[torch.Tensor] = []
        self._counts = np.zeros(len(self.names))

    def add(self, losses: Sequence[torch.Tensor], labels: int, counts: FloatArray | None) -> None:
        """Add a micro-batch, without waiting for its device.

        losses: total, of the text and of the fusion, each the sum over so many labels; non-finite ones do not count.
        """
        of_batch = torch.stack([loss.detach().float() for loss in losses])
        of_batch = torch.cat([of_batch, torch.full_like(of_batch[:1], labels)])
        self._losses.append(torch.where(of_batch.isfinite().all(), of_batch, 0.0))
        if counts is not None and self.names:
            self._counts = self._counts + counts

    def _since(self) -> tuple[dict[str, float], dict[str, float]]:
        """The losses and the counts since the last line."""
        losses = torch.stack(self._losses).cpu().double().sum(0) if self._losses else torch.zeros(len(LOSSES)).double()
        values = self._over_processes(torch.cat([losses, torch.from_numpy(self._counts)])).tolist()
        n = len(LOSSES)
        return dict(zip(LOSSES, values[:n], strict=True)), dict(zip(self.names, values[n:], strict=True))

    def line(self) -> dict[str, float]:
        """What a line of the log says, which ends here: nats per label, and shares of what the labels had."""
        losses, counts = self._since()
        self.start(self._added(counts))
        labels = losses.pop("labels")
        means = {name: value / labels for name, value in losses.items()} if labels else {}
        return means | (shares(counts) if counts else {})

    def so_far(self) -> dict[str, float]:
        """The counts of the run, those since the last line too."""
        return self._added(self._since()[1])

    def _added(self, counts: Mapping[str, float]) -> dict[str, float]:
        return {name: self._before.get(name, 0.0) + value for name, value in counts.items()}
