"""The bytes that every entry of a vocabulary stands for, and one view of every kind of tokenizer.

Strings of a vocabulary cannot be compared across tokenizers: ``Ġfoo``, ``▁foo`` and the bytes of a tiktoken rank are
one and the same token. Their *surface* can: the bytes that the entry contributes to a decoded text. ``transformers`` is
never imported here: its tokenizers are recognised by what they carry.
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
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, models

from fusekit.errors import AlignmentError
from fusekit.types import IntArray

# The roles by which special tokens correspond across tokenizers. Padding is deliberately absent: nothing maps to it.
ROLES = ("bos", "eos", "end_of_turn")
METASPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_DUMMY_SPACES = (" ", METASPACE)
# Pre-tokenizers after which white space is in no token at all.
_DROP_SPACE = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit"}


@dataclass(frozen=True, eq=False)
class TokenizerView:
    """What the alignment needs to know of a tokenizer.

    Attributes:
        name: how errors call the tokenizer.
        original: the object that the user passed.
        backend: the ``tokenizers.Tokenizer`` behind it, or None for a slow tokenizer.
        direct: whether the backend alone gives the ids that the user's object gives.
    """

    name: str
    original: Any
    backend: Tokenizer | None
    direct: bool
    _parts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def parts(self, component: str) -> list[dict[str, Any]]:
        """The flattened JSON of ``normalizer``, ``pre_tokenizer`` or ``decoder``: a list of ``{"type": ...}``."""
        if component not in self._parts:
            self._parts[component] = _flatten(getattr(self.backend, component, None))
        return self._parts[component]

    def types(self, component: str) -> set[str]:
        """The names of the steps of ``component``, for example ``{"NFKC"}``."""
        return {part["type"] for part in self.parts(component)}

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Added and special tokens by id."""
        if self.backend is not None:
            return dict(self.backend.get_added_tokens_decoder())
        return dict(getattr(self.original, "added_tokens_decoder", {}))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token string -> id, added tokens included."""
        if self.backend is not None:
            return dict(self.backend.get_vocab(with_added_tokens=True))
        return dict(self.original.get_vocab())

    @cached_property
    def prepends(self) -> bool:
        """Whether the normaliser puts a space in front of every stretch of text: a dummy space, not a change of it."""
        return any(map(_is_dummy_space, self.parts("normalizer")))

    @cached_property
    def normalize(self) -> Callable[[str], str] | None:
        """The tokenizer's own normaliser without the dummy space, or None when there is none that can change a text."""
        if self.backend is None or all(map(_is_dummy_space, self.parts("normalizer"))):
            return None
        # A partial, since a reader that has been used travels to other processes.
        return functools.partial(_normalized, self.backend.normalizer, self.prepends)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, no special tokens added."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """:meth:`encode` of many short texts at once."""
        if not self.direct or self.backend is None:
            return [list(self.original(text, add_special_tokens=False)["input_ids"]) for text in texts]
        with _unlimited(self.original, self.backend):
            return [list(e.ids) for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], IntArray]:
        """Token ids and their character spans ``[n, 2]`` in ``text``."""
        if self.backend is None:
            raise AlignmentError(f"{self.name} is a slow tokenizer and gives no offsets")
        if not self.direct:
            encoded = self.original(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(encoded["input_ids"]), np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        with _unlimited(self.original, self.backend):
            encoding = self.backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    @cached_property
    def roles(self) -> dict[str, int]:
        """Ids of the special tokens by role (see :data:`ROLES`), as far as the tokenizer tells them."""
        found = {role: getattr(self.original, f"{role}_token_id", None) for role in ("bos", "eos")}
        end = _end_of_turn(self.original)
        found["end_of_turn"] = found["eos"] if end is None else end
        return {role: int(id_) for role, id_ in found.items() if id_ is not None}


def _normalized(normalizer: Any, prepends: bool, text: str) -> str:
    normalized = str(normalizer.normalize_str(text))
    return normalized[1:] if prepends and normalized.startswith(_DUMMY_SPACES) else normalized


def _is_dummy_space(part: dict[str, Any]) -> bool:
    return part["type"] == "Prepend" and part.get("prepend") in _DUMMY_SPACES


@contextmanager
def _unlimited(original: Any, backend: Tokenizer) -> Iterator[None]:
    """Within it the backend neither truncates nor pads; its settings are put back afterwards."""
    truncation, padding = backend.truncation, backend.padding
    if truncation is not None:
        backend.no_truncation()
    if padding is not None:
        backend.no_padding()
    split_special = getattr(original, "split_special_tokens", None)
    if split_special is not None and backend.encode_special_tokens != split_special:
        backend.encode_special_tokens = split_special
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _flatten(component: Any) -> list[dict[str, Any]]:
    """The leaves of a (nested) ``Sequence`` of a tokenizer component, in order."""
    if component is None:
        return []

    def leaves(part: dict[str, Any]) -> list[dict[str, Any]]:
        if part.get("type") != "Sequence":
            return [part]
        children: list[dict[str, Any]] = next(
            (part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), []
        )
        return [leaf for child in children for leaf in leaves(child)]

    try:
        return leaves(json.loads(component.__getstate__()))
    except Exception as error:  # a component written in Python (`PreTokenizer.custom`) has no serialised form
        raise AlignmentError(
            f"the {type(component).__name__} of the tokenizer is custom Python code and cannot be read: {error}"
        ) from error


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
    special = set(getattr(tokenizer, "all_special_ids", []))
    special |= {id_ for id_, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return next((int(id_) for id_ in after if id_ in special), None)


def _name(tokenizer: Any) -> str:
    kind = type(tokenizer).__name__
    if path := getattr(tokenizer, "name_or_path", ""):
        return f"{path} ({kind})"
    if isinstance(tokenizer, Tokenizer):
        return f"{kind}({type(tokenizer.model).__name__}, {tokenizer.get_vocab_size()} entries)"
    return kind


def _view_of(tokenizer: Any) -> TokenizerView:
    name = _name(tokenizer)
    if isinstance(tokenizer, Tokenizer):
        return TokenizerView(name, tokenizer, tokenizer, direct=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        # A class that overrides the encoding is called itself; transformers' own code passes the text on as it is.
        homes = [getattr(getattr(type(tokenizer), m, None), "__module__", "") for m in ("__call__", "_encode_plus")]
        direct = all(home.startswith("transformers.tokenization_utils") for home in homes)
        return TokenizerView(name, tokenizer, backend, direct)
    if callable(tokenizer) and hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "convert_ids_to_tokens"):
        return TokenizerView(name, tokenizer, None, direct=False)
    raise AlignmentError(
        f"{name} is not a tokenizer of transformers or tokenizers: load it with transformers.AutoTokenizer, or wrap it "
        "in transformers.PreTrainedTokenizerFast"
    )


class Kind(IntEnum):
    """What a vocabulary entry is."""

    HOLE = 0  # no entry has this id
    ORDINARY = 1
    BYTE = 2  # a byte-fallback entry, <0x0A>
    ADDED = 3  # added by the user, plain text
    SPECIAL = 4  # maps by role or not at all
    UNKNOWN = 5  # stands for any text


TEXT_KINDS = (Kind.ORDINARY, Kind.BYTE, Kind.ADDED)


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
    def text_ids(self) -> IntArray:
        """The entries that stand for text: int64, ascending."""
        return np.flatnonzero(np.isin(self.kinds, TEXT_KINDS) & (self.lengths > 0))

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
        try:
            encoded = self.view.encode(surface.decode())
        except (UnicodeDecodeError, AlignmentError):
            encoded = []
        if encoded and encoded[-1] in ids:
            return encoded[-1]
        # A string with a space is in a form that such a pre-tokenizer never produces.
        marked = self.form in (Form.METASPACE, Form.BYTE_LEVEL)
        order = (Kind.ADDED, Kind.ORDINARY, Kind.BYTE)
        return min(ids, key=lambda i: (order.index(Kind(int(self.kinds[i]))), marked and " " in self.strings[i], i))

    @cached_property
    def _longest(self) -> int:
        return int(self.lengths.max(initial=0))

    def longest_prefix(self, string: bytes) -> int:
        """The id of the longest entry that a string begins with, -1 where not even the first byte is one."""
        lengths = range(min(len(string), self._longest), 0, -1)
        return next((self.id_of[string[:length]] for length in lengths if string[:length] in self.id_of), -1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that tokens spell, special and unknown ones left out; bytes that are no UTF-8 become U+FFFD.

        A dummy space in front stays. A decoder of ``tokenizers`` takes an added token for a piece of its own alphabet.
        """
        spelled = (self.of[id_] for id_ in ids if id_ < len(self) and self.kinds[id_] in TEXT_KINDS)
        return b"".join(spelled).decode(errors="replace")

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
    return Form.METASPACE if "Metaspace" in decoder | pre or METASPACE in replaced else Form.PLAIN


