"""Rows as one model reads them: its tokens, each with its place in the contents, and which are to be learned."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import groupby, pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np
import xxhash
from tokenizers import AddedToken, Tokenizer

from fusekit.alignment.ends import Mark, check_encodable, marked_ends
from fusekit.alignment.surfaces import Kind, vocabulary_surfaces
from fusekit.data.templates import ChatTemplate, Region, Rendered, Renderer, Span, stand_ins
from fusekit.errors import DataError
from fusekit.types import FRAGMENT, TEXT, BoolArray, IntArray, Message, Part, Row, TokenizedRow, TokenizedText

_NONCE = "\U000fab50"
"""A private character, to call the control tokens of a template by names that no data spell."""


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
        tokenizer: of ``transformers``.
        control: ids of further added tokens that are control tokens, beside those marked special and those with a role:
            what the template writes. All other added tokens are part of the vocabulary, in contents too.

    Attributes:
        surfaces: of the vocabulary.
        strings, id_of: what each control token is looked for as, by id, and the other way round; tokens of byte
            fallback are none, however marked.
    """

    def __init__(self, tokenizer: Any, control: Sequence[int] = ()) -> None:
        self.surfaces = surfaces = vocabulary_surfaces(tokenizer)
        wanted = {*control, *surfaces.roles.values()}
        self.strings = {
            id_: token.content
            for id_, token in surfaces.added_tokens.items()
            if token.content and (token.special or id_ in wanted) and surfaces.kinds[id_] != Kind.BYTE
        }
        spelled = sorted(set(self.strings.values()), key=lambda string: (-len(string), string))
        self._control = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self.id_of = {string: id_ for id_, string in self.strings.items()}
        self._is_control = np.zeros(len(surfaces), bool)
        unknown = surfaces.kinds == Kind.UNKNOWN  # what stands for any text is no sign of a control token
        self._is_control[[id_ for id_ in self.strings if not unknown[id_]]] = True

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
        check_encodable(text)
        expected = [part.id for part in parts if part.id >= 0]
        if not any(part.content and part.id < 0 and self._control.search(part.text) for part in parts):
            ids = self.surfaces.encode(text)
            at = np.flatnonzero(self._is_control[ids])
            if [ids[i] for i in at.tolist()] == expected:
                spans = lambda: self.surfaces.encode_with_offsets(text)[1]  # noqa: E731
                return marked_ends(ids, at.tolist(), text, _marks(parts), self.surfaces, offsets=spans), at
        return self._encode_guarded(text, parts, expected)

    def _encode_guarded(
        self, text: str, parts: Sequence[Stretch], expected: list[int]
    ) -> tuple[TokenizedText, IntArray]:
        if _NONCE in text:
            raise DataError("the example holds the private character U+FAB50, which fusekit needs for itself")
        copy, alias_of, own_ids = self._copy
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

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int, str], IntArray]:
        """A copy of the tokenizer that knows only the template's control tokens, their names in it, and ids by its."""
        surfaces = self.surfaces
        # The vocabulary is shared: to read a large one again takes seconds. What is changed here is the copy's own.
        copy = Tokenizer(surfaces.backend.model)
        for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if getattr(surfaces.backend, name) is not None:
                setattr(copy, name, getattr(surfaces.backend, name))
        # In the order of their ids, which are counted on from the vocabulary's.
        for control, added in groupby(sorted(surfaces.added_tokens), lambda id_: id_ in self.strings):
            tokens = [_renamed(surfaces.added_tokens[id_], surfaces.added_tokens[id_].content) for id_ in added]
            (copy.add_special_tokens if control else copy.add_tokens)(tokens)
        size = max(copy.get_vocab_size(with_added_tokens=True), len(surfaces))
        alias_of = {id_: f"{_NONCE}{chr(0xF0000 + n)}{_NONCE}" for n, id_ in enumerate(sorted(self.strings))}
        copy.add_tokens([_renamed(surfaces.added_tokens[id_], alias) for id_, alias in alias_of.items()])
        copy.encode_special_tokens = True
        own_ids = np.arange(size + len(alias_of) + 1)
        for id_, alias in alias_of.items():
            own_ids[copy.token_to_id(alias)] = id_
        return copy, alias_of, own_ids

    def __getstate__(self) -> dict[str, Any]:
        # A tokenizer that is pickled looks for control tokens again.
        return {name: value for name, value in self.__dict__.items() if name != "_copy"}


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


