"""Tokens per second of each mode of generation, against the models' own decoding.

    python -m benchmarks.generation MODEL MODEL... [--tokens 64] [--runs 3]      # adds to results/generation.csv

``own_s`` is what the models' own decoding of the same answers takes: of each, the seconds per token of transformers'
greedy ``generate`` times the tokens of the answers in its tokenizer, summed; ``times_own`` is the mode's time over it.
``generate`` and the modes run in turn, in one process, after a first run that is not counted; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch

from benchmarks.measure import RESULTS, add, parser_of

PROMPTS = [
    "Explain in a few paragraphs how a bicycle stays upright, and why.",
    "Write a short story about a lighthouse keeper who finds a letter.",
]
MODES: dict[str, dict[str, Any]] = {
    "safe": {"mode": "safe"},
    "safe, threshold 1": {"mode": "safe", "threshold": 1.0},
    "unite": {"mode": "unite"},
    "cool, shortest": {"mode": "cool"},
    "cool, aligned": {"mode": "cool", "segment": "aligned"},
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompt", action="append", help="in place of the usual ones; may be given several times")
    parser.add_argument("--raw", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)

    from fusekit.capturing.models import ModelChoice
    from fusekit.generation import generate
    from fusekit.generation.reader import load_readers

    readers = load_readers([ModelChoice(model, dtype="float32") for model in options.models])
    prompts = options.prompt or PROMPTS
    own: list[list[float]] = []  # per run, seconds per token of each model
    taken: dict[str, list[float]] = {name: [] for name in MODES}
    answers: dict[str, list[Any]] = {}
    for _ in range(options.runs + 1):
        own.append([_own(reader, prompts, options) for reader in readers])
        for name, fields in MODES.items():
            start = time.perf_counter()
            answers[name] = generate(readers, prompts, max_new_tokens=options.tokens, raw=options.raw, **fields)
            taken[name].append(time.perf_counter() - start)
    each = [statistics.median(found) for found in list(zip(*own[1:], strict=True))]
    lines = []
    for name, found in taken.items():
        counts = [sum(len(r.tokens(a.text.encode())[0]) for a in answers[name]) for r in readers]
        alone = sum(one * count for one, count in zip(each, counts, strict=True))
        middle = statistics.median(found[1:])
        lines.append(
            {
                "models": " ".join(reader.name for reader in readers),
                "mode": name,
                "answer_tokens": counts[0],
                "tokens_per_s": round(counts[0] / middle, 2),
                "seconds": round(middle, 3),
                "lowest": round(min(found[1:]), 3),
                "highest": round(max(found[1:]), 3),
                "own_s": round(alone, 3),
                "times_own": round(middle / alone, 2),
                "machine": f"{os.cpu_count()} cores, one thread, float32",
            }
        )
        print(lines[-1], flush=True)
    add(RESULTS / "generation.csv", lines, "models")


@torch.inference_mode()
def _own(reader: Any, prompts: list[str], options: argparse.Namespace) -> float:
    """Seconds per token of a model alone."""
    from fusekit.types import Message

    tokens, taken = 0, 0.0
    for prompt in prompts:
        ids = torch.tensor([reader.prompt([Message("user", prompt)], raw=options.raw).ids])
        mask = torch.ones_like(ids)
        start = time.perf_counter()
        written = reader.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=options.tokens, min_new_tokens=options.tokens // 2
        )
        taken += time.perf_counter() - start
        tokens += written.shape[1] - ids.shape[1]
    return taken / tokens


if __name__ == "__main__":
    main()
