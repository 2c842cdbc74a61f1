"""One view of every kind of tokenizer: encode without special tokens, and say how token strings are written.

``transformers`` is never imported here: its tokenizers are recognised by what they carry. The view calls the Rust
backend directly, as transformers does for a plain ``tokenizer(text, add_special_tokens=False)``; a tokenizer class
that overrides the encoding itself is called through its own ``__call__``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from fusekit.errors import AlignmentError
from fusekit.types import IntArray

# The roles by which special tokens correspond across tokenizers. Padding is deliberately absent: nothing maps to it.
ROLES = ("bos", "eos", "end_of_turn")


_DUMMY_SPACES = (" ", "▁")


def _normalized(normalizer: Any, prepends: bool, text: str) -> str:
    normalized = str(normalizer.normalize_str(text))
    return normalized[1:] if prepends and normalized.startswith(_DUMMY_SPACES) else normalized


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
        return partial(_normalized, self.backend.normalizer, self.prepends)

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
        return _roles(self)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, or None."""
        value = getattr(self.original, "pad_token_id", None)
        return None if value is None else int(value)


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
        state = json.loads(component.__getstate__())
    except Exception as error:  # a component written in Python (`PreTokenizer.custom`) has no serialised form
        raise AlignmentError(
            f"the {type(component).__name__} of the tokenizer is custom Python code and cannot be read: {error}"
        ) from error
    return leaves(state)


def _name(tokenizer: Any) -> str:
    kind = type(tokenizer).__name__
    path = getattr(tokenizer, "name_or_path", "")
    if path:
        return f"{path} ({kind})"
    if isinstance(tokenizer, Tokenizer):
        return f"{kind}({type(tokenizer.model).__name__}, {tokenizer.get_vocab_size()} entries)"
    return kind


def _encodes_plainly(tokenizer: Any) -> bool:
    """Whether the class leaves encoding to transformers' own code, which passes the text to the backend as it is."""
    return all(
        getattr(getattr(type(tokenizer), method, None), "__module__", "").startswith("transformers.tokenization_utils")
        for method in ("__call__", "_encode_plus")
    )


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


def _roles(view: TokenizerView) -> dict[str, int]:
    roles = {}
    for role in ("bos", "eos"):
        value = getattr(view.original, f"{role}_token_id", None)
        if value is not None:
            roles[role] = int(value)
    value = _end_of_turn(view.original)
    if value is None:
        value = roles.get("eos")
    if value is not None:
        roles["end_of_turn"] = int(value)
    return roles


def view_of(tokenizer: Any) -> TokenizerView:
    """The view of a tokenizer. Raises AlignmentError for what is none."""
    if isinstance(tokenizer, Tokenizer):
        return TokenizerView(_name(tokenizer), tokenizer, tokenizer, direct=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return TokenizerView(_name(tokenizer), tokenizer, backend, direct=_encodes_plainly(tokenizer))
    if callable(tokenizer) and hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "convert_ids_to_tokens"):
        return TokenizerView(_name(tokenizer), tokenizer, None, direct=False)
    raise AlignmentError(
        f"{_name(tokenizer)} is not a tokenizer of transformers or tokenizers: load it with "
        "transformers.AutoTokenizer, or wrap it in transformers.PreTrainedTokenizerFast"
    )


def signs_of(tokenizer: Any) -> tuple[Any, ...]:
    """Cheap signs that a tokenizer object was changed after a view of it was made."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return (len(tokenizer),)
    parts = [getattr(backend, name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    states = [part.__getstate__() if part is not None else None for part in parts]
    return (backend.get_vocab_size(with_added_tokens=True), *states, getattr(tokenizer, "chat_template", None))


def slow_surfaces(view: TokenizerView) -> Iterator[tuple[int, str, bytes]]:
    """``(id, token string, surface)`` of every entry of a tokenizer without a backend.

    Raises:
        AlignmentError: it is neither SentencePiece with an ``sp_model`` nor plain bytes as ByT5 has them.
    """
    model = getattr(view.original, "sp_model", None)
    sentencepiece, plain = hasattr(model, "id_to_piece"), getattr(view.original, "_utf_vocab_size", None) == 256
    if not sentencepiece and not plain:
        raise AlignmentError(
            f"{view.name} is a slow tokenizer: it gives no offsets, and its vocabulary is of no kind that fusekit can "
            "rebuild (SentencePiece, plain bytes); use the fast tokenizer of this model if it has one"
        )
    for string, id_ in view.vocabulary.items():
        if plain:
            yield id_, string, bytes([ord(string)]) if len(string) == 1 and ord(string) < 256 else string.encode()
            continue
        piece = model.piece_to_id(string)  # type: ignore[union-attr]
        byte = model.id_to_piece(piece) == string and model.is_byte(piece)  # type: ignore[union-attr]
        yield id_, string, bytes([int(string[3:5], 16)]) if byte else string.replace("▁", " ").encode()
