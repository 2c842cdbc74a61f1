"""Rows of data met with what each model said about them: by the hash of their content, never by their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fusekit.errors import DistillationError
from fusekit.types import CapturedRow, Row

SHOWN = 5  # keys in a message


class Captures(Protocol):
    """What a model said about rows, by their keys: a :class:`fusekit.capturing.store.Store`, or a dict.

    ``keys`` may be an attribute or a method.
    """

    @property
    def keys(self) -> Any: ...

    def __contains__(self, key: str, /) -> bool: ...

    def get(self, key: str, /) -> CapturedRow | None:
        """The row of a key that it contains."""


@dataclass(frozen=True)
class Match:
    """How the rows of one model met the rows of data.

    Attributes:
        matched: how many keys both have.
        missing: keys of rows of data that the model has nothing about, in the data's order.
        surplus: keys that the model has and the data has not, sorted.
        duplicates: keys that the model has more than once, sorted; each counts once.
    """

    matched: int
    missing: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.matched} rows matched"]
        for name in ("missing", "surplus", "duplicates"):
            keys = getattr(self, name)
            if keys:
                parts.append(f"{len(keys)} {name} ({_first(keys)})")
        return ", ".join(parts)


def _first(keys: Sequence[str]) -> str:
    return ", ".join([*keys[:SHOWN], *(["..."] if len(keys) > SHOWN else [])])


@dataclass(frozen=True)
class Joined:
    """The rows to train on, and how each model matched them.

    Attributes:
        rows: in the data's order, each key once.
        duplicates: keys that the data has more than once, in order of their second appearance.
        matches: by model.
    """

    rows: tuple[Row, ...]
    duplicates: tuple[str, ...] = ()
    matches: dict[str, Match] = field(default_factory=dict)

    def report(self) -> list[str]:
        """One line for the data and one for each model."""
        lines = [f"{len(self.rows)} rows of data"]
        if self.duplicates:
            lines[0] += f", {len(self.duplicates)} of them given more than once ({_first(self.duplicates)})"
        return lines + [f"{name}: {match}" for name, match in self.matches.items()]


def join(rows: Iterable[Row], models: Mapping[str, Captures]) -> Joined:
    """Match rows of data with the captured rows of models.

    Args:
        rows: the data; of equal rows the first is kept.
        models: name to captured rows.

    Raises:
        DistillationError: there are no rows, or a model has none of them.
    """
    by_key: dict[str, Row] = {}
    copies: dict[str, None] = {}
    for row in rows:
        if row.key in by_key:
            copies[row.key] = None
        else:
            by_key[row.key] = row
    if not by_key:
        raise DistillationError("there are no rows of data to train on")
    matches = {name: _match(by_key, keys_of(captures)) for name, captures in models.items()}
    for name, match in matches.items():
        if not match.matched:
            raise DistillationError(
                f"{name} has none of the {len(by_key)} rows of data: it was captured from other data. The data begin "
                f"with {next(iter(by_key))}, {name} with {', '.join(match.surplus[:1]) or 'nothing'}; capture it from "
                "the same rows, read and cut the same way"
            )
    return Joined(tuple(by_key.values()), tuple(copies), matches)


def keys_of(captures: Captures) -> list[str]:
    """The keys, in the order of the rows."""
    keys = captures.keys
    return list(keys() if callable(keys) else keys)


def _match(by_key: Mapping[str, Row], keys: Sequence[str]) -> Match:
    held: set[str] = set()
    twice: set[str] = set()
    for key in keys:
        (twice if key in held else held).add(key)
    missing = tuple(key for key in by_key if key not in held)
    surplus = tuple(sorted(held - by_key.keys()))
    return Match(len(by_key) - len(missing), missing, surplus, tuple(sorted(twice)))
