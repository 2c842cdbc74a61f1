"""Token ids and byte ends of a text that is partly template and partly data.

The parts are encoded together, so that tokens form across their seams as the model knows them. What is data never
becomes a control token: where a content spells one, the text is encoded by a copy of the tokenizer that does not look
for them, and in which the template's own are known by another name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from fusekit.alignment.ends import Mark, encoded, marked_ends
from fusekit.alignment.surfaces import Kind, vocabulary_surfaces
from fusekit.errors import DataError
from fusekit.types import IntArray, TokenizedText

_NONCES = [chr(code) for code in range(0xFAB50, 0xFAB60)]


class Stretch(NamedTuple):
    """A stretch of a rendered text."""

    text: str
    id: int = -1  # of the control token that it is, or -1
    content: bool = False  # whether it is a message's content
    message: int = 0  # which message it belongs to
    closes: bool = False  # whether it is the end of that message's turn
    label: bool = False


class Encoder:
    """Encodes texts of parts with one tokenizer.

    Args:
        tokenizer: of ``transformers`` or ``tokenizers``.
        control: ids of further added tokens that are control tokens, beside those marked special and those with a role:
            what the template writes. All other added tokens are part of the vocabulary, in contents too.

    Attributes:
        surfaces: of the vocabulary.
        strings, id_of: what each control token is looked for as, by id, and the other way round; tokens of byte
            fallback are none, however marked.
    """

    def __init__(self, tokenizer: Any, control: Sequence[int] = ()) -> None:
        self.surfaces = vocabulary_surfaces(tokenizer)
        view = self.surfaces.view
        wanted = {*control, *view.roles.values()}
        self.strings = {
            id_: token.content
            for id_, token in view.added_tokens.items()
            if token.content and (token.special or id_ in wanted) and self.surfaces.kinds[id_] != Kind.BYTE
        }
        spelled = sorted(set(self.strings.values()), key=lambda string: (-len(string), string))
        self._control = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self.id_of = {string: id_ for id_, string in self.strings.items()}
        self._is_control = np.zeros(len(self.surfaces), bool)
        unknown = self.surfaces.kinds == Kind.UNKNOWN  # what stands for any text is no sign of a control token
        self._is_control[[id_ for id_ in self.strings if not unknown[id_]]] = True
        self._copies: dict[str, tuple[Tokenizer, dict[int, str], IntArray]] = {}

    def find_control(self, text: str) -> list[Mark]:
        """The control tokens that a text spells, in order: leftmost, and the longest there."""
        return [Mark(*match.span(), self.id_of[match[0]]) for match in self._control.finditer(text)]

    def encode(self, parts: Sequence[Stretch]) -> tuple[TokenizedText, IntArray]:
        """Encode the parts as one text.

        Returns the tokens with their ends in the bytes of the text, and the positions of the parts' control tokens,
        int64. Raises DataError where the tokenizer cannot keep control tokens out of the data, AlignmentError where the
        ends of the tokens cannot be known.
        """
        text = "".join([part.text for part in parts])
        encoded(text)
        expected = [part.id for part in parts if part.id >= 0]
        if not any(part.content and part.id < 0 and self._control.search(part.text) for part in parts):
            ids = self.surfaces.view.encode(text)
            at = np.flatnonzero(self._is_control[ids])
            if [ids[i] for i in at.tolist()] == expected:
                spans = lambda: self.surfaces.view.encode_with_offsets(text)[1]  # noqa: E731
                return marked_ends(ids, at.tolist(), text, _marks(parts), self.surfaces, offsets=spans), at
        return self._encode_guarded(text, parts, expected)

    def _encode_guarded(
        self, text: str, parts: Sequence[Stretch], expected: list[int]
    ) -> tuple[TokenizedText, IntArray]:
        copy, alias_of, own_ids = self._copy(text)
        renamed = [alias_of[part.id] if part.id >= 0 else part.text for part in parts]
        encoding = copy.encode("".join(renamed), add_special_tokens=False)
        ids = own_ids[encoding.ids].tolist() if encoding.ids else []
        at = np.flatnonzero(self._is_control[ids])
        if [ids[i] for i in at.tolist()] != expected:
            found = next((ids[i] for i in at.tolist() if ids[i] not in expected), ids[int(at[0])] if len(at) else -1)
            name = self.strings.get(found, "a control token")
            raise DataError(
                f"{self.surfaces.name} reads {name!r} in a content as a control token, or misses one of its template's,"
                " and cannot be kept from it: leave the example out, or write the string differently in the data"
            )

        def offsets() -> IntArray:
            spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            return _places([len(part.text) for part in parts], [len(string) for string in renamed])[spans]

        return marked_ends(ids, at.tolist(), text, _marks(parts), self.surfaces, offsets=offsets), at

    def _copy(self, text: str) -> tuple[Tokenizer, dict[int, str], IntArray]:
        """The copy of the tokenizer whose names for control tokens are nowhere in ``text``."""
        nonce = next((nonce for nonce in _NONCES if nonce not in text), None)
        if nonce is None:
            raise DataError(
                f"the example holds every one of the {len(_NONCES)} private characters that fusekit needs one of"
            )
        if nonce not in self._copies:
            self._copies[nonce] = self._make_copy(nonce)
        return self._copies[nonce]

    def _make_copy(self, nonce: str) -> tuple[Tokenizer, dict[int, str], IntArray]:
        view = self.surfaces.view
        if view.backend is None or not view.direct:
            raise DataError(
                f"{view.name} encodes in Python, so control tokens that a content spells cannot be kept out of it: use "
                "the fast tokenizer of this model, or leave such examples out"
            )
        # The vocabulary is shared: to read a large one again takes seconds. What is changed here is the copy's own.
        copy = Tokenizer(view.backend.model)
        for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if getattr(view.backend, name) is not None:
                setattr(copy, name, getattr(view.backend, name))
        # In the order of their ids, which are counted on from the vocabulary's.
        for control, added in groupby(sorted(view.added_tokens), lambda id_: id_ in self.strings):
            tokens = [_renamed(view.added_tokens[id_], view.added_tokens[id_].content) for id_ in added]
            (copy.add_special_tokens if control else copy.add_tokens)(tokens)
        size = max(copy.get_vocab_size(with_added_tokens=True), len(self.surfaces))
        alias_of = {id_: f"{nonce}{chr(0xF0000 + n)}{nonce}" for n, id_ in enumerate(sorted(self.strings))}
        copy.add_tokens([_renamed(view.added_tokens[id_], alias) for id_, alias in alias_of.items()])
        copy.encode_special_tokens = True
        own_ids = np.arange(size + len(alias_of) + 1)
        for id_, alias in alias_of.items():
            own_ids[copy.token_to_id(alias)] = id_
        return copy, alias_of, own_ids

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}


def _renamed(token: AddedToken, name: str) -> AddedToken:
    """A token that is looked for in the same way under a name."""
    kept = ("single_word", "lstrip", "rstrip", "normalized")
    return AddedToken(name, special=False, **{attribute: getattr(token, attribute) for attribute in kept})


def _marks(parts: Sequence[Stretch]) -> list[Mark]:
    marks, start = [], 0
    for part in parts:
        if part.id >= 0:
            marks.append(Mark(start, start + len(part.text), part.id))
        start += len(part.text)
    return marks


def _places(lengths: list[int], renamed: list[int]) -> IntArray:
    """Position in the text of every position of the renamed text, whose parts have other lengths."""
    places = [np.zeros(1, np.int64)]
    start = 0
    for length, other in zip(lengths, renamed, strict=True):
        places.append(start + np.minimum(np.arange(1, other + 1), length))
        start += length
        if other:
            places[-1][-1] = start
    return np.concatenate(places)
