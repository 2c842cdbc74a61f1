"""The bytes that every entry of a vocabulary stands for, and what else the alignment needs to know of a tokenizer.

Strings of a vocabulary cannot be compared across tokenizers: ``Ġfoo``, ``▁foo`` and the bytes of a tiktoken rank are
one and the same token. Their *surface* can: the bytes that the entry contributes to a decoded text. ``transformers`` is
never imported here: its tokenizers are recognised by the backend of ``tokenizers`` that they carry.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, models

from fusekit.errors import AlignmentError
from fusekit.types import BoolArray, IntArray

# The roles by which special tokens correspond across tokenizers. Padding is deliberately absent: nothing maps to it.
ROLES = ("bos", "eos", "end_of_turn")
METASPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_DUMMY_SPACES = (" ", METASPACE)
# Pre-tokenizers after which white space is in no token at all.
_DROP_SPACE = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit"}
_COMPONENTS = ("normalizer", "pre_tokenizer", "decoder")


def _is_dummy_space(part: dict[str, Any]) -> bool:
    return part["type"] == "Prepend" and part.get("prepend") in _DUMMY_SPACES


def _leaves(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of a tokenizer's component, which may be nested ``Sequence``s."""
    if part.get("type") != "Sequence":
        yield part
    for children in ("normalizers", "pretokenizers", "decoders"):
        for child in part.get(children, ()):
            yield from _leaves(child)


@contextmanager
def _unlimited(tokenizer: Any, backend: Tokenizer) -> Iterator[None]:
    """Within it the backend neither truncates nor pads; its settings are put back afterwards."""
    truncation, padding = backend.truncation, backend.padding
    # Calls of a tokenizer of transformers leave their own value behind.
    backend.encode_special_tokens = getattr(tokenizer, "split_special_tokens", backend.encode_special_tokens)
    if truncation is not None:
        backend.no_truncation()
    if padding is not None:
        backend.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _roles(tokenizer: Any) -> dict[str, int]:
    found = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos")}
    end = _end_of_turn(tokenizer)
    found["end_of_turn"] = found["eos"] if end is None else end
    return {role: int(id_) for role, id_ in found.items() if id_ is not None}


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an assistant's content, or None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    marker = "fusekit marks this"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": marker}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        after = tokenizer(rendered.rpartition(marker)[2], add_special_tokens=False)["input_ids"]
    except Exception:  # templates are user code and may raise anything; without one there is simply no role
        return None
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return next((int(id_) for id_ in after if id_ in special), None)


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


