"""One model's side of a common text: how it tokenises the text, what it expects next, and its cache.

The models share bytes, not tokens. Every model has a cursor over the same bytes: the tokens that its own tokenizer
makes of them, behind the prompt under its own chat template, and a cache of what it has read. When text is added, only
the tokens that change are read; the cache is cropped to the others.
"""

from __future__ import annotations

import codecs
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fusekit.alignment.ends import tokenize
from fusekit.alignment.surfaces import vocabulary_surfaces
from fusekit.alignment.vocabulary_map import VocabularyMap, build_vocabulary_map
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_model, load_tokenizer
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.generation.respond import Prompt, device_of, limits_of, prompt_of
from fusekit.generation.settings import GenerationError
from fusekit.types import FRAGMENT, Message, Row

# In front of text that must not get a dummy space. Hardly any vocabulary joins the first one to what follows.
_GUARDS = ("\x01", "\n", ".", "a", "0")
_UNCERTAIN = -1  # the end of a token that stands at no certain byte of the text, after normalisation
_ANCHOR, _FURTHEST = 4, 256  # tokens that may change when text is added: at least, at most
_ROWS_KEPT = 64


def unfinished(data: bytes) -> int | None:
    """Bytes at the end of ``data`` that begin a character, None where it is not the beginning of any UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    return len(decoder.getstate()[0])


class Reader:
    """A causal language model of transformers with its tokenizer. name: how segments and errors call it.

    Raises:
        GenerationError: the tokenizer drops white space, so that the model cannot write exact text.
        AlignmentError: the tokens do not stand for fixed bytes.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.surfaces = vocabulary_surfaces(tokenizer)
        if self.surfaces.drops_space:
            raise GenerationError(
                f"{name}: its tokenizer drops white space, so the text it writes is not known exactly"
            )
        self._rows = RowTokenizer(tokenizer)
        self.device = device_of(model)
        self.limit, self.ends = limits_of(model, tokenizer)
        self._writable = [id_ for bytes_, id_ in self.surfaces.id_of.items() if unfinished(bytes_) is not None]
        self._continuing = [(s, id_) for s, id_ in self.surfaces.id_of.items() if 0x80 <= s[0] < 0xC0]
        self._masks: dict[tuple[bytes, bytes, int], torch.Tensor] = {}
        self._pieces: dict[bytes, int | None] = {}
        self._maps: dict[str, VocabularyMap] = {}
        self._dummy_space = self.surfaces.of[int(tokenize("a", tokenizer).ids[0])].startswith(b" ")
        takes = inspect.signature(model.forward).parameters
        self.keeps_logits, self.caches = "logits_to_keep" in takes, "past_key_values" in takes

    def prompt(self, messages: Sequence[Message], *, raw: bool) -> Prompt:
        """The ids of a conversation, or of one text to continue (``raw``), up to where the model begins to write.

        Raises GenerationError: the prompt is as long as the model's context, or the model has no chat template.
        """
        if raw:
            prompt = Prompt(self._rows.tokenize(Row((Message(FRAGMENT, messages[0].content),))).ids.tolist())
        else:
            try:
                self._rows.template  # noqa: B018  says what is missing
            except DataError as error:
                raise GenerationError(f"{error}; or continue the prompt as raw text (raw=True, --raw)") from error
            prompt = prompt_of(self._rows, messages)
            if not prompt.ends <= self.ends:
                self.ends |= prompt.ends
                self._masks.clear()
        if len(prompt.ids) >= self.limit:
            raise GenerationError(
                f"the prompt has {len(prompt.ids)} tokens for {self.name}, which reads at most {self.limit}: shorten it"
            )
        if not prompt.ids:
            raise GenerationError(f"the prompt has no token for {self.name}, which has no bos token either")
        return prompt

    def tokens(self, text: bytes) -> tuple[list[int], list[int]]:
        """Token ids of text within a text, and the byte end of each, -1 where it is uncertain. text: valid UTF-8."""
        if not text:
            return [], []
        if not self._dummy_space:
            found = tokenize(text.decode(), self.tokenizer)
            return found.ids.tolist(), np.where(found.lows <= found.ends, found.ends, _UNCERTAIN).tolist()
        for guard in _GUARDS:
            found = tokenize(guard + text.decode(), self.tokenizer)
            first = int(np.searchsorted(found.ends, 1, "right"))
            if first and found.lows[first - 1] <= 1 == found.ends[first - 1]:
                ends = np.where(found.lows <= found.ends, found.ends - 1, _UNCERTAIN)
                return found.ids[first:].tolist(), ends[first:].tolist()
        pieces = self.pieces(text)
        if pieces is None:
            raise GenerationError(f"{self.name} has no tokens for the text {text.decode()[:40]!r}")
        return pieces, np.cumsum([len(self.surfaces.of[id_]) for id_ in pieces]).tolist()

    def pieces(self, data: bytes) -> list[int] | None:
        """The longest tokens that spell ``data`` one after the other, whatever it is; None where a byte has none."""
        found, at, id_of = [], 0, self.surfaces.id_of
        while at < len(data):
            length = next((n for n in range(len(data) - at, 0, -1) if data[at : at + n] in id_of), 0)
            if not length:
                return None
            found.append(id_of[data[at : at + length]])
            at += length
        return found

    def first_piece(self, data: bytes) -> int | None:
        """The token for ``data``, or else the first of those that the tokenizer writes for it; None for none."""
        if data not in self._pieces:
            exact = self.surfaces.id_of.get(data)
            found = (
                [exact] if exact is not None else self.tokens(data)[0] if unfinished(data) == 0 else self.pieces(data)
            )
            self._pieces[data] = found[0] if found else None
        return self._pieces[data]

    def map_into(self, main: Reader) -> VocabularyMap:
        """The map from this vocabulary into another model's."""
        key = main.surfaces.fingerprint
        if key not in self._maps:
            self._maps[key] = build_vocabulary_map(main.tokenizer, self.tokenizer, method="prefix")
        return self._maps[key]

    def mask(self, need: bytes, part: bytes, size: int) -> torch.Tensor:
        """bool [size]: tokens that may follow a begun character (``part``), or begin with what the lead still needs."""
        key = (need, part, size)
        if key not in self._masks:
            allowed = self._writable
            if part:
                allowed = [id_ for surface, id_ in self._continuing if unfinished(part + surface) is not None]
            elif need:
                of = self.surfaces.of
                allowed = [i for i in allowed if of[i].startswith(need) or need.startswith(of[i])]
            mask = torch.zeros(size, dtype=torch.bool)
            mask[[id_ for id_ in allowed if id_ < size and id_ not in self.ends]] = True
            self._masks[key] = mask
        return self._masks[key]


