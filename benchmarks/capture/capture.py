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
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import RESULTS, device_name, in_turns, parser_of, write
from fusekit.capturing.capture import capture_rows
from fusekit.capturing.store import StoreSpec
from fusekit.capturing.teacher import Teacher, padded, plan_batches
from fusekit.devices import Processes
from fusekit.settings import Selection
from fusekit.types import TEXT, Message, Part, Row, TokenizedRow

VOCABULARY, TOKENS = 151_936, 151_665


class Tokens:
    """Rows whose tokens are known beforehand. labels: share of the tokens, at the end of each row, that are labels."""

    def __init__(self, known: Iterable[np.ndarray], labels: float = 1.0) -> None:
        self.rows, self.tokens = [], {}
        for number, ids in enumerate(known):
            row, at = Row((Message(TEXT, f"{number}"),)), np.arange(len(ids))
            zeros, part = np.zeros(len(ids), np.int64), np.full(len(ids), Part.CONTENT, np.int64)
            taught = at >= max(1, round(len(ids) * (1 - labels)))
            self.rows.append(row)
            self.tokens[row.key] = TokenizedRow(row.key, ids, zeros, part, at * 4, at * 4, taught)

    def tokenize(self, row: Row) -> TokenizedRow:
        return self.tokens[row.key]


def random_ids(count: int, shortest: int, longest: int) -> Iterator[np.ndarray]:
    """The ids of rows of random lengths."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, TOKENS, int(rng.integers(shortest, longest + 1)))


def forward(part: Any, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The bare forward pass of a model, or of a part of it, over padded batches, which are brought to its device."""
    with torch.inference_mode():
        for ids, mask in batches:
            part(input_ids=ids.to(part.device), attention_mask=mask.to(part.device), use_cache=False)
    if part.device.type == "cuda":
        torch.cuda.synchronize()


def capture(teacher: Teacher, data: Tokens, k: int, folder: Path, device: torch.device) -> None:
    """Capture all rows into a store in the folder, in place of one that is there."""
    shutil.rmtree(folder / "store", ignore_errors=True)
    spec = StoreSpec(model="benchmark", vocabulary=teacher.vocabulary, top_k=k)
    alone = Processes(0, 1, 1, device)
    capture_rows(data.rows, data, lambda: teacher, folder / "store", lambda: spec, quiet=True, processes=alone)


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
    parser = parser_of(__doc__)
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
        results += measure(model, Tokens(random_ids(options.rows, 24, 64), labels), k, options)
    write(RESULTS / f"{options.name}.csv", results)


def measure(model: Any, data: Tokens, k: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per thing measured."""
    tokens = [data.tokenize(row) for row in data.rows]
    lengths = [int(row.label_positions[-1]) for row in tokens]
    device = torch.device(options.device)
    batches = [padded([tokens[i] for i in batch]) for batch in plan_batches(lengths, options.batch_tokens)]
    batches = [(ids.to(device), mask.to(device)) for ids, mask in batches]
    teacher = Teacher(model, np.arange(TOKENS), Selection(k), batch_tokens=options.batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            "forward": partial(forward, model, batches),
            "decoder": partial(forward, model.get_decoder(), batches),
            "capture": partial(capture, teacher, data, k, Path(folder), device),
        }
        times = in_turns(calls, options.runs)
        size = sum(file.stat().st_size for file in Path(folder, "store").glob("shard-*.parquet"))
    taught = sum(int(row.labels.sum()) for row in tokens)
    bare, busy_forward = (statistics.median(seconds) for seconds in times["forward"])
    shared = {
        "hidden": options.hidden,
        "layers": options.layers,
        "vocabulary": VOCABULARY,
        "dtype": options.dtype,
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "rows": len(tokens),
        "tokens": sum(lengths),
        "padded": sum(ids.numel() for ids, _ in batches),
        "labels": taught,
        "k": k,
    }
    found = []
    for name, (wall, cpu) in times.items():
        middle, busy = statistics.median(wall), statistics.median(cpu)
        row = shared | {
            "measured": name,
            "seconds": round(middle, 3),
            "fastest": round(min(wall), 3),
            "slowest": round(max(wall), 3),
            "times_forward": round(middle / bare, 3),
            "cpu_seconds": round(busy, 3),
            "cpu_times_forward": round(busy / busy_forward, 3),
            "bytes_per_label": round(size / taught, 1) if name == "capture" else "",
        }
        print(row)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
