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
from fusekit.capturing.models import ModelChoice, device_of, find_checkpoint, load_model, load_tokenizer
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError, GenerationError
from fusekit.generation.respond import Prompt, limits_of, prompt_of
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

    Raises GenerationError for a tokenizer that drops white space, AlignmentError for tokens that are not fixed bytes.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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
        layers = getattr(DynamicCache(config=model.config), "layers", ()) if self.caches else ()
        # Of a recurrent state the last tokens cannot be taken back.
        self.crops = self.caches and all(type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in layers)

    def new_cache(self) -> Any:
        """An empty cache; None for a model that takes none."""
        from transformers import DynamicCache

        # A layer that forgets what a sliding window has passed cannot be cropped; the mask does what the window is for.
        return None if not self.caches else DynamicCache() if self.crops else DynamicCache(config=self.model.config)

    def prompt(self, messages: Sequence[Message], *, raw: bool) -> Prompt:
        """The ids of a conversation, or of one text to continue (``raw``), up to where the model begins to write.

        Raises GenerationError: the prompt is as long as the model's context, or the model has no chat template.
        """
        if raw:
            prompt = Prompt(self._rows.tokenize(Row((Message(FRAGMENT, messages[0].content),))).ids.tolist())
        else:
            try:
                prompt = prompt_of(self._rows, messages)
            except DataError as error:
                raise GenerationError(f"{error}; or continue the prompt as raw text (raw=True, --raw)") from error
            if not prompt.ends <= self.ends:
                self.ends |= prompt.ends
                self._masks.clear()
        if len(prompt.ids) >= self.limit:
            raise GenerationError(
                f"the prompt has {len(prompt.ids)} tokens for {self.name}, which reads at most {self.limit}: shorten it"
            )
        return prompt

    def tokens(self, text: bytes) -> tuple[list[int], list[int]]:
        """Token ids of text within a text, and the byte end of each, -1 where it is uncertain. text: valid UTF-8."""
        if not text:
            return [], []
        for guard in _GUARDS if self._dummy_space else ("",):
            found, size = tokenize(guard + text.decode(), self.tokenizer), len(guard)
            first = int(np.searchsorted(found.ends, size, "right")) if size else 0
            if not size or (first and found.lows[first - 1] <= size == found.ends[first - 1]):
                ends = np.where(found.lows <= found.ends, found.ends - size, _UNCERTAIN)
                return found.ids[first:].tolist(), ends[first:].tolist()
        pieces = self.pieces(text)
        if pieces is None:
            raise GenerationError(f"{self.name} has no tokens for the text {text.decode()[:40]!r}")
        return pieces, np.cumsum([len(self.surfaces.of[id_]) for id_ in pieces]).tolist()

    def pieces(self, data: bytes) -> list[int] | None:
        """The longest tokens that spell ``data`` one after the other, whatever it is; None where a byte has none."""
        found = []
        while data:
            id_ = self.surfaces.longest_prefix(data)
            if id_ < 0:
                return None
            found.append(id_)
            data = data[len(self.surfaces.of[id_]) :]
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
        self._logprobs: dict[int, torch.Tensor] = {}  # number of cached tokens -> float32 [V], what follows them

    def __len__(self) -> int:
        return len(self._prompt) + len(self.ids)

    @property
    def need(self) -> bytes:
        """What is left of the lead to be written."""
        return self.lead[self.ends[-1] if self.ends else 0 :]

    # ---------------------------------------------------------------- text

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
        self.ids[keep:], self.ends[keep:] = ids + (rest or []), ends
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
        del self.ids[tokens:], self.ends[tokens:]

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

    # ---------------------------------------------------------------- model

    def next(self, part: bytes = b"") -> Next:
        """What the model expects after its tokens. part: the begun character that the text ends with."""
        probs = self._read(len(self), len(self))[0].exp()
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

    def _read(self, low: int, high: int) -> list[torch.Tensor]:
        """Log-probabilities float32 [V] after the first ``low`` to ``high`` tokens; reads those that are not cached."""
        ids, cached = self._prompt + self.ids, self._cached
        same = len(cached)
        if ids[:same] != cached:
            same = next((at for at, (a, b) in enumerate(zip(ids, cached, strict=False)) if a != b), len(ids))
        wanted = range(low, high + 1)
        if missing := [count for count in wanted if count > same or count not in self._logprobs]:
            self._crop(min(same, missing[0] - 1))
            first = next(count for count in wanted if count not in self._logprobs)
            self._forward(ids[len(self._cached) : high], first)
        return [self._logprobs[count] for count in wanted]

    def _crop(self, tokens: int) -> None:
        """Take what follows the first ``tokens`` out of the cache; all of it, where the model cannot undo reading."""
        excess = len(self._cached) - tokens
        if not self.reader.caches or (excess and not self.reader.crops):
            self._cache, tokens = None, 0
        elif excess:
            self._cache.crop(-excess)
        del self._cached[tokens:]
        self._logprobs = {count: row for count, row in self._logprobs.items() if count <= tokens}

    @torch.inference_mode()
    def _forward(self, ids: list[int], first: int) -> None:
        """Read tokens behind the cached ones; keep the rows from that after ``first`` tokens on."""
        reader = self.reader
        if self._cache is None:
            self._cache = reader.new_cache()
        # A recurrent state that has begun takes one token at a time in most models.
        size = 1 if self._cached and reader.caches and not reader.crops else len(ids)
        for begin in range(0, len(ids), size):
            piece = ids[begin : begin + size]
            count = len(self._cached) + len(piece)
            keep = min(max(count - first + 1, 1), len(piece))
            more = {"logits_to_keep": keep} if reader.keeps_logits else {}
            cache = {"past_key_values": self._cache, "use_cache": True} if reader.caches else {}
            output = reader.model(input_ids=torch.tensor([piece], device=reader.device), **cache, **more)
            rows = output.logits[0, -keep:].float().log_softmax(-1).cpu()
            self._cached += piece
            self._logprobs |= zip(range(count - keep + 1, count + 1), rows, strict=True)
        self.forwarded += len(ids)
        oldest = len(self._cached) - _ROWS_KEPT
        self._logprobs = {count: row for count, row in self._logprobs.items() if count >= oldest}


def load_readers(models: Sequence[Any]) -> list[Reader]:
    """The models that a user names: ids, folders, ModelChoices, loaded models, pairs of a model and its tokenizer.

    Readers stay as they are. Raises GenerationError for fewer than two, CaptureError for one that is not found.
    """
    if isinstance(models, (str, Path)) or len(models) < 2:
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
        checkpoint = find_checkpoint(ModelChoice(model.name_or_path), weights=False)
        return model, load_tokenizer(checkpoint), model.name_or_path
    choice = model if isinstance(model, ModelChoice) else ModelChoice(str(model))
    checkpoint = find_checkpoint(choice)
    checkpoint.fetch(bar=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(checkpoint, device), load_tokenizer(checkpoint), choice.model
