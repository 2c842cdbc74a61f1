"""Aligned texts as they are shown: both tokenisations group by group, as plain values that outlive the tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fusekit.alignment.alignment import TokenAlignment, pieces, visible
from fusekit.alignment.cases import Case, plan_rows
from fusekit.alignment.surfaces import Surfaces
from fusekit.errors import AlignmentError
from fusekit.types import TopK

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
    """A token. shown: its text, made visible. size: its bytes. about: id, end, what it teaches or is taught.

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
    """A text under both tokenisations. left_out: how many groups more the text has."""

    groups: list[Group]
    left_out: int = 0

    def beginning(self, most: int) -> Sample:
        """At most so many groups of it."""
        left_out = max(len(self.groups) - most, 0)
        return Sample(groups=self.groups[:most], left_out=self.left_out + left_out) if left_out else self


_SAMPLES = TypeAdapter(list[Sample])


def sample_of(
    alignment: TokenAlignment, surfaces: tuple[Surfaces, Surfaces], rows: tuple[TopK, TopK] | None = None
) -> Sample:
    """What is shown of an alignment.

    Args:
        alignment: of method ``span``.
        surfaces: of the pivot and of the source, for token strings.
        rows: the source's rows [m, k] and the pivot's [n, k']; None where there are none.
    """
    data = alignment.text.encode()
    pivot, source = pieces(alignment.pivot, data), pieces(alignment.source, data)
    cases = [Case(int(case)).name.lower() for case in plan_rows(alignment).cases]
    linked = set(alignment.source_at[alignment.source_at >= 0].tolist())

    def of_pivot(i: int) -> Token:
        about = (
            _about(surfaces[0], int(alignment.pivot_ids[i]), int(alignment.pivot_ends[i])) + f"\n{MEANING[cases[i]]}"
        )
        about += _top(rows[1], i, surfaces[0], "taught") if rows else ""
        inner, lost = bool(alignment.source_at[i] < 0), cases[i] in LOST
        return Token(shown=visible(pivot[i]), size=len(pivot[i]), about=about, inner=inner, lost=lost)

    def of_source(j: int) -> Token:
        about = _about(surfaces[1], int(alignment.source_ids[j]), int(alignment.source_ends[j]))
        about += _top(rows[0], j, surfaces[1], "predicts") if rows else ""
        return Token(shown=visible(source[j]), size=len(source[j]), about=about, inner=j not in linked)

    groups = [
        Group(
            read=_readable(b"".join(pivot[p])),
            pivot=[of_pivot(i) for i in range(p.start, p.stop)],
            source=[of_source(j) for j in range(s.start, s.stop)],
        )
        for p, s in alignment.groups
    ]
    return Sample(groups=groups)


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples as JSON."""
    plain = [sample.model_dump(mode="json", exclude_defaults=True) for sample in samples]
    # Escaped, so that what is half a character on its own comes back as it was.
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def read_samples(path: Path) -> list[Sample]:
    """The samples that :func:`write_samples` wrote, none where there is no file. Raises AlignmentError: damaged."""
    try:
        return _SAMPLES.validate_python(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise AlignmentError(f"{path} cannot be read: {first}") from error


def _readable(text: bytes) -> str:
    """The text of a group; ``⋯`` where it ends inside a character."""
    shown = text.decode(errors="ignore").replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip() or shown.encode() == text else "⋯"


def _about(surfaces: Surfaces, id_: int, end: int) -> str:
    string = surfaces.strings[id_] if id_ < len(surfaces) else "?"
    return f"{string}\nid {id_}, ends at byte {end}"


def _top(rows: TopK, at: int, surfaces: Surfaces, verb: str) -> str:
    listed = [(int(i), float(np.exp(p))) for i, p in zip(rows.ids[at], rows.logprobs[at], strict=True) if i >= 0][:5]
    lines = [f"{100 * p:.1f} % {visible(surfaces.of[i]) if i < len(surfaces) else i}" for i, p in listed]
    return f"\n{verb}:\n" + "\n".join([*lines, f"{100 * float(rows.tail[at]):.1f} % everything else"])
