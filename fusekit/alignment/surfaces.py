"""The bytes that every vocabulary entry stands for.

Strings of a vocabulary cannot be compared across tokenizers: ``Ġfoo``, ``▁foo`` and the bytes of a tiktoken rank are
one and the same token. Their *surface* can: the bytes that the entry contributes to a decoded text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, models

from fusekit.alignment.tokenizers import ROLES, TokenizerView, signs_of, slow_surfaces, view_of
from fusekit.errors import AlignmentError
from fusekit.types import IntArray

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
METASPACE = "▁"
# Pre-tokenizers after which white space is in no token at all.
_DROP_SPACE = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit"}


class Kind(IntEnum):
    """What a vocabulary entry is."""

    HOLE = 0  # no entry has this id
    ORDINARY = 1
    BYTE = 2  # a byte-fallback entry, <0x0A>
    ADDED = 3  # added by the user, plain text
    SPECIAL = 4  # maps by role or not at all
    UNKNOWN = 5  # stands for any text


class Form(IntEnum):
    """How a tokenizer writes bytes as token strings."""

    BYTE_LEVEL = 0
    METASPACE = 1
    WORDPIECE = 2
    PLAIN = 3


@dataclass(frozen=True, eq=False)
class Surfaces:
    """Surfaces of a vocabulary, indexed by id.

    Attributes:
        view: the tokenizer.
        form: how its token strings are written.
        drops_space: whether white space of a text can be in no token at all (WordPiece).
        of: list of V entries, the surface of each id (empty for holes).
        lengths: int64 [V], bytes of each surface.
        kinds: uint8 [V], a :class:`Kind` each.
        strings: list of V token strings as the vocabulary writes them.
    """

    view: TokenizerView
    form: Form
    drops_space: bool
    of: list[bytes]
    lengths: IntArray
    kinds: npt.NDArray[np.uint8]
    strings: list[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.of)

    @property
    def name(self) -> str:
        """How errors call the tokenizer."""
        return self.view.name

    @cached_property
    def flat(self) -> tuple[npt.NDArray[np.uint8], IntArray, IntArray]:
        """All surfaces in one array of bytes, with the start and the length of each: uint8 [sum], int64 [V] twice."""
        return np.frombuffer(b"".join(self.of), np.uint8), np.cumsum(self.lengths) - self.lengths, self.lengths

    @cached_property
    def id_of(self) -> dict[bytes, int]:
        """Surface -> the id that the tokenizer emits for it, over entries that stand for text.

        Where several ids have one surface (``1`` and ``<0x31>``), the tokenizer is asked; where its answer is none
        of them, added tokens come first, then ordinary ones, then byte fallback, then the lower id.
        """
        rank = {Kind.ADDED: 0, Kind.ORDINARY: 1, Kind.BYTE: 2}
        winners: dict[bytes, int] = {}
        contested: dict[bytes, list[int]] = {}
        for id_ in np.flatnonzero(np.isin(self.kinds, list(rank)) & (self.lengths > 0)).tolist():
            surface = self.of[id_]
            first = winners.setdefault(surface, id_)
            if first != id_:
                contested.setdefault(surface, [first]).append(id_)
        for surface, ids in contested.items():
            emitted = self._emitted(surface)
            if emitted not in ids:
                emitted = min(ids, key=lambda i: (rank[Kind(int(self.kinds[i]))], self._unlikely(i), i))
            winners[surface] = emitted
        return winners

    def decode(self, ids: Iterable[int]) -> str:
        """The text that tokens spell, special and unknown ones left out; bytes that are no UTF-8 become U+FFFD.

        A dummy space in front stays. A decoder of ``tokenizers`` takes an added token for a piece of its own alphabet.
        """
        silent = (Kind.HOLE, Kind.SPECIAL, Kind.UNKNOWN)
        spelled = (self.of[id_] for id_ in ids if id_ < len(self) and self.kinds[id_] not in silent)
        return b"".join(spelled).decode(errors="replace")

    def _unlikely(self, id_: int) -> bool:
        """Whether the vocabulary writes the entry in a form that its pre-tokenizer never produces."""
        return self.form in (Form.METASPACE, Form.BYTE_LEVEL) and " " in self.strings[id_]

    def _emitted(self, surface: bytes) -> int | None:
        try:
            ids = self.view.encode(surface.decode())
        except (UnicodeDecodeError, AlignmentError):
            return None
        return ids[-1] if ids and self.of[ids[-1]] == surface else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hex, of everything that a vocabulary map depends on: entries, roles and how text is cut."""
        digest = hashlib.sha256(b"fusekit surfaces 1")
        for surface, kind in zip(self.of, self.kinds.tolist(), strict=True):
            digest.update(struct.pack("<IB", len(surface), kind) + surface)
        settings: dict[str, Any] = {"roles": sorted(self.view.roles.items()), "form": int(self.form)}
        if self.view.backend is not None:
            state = json.loads(self.view.backend.to_str())
            settings |= {key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")}
            model = state["model"]
            settings["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
            for key in ("vocab", "merges"):
                digest.update(json.dumps(model.get(key)).encode())
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


def byte_level_surface(string: str) -> bytes:
    """Bytes of a byte-level token string. A string outside the alphabet stands for itself, as the decoder has it."""
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[character] for character in string])
    except KeyError:
        return string.encode()