class Next(NamedTuple):
    """What a model expects next, among what may follow: probabilities float32 [V] of tokens, and of the end of turn."""

    tokens: torch.Tensor
    end: float

    def best(self) -> tuple[int | None, float]:
        """The most probable token, None for the end of turn, and its probability; (None, 0) where nothing fits."""
        at = int(self.tokens.argmax())
        value = float(self.tokens[at])
        return (at, value) if value > self.end else (None, self.end)


class Cursor:
    """One model's place in a text.

    lead: bytes between the prompt and the text that only this model's template has; positions here count them. ids,
    ends: the tokens behind the prompt, and the byte end of each. forwarded: tokens that went through the model.
    """

    def __init__(self, reader: Reader, prompt: Prompt) -> None:
        self.reader, self.lead = reader, prompt.lead
        self.ids: list[int] = []
        self.ends: list[int] = []
        self.forwarded = 0
        self._prompt = prompt.ids
        self._cache: Any = None
        self._cached: list[int] = []  # tokens in the cache
        self._same = 0  # of them, at least so many are those of the text
        self._logprobs: dict[int, torch.Tensor] = {}  # tokens read -> float32 [V], while the cache has them

    # ---------------------------------------------------------------- text

    def __len__(self) -> int:
        return len(self._prompt) + len(self.ids)

    @property
    def need(self) -> bytes:
        """What is left of the lead to be written."""
        return self.lead[self.ends[-1] if self.ends else 0 :]

    def follow(self, text: bytes) -> bool:
        """Read the text as the tokenizer writes it, where the tokens here are of its beginning.

        text: without the lead; it may end within a character. Returns False where the tokenizer cannot write that end.
        """
        data = self.lead + text
        whole = len(data) - (unfinished(data) or 0)
        keep, start = self._anchor(whole, data)
        ids, ends = self.reader.tokens(data[start:whole])
        rest = self.reader.pieces(data[whole:])
        ends = [end + start if end >= 0 else end for end in ends]
        if rest:
            ends += (whole + np.cumsum([len(self.reader.surfaces.of[id_]) for id_ in rest])).tolist()
        elif ends:
            ends[-1] = whole
        self._replace(keep, ids + (rest or []), ends)
        return rest is not None

    def push(self, id_: int) -> bytes:
        """Add a token of the model's own choice. Returns its bytes that are not of the lead."""
        surface = self.reader.surfaces.of[id_]
        need = self.need
        self.ids.append(id_)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(surface))
        return surface[len(need) :]

    def rewind(self, tokens: int) -> None:
        """Drop all but the first ``tokens`` behind the prompt."""
        self._replace(tokens, [], [])

    def restore(self, ids: list[int], ends: list[int]) -> None:
        """Go back to the tokens of an earlier text."""
        keep = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), len(ids))
        self._replace(min(keep, len(self.ids)), ids[keep:], ends[keep:])

    def boundaries(self, text: bytes) -> set[int]:
        """The certain byte ends of the last few tokens of a text that begins as the one here; reads nothing."""
        data = self.lead + text
        data = data[: len(data) - (unfinished(data) or 0)]
        _, start = self._anchor(len(data), data)
        return {end + start for end in self.reader.tokens(data[start:])[1] if end >= 0} | {start}

    def _anchor(self, limit: int, data: bytes) -> tuple[int, int]:
        """Tokens that stay whatever is added to the text, and their byte end: up to a word that began some tokens ago.

        Tokenizers cut text into words first, so where a word begins they start over.
        """
        furthest = max(len(self.ids) - _FURTHEST, 0)
        for keep in range(len(self.ids) - _ANCHOR, furthest, -1):
            end = self.ends[keep - 1]
            if 0 < end < limit and data[end : end + 1] == b" " and not data[end - 1 : end].isspace():
                return keep, end
        for keep in range(furthest, 0, -1):
            end = self.ends[keep - 1]
            if 0 < end < limit and unfinished(data[:end]) == 0:
                return keep, end
        return 0, 0

    def _replace(self, keep: int, ids: list[int], ends: list[int]) -> None:
        self._same = min(self._same, len(self._prompt) + keep)
        self.ids[keep:], self.ends[keep:] = ids, ends

    # ---------------------------------------------------------------- model

    def next(self, part: bytes = b"") -> Next:
        """What the model expects after its tokens. part: the begun character that the text ends with."""
        logprobs = self._read(len(self), len(self))[0]
        probs = logprobs.exp()
        mask = self.reader.mask(self.need, part, len(probs))
        end = 0.0 if part else float(probs[self._end_ids(len(probs))].sum())
        tokens = probs.where(mask, 0.0)
        total = float(tokens.sum()) + end
        return Next(tokens / total, end / total) if total > 0 else Next(tokens, 0.0)

    def nll(self, first: int) -> list[float]:
        """Nats of each token from number ``first`` behind the prompt on; the model need not read the last one."""
        found: list[float] = []
        for begin in range(first, len(self.ids), _ROWS_KEPT):
            ids = self.ids[begin : begin + _ROWS_KEPT]
            rows = self._read(len(self._prompt) + begin, len(self._prompt) + begin + len(ids) - 1)
            found += [-float(row[id_]) for row, id_ in zip(rows, ids, strict=True)]
        return found

    def end_nll(self) -> float:
        """Nats of the end of turn after the tokens."""
        row = self._read(len(self), len(self))[0]
        return -float(row[self._end_ids(len(row))].logsumexp(0))

    def _end_ids(self, size: int) -> list[int]:
        return sorted(id_ for id_ in self.reader.ends if id_ < size)

    @torch.inference_mode()
    def _read(self, low: int, high: int) -> list[torch.Tensor]:
        """Log-probabilities float32 [V] after the first ``low`` to ``high`` tokens; reads those that are not cached."""
        ids = self._prompt + self.ids if self._same < high or len(self._cached) < high else []
        while self._same < min(len(self._cached), high) and self._cached[self._same] == ids[self._same]:
            self._same += 1
        wanted = range(low, high + 1)
        if missing := [count for count in wanted if count > self._same or count not in self._logprobs]:
            self._crop(min(self._same, missing[0] - 1))
            first = next(count for count in wanted if count not in self._logprobs)
            self._forward((ids or self._prompt + self.ids)[len(self._cached) : high], first)
        return [self._logprobs[count] for count in wanted]

    def _crop(self, tokens: int) -> None:
        """Take what follows the first ``tokens`` out of the cache; all of it, where the model cannot undo reading."""
        excess = len(self._cached) - tokens
        if not self.reader.caches:
            self._cache, tokens = None, 0
        elif excess > 0:
            try:
                self._cache.crop(-excess)
            except (AttributeError, NotImplementedError, RuntimeError, ValueError):  # recurrent states
                self._cache, tokens = None, 0
        del self._cached[tokens:]
        self._same = min(self._same, tokens)
        self._logprobs = {count: row for count, row in self._logprobs.items() if count <= tokens}

    def _forward(self, ids: list[int], first: int) -> None:
        """Read tokens behind the cached ones; keep the rows from that after ``first`` tokens on."""
        if self._cache is None and self.reader.caches:
            self._cache = _new_cache(self.reader.model)
        total = len(self._cached) + len(ids)
        # A recurrent state that has begun takes one token at a time in most models.
        size = 1 if self._cached and not _is_plain(self._cache) else len(ids)
        for begin in range(0, len(ids), size):
            piece = ids[begin : begin + size]
            count = len(self._cached) + len(piece)
            keep = min(max(count - first + 1, 1), len(piece))
            more = {"logits_to_keep": keep} if self.reader.keeps_logits else {}
            tensor = torch.tensor([piece], device=self.reader.device)
            cache = {"past_key_values": self._cache, "use_cache": True} if self.reader.caches else {}
            output = self.reader.model(input_ids=tensor, **cache, **more)
            rows = output.logits[0, -keep:].float().log_softmax(-1).cpu()
            self._cached += piece
            for row, at in zip(rows, range(count - keep + 1, count + 1), strict=True):
                self._logprobs[at] = row
        self._same = total
        self.forwarded += len(ids)
        for count in [count for count in self._logprobs if count < total - _ROWS_KEPT]:
            del self._logprobs[count]


