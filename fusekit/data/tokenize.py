"""Rows as one model reads them: its tokens, each with its place in the contents, and which are to be learned."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np
import xxhash

from fusekit.data.encoding import Encoder, Stretch
from fusekit.data.templates import ChatTemplate, Region, Rendered, Renderer, Span
from fusekit.errors import DataError
from fusekit.types import FRAGMENT, TEXT, BoolArray, Cut, IntArray, Message, Part, Row, TokenizedRow, TokenizedText

TRAIN_ON = ("assistant", "all")
_ROLE_SEQUENCES = (("user", "assistant"), ("user", "assistant", "user", "assistant"))


class _Ending(NamedTuple):
    """How a template ends an assistant's turn. id: its control token, -1 for none. text: all of it up to there."""

    id: int
    text: str


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

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raises DataError where none was given and the tokenizer has none."""
        template = self._given if self._given is not None else ChatTemplate.of(self.tokenizer)
        return template if self._foreign is None else template.with_roles_of(self._foreign)

    @property
    def name(self) -> str:
        """How errors and artifacts call the model's tokenizer."""
        return self.encoder.name

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over the tokenizer, the template and what is learned."""
        try:
            template = self.template.fingerprint
        except DataError:  # plain text needs none
            template = "none"
        printed = self.facts.get("date", "no date")
        parts = [self.encoder.surfaces.fingerprint, template, self.train_on, repr(self._bos), str(printed)]
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
        return self._ending.id >= 0

    @property
    def turn_end_text(self) -> str:
        """What the template writes after an answer where no control token ends it; empty where one does."""
        return "" if self.ends_turns else self._ending.text

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
        bos = [] if self._writes_bos(stretches) else self._bos
        for id_ in reversed(bos):
            tokens = tokens.opened(id_)
        found = coordinates(row.key, tokens, at + len(bos), stretches, contents, learn_all=self.train_on == "all")
        found.labels[: len(bos)] = False
        return found

    def _writes_bos(self, stretches: Sequence[Stretch]) -> bool:
        """Whether the template writes bos before the first content."""
        before = takewhile(lambda stretch: not stretch.content, stretches)
        return any(stretch.id in self._bos for stretch in before)

    @cached_property
    def _bos(self) -> list[int]:
        """The tokens that the tokenizer puts before any text, or says that it does (``add_bos_token``)."""
        if not hasattr(self.tokenizer, "bos_token"):
            with_bos = self.tokenizer.encode("a").ids
        else:
            with_bos = list(self.tokenizer("a")["input_ids"])
        view = self.encoder.surfaces.view
        plain, bos = view.encode("a"), view.roles.get("bos")
        at = next((i for i in range(len(with_bos)) if with_bos[i : i + len(plain)] == plain), 0)
        if at == 0 and bos is not None and (with_bos[:1] == [bos] or getattr(self.tokenizer, "add_bos_token", False)):
            return [bos]
        return [int(id_) for id_ in with_bos[:at]]

    def _tokenize_text(self, row: Row) -> TokenizedRow:
        eos = self.encoder.surfaces.view.roles.get("eos")
        contents, stretches, at = [], [Stretch("")], []
        count = len(self._bos)
        ids, ends, lows = list(self._bos), [0] * count, [0] * count
        position = 0
        for number, message in enumerate(row.messages):
            if row.cut is not None and number > row.cut.message:
                break
            whole = row.cut is None or number < row.cut.message
            content = message.content if whole else message.content.encode()[: row.cut.size].decode()  # type: ignore[union-attr]
            tokens, _ = self.encoder.encode([Stretch(content, content=True)] if content else [])
            size = len(content.encode())
            contents.append(Content(number, position, position + size, 0, size, size))
            stretches.append(Stretch(content, -1, True, number, label=True))
            ids += tokens.ids.tolist()
            ends += (tokens.ends + position).tolist()
            lows += (tokens.lows + position).tolist()
            position += size
            if message.role == TEXT and whole:
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
        found = coordinates(row.key, tokens, np.array(at, np.int64), stretches, contents, learn_all=False)
        found.labels[: max(count, 1)] = False
        return found

    @cached_property
    def _renderer(self) -> Renderer:
        view = self.encoder.surfaces.view
        variables = dict(getattr(self.tokenizer, "special_tokens_map", {}))
        for role in ("bos", "eos"):
            own = view.added_tokens[view.roles[role]].content if role in view.roles else ""
            given = getattr(self.template, role)
            variables[f"{role}_token"] = own if given is None else given
        source, name = self.template.source_on(self.date), f"the chat template {self.template.name} for {self.name}"
        return Renderer(source, variables, name)

    @cached_property
    def _written_as(self) -> dict[str, tuple[str, int]]:
        """The template's control strings that this tokenizer does not have: what each is written as, and its id."""
        view = self.encoder.surfaces.view
        have = {token.content for token in view.added_tokens.values()}
        written: dict[str, tuple[str, int]] = {}
        for role in ("bos", "end_of_turn", "eos"):
            string = getattr(self.template, role)
            if not string or string in have or string in written:
                continue
            own = view.roles.get(role)
            if role == "bos" and self._begins_turns(string):
                continue  # text, as other strings of the template
            if own is not None:
                written[string] = (view.added_tokens[own].content, own)
            elif role == "bos":
                written[string] = ("", -1)  # as text it would only be noise
        return written

    def _begins_turns(self, string: str) -> bool:
        """Whether the template's bos is what it begins every turn with (``<|im_start|>`` of some), so no bos."""
        return self._around_stand_ins(_ROLE_SEQUENCES[0]).count(string) > 1

    @cached_property
    def _encoder_for_template(self) -> Encoder:
        """The encoder that also knows the added tokens that the template writes, marked special or not."""
        view = self.encoder.surfaces.view
        by_length = sorted(view.added_tokens.items(), key=lambda entry: -len(entry[1].content))
        rendered = "".join(
            self._around_stand_ins(roles) for roles in (*_ROLE_SEQUENCES, ("system", "user", "assistant"))
        )
        used = [id_ for id_, token in by_length if _is_marker(token.content) and token.content in rendered]
        return Encoder(self.tokenizer, used) if set(used) - self.encoder.strings.keys() else self.encoder

    def _around_stand_ins(self, roles: Sequence[str]) -> str:
        try:
            rendered = self._renderer.render_roles(roles)
        except DataError:
            return ""
        starts = [0, *(region.stop for region in rendered.regions)]
        stops = [*(region.start for region in rendered.regions), len(rendered.text)]
        return "\n".join(rendered.text[a:b] for a, b in zip(starts, stops, strict=True))

    @cached_property
    def _ending(self) -> _Ending:
        for roles in _ROLE_SEQUENCES:
            try:
                rendered = self._renderer.render_roles(roles)
            except DataError:
                continue
            if not rendered.regions or rendered.regions[-1].message != len(roles) - 1:
                continue
            tail = rendered.text[rendered.regions[-1].stop :]
            for stretch in self._control_stretches(tail):
                if stretch[2] >= 0:
                    return _Ending(stretch[2], tail[: stretch[1]])
            return _Ending(-1, tail)
        return _Ending(-1, "")

    def _control_stretches(self, text: str, *, begins: bool = False) -> list[tuple[int, int, int, str]]:
        """``(start, stop, id, written as)`` of each control string of the template's own text; id -1 for none.

        begins: whether the row begins with this text: only there a foreign bos becomes the model's own, and once.
        """
        found = [(m.start, m.stop, m.id, text[m.start : m.stop]) for m in self._encoder_for_template.find_control(text)]
        for string, (own, id_) in self._written_as.items():
            start = text.find(string)
            while start >= 0:
                found = [entry for entry in found if entry[1] <= start or entry[0] >= start + len(string)]
                dropped = string == self.template.bos and not begins
                found.append((start, start + len(string), -1 if dropped else id_, "" if dropped else own))
                begins = begins and string != self.template.bos
                start = text.find(string, start + len(string))
        return sorted(found)

    def _layout(self, row: Row) -> tuple[list[Stretch], list[Content]]:
        """The rendered row in stretches up to its cut, and where the contents stand in their bytes."""
        rendered = self._renderer.render(row.messages, row.key)
        pieces = self._pieces(rendered, row.messages)
        stretches: list[Stretch] = []
        contents: list[Content] = []
        position = 0
        following = [*rendered.regions[1:], None]
        for piece, region, after in zip(pieces, rendered.regions, following, strict=False):
            message = row.messages[region.message]
            text = rendered.text[region.start : region.stop]
            size = len(message.content.encode())
            first = last = -1
            if region.first is not None:
                first = len(message.content[: region.first].encode())
                last = first + len(text.encode())
            continued = bool(contents) and contents[-1].message == region.message
            cut = row.cut if row.cut is not None and row.cut.message == region.message else None
            if cut is not None and continued and cut.size <= first:
                break
            stretches += piece
            position += sum(len(stretch.text.encode()) for stretch in piece)
            if cut is not None:
                if first < 0:
                    raise DataError(
                        f"example {row.key} is cut in message {cut.message}, whose content {self._renderer.name} "
                        "rewrites"
                    )
                text = text.encode()[: max(cut.size - first, 0)].decode()
                size, last = cut.size, first + len(text.encode())
            if continued:
                contents[-1] = contents[-1]._replace(size=first)
            stop = position + len(text.encode())
            low = contents[-1].last if continued else 0
            contents.append(Content(region.message, position, stop, first, last, size, low))
            stretches += self._content_stretches(rendered, region, text, row.messages)
            position = stop
            if cut is not None and (cut.size <= last or after is None or after.message != cut.message):
                break
        else:
            stretches += pieces[-1]
        return _cut_off(stretches, contents, row.cut, row.key, self._renderer.name)

    def _content_stretches(
        self, rendered: Rendered, region: Region, text: str, messages: Sequence[Message]
    ) -> list[Stretch]:
        """What stands in a region up to a cut, cut at the tags of its reasoning and where it begins to be learned."""
        start, message = region.start, region.message
        stop = start + len(text)
        tags = {tag[0]: tag[1] for tag in rendered.tags if start <= tag[0] and tag[1] <= stop}
        edges = {start, stop, *tags, *tags.values()}
        learned = rendered.generated or ()
        if rendered.generated is None and messages[message].role == "assistant":
            learned = ((rendered.answers.get(message, start), max(stop, start)),)
        if messages[message].role == "assistant":
            edges |= {edge for span in learned for edge in span if start < edge < stop}
        else:
            learned = ()
        stretches = []
        for a, b in pairwise(sorted(edges)) if start < stop else [(start, stop)]:
            string = rendered.text[a:b]
            found = self._encoder_for_template.find_control(string) if tags.get(a) == b else []
            id_ = found[0].id if len(found) == 1 and len(string) == found[0].stop - found[0].start else -1
            label = any(x <= a and (a < y or a == b == y) for x, y in learned)
            stretches.append(Stretch(string, id_, True, message, False, label))
        return stretches

    def _pieces(self, rendered: Rendered, messages: Sequence[Message]) -> list[list[Stretch]]:
        """What the template writes before, between and after the contents, cut at control tokens and at labels."""
        regions = rendered.regions
        starts, stops = [0, *(r.stop for r in regions)], [*(r.start for r in regions), len(rendered.text)]
        numbers = [*(region.message for region in regions), len(messages)]
        pieces: list[list[Stretch]] = []
        for n, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            text = rendered.text[start:stop]
            control = self._control_stretches(text, begins=n == 0)
            before = numbers[n - 1] if n else -1
            closing = -1
            if before >= 0 and (numbers[n] == before + 1):
                closing = next((i for i, entry in enumerate(control) if entry[2] == self._ending.id >= 0), -1)
            labels = self._labels(
                rendered,
                before=before,
                after=numbers[n],
                piece=(start, stop),
                control=control,
                closing=closing,
                messages=messages,
            )
            border = control[closing][1] if closing >= 0 else 0
            if closing < 0 <= before and messages[before].role == "assistant":  # an end of turn that is text
                border = next((b for a, b in labels if a == 0 and b < len(text) + 1), 0)
            cuts = {0, len(text), border, *(edge for entry in control for edge in entry[:2])}
            inside = [edge for span in labels for edge in span if not any(c[0] < edge < c[1] for c in control)]
            edges = sorted(cuts | set(inside))
            by_start = {entry[0]: entry for entry in control}
            piece = []
            for a, b in pairwise(edges):
                entry = by_start.get(a)
                number = before if b <= border else numbers[n]
                learned = any(x <= a < y for x, y in labels)
                ends = closing >= 0 and entry is control[closing]
                piece.append(
                    Stretch(entry[3] if entry else text[a:b], entry[2] if entry else -1, False, number, ends, learned)
                )
            pieces.append(piece)
        return pieces

    def _labels(
        self,
        rendered: Rendered,
        *,
        before: int,
        after: int,
        piece: Span,
        control: list[tuple[int, int, int, str]],
        closing: int,
        messages: Sequence[Message],
    ) -> list[Span]:
        """Which characters of a piece between two contents are learned, counted from its start."""
        start, stop = piece
        if rendered.generated is not None:
            return [(max(a - start, 0), min(b, stop) - start) for a, b in rendered.generated if a < stop and b > start]
        spans = []
        if before >= 0 and messages[before].role == "assistant":
            if closing >= 0:
                spans.append((0, control[closing][1]))
            elif self._ending.id < 0 and rendered.text.startswith(self._ending.text, start, stop):
                spans.append((0, len(self._ending.text)))
        if after in rendered.answers:
            spans.append((max(rendered.answers[after] - start, 0), stop - start))
        return spans


