"""Chat templates: a model's own, those that ship with fusekit, or a file; and where they write what.

``foreign`` use (every model of a run under the pivot's template) needs to know what a template's control strings stand
for, so a template carries the roles of the model it was written for.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from fusekit.alignment.surfaces import vocabulary_surfaces
from fusekit.errors import DataError
from fusekit.types import Message

SHIPPED: dict[str, tuple[str | None, str, str]] = {
    "chatml": (None, "<|im_end|>", "<|im_end|>"),
    "gemma": ("<bos>", "<eos>", "<end_of_turn>"),
    "internlm2": ("<s>", "</s>", "<|im_end|>"),
    "llama-3": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "llama-3.1": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>", "</s>"),
    "openchat-3.5": ("<s>", "<|end_of_turn|>", "<|end_of_turn|>"),
    "phi-3": ("<s>", "<|endoftext|>", "<|end|>"),
    "qwen": (None, "<|im_end|>", "<|im_end|>"),
    "solar": ("<s>", "</s>", "</s>"),
    "vicuna": ("<s>", "</s>", "</s>"),
    "yi": ("<|startoftext|>", "<|im_end|>", "<|im_end|>"),
}
"""bos, eos and end of turn of the templates that ship with fusekit."""


def template_names() -> list[str]:
    """The names of the templates that ship with fusekit, in order."""
    return sorted(SHIPPED)


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja chat template, and the control strings of the model it belongs to.

    Attributes:
        name: how errors and artifacts call it.
        source: the jinja text.
        bos, eos, end_of_turn: what they are in it; None for those of whichever tokenizer uses it.
        origin: where it comes from, for users and artifacts; names no path, so that it stays when a folder is moved.
    """

    name: str
    source: str
    bos: str | None = None
    eos: str | None = None
    end_of_turn: str | None = None
    origin: str = "given"

    @property
    def prints_date(self) -> bool:
        """Whether what it writes depends on the day."""
        return "strftime_now" in self.source

    def source_on(self, date: datetime.date) -> str:
        """The jinja text as it would write on a day (at 0:00), whatever the clock says."""
        if not self.prints_date:
            return self.source
        # transformers passes no function on to a template, so the day is written into it.
        moment = datetime.datetime.combine(date, datetime.time())
        codes = sorted(set(re.findall("%-?[A-Za-z]", self.source)))
        written = "".join(f"|replace({code!r}, {moment.strftime(code)!r})" for code in codes)
        # The source begins a line, as it did: white space around blocks depends on it.
        return f"{{% macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{self.source}"

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over the source and the control strings."""
        roles = map(repr, (self.bos, self.eos, self.end_of_turn))
        return xxhash.xxh3_128_hexdigest("\0".join(["fusekit template 1", self.source, *roles]).encode())

    @classmethod
    def named(cls, name: str) -> ChatTemplate:
        """One that ships with fusekit (:func:`template_names`). Raises DataError for an unknown name."""
        if name not in SHIPPED:
            raise DataError(
                f"no chat template is called {name!r}: there are own, {', '.join(template_names())}; "
                "or give a jinja file"
            )
        file = resources.files("fusekit.data") / "chat_templates" / f"{name}.jinja"
        return cls(name, file.read_text(encoding="utf-8"), *SHIPPED[name], origin=f"{name}, shipped with fusekit")

    @classmethod
    def from_file(cls, path: str | Path) -> ChatTemplate:
        """A jinja file, with the control strings of the tokenizer that uses it. Raises DataError."""
        path = Path(path).expanduser()
        try:
            return cls(path.name, path.read_text(encoding="utf-8"), origin=f"the file {path.name}")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the chat template {path} cannot be read: {error}") from error

    @classmethod
    def chosen(cls, name: str) -> ChatTemplate | None:
        """What a user names: ``own`` (None, for :meth:`of` the tokenizer), one that ships, or a jinja file.

        Raises DataError for a name that is neither.
        """
        if name == "own":
            return None
        is_file = name not in SHIPPED and Path(name).expanduser().is_file()
        return cls.from_file(name) if is_file else cls.named(name)

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """A tokenizer's own template. Raises DataError where it has none, with the names to choose from."""
        source = getattr(tokenizer, "chat_template", None)
        source = source.get("default") if isinstance(source, dict) else source
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not isinstance(source, str) or not source:
            raise DataError(f"{name} has no chat template: name one of {', '.join(template_names())}, or a jinja file")
        return cls(f"{name}'s own", source, origin="the tokenizer's own").with_roles_of(tokenizer)

    def with_roles_of(self, tokenizer: Any) -> ChatTemplate:
        """With the control strings of a tokenizer where it has none of its own."""
        surfaces = vocabulary_surfaces(tokenizer)
        added = surfaces.added_tokens
        theirs = {role: added[id_].content for role, id_ in surfaces.roles.items() if id_ in added}
        return replace(
            self,
            bos=self.bos or theirs.get("bos"),
            eos=self.eos or theirs.get("eos"),
            end_of_turn=self.end_of_turn or theirs.get("end_of_turn"),
        )


