"""What a question of the demo is, and which ones are held out.

Every question has a *key*, and a hash of the key decides whether it may be trained on or is held out. The two sets are
therefore disjoint by construction: whoever generates rows, with whatever seed, no held-out question is ever trained on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

HELD_OUT_ONE_IN = 8


def is_held_out(key: str) -> bool:
    """Whether the question (or document) with this key is kept for evaluation. The same in every run and process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        skill: the name of its skill.
        key: what decides whether it is held out.
        prompt: what the user says.
        answer: the reply that a training row shows.
        answers: every reply that counts as right.
        probabilities: where replies are drawn at random, the probability of each of ``answers``, 1 in all; else empty.
    """

    skill: str
    key: str
    prompt: str
    answer: str
    answers: tuple[str, ...]
    probabilities: tuple[float, ...] = ()

    def messages(self) -> list[dict[str, str]]:
        """The row as a conversation, for a chat template."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


def exact_match(row: Row, reply: str) -> bool:
    """True when the reply, without surrounding white space, is one of the row's right answers."""
    return reply.strip() in row.answers
