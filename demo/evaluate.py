"""Score models on the demo's held-out questions and text, and print one table.

    python demo/evaluate.py MODEL_DIR [MODEL_DIR ...]
    python demo/evaluate.py demo/models/* --json scores.json

Greedy decoding in float32, so that the figures do not depend on anything but the weights. Any causal language model
whose fast tokenizer has a chat template can be scored; its own template and tokenizer are used. The first table has
exact match and the bits per byte of documents. The second one has divergences where replies are drawn at random, and
the bits per byte of held-out answers, for every skill.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import tasks
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = 200  # held-out questions per skill
BATCH = 100
LONGEST_REPLY = 24  # tokens
DOCUMENTS = 200  # held-out documents for bits per byte
CHARACTERS = 400  # of each document

Scores = dict[str, float]
"""Exact match (0 to 1) by skill, their mean as ``average``, and ``bits_per_byte`` on held-out text; then
``divergence/SKILL`` (bits a question) where replies are drawn at random, ``answer_bits_per_byte/SKILL`` for all."""


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
        # A tokenizer without a beginning-of-sequence token reads a document after the end of another one.
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = torch.tensor([[first, *tokenizer(start, add_special_tokens=False).input_ids]])
        log_probabilities = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        nats -= log_probabilities.gather(1, ids[0, 1:, None]).sum().item()
        size += len(start.encode())
    return nats / math.log(2) / size


def encode_answer(tokenizer: Any, row: tasks.Row) -> tuple[torch.Tensor, torch.Tensor]:
    """A row under the tokenizer's template: ids, int64 [T], and which of them are the answer or end its turn, bool [T].

    A token that holds both white space of the template and the beginning of the answer belongs to the answer.
    """
    text = tokenizer.apply_chat_template(row.messages(), tokenize=False)
    prompt = tokenizer.apply_chat_template(row.messages()[:1], tokenize=False, add_generation_prompt=True)
    stop = text.rindex(row.answer) + len(row.answer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counted = [end > len(prompt) and begin <= stop for begin, end in encoded["offset_mapping"]]
    return torch.tensor(encoded["input_ids"]), torch.tensor(counted)


@torch.inference_mode()
def answer_bits(model: Any, tokenizer: Any, rows: list[tasks.Row]) -> list[float]:
    """How many bits the model needs for each row's ``answer`` and the end of the turn, given the prompt."""
    encoded = [encode_answer(tokenizer, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: len(encoded[number][0]))
    bits = [0.0] * len(rows)
    for first in range(0, len(order), BATCH):
        numbers = order[first : first + BATCH]
        ids = pad_sequence([encoded[number][0] for number in numbers], batch_first=True)
        counted = pad_sequence([encoded[number][1] for number in numbers], batch_first=True)
        # Padded on the right of a causal model: no mask needed, what comes later changes nothing before.
        log_probabilities = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        chosen = log_probabilities.gather(2, ids[:, 1:, None])[..., 0].masked_fill(~counted[:, 1:], 0.0)
        for number, nats in zip(numbers, chosen.double().sum(1).tolist(), strict=True):
            bits[number] = -nats / math.log(2)
    return bits


def answer_bits_per_byte(model: Any, tokenizer: Any, skill: str, count: int = QUESTIONS) -> float:
    """Bits for the held-out answers of a skill, ends of turns included, per byte of UTF-8 of the answers."""
    rows = tasks.held_out_rows(skill, count)
    return sum(answer_bits(model, tokenizer, rows)) / sum(len(row.answer.encode()) for row in rows)


def divergence(model: Any, tokenizer: Any, skill: str, count: int = QUESTIONS) -> float:
    """Mean Kullback-Leibler divergence of the model's replies from the true distribution, in bits a question, >= 0.

    Exact: the model's probability of every right answer is computed. What it gives to wrong ones is missing there.
    """
    rows = tasks.held_out_rows(skill, count)
    answers = [(row, *pair) for row in rows for pair in zip(row.answers, row.probabilities, strict=True) if pair[1]]
    bits = answer_bits(model, tokenizer, [replace(row, answer=answer) for row, answer, _ in answers])
    pairs = zip(answers, bits, strict=True)
    return sum(share * (math.log2(share) + needed) for (_, _, share), needed in pairs) / len(rows)


def evaluate(folder: str | Path, count: int = QUESTIONS) -> Scores:
    """Every score of the model in a folder."""
    model, tokenizer = load(folder)
    scores = {skill: accuracy(model, tokenizer, skill, count) for skill in tasks.SKILLS}
    scores["average"] = sum(scores.values()) / len(scores)
    scores["bits_per_byte"] = bits_per_byte(model, tokenizer)
    for skill in tasks.DRAWS:
        scores[f"divergence/{skill}"] = divergence(model, tokenizer, skill, count)
    for skill in tasks.ALL_SKILLS:
        scores[f"answer_bits_per_byte/{skill}"] = answer_bits_per_byte(model, tokenizer, skill, count)
    return scores


def markdown(results: dict[str, Scores]) -> str:
    """Results by model as a table, a row per model: exact match in per cent, then bits per byte."""
    header = ["model", *tasks.SKILLS, "average", "bits per byte"]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for name, scores in results.items():
        cells = [f"{100 * scores[column]:.1f}" for column in [*tasks.SKILLS, "average"]]
        lines.append(f"| {' | '.join([name, *cells, format(scores['bits_per_byte'], '.3f')])} |")
    return "\n".join(lines)


def markdown_of_distributions(results: dict[str, Scores]) -> str:
    """Divergences (``KL``) and bits per byte of answers (``bpb``) as a table, a row per model; lower is better."""
    columns = {f"KL {skill}": f"divergence/{skill}" for skill in tasks.DRAWS}
    columns |= {f"bpb {skill}": f"answer_bits_per_byte/{skill}" for skill in tasks.ALL_SKILLS}
    lines = [f"| {' | '.join(['model', *columns])} |", f"|---|{'---:|' * len(columns)}"]
    for name, scores in results.items():
        lines.append(f"| {' | '.join([name, *(format(scores[key], '.2f') for key in columns.values())])} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write scores here.")
@click.option("--count", default=QUESTIONS, show_default=True, help="Held-out questions per skill.")
def main(folders: tuple[Path, ...], json_file: Path | None, count: int) -> None:
    torch.use_deterministic_algorithms(True)
    results = {str(folder): evaluate(folder, count) for folder in folders}
    click.echo(f"{markdown(results)}\n\n{markdown_of_distributions(results)}")
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