def _fast_surfaces(view: TokenizerView, form: Form) -> Iterator[tuple[int, str, bytes]]:
    """``(id, token string, surface)`` of every entry of a tokenizer with a backend, as if none was added."""
    model: Any = view.backend.model if view.backend is not None else None
    byte_fallback = "ByteFallback" in view.types("decoder") or bool(getattr(model, "byte_fallback", False))
    replacements = []
    for part in view.parts("decoder"):
        if part["type"] == "Replace" and "String" in part["pattern"]:
            replacements.append((part["pattern"]["String"], part["content"]))
        elif part["type"] == "Metaspace":
            replacements.append((part["replacement"], " "))
    replacements += [(part["replacement"], " ") for part in view.parts("pre_tokenizer") if part["type"] == "Metaspace"]
    for string, id_ in view.vocabulary.items():
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(string)):
            yield id_, string, bytes([int(match[1], 16)])
        elif form is Form.BYTE_LEVEL:
            yield id_, string, _byte_level_surface(string)
        elif form is Form.WORDPIECE:
            yield id_, string, _wordpiece_surface(string, model.continuing_subword_prefix)
        else:
            replaced = string
            for old, new in replacements:
                replaced = replaced.replace(old, new)
            yield id_, string, replaced.encode()


def _slow_surfaces(view: TokenizerView) -> Iterator[tuple[int, str, bytes]]:
    """As :func:`_fast_surfaces`, of SentencePiece with an ``sp_model`` and of plain bytes as ByT5 has them."""
    model: Any = getattr(view.original, "sp_model", None)
    plain = getattr(view.original, "_utf_vocab_size", None) == 256
    if not hasattr(model, "id_to_piece") and not plain:
        raise AlignmentError(
            f"{view.name} is a slow tokenizer: it gives no offsets, and its vocabulary is of no kind that fusekit can "
            "rebuild (SentencePiece, plain bytes); use the fast tokenizer of this model if it has one"
        )
    for string, id_ in view.vocabulary.items():
        if plain:
            yield id_, string, bytes([ord(string)]) if len(string) == 1 and ord(string) < 256 else string.encode()
            continue
        piece = model.piece_to_id(string)
        byte = model.id_to_piece(piece) == string and model.is_byte(piece)
        yield id_, string, bytes([int(string[3:5], 16)]) if byte else string.replace(METASPACE, " ").encode()


