"""Memory estimates against the peak that a process really takes: trainings and captures of a model, on the CPU.

    python -m benchmarks.memory MODEL --work /tmp/bench            # a folder; adds to results/memory.csv

Every case is a process of its own, whose peak is that of the kernel (``VmHWM``); ``before`` is what it had taken before
the model. The rows are Python's standard library as plain text, each cut at exactly so many tokens. A training takes
two optimizer steps of two batches each and publishes its result; a capture takes two batches.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, add, parser_of, resident

BATCHES = 4
"""Of a training, two to an optimizer step, so that gradients are added up; a capture takes half of them."""

TRAININGS: list[dict[str, Any]] = [
    {"per_device_train_batch_size": 1},
    {"per_device_train_batch_size": 4},
    {"per_device_train_batch_size": 4, "activation_checkpointing": True},
    {"per_device_train_batch_size": 4, "bf16": True},
    {"per_device_train_batch_size": 4, "dtype": "bfloat16"},
]
CAPTURES: list[dict[str, Any]] = [
    {"batch_tokens": 2048},
    {"batch_tokens": 16384},
    {"batch_tokens": 2048, "dtype": "float32"},
]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the cases make; it is removed")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--only", choices=["train", "capture"])
    parser.add_argument("--cases", type=int, help="only so many of each")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_case(options.model, options.tokens, options.work, **json.loads(options.case))))
        return
    found = []
    for what, cases in (("train", TRAININGS), ("capture", CAPTURES)):
        for fields in cases[: options.cases] if options.only in (None, what) else []:
            shutil.rmtree(options.work, ignore_errors=True)
            case = {"what": what, "fields": fields}
            command = [sys.executable, "-m", __spec__.name if __spec__ else "benchmarks.memory", options.model]
            command += ["--work", str(options.work), "--tokens", str(options.tokens), "--case", json.dumps(case)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{case}: {done.stderr[-2000:]}")
            measured = json.loads(done.stdout.splitlines()[-1])
            found.append(_line(Path(options.model).name, options.tokens, what, fields, measured))
            print(found[-1], flush=True)
    shutil.rmtree(options.work, ignore_errors=True)
    add(RESULTS / "memory.csv", found, "model", "what", "settings", "row_tokens")


def _line(model: str, tokens: int, what: str, fields: dict[str, Any], measured: dict[str, int]) -> dict[str, Any]:
    peak, said = measured["peak"], measured["estimate"]
    return {
        "model": model,
        "what": what,
        "settings": " ".join(f"{name}={value}" for name, value in fields.items()),
        "row_tokens": tokens,
        "before_GB": round(measured["before"] / 1e9, 2),
        "peak_GB": round(peak / 1e9, 2),
        "estimate_GB": round(said / 1e9, 2),
        "estimate_of_peak": round(said / peak, 3),
    }


def _case(model: str, tokens: int, work: Path, what: str, fields: dict[str, Any]) -> dict[str, int]:
    """Runs in a process of its own. peak: of it. before: once all is imported. estimate: what fusekit says."""
    import logging

    import torch

    from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer
    from fusekit.data.tokenize import RowTokenizer
    from fusekit.devices import Processes

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    choice = ModelChoice(model, dtype=fields.pop("dtype", "auto") if what == "capture" else "auto")
    checkpoint = find_checkpoint(choice)
    reader = RowTokenizer(load_tokenizer(checkpoint))
    alone = Processes(0, 1, 1, torch.device("cpu"))
    if what == "train":
        return _train(
            checkpoint, reader, _rows(reader, tokens, BATCHES * fields["per_device_train_batch_size"]), work, fields
        )
    from fusekit.capturing.capture import Capture
    from fusekit.capturing.teacher import memory_needs
    from fusekit.settings import CaptureSettings

    size = fields["batch_tokens"]
    rows = _rows(reader, tokens, BATCHES // 2 * (size // tokens))
    before = resident("VmHWM")
    settings = CaptureSettings(batch_tokens=size)
    said = memory_needs(checkpoint, settings, alone)[0].needed
    Capture(checkpoint, reader, rows, work, settings).run(alone)
    return {"before": before, "peak": resident("VmHWM"), "estimate": said}


def _train(checkpoint: Any, reader: Any, rows: list[Any], work: Path, fields: dict[str, Any]) -> dict[str, int]:
    from fusekit.devices import Processes
    from fusekit.distillation import arguments as estimate
    from fusekit.distillation.inputs import Inputs
    from fusekit.distillation.run import distill
    from fusekit.distillation.settings import DistillSettings

    trainer = {"save_strategy": "no", "disable_tqdm": True}
    changes = {
        "training": {
            "batch_size": 2 * fields["per_device_train_batch_size"],
            "num_train_epochs": 1,
            **trainer,
            **fields,
        }
    }
    settings = DistillSettings.of("sft", changes)
    before = resident("VmHWM")
    longest = max(len(reader.tokenize(row)) for row in rows)
    said = estimate.memory_needs(checkpoint, settings.training, longest, Processes.current())[0].needed
    distill(
        Inputs(checkpoint.choice, rows, row_tokenizer=reader),
        settings,
        work,
        say=lambda line: print(f"{resident('VmHWM') / 1e9:.2f} GB: {line}", file=sys.stderr, flush=True),
    )
    return {"before": before, "peak": resident("VmHWM"), "estimate": said}


def _rows(reader: Any, tokens: int, count: int) -> list[Any]:
    from fusekit.data.prepare import prepare
    from fusekit.types import TEXT, Message, Row

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)[: 12 * tokens * count]
    size = 12 * tokens  # far more characters than any tokenizer takes for so many tokens
    rows = [Row((Message(TEXT, text[i * size : (i + 1) * size]),)) for i in range(count)]
    return prepare(rows, [reader], tokens).rows


if __name__ == "__main__":
    main()
