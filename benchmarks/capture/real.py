"""Capture of a pretrained model against its bare forward, and what the head's rounding costs, on real text.

    OMP_NUM_THREADS=1 python -m benchmarks.capture.real MODEL..       # checkpoints or GGUF files

``forward``: ``model(input_ids, attention_mask)`` of the same batches, logits thrown away. ``capture``: top-k rows of
every label on disk, synced, with the head in float32 or in the model's dtype. In turns, in one process; processor
seconds. ``error``: log-probabilities of the labels in nats, against the same hidden states under a float32 head
(``of head``), and against the whole model in float32 (``of model``). The text is Python's standard library.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.capture.capture import Tokens, capture, forward
from benchmarks.measure import RESULTS, device_name, in_turns, parser_of, write
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_model, load_tokenizer
from fusekit.capturing.teacher import Teacher, padded, plan_batches
from fusekit.settings import Selection
from fusekit.types import CapturedRow


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    write(RESULTS / "capture-real.csv", [row for name in options.models for row in measure(name, options)])


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per thing measured of a model."""
    device = torch.device(options.device)
    checkpoint = find_checkpoint(ModelChoice(name, dtype=options.dtype))
    model = load_model(checkpoint, device)
    text = load_tokenizer(checkpoint)(Path(argparse.__file__).read_text())["input_ids"]
    data = Tokens(np.array(text[: options.rows * options.length]).reshape(options.rows, options.length))
    heads = {dtype: Teacher(model, selection=Selection(options.k), float32_head=dtype == "float32") for dtype in HEADS}
    tokens = [data.tokenize(row) for row in data.rows]
    planned = plan_batches([options.length - 1] * len(tokens), heads["float32"].batch_tokens)
    batches = [padded([tokens[i] for i in batch]) for batch in planned]
    with tempfile.TemporaryDirectory() as folder:
        calls = {"forward": partial(forward, model, batches)}
        for dtype, head in heads.items():
            calls[f"capture, head in {dtype}"] = partial(capture, head, data, options.k, Path(folder), device)
        times = in_turns(calls, options.runs)
    seconds = {what: taken.cpu if device.type == "cpu" else taken.wall for what, taken in times.items()}
    exact, rounded = (actual(heads[dtype].score(tokens).rows) for dtype in HEADS)
    del heads
    whole = actual(Teacher(model.float(), selection=Selection(options.k)).score(tokens).rows)
    bare, shared = statistics.median(seconds["forward"]), {"model": Path(name).stem, "dtype": options.dtype}
    errors = {
        "error of head": rounded - exact,
        "error of model, head in float32": exact - whole,
        "error of model, head in model": rounded - whole,
    }
    shared |= {"rows": options.rows, "row_tokens": options.length, "k": options.k}
    shared |= {"vocabulary": model.config.vocab_size, "device": device_name(options.device)}
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