class Surfaces:
    """A tokenizer as the alignment sees it, with the surfaces of its vocabulary, indexed by id.

    Attributes:
        name: how errors call it.
        tokenizer: what the user passed.
        backend: the ``tokenizers.Tokenizer`` behind it.
        parts: the steps of ``normalizer``, ``pre_tokenizer`` and ``decoder``, ``{"type": ...}`` each, in order.
        form: how its token strings are written.
        drops_space: whether white space of a text can be in no token at all (WordPiece).
        prepends: whether the normaliser puts a space in front of every stretch of text: a dummy space, not a change.
        normalizes: whether the normaliser can change a text, apart from a dummy space.
        added_tokens: added and special tokens by id.
        roles: ids of the special tokens by role (see :data:`ROLES`), as far as the tokenizer tells them.
        of: list of V entries, the surface of each id (empty for holes).
        lengths: int64 [V], bytes of each surface.
        kinds: uint8 [V], a :class:`Kind` each.
        strings: list of V token strings as the vocabulary writes them.
    """

    def __init__(self, name: str, tokenizer: Any, backend: Tokenizer, parts: dict[str, list[dict[str, Any]]]) -> None:
        self.name, self.tokenizer, self.backend, self.parts = name, tokenizer, backend, parts
        self.form = self._form()
        self.drops_space = self.form in (Form.WORDPIECE, Form.PLAIN) and bool(self.types("pre_tokenizer") & _DROP_SPACE)
        dummies = list(map(_is_dummy_space, parts["normalizer"]))
        self.prepends, self.normalizes = any(dummies), not all(dummies)
        self.added_tokens: dict[int, AddedToken] = dict(backend.get_added_tokens_decoder())
        self.roles = _roles(tokenizer)
        surface_of, unknown = self._surface_of(), _unknown_id(backend)
        byte_fallback = "ByteFallback" in self.types("decoder") or bool(getattr(backend.model, "byte_fallback", False))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values()) + 1
        self.of, self.strings, self.kinds = [b""] * size, [""] * size, np.zeros(size, np.uint8)
        for string, id_ in vocabulary.items():
            byte, added = _BYTE_TOKEN.fullmatch(string) if byte_fallback else None, self.added_tokens.get(id_)
            if byte:  # also where it is an added token: a text rarely spells one out, and ends.py asks whether it does
                kind, surface = Kind.BYTE, bytes([int(byte[1], 16)])
            elif added is not None:  # it is looked for in the text as it is: it stands for its own characters
                kind, surface = Kind.SPECIAL if added.special else Kind.ADDED, added.content.encode()
            else:
                kind, surface = Kind.ORDINARY, string.encode() if id_ == unknown else surface_of(string)
            self.strings[id_], self.kinds[id_], self.of[id_] = string, kind, surface
        if unknown is not None:
            self.kinds[unknown] = Kind.UNKNOWN
        # A token with a role, and padding, is special even where the tokenizer forgot to mark it.
        self.kinds[list(self.roles.values())] = Kind.SPECIAL
        padding = getattr(tokenizer, "pad_token_id", None)
        if padding is not None and padding < size and padding != unknown:
            self.kinds[padding] = Kind.SPECIAL
        self.lengths: IntArray = np.fromiter(map(len, self.of), np.int64, size)

    def __len__(self) -> int:
        return len(self.of)

    def types(self, component: str) -> set[str]:
        """The names of the steps of a component, for example ``{"NFKC"}``."""
        return {part["type"] for part in self.parts[component]}

    def _form(self) -> Form:
        decoder, pre, model = self.types("decoder"), self.types("pre_tokenizer"), self.backend.model
        wordpiece = isinstance(model, models.WordPiece)
        unreadable = decoder & ({"CTC", "BPEDecoder"} if wordpiece else {"CTC", "BPEDecoder", "WordPiece"})
        if suffix := getattr(model, "end_of_word_suffix", None):
            unreadable |= {f"end-of-word suffix {suffix!r}"}
        if not wordpiece and (prefix := getattr(model, "continuing_subword_prefix", None)):
            unreadable |= {f"prefix {prefix!r} of continuing pieces"}
        if unreadable:
            raise AlignmentError(
                f"{self.name} cannot be aligned exactly: its tokens do not stand for fixed bytes with "
                f"{', '.join(sorted(unreadable))} and the model {type(model).__name__}"
            )
        if "ByteLevel" in decoder or (not decoder and "ByteLevel" in pre):
            return Form.BYTE_LEVEL
        if wordpiece:
            return Form.WORDPIECE
        replaced = {
            part.get("pattern", {}).get("String") for part in self.parts["decoder"] if part["type"] == "Replace"
        }
        return Form.METASPACE if "Metaspace" in decoder | pre or METASPACE in replaced else Form.PLAIN

    def _surface_of(self) -> Callable[[str], bytes]:
        """What gives the bytes of an ordinary entry of the vocabulary, told its string."""
        if self.form is Form.BYTE_LEVEL:
            return _byte_level_surface
        if self.form is Form.WORDPIECE:
            return functools.partial(_wordpiece_surface, prefix=self.backend.model.continuing_subword_prefix)
        replaced = []
        for part in self.parts["decoder"] + self.parts["pre_tokenizer"]:
            if part["type"] == "Metaspace":
                replaced.append((part["replacement"], " "))
            elif part["type"] == "Replace" and "String" in part["pattern"]:
                replaced.append((part["pattern"]["String"], part["content"]))

        def surface(string: str) -> bytes:
            for old, new in replaced:
                string = string.replace(old, new)
            return string.encode()

        return surface

    def normalize(self, text: str) -> str:
        """The text as the normaliser changes it, without a dummy space."""
        normalized = str(self._normalizer.normalize_str(text))
        return normalized[1:] if self.prepends and normalized.startswith(_DUMMY_SPACES) else normalized

    @cached_property
    def _normalizer(self) -> Any:
        return self.backend.normalizer  # the backend makes a new object at every access

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens added."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """:meth:`encode` of many short texts at once."""
        with _unlimited(self.tokenizer, self.backend):
            return [list(e.ids) for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], IntArray]:
        """Token ids and their character spans ``[n, 2]`` in ``text``."""
        with _unlimited(self.tokenizer, self.backend):
            encoding = self.backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    @cached_property
    def flat(self) -> tuple[npt.NDArray[np.uint8], IntArray]:
        """All surfaces in one array of bytes, uint8 [sum], and where each starts, int64 [V]."""
        return np.frombuffer(b"".join(self.of), np.uint8), np.cumsum(self.lengths) - self.lengths

    @cached_property
    def is_text(self) -> BoolArray:
        """bool [V], whether an entry stands for text."""
        return np.isin(self.kinds, (Kind.ORDINARY, Kind.BYTE, Kind.ADDED)) & (self.lengths > 0)

    @cached_property
    def text_ids(self) -> IntArray:
        """The entries that stand for text: int64, ascending."""
        return np.flatnonzero(self.is_text)

    @cached_property
    def id_of(self) -> dict[bytes, int]:
        """Surface -> the id that the tokenizer emits for it, over entries that stand for text.

        Where several ids have one surface (``1`` and ``<0x31>``), the tokenizer is asked; where its answer is none
        of them, added tokens come first, then ordinary ones, then byte fallback, then the lower id.
        """
        winners: dict[bytes, int] = {}
        contested: dict[bytes, list[int]] = {}
        for id_ in self.text_ids.tolist():
            surface = self.of[id_]
            first = winners.setdefault(surface, id_)
            if first != id_:
                contested.setdefault(surface, [first]).append(id_)
        for surface, ids in contested.items():
            winners[surface] = self._emitted(surface, ids)
        return winners

    def _emitted(self, surface: bytes, ids: list[int]) -> int:
        """Which of ``ids``, which all have this surface, stands for it in a text."""
        text = decoded(surface)
        encoded = [] if text is None else self.encode(text)
        if encoded and encoded[-1] in ids:
            return encoded[-1]
        # A string with a space is in a form that such a pre-tokenizer never produces.
        marked = self.form in (Form.METASPACE, Form.BYTE_LEVEL)
        order = (Kind.ADDED, Kind.ORDINARY, Kind.BYTE)
        return min(ids, key=lambda i: (order.index(Kind(int(self.kinds[i]))), marked and " " in self.strings[i], i))

    @cached_property
    def _longest(self) -> int:
        return int(self.lengths.max())

    def longest_prefix(self, string: bytes) -> int:
        """The id of the longest entry that a string begins with, -1 where not even the first byte is one."""
        for length in range(min(len(string), self._longest), 0, -1):
            if (id_ := self.id_of.get(string[:length])) is not None:
                return id_
        return -1

    def decode(self, ids: Iterable[int]) -> str:
        """The text that tokens spell, special and unknown ones left out; bytes that are not UTF-8 become U+FFFD.

        A dummy space in front stays. A decoder of ``tokenizers`` takes an added token for a piece of its own alphabet.
        """
        spelled = (self.of[id_] for id_ in ids if id_ < len(self) and self.is_text[id_])
        return b"".join(spelled).decode(errors="replace")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hex, of everything that a vocabulary map depends on: entries, roles and how text is cut."""
        digest = hashlib.sha256(b"fusekit surfaces 1")
        for surface, kind in zip(self.of, self.kinds.tolist(), strict=True):
            digest.update(struct.pack("<IB", len(surface), kind) + surface)
        state = json.loads(self.backend.to_str())
        for name in ("vocab", "merges"):
            digest.update(json.dumps(state["model"].pop(name, None)).encode())
        told = {name: state[name] for name in ("added_tokens", "model", *_COMPONENTS)}
        told |= {"roles": sorted(self.roles.items()), "form": int(self.form)}
        digest.update(json.dumps(told, sort_keys=True).encode())
        return digest.hexdigest()