def _is_marker(string: str) -> bool:
    """Whether an added token not marked special is one that a template structures turns with, not a word or space."""
    return bool(string.strip()) and not string.isalnum()


def _check_cut(row: Row) -> None:
    if row.cut is None:
        return
    if not 0 <= row.cut.message < len(row.messages):
        raise DataError(f"example {row.key} is cut in message {row.cut.message}, but has {len(row.messages)}")
    content = row.messages[row.cut.message].content.encode()
    at_character = row.cut.size == len(content) or (
        0 <= row.cut.size < len(content) and content[row.cut.size] & 0xC0 != 0x80
    )
    if not at_character:
        raise DataError(
            f"example {row.key} is cut after byte {row.cut.size} of message {row.cut.message}, which has "
            f"{len(content)} bytes and no character ending there"
        )


def _cut_off(
    stretches: list[Stretch], contents: list[Content], cut: Cut | None, key: str, name: str
) -> tuple[list[Stretch], list[Content]]:
    """What is left up to a cut. One at the start of a message ends the row with the turn before it."""
    if cut is None:
        return stretches, contents
    if not any(content.message == cut.message for content in contents):
        raise DataError(f"example {key} is cut in message {cut.message}, whose content {name} writes at no known place")
    if contents[-1].stop > contents[-1].start:
        return stretches, contents
    return [s for s in stretches if s.message < cut.message], [c for c in contents if c.message < cut.message]


