"""Numbers and names as people read them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from fusekit.evaluation.table import NO_VALUE, fixed

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def name(text: object) -> str:
    """Text from data on one line; invisible characters, and those that turn the writing direction, as code points."""
    shown = " ".join(str(text).split()) if str(text).strip() else str(text)
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in _HIDDEN else c for c in shown)


def block(text: str) -> str:
    """As :func:`name`, but line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _HIDDEN else f"\\u{ord(c):04x}" for c in text)


def shorten(text: str, most: int) -> str:
    """At most so many characters; the middle is left out, since the end of a name says as much as its beginning."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent: ``0.125`` -> ``12.5 %``."""
    return NO_VALUE if value is None or not math.isfinite(value) else f"{fixed(100 * value, digits)} %"


def scaled(value: float | None) -> str:
    """A count with three digits: ``0.95 M``, ``7.24 B``."""
    if value is None:
        return NO_VALUE
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= (size if unit == "T" else size / 10):
            found = value / size
            return f"{found:.{2 if found < 10 else 1 if found < 100 else 0}f} {unit}"
    return f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """``3.1 s``, ``1 min 12 s``, ``2 h 05 min``."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
