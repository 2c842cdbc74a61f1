"""Surfaces of tokenizers written in Python, for the kinds whose vocabulary can be rebuilt exactly.

They give no offsets, so an encoding is trusted only where its surfaces spell the text (ends.py checks every text).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fusekit.alignment.tokenizer_view import TokenizerView
from fusekit.errors import AlignmentError


def slow_surfaces(view: TokenizerView) -> Iterable[tuple[int, str, bytes]]:
    """``(id, token string, surface)`` of every entry of a slow tokenizer.

    Raises:
        AlignmentError: it is none of the kinds that can be rebuilt: byte-level with a ``byte_decoder``,
            SentencePiece with an ``sp_model``, plain bytes as ByT5 has them.
    """
    tokenizer = view.original
    if isinstance(getattr(tokenizer, "byte_decoder", None), dict):
        return _byte_level(tokenizer)
    if hasattr(getattr(tokenizer, "sp_model", None), "id_to_piece"):
        return _sentencepiece(tokenizer)
    if getattr(tokenizer, "_utf_vocab_size", None) == 256:
        return _plain_bytes(tokenizer)
    raise AlignmentError(
        f"{view.name} is a slow tokenizer: it gives no offsets, and its vocabulary is of no kind that fusekit can "
        "rebuild (byte-level, SentencePiece, plain bytes); use the fast tokenizer of this model if it has one"
    )


def _byte_level(tokenizer: Any) -> Iterable[tuple[int, str, bytes]]:
    decoder = tokenizer.byte_decoder
    for string, id_ in tokenizer.get_vocab().items():
        known = all(character in decoder for character in string)
        yield id_, string, bytes([decoder[c] for c in string]) if known else string.encode()


def _sentencepiece(tokenizer: Any) -> Iterable[tuple[int, str, bytes]]:
    model = tokenizer.sp_model
    for string, id_ in tokenizer.get_vocab().items():
        piece = model.piece_to_id(string)
        if model.id_to_piece(piece) == string and model.is_byte(piece):
            yield id_, string, bytes([int(string[3:5], 16)])
        else:
            yield id_, string, string.replace("▁", " ").encode()


def _plain_bytes(tokenizer: Any) -> Iterable[tuple[int, str, bytes]]:
    for string, id_ in tokenizer.get_vocab().items():
        yield id_, string, bytes([ord(string)]) if len(string) == 1 and ord(string) < 256 else string.encode()