def kept_date(value: object) -> datetime.date | None:
    """A day as manifests keep it; None for anything else."""
    try:
        return datetime.date.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None


_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PADDING = " \n\t"
_STAND_IN = "\U000fae01"
_OPEN, _CLOSE = "<think>", "</think>"
_CONTINUED = re.compile(r"\S\s*\n</think>\s*\n")  # of reasoning that the prompt opened, so that the answer does not
# As long as what they stand for, so that no position changes.
_HIDDEN = {_OPEN: "\U000fae02" * len(_OPEN), _CLOSE: "\U000fae03" * len(_CLOSE)}

Span = tuple[int, int]


class Region(NamedTuple):
    """Where the content of a message, or a part of it, is rendered. Positions are characters.

    A message has several where a template changes the white space around its reasoning.
    """

    message: int
    start: int
    stop: int
    first: int | None  # where in the content that part begins; None where what stands there is no part of it


class Rendered(NamedTuple):
    """A rendered conversation."""

    text: str
    regions: tuple[Region, ...]  # of the contents that have a place in it, in order
    generated: tuple[Span, ...] | None  # what ``{% generation %}`` encloses; None for a template without it
    answers: Mapping[int, int]  # where an answer begins, by the number of an assistant message (without ``generation``)
    tags: tuple[Span, ...] = ()  # around the reasoning of answers, in order


