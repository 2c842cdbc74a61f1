"""Numbers and names as people read them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from fusekit.evaluation.table import NO_VALUE, fixed

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def name(text: object) -> str:
    """Text from data on one line; invisible characters, and those that turn the writing direction, as code points."""
    return block(" ".join(str(text).split()) or str(text))


def block(text: str) -> str:
    """As :func:`name`, but all white space stays."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _HIDDEN else f"\\u{ord(c):04x}" for c in text)


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def percent(value: float | None) -> str:
    """A share in per cent: ``0.125`` -> ``12.5 %``."""
    return NO_VALUE if value is None or not math.isfinite(value) else f"{fixed(100 * value, 1)} %"


def scaled(value: float | None) -> str:
    """A count with three digits: ``0.951 M``, ``7.24 B``."""
    if value is None:
        return NO_VALUE
    unit, size = next((pair for pair in (("T", 1e12), ("B", 1e9), ("M", 1e5)) if value >= pair[1]), ("", 1))
    return f"{value / (1e6 if unit == 'M' else size):.3g} {unit}".strip()


def seconds(value: float | None) -> str:
    """``3.1 s``, ``1 min 12 s``, ``2 h 05 min``."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
