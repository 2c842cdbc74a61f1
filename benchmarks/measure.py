"""What the benchmarks share: options, times, memory of this process, and results as CSV with the machine in them."""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """For a script's options; its help is the script's docstring as it stands."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


class Seconds(NamedTuple):
    """What calls took, one value per run: on the clock, and of the processor."""

    wall: list[float]
    cpu: list[float]


def in_turns(calls: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, Seconds]:
    """The seconds of calls that are made in turn, after a first turn that is not counted."""
    found = {name: Seconds([], []) for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            started, busy = time.perf_counter(), time.process_time()
            call()
            if run:
                found[name].wall.append(time.perf_counter() - started)
                found[name].cpu.append(time.process_time() - busy)
    return found


def median_ms(call: Callable[[], Any], runs: int = 15, seconds: float = 1.0) -> float:
    """Median milliseconds of ``call`` over up to ``runs`` runs, after one that is not counted, within ``seconds``."""
    call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < runs and (len(times) < 3 or time.perf_counter() - started < seconds):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def resident(field: str) -> int:
    """Bytes of this process alone: ``VmRSS`` now, ``VmHWM`` at the peak.

    Not ru_maxrss, which knows what stood in the process before the program was started.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(f"{field}:"))


def forget_peak() -> int:
    """Let the peak of this process begin anew; returns the bytes that are resident now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # pages that were freed before must not count as there already
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def machine() -> str:
    """Processor, cores, memory, torch: what a figure is worth nothing without."""
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, torch {importlib.metadata.version('torch')}"


def device_name(device: str) -> str:
    """``cpu``, or what the GPU is called."""
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of one shape, the machine in a column of its own."""
    _put(file, [{**row, "machine": machine()} for row in rows])


def add(file: Path, rows: Sequence[Mapping[str, Any]], *names: str) -> None:
    """Add rows to a file, in place of those that have the same values under these names; the machine as in `write`."""
    rows = [{**row, "machine": row.get("machine", machine())} for row in rows]
    now = {tuple(str(row[name]) for name in names) for row in rows}
    before = list(csv.DictReader(file.open(encoding="utf-8"))) if file.exists() else []
    _put(file, [*(row for row in before if tuple(row[name] for name in names) not in now), *rows])


def _put(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(file)
