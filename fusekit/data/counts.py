"""What became of the examples: counted, with the first of each kind by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from fusekit.errors import DataError

EXAMPLES = 10
"""How many keys are kept per reason; of unusable examples ``LISTED``."""
LISTED = 1000

REASONS = {
    "unusable": "cannot be read, or has marks or fields that fusekit does not know, skipped",
    "empty": "no message with any text",
    "duplicate": "the same messages as an earlier example",
    "overlong": "longer than max_length for some model, dropped",
    "no_label": "no supervised token for some model, by the example's own marks or since the cut left none",
    "refused": "a template refuses it, or a model cannot encode it",
    "cut": "kept up to where the first model reached max_length",
    "unlinked": "kept, with a message that some template rewrites: its tokens link to nothing",
    "shortened": "kept, with an answer whose beginning some template drops (earlier reasoning): it is not learned",
    "unended": "kept, with an answer whose end of turn is no control token of some model: it links to nothing",
}
"""Why an example is not used, or not as it is."""

DROPPED = ("unusable", "empty", "duplicate", "overlong", "no_label", "refused")


@dataclass
class DataCounts:
    """What became of the examples. seen = kept + the sum of ``dropped``.

    Attributes:
        on_bad_row: ``error``: an unusable example raises; ``skip``: it is counted and listed.
        seen, kept: numbers of examples.
        reasons: examples per reason of :data:`REASONS`.
        keys: the first keys per reason; of unusable examples the file, the line and what is wrong.
        first_refusal: what the first refused example was refused for.
        unused: examples per field that has a value and is not used.
    """

    on_bad_row: str = "error"
    seen: int = 0
    kept: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    first_refusal: str = ""
    unused: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, key: str, most: int = EXAMPLES) -> None:
        """Count an example."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        keys = self.keys.setdefault(reason, [])
        if len(keys) < most:
            keys.append(key)

    def unusable(self, error: DataError) -> None:
        """Count an example that cannot be read. Raises the error where that is what ``on_bad_row`` says."""
        if self.on_bad_row != "skip":
            raise error
        self.seen += 1
        self.add("unusable", str(error)[:1000], LISTED)

    @property
    def dropped(self) -> int:
        """Examples that are not used."""
        return sum(self.reasons.get(reason, 0) for reason in DROPPED)

    def as_dict(self) -> dict[str, object]:
        """Plain types, for a manifest or a report."""
        return dataclasses.asdict(self)

    @property
    def lines(self) -> list[str]:
        """What a user is told: the counts, the unused fields, and the first unusable examples."""
        said = [str(self)]
        if self.unused:
            fields = [f"{name} ({count})" for name, count in sorted(self.unused.items(), key=lambda item: -item[1])]
            said.append(f"fields that are not used: {', '.join(fields[:EXAMPLES])}{', ...' * (len(fields) > EXAMPLES)}")
        unusable = self.keys.get("unusable", [])
        said += [f"skipped: {line}" for line in unusable[:EXAMPLES]]
        more = self.reasons.get("unusable", 0) - EXAMPLES
        return said + ([f"skipped: {more} more"] if more > 0 else [])

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return f"{self.kept} of {self.seen} examples kept" + (f" ({counts})" if counts else "")