def decoded(surface: bytes) -> str | None:
    """A surface's text, None where it is not UTF-8."""
    try:
        return surface.decode()
    except UnicodeDecodeError:
        return None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


def _byte_level_surface(string: str) -> bytes:
    """A string outside the alphabet stands for itself, as the decoder has it."""
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[character] for character in string])
    except KeyError:
        return string.encode()


def _wordpiece_surface(string: str, prefix: str) -> bytes:
    """A continuing piece stands for its own bytes; the start of a word for a space and its bytes.

    Punctuation and CJK characters are cut out wherever they stand, so no space belongs to them.
    """
    if string.startswith(prefix) and string != prefix:
        return string[len(prefix) :].encode()
    alone = len(string) == 1 and (unicodedata.category(string)[0] in "PS" or "CJK" in unicodedata.name(string, ""))
    return string.encode() if alone else b" " + string.encode()


def _unknown_id(backend: Tokenizer) -> int | None:
    """The id that the model emits for text that it cannot spell."""
    model = backend.model
    if isinstance(model, models.Unigram):
        return json.loads(model.__getstate__()).get("unk_id")  # type: ignore[no-any-return]
    token = getattr(model, "unk_token", None)
    return backend.token_to_id(token) if token else None


@functools.lru_cache(maxsize=8)  # what is derived holds the tokenizer, so weak references would never be dropped
def _surfaces_of(tokenizer: Any, name: str, backend: Tokenizer, _size: int, states: Any, _template: str) -> Surfaces:
    steps = (list(_leaves(json.loads(state))) if state else [] for state in states)
    return Surfaces(name, tokenizer, backend, dict(zip(_COMPONENTS, steps, strict=True)))


def vocabulary_surfaces(tokenizer: Any) -> Surfaces:
    """Surfaces of a tokenizer's vocabulary, made once per tokenizer object and again when it was changed.

    Args:
        tokenizer: a fast one of ``transformers``, or ``tokenizers.Tokenizer``.

    Raises:
        AlignmentError: the vocabulary's entries do not stand for fixed bytes; names the tokenizer and the reason.
    """
    kind, path = type(tokenizer).__name__, getattr(tokenizer, "name_or_path", "")
    name = f"{path} ({kind})" if path else kind
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise AlignmentError(
            f"{name} is not a fast tokenizer of transformers or tokenizers: load it with transformers.AutoTokenizer; a "
            "tokenizer that is written in Python gives no offsets and cannot be aligned exactly"
        )
    try:
        parts = [getattr(backend, component) for component in _COMPONENTS]
        states = tuple(None if part is None else part.__getstate__() for part in parts)
    except Exception as error:  # a component that is written in Python has no serialised form
        raise AlignmentError(f"{name} has custom Python code, which cannot be read: {error}") from error
    template = str(getattr(tokenizer, "chat_template", None))  # several templates are a dict
    size = backend.get_vocab_size(with_added_tokens=True)
    return _surfaces_of(tokenizer, name, backend, size, states, template)
