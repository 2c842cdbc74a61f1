"""Natural text as questions: the body of a function of the standard library, given its first line. Licence: PSF."""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
from pathlib import Path

from questions import Row

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "pydoc_data",
    "turtledemo",
}
SHORTEST, LONGEST = 40, 160  # characters of an answer
LONGEST_SIGNATURE = 80


def _as_question(function: ast.FunctionDef) -> tuple[str, str] | None:
    """The first line of a function and the first lines of its body without the docstring; None if they do not fit."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    signature = f"def {function.name}({ast.unparse(function.args)}):"
    body = ""
    for line in (line for statement in statements for line in ast.unparse(statement).split("\n")):
        longer = f"{body}\n{line}" if body else line
        if len(longer) > LONGEST:
            break
        body = longer
    fits = len(body) >= SHORTEST and len(signature) <= LONGEST_SIGNATURE and body == body.strip()
    return (signature, body) if fits else None


@functools.cache
def functions() -> tuple[tuple[str, str], ...]:
    """(signature, beginning of the body) of the standard library's functions, in a fixed order, without duplicates.

    Written by ``ast.unparse``: no comments, no docstrings (which are the documents of ``tasks``), one layout.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            question = _as_question(node) if isinstance(node, ast.FunctionDef) else None
            if question is not None:
                found.setdefault(question[1], question)  # one body is one question, however many functions share it
    return tuple(found.values())


def code(rng: random.Random) -> Row:
    """A function of the standard library. The key is its body, so a body is on one side only."""
    signature, body = rng.choice(functions())
    return Row("code", f"code {body}", signature, body, (body,))
