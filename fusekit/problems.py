"""Problems of a recipe, collected with their lines and reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fusekit.errors import FusekitError, RecipeError
from fusekit.safe_yaml import Document, KeyPath


def nearest(word: str, known: Iterable[str]) -> str:
    """``: did you mean 'models'?`` when a known name is near, else the list of the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(names)}" if names else "; nothing is accepted here"


@dataclass
class Problems:
    """Collects what is wrong with one document; ``raise_if_any`` reports all of it in the order of the lines."""

    document: Document
    found: list[tuple[int, str, KeyPath]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, path: KeyPath, message: str) -> None:
        entry = (self.document.line(path), message, path)
        if entry not in self.found:
            self.found.append(entry)

    def near(self, path: KeyPath) -> bool:
        """Whether something was already reported at ``path``, below it, or at a key that encloses it."""
        return any(path[: len(known)] == known[: len(path)] for _, _, known in self.found if known)

    def warn(self, path: KeyPath, message: str) -> None:
        text = f"{self.document.name}, line {self.document.line(path)}: {message}"
        if text not in self.warnings:
            self.warnings.append(text)

    def raise_if_any(self, kind: type[FusekitError] = RecipeError) -> None:
        """Raise one error with every problem and its line; return if there is none."""
        if not self.found:
            return
        rows = [f"line {line}: {message}" for line, message, _ in sorted(self.found, key=lambda entry: entry[:2])]
        if len(rows) == 1:
            raise kind(f"{self.document.name}, {rows[0]}")
        raise kind(f"{self.document.name}: {len(rows)} problems\n" + "\n".join(f"  {row}" for row in rows))


def reasons(error: ValidationError) -> list[str]:
    """What a pydantic error says, one line each, without its links and input dumps."""
    return [" ".join(str(detail["msg"]).split()) for detail in error.errors(include_url=False, include_context=False)]


def by_place(error: ValidationError, data: Any) -> dict[KeyPath, list[str]]:
    """Messages of a pydantic error by the path in the recipe: the names of union members are not part of it."""
    places: dict[KeyPath, list[str]] = {}
    for detail in error.errors(include_url=False, include_context=False):
        value: Any = data
        path: KeyPath = ()
        missing = detail["type"] == "missing"
        parts: Sequence[int | str] = detail["loc"][:-1] if missing else detail["loc"]
        for part in parts:
            if isinstance(value, Mapping) and part in value:
                value, path = value[part], (*path, str(part))
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value, path = value[part], (*path, part)
        message = f"`{detail['loc'][-1]}` is missing" if missing else " ".join(str(detail["msg"]).split())
        if message not in places.setdefault(path, []):
            places[path].append(message)
    return places
