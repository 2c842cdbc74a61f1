"""An alignment as people read it: in a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusekit.types import TokenizedText

if TYPE_CHECKING:
    from fusekit.alignment.alignment import TokenAlignment

_VISIBLE = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True)
class Cell:
    """One group: the text that it covers and the pieces of it that each side's tokens consume."""

    text: str
    pivot: list[str]
    source: list[str]


def visible(piece: bytes) -> str:
    """``piece`` with spaces and controls made visible and bytes that are no UTF-8 as ``\\xNN``; ``∅`` if empty."""
    if not piece:
        return "∅"
    return "".join(map(_shown, piece.decode(errors="backslashreplace")))


def _shown(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    category = unicodedata.category(character)
    if category == "Cc":
        return f"\\x{ord(character):02x}"
    # Joiners and other spaces cannot be seen either; variation selectors could only be seen on what is before them.
    hidden = category in ("Cf", "Zs", "Zl", "Zp", "Cn", "Co") or "\ufe00" <= character <= "\ufe0f"
    return f"\\u{ord(character):04x}" if hidden else character


def pieces(tokens: TokenizedText, data: bytes) -> list[bytes]:
    """The bytes of the text that each token consumes."""
    ends = tokens.ends.tolist()
    return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=False)] if ends else []


def cells(alignment: TokenAlignment) -> list[Cell]:
    """The groups of an alignment as text."""
    data = alignment.text.encode()
    pivot, source = pieces(alignment.pivot, data), pieces(alignment.source, data)
    found = []
    for p, s in alignment.groups:
        text = b"".join(pivot[p])
        found.append(Cell(visible(text), [visible(x) for x in pivot[p]], [visible(x) for x in source[s]]))
    return found


def columns(text: str) -> int:
    """Terminal columns that ``text`` takes."""
    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Cf") else 2 if _wide(c) else 1 for c in text
    )


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def side_by_side(found: Iterable[Cell], width: int) -> str:
    """Rows of ``text``, ``pivot`` and ``source``, a column per group, folded at ``width`` terminal columns."""
    names = ("text  ", "pivot ", "source")
    blocks: list[list[str]] = []
    used = width
    for cell in found:
        texts = [cell.text, "·".join(cell.pivot), "·".join(cell.source)]
        size = max(map(columns, texts))
        if used + size + 1 > width or not blocks:
            blocks.append([name + " │" for name in names])
            used = len(names[0]) + 2
        used += size + 1
        for row, text in enumerate(texts):
            blocks[-1][row] += text + " " * (size - columns(text)) + "│"
    return "\n\n".join("\n".join(block) for block in blocks)