TRAIN_ON = ("assistant", "all")
_ASKED = ("user", "assistant")
_SAMPLED = (_ASKED, _ASKED * 2, ("system", *_ASKED))


class RowTokenizer:
    """One model's reading of rows.

    Args:
        tokenizer: of ``transformers``; any kind whose tokens' bytes can be known (:mod:`fusekit.alignment`).
        template: the chat template; None for :meth:`ChatTemplate.of` the tokenizer.
        train_on: ``assistant``: what the assistant writes and the end of its turn; ``all``: every token but the first.
            Of plain text everything is learned but bos.
        foreign: the tokenizer that a template without control strings of its own was written for. The template's
            bos, eos and end of turn are written as this tokenizer's own, where it does not have them as they are.
        date: the day that a template prints which asks for today's; None for today.

    Raises:
        DataError: unknown ``train_on``, no template, or one that cannot be used.
        AlignmentError: the tokens of this tokenizer do not stand for fixed bytes.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate | None = None,
        train_on: str = "assistant",
        foreign: Any = None,
        date: datetime.date | None = None,
    ) -> None:
        if train_on not in TRAIN_ON:
            raise DataError(f"train_on is {train_on!r}: it is one of {', '.join(TRAIN_ON)}")
        self.tokenizer, self.train_on = tokenizer, train_on
        self._given, self._foreign = template, foreign
        self.date = date or datetime.date.today()
        self.encoder = Encoder(tokenizer)
        self.name = self.encoder.surfaces.name

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raises DataError where none was given and the tokenizer has none."""
        template = self._given if self._given is not None else ChatTemplate.of(self.tokenizer)
        return template if self._foreign is None else template.with_roles_of(self._foreign)

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over the tokenizer, the template and what is learned."""
        facts = self.facts
        template = self.template.fingerprint if facts["chat_template"] is not None else "none"
        parts = [self.encoder.surfaces.fingerprint, template, self.train_on, repr(self._bos)]
        parts.append(str(facts.get("date", "no date")))
        return xxhash.xxh3_128_hexdigest("\0".join(["fusekit rows 2", *parts]).encode())

    @property
    def facts(self) -> dict[str, str | None]:
        """``chat_template``: where it comes from, None for a model that has none; ``date``: the day that it prints."""
        try:
            template = self.template
        except DataError:  # plain text needs none
            return {"chat_template": None}
        origin = template.origin if self._foreign is None else f"the pivot's: {template.origin}"
        facts: dict[str, str | None] = {"chat_template": origin}
        return facts | ({"date": self.date.isoformat()} if template.prints_date else {})

    @property
    def ends_turns(self) -> bool:
        """Whether the template ends an assistant's turn with a control token of this tokenizer; else no turn links."""
        return self._ending[0] >= 0

    @property
    def turn_end_text(self) -> str:
        """What the template writes after an answer where no control token ends it; empty where one does."""
        return "" if self.ends_turns else self._ending[1]

    def tokenize(self, row: Row) -> TokenizedRow:
        """The tokens of a row up to its cut.

        Raises:
            DataError: the template refuses the row, a cut is in a message whose content is at no known place, or a
                control token in a content cannot be read as text.
            AlignmentError: the tokens' ends cannot be known.
        """
        _check_cut(row)
        found = self._tokenize_text(row) if row.is_text else self._tokenize_chat(row)
        found.labels[np.isin(found.message, row.context)] = False
        return found

    def _tokenize_chat(self, row: Row) -> TokenizedRow:
        if any(message.role in (TEXT, FRAGMENT) for message in row.messages):
            raise DataError(f"example {row.key} mixes plain text with messages of a conversation")
        stretches, contents = self._layout(row)
        tokens, at = self._encoder_for_template.encode([stretch for stretch in stretches if stretch.text])
        before = takewhile(lambda stretch: not stretch.content, stretches)
        bos = [] if any(stretch.id in self._bos for stretch in before) else self._bos
        for id_ in reversed(bos):
            tokens = tokens.opened(id_)
        found = _coordinates(row.key, tokens, at + len(bos), stretches, contents)
        if self.train_on == "all":
            found.labels[1:] = True
        found.labels[: len(bos)] = False
        return found

    @cached_property
    def _bos(self) -> list[int]:
        """The tokens that the tokenizer puts before any text, or says that it does (``add_bos_token``)."""
        with_bos = list(self.tokenizer("a")["input_ids"])
        surfaces = self.encoder.surfaces
        plain, bos = surfaces.encode("a"), surfaces.roles.get("bos")
        at = next((i for i in range(len(with_bos)) if with_bos[i : i + len(plain)] == plain), 0)
        if at == 0 and bos is not None and (with_bos[:1] == [bos] or getattr(self.tokenizer, "add_bos_token", False)):
            return [bos]
        return [int(id_) for id_ in with_bos[:at]]

    def _tokenize_text(self, row: Row) -> TokenizedRow:
        eos = self.encoder.surfaces.roles.get("eos")
        contents, stretches, at = [], [], []
        count = len(self._bos)
        ids, ends, lows = list(self._bos), [0] * count, [0] * count
        position = 0
        for number, (role, content) in enumerate(row.messages[: None if row.cut is None else row.cut.message + 1]):
            whole = row.cut is None or number < row.cut.message
            if row.cut is not None and not whole:
                content = content.encode()[: row.cut.size].decode()  # noqa: PLW2901
            tokens, _ = self.encoder.encode([Stretch(content, content=True)] if content else [])
            size = len(content.encode())
            contents.append(Content(number, position, position + size, 0, size, size))
            stretches.append(Stretch(content, -1, True, number, label=True))
            ids += tokens.ids.tolist()
            ends += (tokens.ends + position).tolist()
            lows += (tokens.lows + position).tolist()
            position += size
            if role == TEXT and whole:
                if eos is None:
                    raise DataError(f"{self.name} has no eos token, which ends a document: set tokenizer.eos_token")
                string = self.encoder.surfaces.strings[eos]
                at.append(len(ids))
                position += len(string.encode())
                ids.append(eos)
                ends.append(position)
                lows.append(position)
                stretches.append(Stretch(string, eos, False, number, True, True))
        tokens = TokenizedText.of(ids, np.array(ends, np.int64), np.array(lows, np.int64))
        found = _coordinates(row.key, tokens, np.array(at, np.int64), stretches, contents)
        found.labels[: max(count, 1)] = False
        return found

    @cached_property
    def _renderer(self) -> Renderer:
        surfaces = self.encoder.surfaces
        variables = dict(getattr(self.tokenizer, "special_tokens_map", {}))
        for role in ("bos", "eos"):
            own = surfaces.added_tokens[surfaces.roles[role]].content if role in surfaces.roles else ""
            given = getattr(self.template, role)
            variables[f"{role}_token"] = own if given is None else given
        name = f"the chat template {self.template.name} for {self.name}"
        return Renderer(self.template.source_on(self.date), variables, name)

    @cached_property
    def _samples(self) -> dict[tuple[str, ...], Rendered]:
        """Conversations of stand-ins, by those roles that the template takes."""
        found: dict[tuple[str, ...], Rendered] = {}
        for roles in _SAMPLED:
            with suppress(DataError):
                found[roles] = self._renderer.render(stand_ins(roles))
        return found

    @cached_property
    def _written_as(self) -> dict[str, tuple[str, int]]:
        """The template's control strings that this tokenizer does not have: what each is written as, and its id."""
        surfaces = self.encoder.surfaces
        have = {token.content for token in surfaces.added_tokens.values()}
        written: dict[str, tuple[str, int]] = {}
        for role in ("bos", "end_of_turn", "eos"):
            string, own = getattr(self.template, role), surfaces.roles.get(role)
            if not string or string in have or string in written:
                continue
            if role == "bos" and _ASKED in self._samples and self._samples[_ASKED].text.count(string) > 1:
                continue  # text, as other strings of the template: it begins every turn (<|im_start|> of some)
            if own is not None:
                written[string] = (surfaces.added_tokens[own].content, own)
            elif role == "bos":
                written[string] = ("", -1)  # as text it would only be noise
        return written

    @cached_property
    def _encoder_for_template(self) -> Encoder:
        """The encoder that also knows the added tokens that the template writes, marked special or not."""
        rendered = "\n".join(sample.text for sample in self._samples.values())
        # Those that a template structures turns with: neither words nor white space.
        used = [
            id_
            for id_, token in self.encoder.surfaces.added_tokens.items()
            if token.content.strip() and not token.content.isalnum() and token.content in rendered
        ]
        return Encoder(self.tokenizer, used) if set(used) - self.encoder.strings.keys() else self.encoder

    @cached_property
    def _ending(self) -> tuple[int, str]:
        """How the template ends an assistant's turn: its control token, -1 for none, and all of it up to there."""
        for roles, rendered in self._samples.items():
            if roles[0] == "user" and rendered.regions and rendered.regions[-1].message == len(roles) - 1:
                tail = rendered.text[rendered.regions[-1].stop :]
                found = (entry for entry in self._control_strings(tail) if entry[2] >= 0)
                return next(((id_, tail[:stop]) for _, stop, id_, _ in found), (-1, tail))
        return -1, ""

    def _control_strings(self, text: str, *, begins: bool = False) -> list[tuple[int, int, int, str]]:
        """``(start, stop, id, written as)`` of each control string of the template's own text; id -1 for none.

        begins: whether the row begins with this text: only there a foreign bos becomes the model's own, and once.
        """
        found = [(m.start, m.stop, m.id, text[m.start : m.stop]) for m in self._encoder_for_template.find_control(text)]
        for string, (own, id_) in self._written_as.items():
            for start, stop in (match.span() for match in re.finditer(re.escape(string), text)):
                found = [entry for entry in found if entry[1] <= start or entry[0] >= stop]
                dropped = string == self.template.bos and not begins
                found.append((start, stop, -1 if dropped else id_, "" if dropped else own))
                begins = begins and string != self.template.bos
        return sorted(found)

    def _layout(self, row: Row) -> tuple[list[Stretch], list[Content]]:
        """The rendered row in stretches up to its cut, and where the contents stand in their bytes."""
        rendered = self._renderer.render(row.messages, row.key)
        regions = rendered.regions
        if row.cut is not None and not any(r.message == row.cut.message and r.first is not None for r in regions):
            raise DataError(
                f"example {row.key} is cut in message {row.cut.message}, whose content {self._renderer.name} rewrites"
            )
        learned = list(rendered.generated or ())
        stretches: list[Stretch] = []
        contents: list[Content] = []
        position = 0
        for n, region in enumerate(regions):
            message, cut = row.messages[region.message], row.cut
            cut = cut if cut is not None and cut.message == region.message else None
            text = rendered.text[region.start : region.stop]
            size = len(message.content.encode())
            first = last = -1
            if region.first is not None:
                first = len(message.content[: region.first].encode())
                last = first + len(text.encode())
            continued = bool(contents) and contents[-1].message == region.message
            if cut is not None and continued and cut.size <= first:
                break
            written = self._around(rendered, n, row.messages, learned)
            stretches += written
            position += sum(len(stretch.text.encode()) for stretch in written)
            if cut is not None:
                text = text.encode()[: max(cut.size - first, 0)].decode()
                size, last = cut.size, first + len(text.encode())
            if continued:
                contents[-1] = contents[-1]._replace(size=first)
            stop = position + len(text.encode())
            low = contents[-1].last if continued else 0
            contents.append(Content(region.message, position, stop, first, last, size, low))
            stretches += self._inside(
                rendered, region, region.start + len(text), learned if message.role == "assistant" else []
            )
            position = stop
            ends = n + 1 == len(regions) or regions[n + 1].message != region.message
            if cut is not None and (cut.size <= last or ends):
                break
        else:
            stretches += self._around(rendered, len(regions), row.messages, learned)
        if row.cut is not None and contents[-1].stop == contents[-1].start:  # it ends with the turn before
            at = row.cut.message
            return [s for s in stretches if s.message < at], [c for c in contents if c.message < at]
        return stretches, contents

    def _around(self, rendered: Rendered, n: int, messages: Sequence[Message], learned: list[Span]) -> list[Stretch]:
        """What the template writes before the region ``n``, or after the last one, cut at control tokens and at labels.

        learned: the spans of the text that are labels; those that the template does not mark are added.
        """
        regions = rendered.regions
        start, before = (regions[n - 1].stop, regions[n - 1].message) if n else (0, -1)
        stop, after = len(rendered.text), len(messages)
        if n < len(regions):
            stop, after = regions[n].start, regions[n].message
        text = rendered.text[start:stop]
        control = {start + a: (start + b, id_, own) for a, b, id_, own in self._control_strings(text, begins=n == 0)}
        end_id, end_text = self._ending
        closing = -1
        if before >= 0 and after == before + 1:
            closing = next((a for a, (_, id_, _) in control.items() if id_ == end_id >= 0), -1)
        border, answered = start, before >= 0 and messages[before].role == "assistant"
        if rendered.generated is None:
            if answered and closing >= 0:
                learned.append((start, control[closing][0]))
            elif answered and end_id < 0 and text.startswith(end_text):
                learned.append((start, start + len(end_text)))
            if after in rendered.answers:
                learned.append((rendered.answers[after], regions[n].stop))
        if closing >= 0:
            border = control[closing][0]
        elif answered:  # an end of turn that is text
            border = next((min(b, stop) for a, b in learned if a <= start < b), start)
        inside = {edge for span in learned for edge in span if start < edge < stop}
        inside -= {edge for edge in inside if any(a < edge < b for a, (b, _, _) in control.items())}
        edges = {start, stop, border, *inside, *control, *(b for b, _, _ in control.values())}
        found = []
        for a, b in pairwise(sorted(edges)):
            _, id_, string = control.get(a, (b, -1, rendered.text[a:b]))
            number, label = before if b <= border else after, any(x <= a < y for x, y in learned)
            found.append(Stretch(string, id_, False, number, a == closing, label))
        return found

    def _inside(self, rendered: Rendered, region: Region, stop: int, learned: list[Span]) -> list[Stretch]:
        """What stands in a region up to ``stop``, cut at the tags of its reasoning and where labels begin and end."""
        tags = {a: b for a, b in rendered.tags if region.start <= a and b <= stop}
        edges = {edge for span in [*learned, *tags.items()] for edge in span if region.start < edge < stop}
        found = []
        for a, b in list(pairwise(sorted({region.start, stop, *edges}))) or [(stop, stop)]:
            string = rendered.text[a:b]
            id_ = self._encoder_for_template.id_of.get(string, -1) if tags.get(a) == b else -1
            found.append(Stretch(string, id_, True, region.message, False, any(x <= a < y for x, y in learned)))
        return found