class Content(NamedTuple):
    """Where a content, or a part of it, stands, in bytes.

    Attributes:
        message: its number.
        start, stop: in the rendered text.
        first, last: which of the content's bytes stand there; both -1 where what stands there is no part of it.
        size: bytes of the content up to the next part, those that the template drops included.
        low: where the part before it ended, 0 for the first.
    """

    message: int
    start: int
    stop: int
    first: int
    last: int
    size: int
    low: int = 0


def coordinates(
    key: str,
    tokens: TokenizedText,
    at: IntArray,
    stretches: Sequence[Stretch],
    contents: Sequence[Content],
    *,
    learn_all: bool,
) -> TokenizedRow:
    """A row's tokens with their coordinates.

    Args:
        key: the row's.
        tokens: of the whole rendered text, T of them.
        at: int64, position of the token of each stretch that is a control token.
        stretches: of the rendered text, in order.
        contents: in order.
        learn_all: whether every token but the first is a label.
    """
    n = len(tokens)
    highs, lows = tokens.ends, tokens.lows
    uncertain = lows > highs
    # Where the token's own text ends: not what was dropped after it.
    reach = np.where(uncertain, highs, lows)
    starts = np.concatenate([[0], highs[:-1]]).astype(np.int64) if n else np.zeros(0, np.int64)
    stretches = [stretch for stretch in stretches if stretch.text]
    stops = np.cumsum([len(stretch.text.encode()) for stretch in stretches], dtype=np.int64)
    message = _stretch_messages(starts, reach, stops, stretches)
    part = np.full(n, int(Part.TEMPLATE), np.int64)
    labels = np.ones(n, bool) if learn_all else _labels(starts, reach, stops, stretches)
    labels[:1] = False
    row = TokenizedRow(key, tokens.ids, message, part, np.zeros(n, np.int64), np.zeros(n, np.int64), labels)
    for content in contents:
        _place(content, row, tokens, starts, reach)
    closing = [stretch.closes for stretch in stretches if stretch.id >= 0]
    known = {content.message for content in contents if content.first >= 0}
    for position, closes in zip(at.tolist(), closing, strict=True):
        if closes and int(message[position]) in known:
            part[position] = Part.END
    return replace(row, lows=row.ends) if np.array_equal(row.lows, row.ends) else row


def _stretch_messages(starts: IntArray, reach: IntArray, stops: IntArray, stretches: Sequence[Stretch]) -> IntArray:
    """The message of the stretch in which each token ends; one without width belongs to what follows it."""
    if not len(stops):
        return np.zeros(len(starts), np.int64)
    of = np.array([stretch.message for stretch in stretches], np.int64)
    inside = np.searchsorted(stops, reach, side="left")
    empty = reach <= starts
    inside[empty] = np.searchsorted(stops, reach[empty], side="right")
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
    certain = inside & (lows <= highs)
    ends[inside] = np.where(highs[inside] >= stop, size, highs[inside] - begin + first)
    bottoms[inside] = np.where(lows[inside] >= stop, content.last, lows[inside] - begin + first)
    unsure = inside & ~certain
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
