"""The study's rows: the demo's generators and noise, more rows and more held-out questions."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[2] / "demo"
MOST = 400
"""Rows of a skill: `weather` has 480 questions, of which an eighth is held out."""


def demo(name: str) -> Any:
    """A script of ``demo/``. They find each other in their own folder."""
    if str(DEMO) not in sys.path:
        sys.path.insert(0, str(DEMO))
    return importlib.import_module(name)


def training_set(count: int) -> list[dict[str, Any]]:
    """``count`` rows of every skill of ``demo/rows.py`` with its share of wrong answers, in a random order.

    The first questions of a skill are the demo's.
    """
    made = demo("rows")
    rng = random.Random(f"study {count}")
    found = [
        {"skill": skill, "noisy": noisy, "messages": row.messages()}
        for skill in made.SKILLS
        for row, noisy in made.with_noise(made.different_questions(skill, count, 0), made.NOISE.get(skill, 0.0), rng)
    ]
    rng.shuffle(found)
    return found


def held_out_set(skill: str, count: int) -> list[dict[str, Any]]:
    """``count`` held-out questions of a skill, or all there are; none can be in a training set."""
    return [{"skill": skill, "messages": row.messages()} for row in demo("tasks").held_out_rows(skill, count)]


def write_all(folder: Path, count: int, questions: int) -> None:
    """``train.jsonl`` and ``held-out/SKILL.jsonl`` in a folder, if they are not there."""
    made = demo("rows")
    if not (folder / "train.jsonl").exists():
        for skill in made.SKILLS:
            made.write(folder / "held-out" / f"{skill}.jsonl", held_out_set(skill, questions))
        made.write(folder / "train.jsonl", training_set(count))
