"""What an alignment teaches and what it loses, counted over a corpus: one small object, with JSON."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from fusekit.alignment.alignment import TokenAlignment
from fusekit.alignment.cases import HAS_ROW, Case, plan_rows
from fusekit.alignment.worth import TeacherWorth
from fusekit.types import IntArray

WORST = 10  # texts kept with the smallest share of positions that get a row
SHAPES = ("1-1", "1-n", "n-1", "m-n")


@dataclass
class Share:
    """Counts over some pivot positions: how many there are, are linked, and get a row."""

    positions: int = 0
    linked: int = 0
    rows: int = 0

    def add(self, positions: int, linked: int, rows: int) -> None:
        """Count more positions."""
        self.positions, self.linked, self.rows = self.positions + positions, self.linked + linked, self.rows + rows

    def to_dict(self) -> dict[str, float]:
        """The counts, and the shares of positions that are linked and that get a row."""
        total = max(self.positions, 1)
        shares = {"linked_share": self.linked / total, "row_share": self.rows / total}
        return {"positions": self.positions, "linked": self.linked, "rows": self.rows, **shares}


@dataclass
class AlignmentQuality:
    """Figures of one pair of tokenizers; :meth:`add` each text.

    Attributes:
        pivot, source: names of the tokenizers.
        texts, pivot_tokens, source_tokens: totals.
        total: over all pivot positions.
        cases: pivot positions by :class:`~fusekit.alignment.cases.Case`, lower-case names.
        shapes: groups between common ends, by shape.
        group_sizes: groups by ``(pivot tokens, source tokens)``.
        scripts, data: shares by the script of the token's first character and by the name given to :meth:`add`.
        worst: ``(row share, text)`` of the texts that lose most.
        worth: what the source's projected rows know, where captured rows were at hand.
    """

    pivot: str
    source: str
    texts: int = 0
    pivot_tokens: int = 0
    source_tokens: int = 0
    total: Share = field(default_factory=Share)
    cases: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    group_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    scripts: dict[str, Share] = field(default_factory=dict)
    data: dict[str, Share] = field(default_factory=dict)
    worst: list[tuple[float, str]] = field(default_factory=list)
    worth: TeacherWorth | None = None

    def add(self, alignment: TokenAlignment, data: str = "", *, cases: IntArray | None = None) -> None:
        """Count one text.

        Args:
            alignment: of method ``span``.
            data: the source of data that the text comes from.
            cases: int64 [n], as :class:`~fusekit.alignment.rows.AlignedRows` has them; planned from the tokens if None.
        """
        cases = plan_rows(alignment).cases if cases is None else cases
        linked, rows = alignment.source_at >= 0, np.isin(cases, list(HAS_ROW))
        self.texts += 1
        self.pivot_tokens += len(cases)
        self.source_tokens += len(alignment.source)
        figures = (len(cases), int(linked.sum()), int(rows.sum()))
        self.total.add(*figures)
        self.data.setdefault(data, Share()).add(*figures)
        counts = np.bincount(cases, minlength=len(Case))
        self.cases.update({case.name.lower(): int(counts[case]) for case in Case if counts[case]})
        self._add_groups(alignment)
        names = np.array(scripts_of(alignment))
        for script in sorted(set(names.tolist())):
            at = names == script
            self.scripts.setdefault(script, Share()).add(int(at.sum()), int(linked[at].sum()), int(rows[at].sum()))
        if len(cases):
            share = figures[2] / max(len(cases) - 1, 1)
            self.worst = sorted([*self.worst, (share, alignment.text)], key=lambda item: item[0])[:WORST]

    def _add_groups(self, alignment: TokenAlignment) -> None:
        sizes = Counter((p.stop - p.start, s.stop - s.start) for p, s in alignment.groups)
        self.group_sizes.update(sizes)
        for (n, m), count in sizes.items():
            shape = SHAPES[0] if n == m == 1 else SHAPES[1] if n == 1 else SHAPES[2] if m == 1 else SHAPES[3]
            self.shapes[shape] += count

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "pivot": self.pivot,
            "source": self.source,
            "texts": self.texts,
            "pivot_tokens": self.pivot_tokens,
            "source_tokens": self.source_tokens,
            **self.total.to_dict(),
            "cases": {case.name.lower(): self.cases[case.name.lower()] for case in Case},
            "groups": {shape: self.shapes[shape] for shape in SHAPES},
            "group_sizes": {f"{n}-{m}": count for (n, m), count in sorted(self.group_sizes.items())},
            "scripts": {name: share.to_dict() for name, share in sorted(self.scripts.items())},
            "data": {name: share.to_dict() for name, share in sorted(self.data.items())},
            "worst": [{"row_share": share, "text": text} for share, text in self.worst],
            **({"worth": self.worth.to_dict()} if self.worth is not None else {}),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2)


@cache
def script_of(character: str) -> str:
    """A coarse script name: the first word of a letter's Unicode name, else digits, space, emoji, punctuation."""
    category = unicodedata.category(character)
    if "\ufe00" <= character <= "\ufe0f":  # variation selectors, which choose the emoji form
        return "emoji"
    if category[0] in "LM":
        return unicodedata.name(character, "other").split()[0].lower()
    if category[0] == "N":
        return "digits"
    if character.isspace() or category[0] == "Z":
        return "space"
    return "emoji" if category in ("So", "Sk", "Cf") else "control" if category[0] == "C" else "punctuation"


def scripts_of(alignment: TokenAlignment) -> list[str]:
    """The script of each pivot token: of the first character that it touches and that is no space, if there is one."""
    data = alignment.text.encode()
    names = []
    start = 0
    for end in alignment.pivot_ends.tolist():
        begin = start
        while begin > 0 and begin < len(data) and data[begin] & 0xC0 == 0x80:  # back to the character's first byte
            begin -= 1
        piece = data[begin : max(end, begin + 1)].decode(errors="ignore")
        if not piece:  # within one character
            piece = data[begin : begin + 4].decode(errors="ignore")
        names.append(script_of((piece.strip() or piece or " ")[0]))
        start = end
    return names
