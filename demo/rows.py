"""Write the rows that a distillation learns from, and the held-out questions, as JSON lines.

    python demo/rows.py                       # demo/rows/train.jsonl and demo/rows/held-out/SKILL.jsonl

A row is a conversation (``messages``) with the name of its skill, as ``dataset`` in the training rows, so that reports
count by it. In the skills of ``NOISE`` the stated share of the
training rows has a wrong answer (``noisy``: true); held-out rows are all right. No question is in a file twice, and no
held-out question is in the training file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import tasks

ROWS = Path(__file__).parent / "rows"
SKILLS = ("weather", "facts", "draw", "add", "pick", "code", "reverse")
TRAINING = 128  # rows per skill
HELD_OUT = 100
NOISE = {"facts": 0.3, "add": 0.3, "reverse": 0.3}
"""Share of training rows whose answer is that of another question of the skill, and wrong."""


def different_questions(skill: str, count: int, seed: int) -> list[tasks.Row]:
    """``count`` training rows of a skill, no question twice."""
    stream = tasks.training_rows(skill, f"distillation {seed}")
    rows: dict[str, tasks.Row] = {}
    while len(rows) < count:
        row = next(stream)
        rows.setdefault(row.prompt, row)
    return list(rows.values())


def with_noise(rows: list[tasks.Row], share: float, rng: random.Random) -> list[tuple[tasks.Row, bool]]:
    """The rows, exactly ``share`` of them (rounded) with another row's answer, and whether each is such a one."""
    wrong = set(rng.sample(range(len(rows)), round(share * len(rows))))
    answers = [row.answer for row in rows]
    noisy = []
    for number, row in enumerate(rows):
        if number in wrong:
            others = [answer for answer in answers if answer not in row.answers]
            row = replace(row, answer=rng.choice(others))  # noqa: PLW2901  (the row with its wrong answer)
        noisy.append((row, number in wrong))
    return noisy


def training_set(seed: int = 0) -> list[dict[str, Any]]:
    """The rows to distil on, of all skills, in a random order: ``dataset`` (the skill), ``noisy``, ``messages``."""
    rng = random.Random(f"noise {seed}")
    found = [
        {"dataset": skill, "noisy": noisy, "messages": row.messages()}
        for skill in SKILLS
        for row, noisy in with_noise(different_questions(skill, TRAINING, seed), NOISE.get(skill, 0.0), rng)
    ]
    rng.shuffle(found)
    return found


def held_out_set(skill: str) -> list[dict[str, Any]]:
    """Held-out questions of a skill with every right answer: ``skill``, ``messages``, ``answers``."""
    rows = tasks.held_out_rows(skill, HELD_OUT)
    return [{"skill": skill, "messages": row.messages(), "answers": list(row.answers)} for row in rows]


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


@click.command(help=__doc__)
@click.option("--out", default=ROWS, show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(out: Path, seed: int) -> None:
    write(out / "train.jsonl", training_set(seed))
    for skill in SKILLS:
        write(out / "held-out" / f"{skill}.jsonl", held_out_set(skill))


if __name__ == "__main__":
    main()
