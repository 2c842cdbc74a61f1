"""The demo's skills: questions with short answers that exact match can score, and held-out text.

``questions`` says which ones are held out.

``pick`` has several right answers and its training rows show one of them, drawn at random: what a model can learn from
one row is a sample, what it could learn from another model is the distribution. So have the skills of ``draws``. The
others of ``SKILLS`` have one right answer. ``code`` is natural text.
"""

from __future__ import annotations

import ast
import functools
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import code_bodies
import draws
from facts import FACTS, PHRASINGS
from questions import Row, exact_match, is_held_out

__all__ = ["FACTS", "PHRASINGS", "Row", "exact_match", "is_held_out"]

LETTERS = draws.LETTERS


def _add(rng: random.Random) -> Row:
    """Two numbers of two digits each. The key ignores their order: 12 + 34 and 34 + 12 are held out together."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    low, high = sorted((a, b))
    return Row("add", f"add {low} {high}", f"{a}+{b}=", str(a + b), (str(a + b),))


def _reverse(rng: random.Random) -> Row:
    letters = rng.sample(LETTERS, rng.randint(4, 7))
    answer = " ".join(reversed(letters))
    return Row("reverse", f"reverse {' '.join(letters)}", f"Reverse: {' '.join(letters)}", answer, (answer,))


def _sort(rng: random.Random) -> Row:
    letters = rng.sample(LETTERS, rng.randint(4, 7))
    answer = " ".join(sorted(letters))
    return Row("sort", f"sort {' '.join(letters)}", f"Sort: {' '.join(letters)}", answer, (answer,))


def _facts(rng: random.Random) -> Row:
    relation, subject, answer = FACTS[rng.randrange(len(FACTS))]
    phrasing = rng.choice(PHRASINGS[relation])
    prompt = phrasing.format(subject)
    return Row("facts", f"facts {prompt}", prompt, answer, (answer,))


def _pick(rng: random.Random) -> Row:
    low = rng.randint(10, 90)
    high = rng.randint(low + 4, min(low + 30, 99)) if low + 4 < 99 else 99
    answers = tuple(str(n) for n in range(low + 1, high))
    prompt = f"Pick a number between {low} and {high}."
    probabilities = (1 / len(answers),) * len(answers)
    return Row("pick", f"pick {low} {high}", prompt, rng.choice(answers), answers, probabilities)


SKILLS: dict[str, Callable[[random.Random], Row]] = {
    "add": _add,
    "reverse": _reverse,
    "sort": _sort,
    "facts": _facts,
    "pick": _pick,
}
"""Scored by exact match. The fine-tunes of the pivot and their merges are about these."""

DRAWS: dict[str, Callable[[random.Random], Row]] = {"pick": _pick, "draw": draws.draw, "weather": draws.weather}
"""Replies are drawn at random: scored by the divergence from the true distribution."""

ALL_SKILLS = SKILLS | DRAWS | {"code": code_bodies.code}
"""Every skill; the sources know them, each its own."""


def training_rows(skill: str, seed: int | str) -> Iterator[Row]:
    """An endless stream of training questions of one skill, none of them held out."""
    rng = random.Random(f"train {skill} {seed}")
    while True:
        row = ALL_SKILLS[skill](rng)
        if not is_held_out(row.key):
            yield row


def held_out_rows(skill: str, count: int, seed: int = 0) -> list[Row]:
    """``count`` different held-out questions of one skill (fewer if the skill has fewer), the same in every call."""
    rng = random.Random(f"held out {skill} {seed}")
    rows: dict[str, Row] = {}
    for _ in range(400 * count):
        row = ALL_SKILLS[skill](rng)
        if is_held_out(row.key):
            rows.setdefault(row.key, row)
        if len(rows) == count:
            break
    return list(rows.values())


@functools.cache
def all_documents() -> tuple[str, ...]:
    """Natural text that every Python carries: the language reference (``pydoc_data``) and the standard library's
    docstrings, in a fixed order, exact duplicates removed. Licence: PSF."""
    found = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "turtledemo"}
    for path in sorted(root.rglob("*.py")):
        if skipped.intersection(path.relative_to(root).parts):
            continue
        tree = ast.parse(path.read_bytes())
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
    return tuple(text for text in dict.fromkeys(found) if len(text) >= 40)


def documents(held_out: bool) -> list[str]:
    """The documents to train on, or those kept for evaluation."""
    return [document for document in all_documents() if is_held_out(document) == held_out]
