"""Capture by size of batch: seconds of the same rows in batches of few and of many tokens, and their ratio.

    OMP_NUM_THREADS=1 python -m benchmarks.capture.batches          # a random Llama, on what device there is

Rows of 512 tokens, all of them labels; the sizes are taken in turns, in one process. Nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from benchmarks.alignment.timing import write
from benchmarks.capture.capture import TOKENS, VOCABULARY, Tokens, random_llama
from fusekit.capturing.teacher import Teacher
from fusekit.settings import Selection

ROW_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 16384], help="tokens of a batch")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = random_llama(options.hidden, options.layers, getattr(torch, options.dtype), options.device)
    data = Tokens(options.rows, ROW_TOKENS, ROW_TOKENS, 1.0)
    rows = [data.tokenize(row) for row in data.rows]
    teachers = {size: Teacher(model, np.arange(TOKENS), Selection(10), batch_tokens=size) for size in options.sizes}
    seconds: dict[int, list[float]] = {size: [] for size in options.sizes}
    processor: dict[int, list[float]] = {size: [] for size in options.sizes}
    teachers[options.sizes[0]].score(rows[:4])  # warms up
    for _ in range(options.runs):
        for size, teacher in teachers.items():
            started, busy = time.perf_counter(), time.process_time()
            teacher.score(rows)
            seconds[size].append(time.perf_counter() - started)
            processor[size].append(time.process_time() - busy)
    least = statistics.median(processor[options.sizes[0]])
    write(
        "capture-batches",
        [
            {
                "hidden": options.hidden,
                "layers": options.layers,
                "vocabulary": VOCABULARY,
                "dtype": options.dtype,
                "device": options.device,
                "rows": options.rows,
                "row_tokens": ROW_TOKENS,
                "batch_tokens": size,
                "seconds": round(statistics.median(seconds[size]), 3),
                "fastest": round(min(seconds[size]), 3),
                "slowest": round(max(seconds[size]), 3),
                "cpu_seconds": round(statistics.median(processor[size]), 3),
                "times_first": round(statistics.median(processor[size]) / least, 3),
            }
            for size in options.sizes
        ],
    )


if __name__ == "__main__":
    main()
