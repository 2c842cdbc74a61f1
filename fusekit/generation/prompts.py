"""A conversation as one model reads it, up to where it begins to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fusekit.data.tokenize import RowTokenizer
from fusekit.types import Message, Part, Row

_STAND_IN = "x"


class Prompt(NamedTuple):
    """A prompt as one model reads it.

    Attributes:
        ids: token ids.
        lead: white space that its template writes between the prompt and an answer, left for the model to write.
        ends: token ids that end an answer under its template.
    """

    ids: list[int]
    lead: bytes = b""
    ends: frozenset[int] = frozenset()


def limits_of(model: Any, tokenizer: Any) -> tuple[int, set[int]]:
    """How many tokens a model reads at most, and the ids that end what it writes, under any template."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = {ends} if isinstance(ends, int) else set(ends or ())
    eos = getattr(tokenizer, "eos_token_id", None)
    return int(most or 1 << 40), found | ({int(eos)} if eos is not None else set())


def prompt_of(reader: RowTokenizer, messages: Sequence[Message]) -> Prompt:
    """The prompt of a conversation that an assistant is to continue. Raises DataError: no template, or it refuses."""
    row = reader.tokenize(Row((*messages, Message("assistant", _STAND_IN))))
    answer = row.message == len(messages)
    ends = frozenset(int(id_) for id_ in row.ids[answer & (row.part == Part.END)])
    start = int(np.flatnonzero(answer & row.labels)[0])
    stop = int(np.flatnonzero(answer & (row.part == Part.CONTENT) & (row.ends > 0))[0]) + 1
    surfaces = reader.encoder.surfaces.of
    lead = b"".join(surfaces[id_] for id_ in row.ids[start:stop].tolist()).removesuffix(_STAND_IN.encode())
    # What is no white space (an empty thought, say) is the model's to write.
    return Prompt(row.ids[:start].tolist(), b"" if lead.strip() else lead, ends)
