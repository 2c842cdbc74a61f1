"""Capture of a pretrained model against its bare forward, and what the head's rounding costs, on real text.

    OMP_NUM_THREADS=1 python -m benchmarks.capture.real MODEL..       # checkpoints or GGUF files

``forward``: ``model(input_ids, attention_mask)`` of the same batches, logits thrown away. ``capture``: top-k rows of
every label on disk, synced, with the head in float32 or in the model's dtype. In turns, in one process; processor
seconds. ``error``: log-probabilities of the labels in nats, against the same hidden states under a float32 head
(``of head``), and against the whole model in float32 (``of model``). The text is Python's standard library.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.alignment.timing import write
from fusekit.capturing.capture import capture_rows
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_model, load_tokenizer
from fusekit.capturing.store import StoreSpec
from fusekit.capturing.teacher import Teacher, padded, plan_batches
from fusekit.devices import Processes
from fusekit.settings import Selection
from fusekit.types import TEXT, CapturedRow, Message, Part, Row, TokenizedRow


class Blocks:
    """Blocks of the text, all of whose tokens but the first are labels."""

    def __init__(self, tokenizer: Any, count: int, length: int) -> None:
        ids = np.array(tokenizer(Path(argparse.__file__).read_text())["input_ids"][: count * length], np.int64)
        self.rows = [Row((Message(TEXT, f"{i}"),)) for i in range(count)]
        ends, zeros, part = np.arange(length) * 4, np.zeros(length, np.int64), np.full(length, Part.CONTENT, np.int64)
        self.tokens = {
            row.key: TokenizedRow(row.key, some, zeros, part, ends, ends, ends > 0)
            for row, some in zip(self.rows, ids.reshape(count, length), strict=True)
        }

    def tokenize(self, row: Row) -> TokenizedRow:
        return self.tokens[row.key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    write("capture-real", [row for name in options.models for row in measure(name, options)])


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per thing measured of a model."""
    device = torch.device(options.device)
    checkpoint = find_checkpoint(ModelChoice(name, dtype=options.dtype))
    model = load_model(checkpoint, device)
    data = Blocks(load_tokenizer(checkpoint), options.rows, options.length)
    heads = {dtype: Teacher(model, selection=Selection(options.k), float32_head=dtype == "float32") for dtype in HEADS}
    tokens = [data.tokenize(row) for row in data.rows]
    planned = plan_batches([options.length - 1] * len(tokens), heads["float32"].batch_tokens)
    batches = [padded([tokens[i] for i in batch]) for batch in planned]
    folder = Path(tempfile.mkdtemp())

    def forward() -> None:
        with torch.inference_mode():
            for ids, mask in batches:
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def captured(teacher: Teacher) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(folder / "store", ignore_errors=True)
            spec = StoreSpec(model=name, vocabulary=teacher.vocabulary, top_k=options.k)
            alone = Processes(0, 1, 1, device)
            capture_rows(data.rows, data, lambda: teacher, folder / "store", lambda: spec, quiet=True, processes=alone)

        return run

    calls = {"forward": forward} | {f"capture, head in {dtype}": captured(head) for dtype, head in heads.items()}
    seconds: dict[str, list[float]] = {what: [] for what in calls}
    for turn in range(options.runs + 1):
        for what, call in calls.items():
            started, busy = time.perf_counter(), time.process_time()
            call()
            if turn:  # the first warms up
                took = time.process_time() - busy if device.type == "cpu" else time.perf_counter() - started
                seconds[what].append(took)
    shutil.rmtree(folder)
    exact, rounded = (actual(heads[dtype].score(tokens).rows) for dtype in HEADS)
    del heads
    whole = actual(Teacher(model.float(), selection=Selection(options.k)).score(tokens).rows)
    bare, shared = statistics.median(seconds["forward"]), {"model": Path(name).stem, "dtype": options.dtype}
    errors = {
        "error of head": rounded - exact,
        "error of model, head in float32": exact - whole,
        "error of model, head in model": rounded - whole,
    }
    shared |= {
        "rows": options.rows,
        "row_tokens": options.length,
        "k": options.k,
        "vocabulary": model.config.vocab_size,
    }
    shared["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found = [
        shared
        | {"measured": what, "seconds": round(statistics.median(took), 3), "fastest": round(min(took), 3)}
        | {"times_forward": round(statistics.median(took) / bare, 3), "mean_nats": "", "most_nats": ""}
        for what, took in seconds.items()
    ]
    for what, error in errors.items():
        nats = {"mean_nats": round(float(np.abs(error).mean()), 5), "most_nats": round(float(np.abs(error).max()), 4)}
        found.append(shared | {"measured": what, "seconds": "", "fastest": "", "times_forward": ""} | nats)
    for row in found:
        print(row)
    return found


HEADS = ("float32", "model")


def actual(rows: list[CapturedRow]) -> np.ndarray:
    """The labels' log-probabilities of all rows."""
    return np.concatenate([row.actual for row in rows])


if __name__ == "__main__":
    main()
