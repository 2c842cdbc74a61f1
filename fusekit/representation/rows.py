"""Rows of data, as every model of a run shares them: messages, and a hash of their content that names the row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import xxhash

TEXT = "text"
"""Role of a document of plain text: no template, ended by the end-of-text token."""

FRAGMENT = "fragment"
"""Role of a piece of a document that goes on in the next row: as ``TEXT``, without the end."""


class Message(NamedTuple):
    """One message: its content as written, by a ``system``, ``user``, ``assistant``, ``TEXT`` or ``FRAGMENT``."""

    role: str
    content: str


class Cut(NamedTuple):
    """Where a row ends: after ``size`` bytes of the UTF-8 content of message number ``message`` (from 0)."""

    message: int
    size: int


@dataclass(frozen=True)
class Row:
    """A conversation, or a block of plain text.

    Attributes:
        messages: in order. Plain text has only messages of role ``TEXT``, the last one ``FRAGMENT`` if it is cut off.
        dataset: which source of data it came from, for counts by source; no part of the key.
        cut: where the row ends for all models of a run, so that every figure is over the same bytes; None for its end.
    """

    messages: tuple[Message, ...]
    dataset: str = ""
    cut: Cut | None = None

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits, the xxh3-128 of the messages: the same row has the same key in every store."""
        canonical = json.dumps([list(message) for message in self.messages], ensure_ascii=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(canonical.encode())

    @property
    def is_text(self) -> bool:
        """Whether it is plain text, which takes no chat template."""
        return all(message.role in (TEXT, FRAGMENT) for message in self.messages)
