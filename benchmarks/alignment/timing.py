"""Medians over several runs, and the machine's name."""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent.parent / "results"


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


def machine() -> str:
    """Processor and core count."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {psutil.cpu_count()} cores"


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``benchmarks/results/NAME.csv``, the machine in every row."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"])
        writer.writeheader()
        writer.writerows({**row, "machine": machine()} for row in rows)
    print(f"{RESULTS / name}.csv")
