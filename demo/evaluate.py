"""Score models on the demo's held-out questions and text, and print one table.

    python demo/evaluate.py MODEL_DIR [MODEL_DIR ...]
    python demo/evaluate.py demo/models/* --json scores.json

Greedy decoding in float32, so that the figures do not depend on anything but the weights. Any causal language model
whose tokenizer has a chat template can be scored; its own template and tokenizer are used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import tasks
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = 200  # held-out questions per skill
BATCH = 100
LONGEST_REPLY = 24  # tokens
DOCUMENTS = 200  # held-out documents for bits per byte
CHARACTERS = 400  # of each document

Scores = dict[str, float]
"""Exact match (0 to 1) by skill, their mean as ``average``, and ``bits_per_byte`` on held-out text."""


def load(folder: str | Path) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer, from local files only."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The model's greedy reply to each prompt, special tokens removed."""
    written: list[str] = []
    for first in range(0, len(prompts), BATCH):
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts[first : first + BATCH]]
        batch = tokenizer.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_dict=True,
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        output = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=LONGEST_REPLY)
        written += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return written


def accuracy(model: Any, tokenizer: Any, skill: str, count: int = QUESTIONS) -> float:
    """The share of held-out questions of a skill whose reply is an exact match."""
    rows = tasks.held_out_rows(skill, count)
    answers = replies(model, tokenizer, [row.prompt for row in rows])
    return sum(map(tasks.exact_match, rows, answers)) / len(rows)


@torch.inference_mode()
def bits_per_byte(model: Any, tokenizer: Any, count: int = DOCUMENTS) -> float:
    """How many bits the model needs per byte of UTF-8 for the beginnings of ``count`` held-out documents."""
    nats, size = 0.0, 0
    for document in tasks.documents(held_out=True)[:count]:
        start = document[:CHARACTERS]
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(start, add_special_tokens=False).input_ids]])
        log_probabilities = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        nats -= log_probabilities.gather(1, ids[0, 1:, None]).sum().item()
        size += len(start.encode())
    return nats / math.log(2) / size


def evaluate(folder: str | Path, count: int = QUESTIONS) -> Scores:
    """Every score of the model in a folder."""
    model, tokenizer = load(folder)
    scores = {skill: accuracy(model, tokenizer, skill, count) for skill in tasks.SKILLS}
    scores["average"] = sum(scores.values()) / len(scores)
    scores["bits_per_byte"] = bits_per_byte(model, tokenizer)
    return scores


def markdown(results: dict[str, Scores]) -> str:
    """Results by model as a table, a row per model: exact match in per cent, then bits per byte."""
    header = ["model", *tasks.SKILLS, "average", "bits per byte"]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for name, scores in results.items():
        cells = [f"{100 * scores[column]:.1f}" for column in [*tasks.SKILLS, "average"]]
        lines.append(f"| {' | '.join([name, *cells, format(scores['bits_per_byte'], '.3f')])} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write scores here.")
@click.option("--count", default=QUESTIONS, show_default=True, help="Held-out questions per skill.")
def main(folders: tuple[Path, ...], json_file: Path | None, count: int) -> None:
    torch.use_deterministic_algorithms(True)
    results = {str(folder): evaluate(folder, count) for folder in folders}
    click.echo(markdown(results))
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