def _form(view: TokenizerView) -> Form:
    decoder, pre = view.types("decoder"), view.types("pre_tokenizer")
    model = view.backend.model if view.backend is not None else None
    unreadable = decoder & {"CTC", "BPEDecoder"}
    suffix = getattr(model, "end_of_word_suffix", None)
    if unreadable or suffix:
        what = f"end-of-word suffix {suffix!r}" if suffix else f"decoder {', '.join(sorted(unreadable))}"
        raise AlignmentError(
            f"{view.name} cannot be aligned exactly: with its {what} a token does not stand for fixed bytes"
        )
    if "ByteLevel" in decoder or (not decoder and "ByteLevel" in pre):
        return Form.BYTE_LEVEL
    if isinstance(model, models.WordPiece):
        return Form.WORDPIECE
    if "WordPiece" in decoder or getattr(model, "continuing_subword_prefix", None):
        raise AlignmentError(
            f"{view.name} cannot be aligned exactly: it writes continuing pieces with a prefix, "
            f"but its model is {type(model).__name__}, not WordPiece"
        )
    replaced = {part.get("pattern", {}).get("String") for part in view.parts("decoder") if part["type"] == "Replace"}
    if "Metaspace" in decoder | pre or METASPACE in replaced:
        return Form.METASPACE
    return Form.PLAIN


def _wordpiece_surface(string: str, prefix: str) -> bytes:
    """A continuing piece stands for its own bytes; the start of a word for a space and its bytes.

    Punctuation and CJK characters are cut out wherever they stand, so no space belongs to them.
    """
    if string.startswith(prefix) and string != prefix:
        return string[len(prefix) :].encode()
    alone = len(string) == 1 and (unicodedata.category(string)[0] in "PS" or "CJK" in unicodedata.name(string, ""))
    return string.encode() if alone else b" " + string.encode()


def _replacements(view: TokenizerView) -> list[tuple[str, str]]:
    pairs = []
    for part in view.parts("decoder"):
        if part["type"] == "Replace" and "String" in part["pattern"]:
            pairs.append((part["pattern"]["String"], part["content"]))
        elif part["type"] == "Metaspace":
            pairs.append((part["replacement"], " "))
    for part in view.parts("pre_tokenizer"):
        if part["type"] == "Metaspace":
            pairs.append((part["replacement"], " "))
    return pairs


def _fast_surfaces(view: TokenizerView, form: Form) -> Iterator[tuple[int, str, bytes]]:
    """``(id, token string, surface)`` of every entry of a tokenizer with a backend, as if none was added."""
    model: Any = view.backend.model if view.backend is not None else None
    byte_fallback = "ByteFallback" in view.types("decoder") or bool(getattr(model, "byte_fallback", False))
    replacements = _replacements(view)
    for string, id_ in view.vocabulary.items():
        if byte_fallback and (match := BYTE_TOKEN.fullmatch(string)):
            yield id_, string, bytes([int(match[1], 16)])
        elif form is Form.BYTE_LEVEL:
            yield id_, string, byte_level_surface(string)
        elif form is Form.WORDPIECE:
            yield id_, string, _wordpiece_surface(string, model.continuing_subword_prefix)
        else:
            replaced = string
            for old, new in replacements:
                replaced = replaced.replace(old, new)
            yield id_, string, replaced.encode()


