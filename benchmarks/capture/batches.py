"""Capture by size of batch: seconds of the same rows in batches of few and of many tokens, and their ratio.

    OMP_NUM_THREADS=1 python -m benchmarks.capture.batches          # a random Llama, on what device there is

Rows of 512 tokens, all of them labels; the sizes are taken in turns, in one process.
"""

from __future__ import annotations

import statistics
from functools import partial

import numpy as np
import torch

from benchmarks.capture.capture import TOKENS, VOCABULARY, Tokens, random_ids, random_llama
from benchmarks.measure import RESULTS, in_turns, parser_of, write
from fusekit.capturing.teacher import Teacher
from fusekit.settings import Selection

ROW_TOKENS = 512


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 16384], help="tokens of a batch")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = random_llama(options.hidden, options.layers, getattr(torch, options.dtype), options.device)
    rows = list(Tokens(random_ids(options.rows, ROW_TOKENS, ROW_TOKENS)).tokens.values())
    teachers = {size: Teacher(model, np.arange(TOKENS), Selection(10), batch_tokens=size) for size in options.sizes}
    calls = {str(size): partial(teacher.score, rows) for size, teacher in teachers.items()}
    times = in_turns(calls, options.runs)
    least = statistics.median(times[str(options.sizes[0])].cpu)
    write(
        RESULTS / "capture-batches.csv",
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
                "seconds": round(statistics.median(wall), 3),
                "fastest": round(min(wall), 3),
                "slowest": round(max(wall), 3),
                "cpu_seconds": round(statistics.median(cpu), 3),
                "times_first": round(statistics.median(cpu) / least, 3),
            }
            for size, (wall, cpu) in times.items()
        ],
    )


if __name__ == "__main__":
    main()
