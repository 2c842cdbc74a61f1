"""The demo's skills: questions with short answers that exact match can score, and held-out text.

Every question has a *key*, and a hash of the key decides whether it may be trained on or is held out. The two sets are
therefore disjoint by construction: whoever generates rows, with whatever seed, no held-out question is ever trained on.

``pick`` has several right answers and its training rows show one of them, drawn at random: what a model can learn from
one row is a sample, what it could learn from another model is the distribution. The other skills have one right answer.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from facts import FACTS, PHRASINGS

HELD_OUT_ONE_IN = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def is_held_out(key: str) -> bool:
    """Whether the question (or document) with this key is kept for evaluation. The same in every run and process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Row:
    """One question. ``answers``: every reply that counts as right; ``answer``: the one that a training row shows."""

    skill: str
    key: str
    prompt: str
    answer: str
    answers: tuple[str, ...]

    def messages(self) -> list[dict[str, str]]:
        """The row as a conversation, for a chat template."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


def exact_match(row: Row, reply: str) -> bool:
    """True when the reply, without surrounding white space, is one of the row's right answers."""
    return reply.strip() in row.answers


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
    return Row("pick", f"pick {low} {high}", f"Pick a number between {low} and {high}.", rng.choice(answers), answers)


SKILLS: dict[str, Callable[[random.Random], Row]] = {
    "add": _add,
    "reverse": _reverse,
    "sort": _sort,
    "facts": _facts,
    "pick": _pick,
}


def training_rows(skill: str, seed: int | str) -> Iterator[Row]:
    """An endless stream of training questions of one skill, none of them held out."""
    rng = random.Random(f"train {skill} {seed}")
    while True:
        row = SKILLS[skill](rng)
        if not is_held_out(row.key):
            yield row


def held_out_rows(skill: str, count: int, seed: int = 0) -> list[Row]:
    """``count`` different held-out questions of one skill (fewer if the skill has fewer), the same in every call."""
    rng = random.Random(f"held out {skill} {seed}")
    rows: dict[str, Row] = {}
    for _ in range(400 * count):
        row = SKILLS[skill](rng)
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
