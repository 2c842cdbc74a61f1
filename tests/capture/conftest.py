from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer
from fusekit.data.prepare import prepare
from fusekit.data.reading import read_rows
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes
from fusekit.types import Row

DEMO = Path(__file__).parents[2] / "demo" / "models"
ALONE = Processes(0, 1, 1, torch.device("cpu"))


def write_rows(path: Path, count: int) -> Path:
    """Sums and lists, as the demo models know them: prompts and answers of different lengths."""
    rng = random.Random(5)
    lines = []
    for i in range(count):
        if i % 3:
            a, b = rng.randint(10, 99), rng.randint(10, 99)
            question, answer, dataset = f"{a}+{b}=", str(a + b), "add"
        else:
            letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(4, 7))
            question, answer, dataset = f"Reverse: {' '.join(letters)}", " ".join(reversed(letters)), "reverse"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "dataset": dataset}))
    path.write_text("\n".join(lines) + "\n")
    return path


def demo_rows(folder: Path, count: int = 20) -> tuple[list[Row], RowTokenizer]:
    """Prepared rows, and how the demo model ``numbers`` reads them."""
    tokenizer = RowTokenizer(load_tokenizer(find_checkpoint(ModelChoice(str(DEMO / "numbers")))))
    rows = prepare(read_rows(write_rows(folder / "rows.jsonl", count)), [tokenizer], 512).rows
    return rows, tokenizer


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 20)