def _unknown_ids(view: TokenizerView) -> set[int]:
    """Ids that the model emits for text that it cannot spell."""
    if view.backend is None:
        return {id_ for id_ in view.added_tokens if id_ == getattr(view.original, "unk_token_id", None)}
    model = view.backend.model
    token = getattr(model, "unk_token", None)
    id_ = view.backend.token_to_id(token) if token else None
    if isinstance(model, models.Unigram):
        id_ = json.loads(model.__getstate__()).get("unk_id")
    return set() if id_ is None else {int(id_)}


def _kind(id_: int, string: str, surface: bytes, added: Mapping[int, AddedToken], unknown: set[int]) -> Kind:
    if id_ in unknown:
        return Kind.UNKNOWN
    if (match := BYTE_TOKEN.fullmatch(string)) and surface == bytes([int(match[1], 16)]):
        # Also where it is an added token: a text rarely spells one out, and ends.py asks whether it does.
        return Kind.BYTE
    if id_ in added:
        return Kind.SPECIAL if added[id_].special else Kind.ADDED
    return Kind.ORDINARY


def _make_surfaces(view: TokenizerView) -> Surfaces:
    form = Form.PLAIN if view.backend is None else _form(view)
    entries = list(slow_surfaces(view) if view.backend is None else _fast_surfaces(view, form))
    if not entries:
        raise AlignmentError(f"{view.name} has an empty vocabulary")
    size = max(entry[0] for entry in entries) + 1
    of, strings, kinds = [b""] * size, [""] * size, np.zeros(size, np.uint8)
    added, unknown = view.added_tokens, _unknown_ids(view)
    for id_, string, surface in entries:
        kind = kinds[id_] = _kind(id_, string, surface, added, unknown)
        strings[id_] = string
        # An added token is looked for in the text as it is: it stands for its own characters.
        of[id_] = surface if kind in _SPELLED else added[id_].content.encode() if id_ in added else string.encode()
    for role in ROLES:  # a token with a role is special even where the tokenizer forgot to mark it
        if (id_with_role := view.roles.get(role)) is not None and id_with_role < size:
            kinds[id_with_role] = Kind.SPECIAL
    if view.pad_id is not None and view.pad_id < size and kinds[view.pad_id] != Kind.UNKNOWN:
        kinds[view.pad_id] = Kind.SPECIAL
    drops = form in (Form.WORDPIECE, Form.PLAIN) and bool(view.types("pre_tokenizer") & _DROP_SPACE)
    lengths = np.fromiter(map(len, of), np.int64, size)
    return Surfaces(view, form, drops, of, lengths, kinds, strings)


_SPELLED = (Kind.ORDINARY, Kind.BYTE)
_KEPT = 8  # what is derived holds the tokenizer, so weak references would never be dropped
_KNOWN: OrderedDict[int, tuple[Any, tuple[Any, ...], Surfaces]] = OrderedDict()


def vocabulary_surfaces(tokenizer: Any) -> Surfaces:
    """Surfaces of a tokenizer's vocabulary, made once per tokenizer object and again when it was changed.

    Args:
        tokenizer: one of ``transformers`` (fast; slow where its vocabulary can be rebuilt) or ``tokenizers.Tokenizer``.

    Raises:
        AlignmentError: the vocabulary's entries do not stand for fixed bytes; names the tokenizer and the reason.
    """
    try:
        sign = signs_of(tokenizer)
    except Exception:  # not a tokenizer, or one with custom Python parts: the view says so, with the name
        return _make_surfaces(view_of(tokenizer))
    known = _KNOWN.get(id(tokenizer))
    if known is None or known[0] is not tokenizer or known[1] != sign:
        known = _KNOWN[id(tokenizer)] = (tokenizer, sign, _make_surfaces(view_of(tokenizer)))
        _KNOWN.move_to_end(id(tokenizer))
        if len(_KNOWN) > _KEPT:
            _KNOWN.popitem(last=False)
    return known[2]