def _unknown_id(view: TokenizerView) -> int | None:
    """The id that the model emits for text that it cannot spell."""
    if view.backend is None:
        id_ = getattr(view.original, "unk_token_id", None)
        return id_ if id_ in view.added_tokens else None
    model = view.backend.model
    if isinstance(model, models.Unigram):
        return json.loads(model.__getstate__()).get("unk_id")  # type: ignore[no-any-return]
    token = getattr(model, "unk_token", None)
    return view.backend.token_to_id(token) if token else None


def _make_surfaces(view: TokenizerView) -> Surfaces:
    form = Form.PLAIN if view.backend is None else _form(view)
    entries = list(_slow_surfaces(view) if view.backend is None else _fast_surfaces(view, form))
    if not entries:
        raise AlignmentError(f"{view.name} has an empty vocabulary")
    size = max(entry[0] for entry in entries) + 1
    of, strings, kinds = [b""] * size, [""] * size, np.zeros(size, np.uint8)
    added, unknown = view.added_tokens, _unknown_id(view)
    for id_, string, surface in entries:
        strings[id_], of[id_], kinds[id_] = string, surface, Kind.ORDINARY
        match = _BYTE_TOKEN.fullmatch(string)
        if id_ == unknown:
            kinds[id_] = Kind.UNKNOWN
        elif match and surface == bytes([int(match[1], 16)]):
            # Also where it is an added token: a text rarely spells one out, and ends.py asks whether it does.
            kinds[id_] = Kind.BYTE
            continue
        elif id_ in added:
            kinds[id_] = Kind.SPECIAL if added[id_].special else Kind.ADDED
        if id_ in added:  # it is looked for in the text as it is: it stands for its own characters
            of[id_] = added[id_].content.encode()
        elif id_ == unknown:
            of[id_] = string.encode()
    for id_ in view.roles.values():  # a token with a role is special even where the tokenizer forgot to mark it
        if id_ < size:
            kinds[id_] = Kind.SPECIAL
    padding = getattr(view.original, "pad_token_id", None)
    if padding is not None and padding < size and kinds[padding] != Kind.UNKNOWN:
        kinds[padding] = Kind.SPECIAL
    drops = form in (Form.WORDPIECE, Form.PLAIN) and bool(view.types("pre_tokenizer") & _DROP_SPACE)
    lengths = np.fromiter(map(len, of), np.int64, size)
    return Surfaces(view, form, drops, of, lengths, kinds, strings)


@functools.lru_cache(maxsize=8)  # what is derived holds the tokenizer, so weak references would never be dropped
def _surfaces_of(tokenizer: Any, _signs: tuple[Any, ...]) -> Surfaces:
    return _make_surfaces(_view_of(tokenizer))


def vocabulary_surfaces(tokenizer: Any) -> Surfaces:
    """Surfaces of a tokenizer's vocabulary, made once per tokenizer object and again when it was changed.

    Args:
        tokenizer: one of ``transformers`` (fast; slow where its vocabulary can be rebuilt) or ``tokenizers.Tokenizer``.

    Raises:
        AlignmentError: the vocabulary's entries do not stand for fixed bytes; names the tokenizer and the reason.
    """
    try:
        signs = _signs(tokenizer)
    except Exception:  # not a tokenizer, or one with custom Python parts: the view says so, with the name
        return _make_surfaces(_view_of(tokenizer))
    return _surfaces_of(tokenizer, signs)


def _signs(tokenizer: Any) -> tuple[Any, ...]:
    """What shows cheaply that a tokenizer object was changed."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return (hash(tokenizer), len(tokenizer))
    parts = [getattr(backend, name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    states = [part.__getstate__() if part is not None else None for part in parts]
    template = str(getattr(tokenizer, "chat_template", None))  # several templates are a dict
    return (hash(tokenizer), backend.get_vocab_size(with_added_tokens=True), *states, template)