def _new_cache(model: Any) -> Any:
    """A cache of keys and values that can be cropped; the model's own kind where it has recurrent states."""
    from transformers import DynamicCache

    own = DynamicCache(config=model.config)
    # One that forgets what a sliding window has passed cannot be cropped; the mask does what the window is for.
    return DynamicCache() if _is_plain(own) else own


def _is_plain(cache: Any) -> bool:
    """Whether all layers hold the keys and values of tokens, which are as they were once the last ones are removed."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in getattr(cache, "layers", ()))


def load_readers(models: Sequence[Any]) -> list[Reader]:
    """The models that a user names.

    Args:
        models: ids, folders, :class:`ModelChoice`, loaded models whose tokenizer is where they came from, or pairs of a
            model and its tokenizer; readers stay as they are.

    Raises:
        GenerationError: fewer than two.
        CaptureError: one cannot be found or loaded.
    """
    if isinstance(models, (str, Path)) or not isinstance(models, Sequence) or len(models) < 2:
        raise GenerationError(f"an ensemble takes at least two models; given: {models or 'none'}")
    readers: list[Reader] = []
    for model in models:
        if not isinstance(model, Reader):
            loaded, tokenizer, path = _load(model)
            taken, name = {reader.name for reader in readers}, Path(path).name
            name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(models) + 2))) if n not in taken)
            model = Reader(loaded, tokenizer, name)  # noqa: PLW2901
        readers.append(model)
    return readers


def _load(model: Any) -> tuple[Any, Any, str]:
    """A model, its tokenizer, and where it is from."""
    if isinstance(model, tuple):
        return *model, model[0].name_or_path or type(model[0]).__name__
    if hasattr(model, "forward"):
        if not model.name_or_path:
            raise GenerationError(f"{type(model).__name__} names no folder of its tokenizer: give (model, tokenizer)")
        checkpoint = find_checkpoint(ModelChoice(model.name_or_path), weights=False)
        return model, load_tokenizer(checkpoint), model.name_or_path
    choice = model if isinstance(model, ModelChoice) else ModelChoice(str(model))
    checkpoint = find_checkpoint(choice)
    checkpoint.fetch(bar=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(checkpoint, device), load_tokenizer(checkpoint), choice.model
