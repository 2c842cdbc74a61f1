"""What an alignment links and loses: figures over a corpus, and aligned texts to be shown."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter

from fusekit.alignment.alignment import TokenAlignment, pieces, visible
from fusekit.alignment.rows import HAS_ROW, Case, plan_rows
from fusekit.alignment.surfaces import Surfaces
from fusekit.types import BoolArray, TokenizedText

WORST = 10
"""How many of the texts that lose most are kept."""


@dataclass
class Share:
    """Counts over some pivot positions: how many there are, are linked, and get a row."""

    positions: int
    linked: int
    rows: int

    def add(self, linked: BoolArray, rows: BoolArray) -> None:
        """Count more positions."""
        self.positions += len(linked)
        self.linked += int(linked.sum())
        self.rows += int(rows.sum())

    @property
    def linked_share(self) -> float:
        """The share of the positions that are linked."""
        return self.linked / max(self.positions, 1)

    @property
    def row_share(self) -> float:
        """The share of the positions that get a row."""
        return self.rows / max(self.positions, 1)

    def to_dict(self) -> dict[str, float]:
        """The counts and the shares."""
        return {**vars(self), "linked_share": self.linked_share, "row_share": self.row_share}


@dataclass(frozen=True, order=True)
class Worst:
    """A text that loses much, and the share of its positions that get a row."""

    row_share: float
    text: str


@dataclass
class AlignmentQuality:
    """Figures of one pair of tokenizers; :meth:`add` each text.

    Attributes:
        pivot, source: names of the tokenizers.
        texts, pivot_tokens, source_tokens: totals.
        cases: pivot positions by :class:`~fusekit.alignment.rows.Case`, lower-case names.
        groups: groups between common ends by shape: ``1-1``, ``1-n``, ``n-1``, ``m-n``.
        scripts, data: shares by the script of the token's first character, and by the name given to :meth:`add`.
        worst: the texts that lose most.
    """

    pivot: str
    source: str
    texts: int = 0
    pivot_tokens: int = 0
    source_tokens: int = 0
    cases: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    scripts: dict[str, Share] = field(default_factory=dict)
    data: dict[str, Share] = field(default_factory=dict)
    worst: list[Worst] = field(default_factory=list)

    @property
    def total(self) -> Share:
        """Over all pivot positions."""
        of = self.scripts.values()
        return Share(sum(s.positions for s in of), sum(s.linked for s in of), sum(s.rows for s in of))

    def add(self, alignment: TokenAlignment, data: str = "") -> None:
        """Count one text, aligned by the method ``span``. data: the source of data that it comes from."""
        cases = plan_rows(alignment).cases
        linked, rows = alignment.source_at >= 0, np.isin(cases, list(HAS_ROW))
        self.texts += 1
        self.pivot_tokens += len(cases)
        self.source_tokens += len(alignment.source)
        self.data.setdefault(data, Share(0, 0, 0)).add(linked, rows)
        taught = Worst(int(rows.sum()) / max(len(cases) - 1, 1), alignment.text)
        self.worst = sorted([*self.worst, taught])[:WORST]
        self.cases.update(Case(case).name.lower() for case in cases.tolist())
        for p, s in alignment.groups:
            n, m = p.stop - p.start, s.stop - s.start
            self.groups["1-1" if n == m == 1 else "1-n" if n == 1 else "n-1" if m == 1 else "m-n"] += 1
        names = np.array(_scripts(alignment))
        for script in sorted(set(names.tolist())):
            self.scripts.setdefault(script, Share(0, 0, 0)).add(linked[names == script], rows[names == script])

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
            "groups": dict(self.groups.most_common()),
            "scripts": {name: share.to_dict() for name, share in sorted(self.scripts.items())},
            "data": {name: share.to_dict() for name, share in sorted(self.data.items())},
            "worst": [vars(worst) for worst in self.worst],
        }


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


def _scripts(alignment: TokenAlignment) -> list[str]:
    """The script of each pivot token: of the first character that it touches and that is not a space, if any."""
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


MEANING = {
    "same": "linked; both predict the same bytes next",
    "longer": "linked; the source's next token is longer, the pivot's next token is its first piece",
    "closes": "linked; several source tokens spell the pivot's next token",
    "crosses": "linked; the pivot's next token ends inside a source token",
    "no_row": "linked, but the next tokens cannot be compared",
    "within_same": "inside a source token, whose row is conditioned on the bytes read; then the same bytes",
    "within_longer": "inside a source token, conditioned; the rest is longer",
    "within_closes": "inside a source token, conditioned; several tokens spell the label",
    "within_crosses": "inside a source token, conditioned; the label ends inside another",
    "unlinked": "not linked, and no row",
    "last": "end of the text: nothing to predict",
    "one_hot": "a one-hot on the label",
    "rule": "a row by one of the papers' rules",
}
LOST = ("no_row", "unlinked")


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Token(_Value):
    """A token as it is shown. shown: its text, made visible. size: its bytes. about: id, end, what it is taught.

    inner: it ends where the other side has no end. lost: nothing is taught there.
    """

    shown: str
    size: int
    about: str
    inner: bool = False
    lost: bool = False


class Group(_Value):
    """The tokens of both sides between two links. read: the text that they cover."""

    read: str
    pivot: list[Token]
    source: list[Token]


class Sample(_Value):
    """A text under both tokenisations, as plain values that outlive the tokenizers. left_out: how many groups more."""

    groups: list[Group]
    left_out: int = 0


def sample_of(alignment: TokenAlignment, surfaces: tuple[Surfaces, Surfaces], most: int | None = None) -> Sample:
    """What is shown of an alignment of method ``span``: at most so many groups.

    surfaces: of the pivot and of the source, for token strings.
    """
    cases = [Case(case).name.lower() for case in plan_rows(alignment).cases.tolist()]
    linked = set(alignment.source_at.tolist())
    pivot = _tokens(alignment, alignment.pivot, surfaces[0], (alignment.source_at < 0).tolist(), cases)
    source = _tokens(alignment, alignment.source, surfaces[1], [j not in linked for j in range(len(alignment.source))])
    read = pieces(alignment.pivot, alignment.text.encode())
    groups = [Group(read=_readable(b"".join(read[p])), pivot=pivot[p], source=source[s]) for p, s in alignment.groups]
    return Sample(groups=groups[:most], left_out=len(groups) - len(groups[:most]))


def _tokens(
    alignment: TokenAlignment,
    tokens: TokenizedText,
    surfaces: Surfaces,
    inner: Sequence[bool],
    cases: Sequence[str] = (),
) -> list[Token]:
    read, found = pieces(tokens, alignment.text.encode()), []
    for i, (id_, end) in enumerate(zip(tokens.ids.tolist(), tokens.ends.tolist(), strict=True)):
        case = cases[i] if cases else None
        about = f"{surfaces.strings[id_]}\nid {id_}, ends at byte {end}" + (f"\n{MEANING[case]}" if case else "")
        shown, size = visible(read[i]), len(read[i])
        found.append(Token(shown=shown, size=size, about=about, inner=inner[i], lost=case in LOST))
    return found


def _readable(text: bytes) -> str:
    """The text of a group; ``⋯`` where it ends inside a character."""
    shown = text.decode(errors="ignore").replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip() or shown.encode() == text else "⋯"


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples as JSON."""
    path.write_bytes(TypeAdapter(list[Sample]).dump_json(list(samples), indent=1, exclude_defaults=True))
