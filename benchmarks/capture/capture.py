"""Capture, with encoding and writing, against the bare forward of the same batches: seconds and their ratio.

    python -m benchmarks.capture.capture            # a random Llama, V 151,936, on what device there is

``forward``: ``model(input_ids, attention_mask)`` of the same padded batches, its logits thrown away. ``decoder``: the
same without the head. ``capture``: top-k rows of every label on disk, synced. All in one process, taken in turns.
Processor seconds say what a machine that does other things besides cannot blur.
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
from fusekit.capturing.store import StoreSpec
from fusekit.capturing.teacher import Teacher, padded, plan_batches
from fusekit.devices import Processes
from fusekit.settings import Selection
from fusekit.types import TEXT, Message, Part, Row, TokenizedRow

VOCABULARY, TOKENS = 151_936, 151_665


class Tokens:
    """Rows whose tokens are known beforehand. labels: share of the tokens, at the end of each row, that are labels."""

    def __init__(self, count: int, shortest: int, longest: int, labels: float) -> None:
        rng = np.random.default_rng(0)
        self.rows = [Row((Message(TEXT, f"{i}"),)) for i in range(count)]
        self.tokens = {}
        for row in self.rows:
            length = int(rng.integers(shortest, longest + 1))
            taught = np.arange(length) >= max(1, round(length * (1 - labels)))
            ends = np.arange(length) * 4
            ids = rng.integers(0, TOKENS, length)
            nothing = np.zeros(length, np.int64)
            part = np.full(length, Part.CONTENT, np.int64)
            self.tokens[row.key] = TokenizedRow(row.key, ids, nothing, part, ends, ends, taught)

    def tokenize(self, row: Row) -> TokenizedRow:
        return self.tokens[row.key]


def random_llama(hidden: int, layers: int, dtype: torch.dtype, device: str) -> Any:
    """Random weights; the head's are large enough that the distributions are about as peaked as a trained model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model.to(device=device, dtype=dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="capture", help="of the CSV file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_llama(options.hidden, options.layers, getattr(torch, options.dtype), options.device)
    results = []
    for labels, k in ((1.0, 10), (1.0, 50), (0.5, 10)):
        results += measure(model, Tokens(options.rows, 24, 64, labels), k, options)
    write(options.name, results)


def measure(model: Any, data: Tokens, k: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per thing measured."""
    tokens = [data.tokenize(row) for row in data.rows]
    lengths = [int(row.label_positions[-1]) for row in tokens]
    device = torch.device(options.device)
    batches = [padded([tokens[i] for i in batch]) for batch in plan_batches(lengths, options.batch_tokens)]
    batches = [(ids.to(device), mask.to(device)) for ids, mask in batches]
    teacher = Teacher(model, np.arange(TOKENS), Selection(k), batch_tokens=options.batch_tokens)
    folder = Path(tempfile.mkdtemp())

    def forward(part: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for ids, mask in batches:
                    part(input_ids=ids, attention_mask=mask, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    def captured() -> None:
        spec = StoreSpec(model="random", vocabulary=VOCABULARY, top_k=k)
        alone = Processes(0, 1, 1, device)
        shutil.rmtree(folder / "store", ignore_errors=True)
        capture_rows(data.rows, data, lambda: teacher, folder / "store", lambda: spec, quiet=True, processes=alone)

    calls = {"forward": forward(model), "decoder": forward(model.get_decoder()), "capture": captured}
    times: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(options.runs + 1):
        for name, call in calls.items():
            started, busy = time.perf_counter(), time.process_time()
            call()
            if run:  # the first warms up
                times[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - busy)
    size = sum(file.stat().st_size for file in (folder / "store").glob("shard-*.parquet"))
    shutil.rmtree(folder)
    taught = sum(int(row.labels.sum()) for row in tokens)
    bare, busy_forward = statistics.median(times["forward"]), statistics.median(processor["forward"])
    shared = {
        "hidden": options.hidden,
        "layers": options.layers,
        "vocabulary": VOCABULARY,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "rows": len(tokens),
        "tokens": sum(lengths),
        "padded": sum(ids.numel() for ids, _ in batches),
        "labels": taught,
        "k": k,
    }
    found = []
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        row = shared | {
            "measured": name,
            "seconds": round(middle, 3),
            "fastest": round(min(seconds), 3),
            "slowest": round(max(seconds), 3),
            "times_forward": round(middle / bare, 3),
            "cpu_seconds": round(statistics.median(processor[name]), 3),
            "cpu_times_forward": round(statistics.median(processor[name]) / busy_forward, 3),
            "bytes_per_label": round(size / taught, 1) if name == "capture" else "",
        }
        print(row)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