def _check_cut(row: Row) -> None:
    if row.cut is None:
        return
    message, size = row.cut
    content = row.messages[message].content.encode() if 0 <= message < len(row.messages) else None
    if content is None or not 0 <= size <= len(content) or (content + b"\0")[size] & 0xC0 == 0x80:
        where = f"{len(row.messages)} messages" if content is None else f"{len(content)} bytes"
        raise DataError(
            f"example {row.key} is cut after byte {size} of message {message}: no character ends there of {where}"
        )


class Content(NamedTuple):
    """Where a content, or a part of it, stands, in bytes."""

    message: int
    start: int  # in the rendered text
    stop: int
    first: int  # of the content's bytes that stand there; -1 where what stands there is no part of it
    last: int
    size: int  # of the content up to the next part, what the template drops included
    low: int = 0  # where the part before it ended, 0 for the first


def _coordinates(
    key: str, tokens: TokenizedText, at: IntArray, stretches: Sequence[Stretch], contents: Sequence[Content]
) -> TokenizedRow:
    """A row's tokens with their coordinates.

    at: positions of the tokens of those stretches that are control tokens. stretches, contents: in order.
    """
    n = len(tokens)
    highs, lows = tokens.ends, tokens.lows
    # Where the token's own text ends: not what was dropped after it.
    reach = np.where(lows > highs, highs, lows)
    starts = np.concatenate([[0], highs[:-1]]).astype(np.int64) if n else np.zeros(0, np.int64)
    stretches = [stretch for stretch in stretches if stretch.text]
    stops = np.cumsum([len(stretch.text.encode()) for stretch in stretches], dtype=np.int64)
    message = _messages(starts, reach, stops, stretches)
    part = np.full(n, int(Part.TEMPLATE), np.int64)
    labels = _labels(starts, reach, stops, stretches)
    labels[:1] = False
    row = TokenizedRow(key, tokens.ids, message, part, np.zeros(n, np.int64), np.zeros(n, np.int64), labels)
    for content in contents:
        _place(content, row, tokens, starts, reach)
    closing = [stretch.closes for stretch in stretches if stretch.id >= 0]
    known = [content.message for content in contents if content.first >= 0]
    ends = at[np.array(closing, bool)]
    part[ends[np.isin(message[ends], known)]] = Part.END
    return replace(row, lows=row.ends) if np.array_equal(row.lows, row.ends) else row