class Renderer:
    """Renders conversations with one template.

    variables: what it sees beside the messages, ``bos_token`` and ``eos_token`` above all. name: for errors.
    """

    MAX_SAMPLES = 4096

    def __init__(self, source: str, variables: Mapping[str, Any], name: str) -> None:
        self.source, self.variables, self.name = source, dict(variables), name
        self.marks_generation = _GENERATION.search(source) is not None
        self._samples: dict[tuple[str, ...], tuple[Rendered, list[tuple[bool, bool]]] | None] = {}

    def render(self, messages: Sequence[Message], key: str = "") -> Rendered:
        """Render a conversation. key: the row's, for errors. Raises DataError where the template refuses it."""
        rendered = self._render([_hidden(message) for message in messages], key)
        text = rendered.text
        for tag, private in _HIDDEN.items():
            text = text.replace(private, tag)
        return rendered._replace(text=text)

    def _render(self, messages: Sequence[Message], key: str) -> Rendered:
        text, spans = self._jinja(messages, key)
        roles = tuple(message.role for message in messages)
        if roles not in self._samples:
            if len(self._samples) >= self.MAX_SAMPLES:
                self._samples.clear()
            self._samples[roles] = self._sample(roles)
        sample = self._samples[roles]
        filled = _filled(*sample, messages) if sample is not None else None
        if filled is not None and filled.text == text:
            return filled._replace(tags=_tags(messages, text, filled.regions))
        if self.marks_generation:
            text, spans = self._jinja(messages, key, generation=True)
        regions = self._regions(messages, text, key)
        generated = tuple(spans) if self.marks_generation else None
        answers = {} if self.marks_generation else self._answers(messages, text, regions)
        return Rendered(text, regions, generated, answers, _tags(messages, text, regions))

    def _jinja(
        self, messages: Sequence[Message], key: str = "", *, generation: bool = False, prompt: bool = False
    ) -> tuple[str, Sequence[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            texts, spans = render_jinja_template(
                conversations=[conversation],
                chat_template=self.source,
                return_assistant_tokens_mask=generation,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except Exception as error:  # templates are foreign code and may raise anything
            roles = ", ".join(message.role for message in messages[:8]) + ", ..." * (len(messages) > 8)
            raise DataError(
                f"{self.name} cannot render example {key} with the roles {roles}: {type(error).__name__}: {error}; "
                "leave such examples out, or use another template"
            ) from error
        return texts[0], spans[0] if generation else ()

    def _sample(self, roles: tuple[str, ...]) -> tuple[Rendered, list[tuple[bool, bool]]] | None:
        """A conversation of stand-ins, and at which ends each content is stripped; None where that cannot be told."""
        messages = stand_ins(roles)
        try:
            text, spans = self._jinja(messages, generation=self.marks_generation)
            padded, _ = self._jinja([Message(role, _PADDING + content + _PADDING) for role, content in messages])
        except DataError:  # a template may refuse a stand-in for what it takes
            return None
        at = [text.find(content) for _, content in messages]
        if any(text.count(content) != 1 for _, content in messages) or at != sorted(at):
            return None
        strips = []
        for _, content in messages:
            before, _, after = padded.partition(content)
            strips.append((not before.endswith(_PADDING), not after.startswith(_PADDING)))
        regions = tuple(Region(i, a, a + len(m.content), 0) for i, (a, m) in enumerate(zip(at, messages, strict=True)))
        if self.marks_generation:
            return Rendered(text, regions, tuple(spans), {}), strips
        return Rendered(text, regions, None, self._answers(messages, text, regions)), strips

    def _answers(self, messages: Sequence[Message], text: str, regions: tuple[Region, ...]) -> dict[int, int]:
        """Where each assistant message begins: after the generation prompt, where there is one and the text has it."""
        answers: dict[int, int] = {}
        for region in regions:
            if messages[region.message].role != "assistant" or region.message in answers:
                continue
            answers[region.message] = region.start
            before = messages[: region.message]
            try:
                prompt, _ = self._jinja(before, prompt=True)
                bare, _ = self._jinja(before)
            except DataError:
                continue
            between = text[len(prompt) : region.start]
            # Beyond the content's start where the prompt opens the reasoning with which the content begins.
            if text.startswith(prompt) and len(prompt) <= region.stop and (prompt != bare or not between.strip()):
                answers[region.message] = len(prompt)
        return answers

    def _regions(self, messages: Sequence[Message], text: str, key: str) -> tuple[Region, ...]:
        """Where contents are when the template rewrites some: one stand-in at a time."""
        stand_in = next(s for s in map(_stand_in, range(10**6)) if not any(s in content for _, content in messages))
        regions: list[Region] = []
        for i, message in enumerate(messages):
            try:
                probed, _ = self._jinja([*messages[:i], Message(message.role, stand_in), *messages[i + 1 :]], key)
            except DataError:
                continue
            before, found, after = probed.partition(stand_in)
            floor, stop = regions[-1].stop if regions else 0, len(text) - len(after)
            if not found or stand_in in after or not text.endswith(after):
                continue
            content, answers = message.content, message.role == "assistant"
            fits = text.startswith(before) and floor <= len(before) <= stop
            if answers and (_tagged(message) or not fits) and (standing := _standing(content, text, floor, stop)):
                regions += [Region(i, *place) for place in standing]
            elif fits:
                regions.append(Region(i, len(before), stop, _first_of(content, text[len(before) : stop])))
            elif answers:  # rewritten: at no place, and learned all the same
                start = next((n for n, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
                if floor <= start <= stop:
                    regions.append(Region(i, start, stop, None))
        return tuple(regions)


def _stand_in(number: int) -> str:
    return f"{_STAND_IN}{number}{_STAND_IN}"


def stand_ins(roles: Sequence[str]) -> list[Message]:
    """A conversation of these roles whose contents are in no data, to see what a template writes around them."""
    return [Message(role, _stand_in(i)) for i, role in enumerate(roles)]


def _filled(sample: Rendered, strips: Sequence[tuple[bool, bool]], messages: Sequence[Message]) -> Rendered:
    """The sample with the contents of other messages of its roles in place of the stand-ins."""
    parts, regions = [], []
    position = done = 0
    for region, (left, right), (_, content) in zip(sample.regions, strips, messages, strict=True):
        first = len(content) - len(content.lstrip()) if left else 0
        last = max(len(content.rstrip()), first) if right else len(content)
        parts += [sample.text[done : region.start], content[first:last]]
        start = position + region.start - done
        position, done = start + last - first, region.stop
        regions.append(Region(region.message, start, position, first))

    def place(at: int) -> int:
        # The start of a content that begins a block is after the piece before it, its stop before the one after.
        n = sum(region.start < at for region in sample.regions)
        return regions[n - 1].stop + max(at - sample.regions[n - 1].stop, 0) if n else at

    generated = None
    if sample.generated is not None:
        generated = tuple((place(start), place(stop)) for start, stop in sample.generated)
    answers = {i: place(start) for i, start in sample.answers.items()}
    return Rendered("".join([*parts, sample.text[done:]]), tuple(regions), generated, answers)


def _tagged(message: Message) -> bool:
    """Whether an answer has a tag of reasoning in it."""
    return message.role == "assistant" and (_OPEN in message.content or _CLOSE in message.content)


def _is_reasoning(message: Message) -> bool:
    """Whether an answer begins with reasoning."""
    return message.role == "assistant" and message.content.lstrip().startswith(_OPEN) and _CLOSE in message.content


def _hidden(message: Message) -> Message:
    """An answer that only mentions tags of reasoning, without them: a template would take it for reasoning."""
    content = message.content
    continued = content.count(_CLOSE) == 1 and _OPEN not in content and _CONTINUED.search(content)
    if not _tagged(message) or _is_reasoning(message) or continued:
        return message
    for tag, private in _HIDDEN.items():
        content = content.replace(tag, private)
    return Message(message.role, content)


def _standing(content: str, text: str, floor: int, stop: int) -> list[tuple[int, int, int]]:
    """Where a content with reasoning stands in front of ``stop``: as it is, or with other white space at its seams.

    Returns ``(start, stop, first)`` of each part, as in :class:`Region`; none where it does not stand there.
    """

    def trimmed(first: int, last: int) -> Span:
        part = content[first:last]
        return first + len(part) - len(part.lstrip()), last - len(part) + len(part.rstrip())

    size = len(content)
    kept = trimmed(0, size)
    for first, last in ((0, size), (0, kept[1]), (kept[0], size), kept):
        start = stop - (last - first)
        if first < last and start >= floor and text.startswith(content[first:last], start):
            return [(start, stop, first)]
    begin = content.find(_OPEN) + len(_OPEN) if content.lstrip().startswith(_OPEN) else 0
    end = content.find(_CLOSE, begin)
    if end < 0:
        return []
    spans = [(0, begin), (begin, end), (end, end + len(_CLOSE)), (end + len(_CLOSE), size)]
    parts = [(a, b) for a, b in (trimmed(*span) for span in spans) if a < b]
    # Possessive in effect: a part begins with no white space, so there is one way to match what is between two.
    pattern = r"\s*".join(f"({re.escape(content[a:b])})" for a, b in parts) + r"\s*\Z"
    found = re.compile(pattern).search(text[:stop], floor)
    return [(*found.span(n), first) for n, (first, _) in enumerate(parts, 1)] if found else []


def _tags(messages: Sequence[Message], text: str, regions: Sequence[Region]) -> tuple[Span, ...]:
    """The spans of the tags around the reasoning with which answers begin, or which the template opens for them."""
    found: list[Span] = []
    opened: set[int] = set()
    for region in regions:
        message = messages[region.message]
        if not _tagged(message):
            continue
        if _is_reasoning(message) or text[: region.start].rstrip().endswith(_OPEN):
            opened.add(region.message)
        for tag in (_OPEN, _CLOSE) if region.message in opened else ():
            if region.first is None:
                at = text.find(tag, region.start, region.stop)
            else:
                at = region.start + message.content.find(tag) - region.first
            if tag in message.content and region.start <= at <= region.stop - len(tag):
                found.append((at, at + len(tag)))
    return tuple(sorted(found))


def _first_of(content: str, rendered: str) -> int | None:
    """Where in a content what was rendered begins: its end or its beginning, perhaps trimmed; None for neither."""
    kept, skipped = content.rstrip(), len(content) - len(content.lstrip())
    if not rendered:
        return None if kept else len(content)
    for whole in (content, kept):
        if whole.endswith(rendered):
            return len(whole) - len(rendered)
    return next((start for start in (0, skipped) if content.startswith(rendered, start)), None)