def _messages(starts: IntArray, reach: IntArray, stops: IntArray, stretches: Sequence[Stretch]) -> IntArray:
    """The message of the stretch in which each token ends; one without width belongs to what follows it."""
    if not len(stops):
        return np.zeros(len(starts), np.int64)
    of = np.array([stretch.message for stretch in stretches], np.int64)
    inside = np.where(
        reach <= starts, np.searchsorted(stops, reach, side="right"), np.searchsorted(stops, reach, side="left")
    )
    messages: IntArray = of[np.minimum(inside, len(of) - 1)]
    return np.maximum.accumulate(messages)


def _place(content: Content, row: TokenizedRow, tokens: TokenizedText, starts: IntArray, reach: IntArray) -> None:
    """Write the coordinates of the tokens of one message into the row."""
    highs, lows, message, ends, bottoms = tokens.ends, tokens.lows, row.message, row.ends, row.lows
    begin, stop, first, size = content.start, content.stop, content.first, content.size
    mine = message == content.message
    after = mine & (starts >= stop) & ~((reach <= begin) & (starts < begin))
    ends[after] = bottoms[after] = size
    if first < 0:
        return
    inside = (reach > begin) & (starts < stop) if stop > begin else np.zeros(len(starts), bool)
    message[inside], row.part[inside] = content.message, Part.CONTENT
    ends[inside] = np.where(highs[inside] >= stop, size, highs[inside] - begin + first)
    bottoms[inside] = np.where(lows[inside] >= stop, content.last, lows[inside] - begin + first)
    unsure = inside & (lows > highs)
    bottoms[unsure] = ends[unsure] + 1
    before = np.flatnonzero(mine & ~inside & ~after)
    if len(before):  # the last token before the content has what is dropped in front of it
        opener = before[-1]
        dropped = max(int(highs[opener]) - begin, 0)
        ends[opener] = size if stop == begin and size else first + dropped
        bottoms[opener] = content.low


def _labels(starts: IntArray, reach: IntArray, stops: IntArray, stretches: Sequence[Stretch]) -> BoolArray:
    """Tokens that reach into a stretch that is learned, or stand without width where one begins."""
    learned = np.array([stretch.label for stretch in stretches], bool)
    edges = np.diff(np.concatenate([[False], learned, [False]]).astype(np.int64))
    bounds = np.concatenate([[0], stops])
    labels = np.zeros(len(starts), bool)
    for begin, end in zip(bounds[np.flatnonzero(edges == 1)], bounds[np.flatnonzero(edges == -1)], strict=True):
        labels |= (starts < end) & ((reach > begin) | (starts >= begin))
    return labels
