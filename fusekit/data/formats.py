"""The forms that a record of data can have, and how each becomes an example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from fusekit.data.counts import DataCounts
from fusekit.disk import with_article
from fusekit.errors import DataError
from fusekit.types import FRAGMENT, TEXT, Message, Row

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "developer": "system",
}
"""What data sets call the three roles."""

# Of a message or an example: 0 or false for what is context and not supervised (OpenAI, Axolotl, ms-swift).
MARKS = ("weight", "train", "training", "loss", "loss_mask")
# Of an answer: its reasoning.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Without which a conversation is another one; fusekit does not render them.
LOST = ("tools", "functions", "tool_calls", "function_call", "history", "train_detail")

PAIRS = (("prompt", "response"), ("question", "answer"), ("prompt", "completion"), ("instruction", "response"))
SYSTEM = ("system", "system_prompt")
ACCEPTED = (
    "messages (a list of {role, content}), conversations (a list of {from, value}), instruction/input/output, "
    "instruction/context/response, prompt/response, question/answer, text, or fragment (text that is cut off)"
)

Turn = tuple[Message, bool]
"""A message, and whether it is supervised where its role is."""


class Form(NamedTuple):
    """How records of one form are read. used: their fields that are read, beside those of every form."""

    parse: Callable[[Mapping[str, Any], str], list[Turn]]
    used: tuple[str, ...]


def form_of(record: object, where: str) -> Form:
    """The form of a record of a file, by its keys.

    where: file and line or row number. Raises DataError for none, or several, of the accepted forms, with the keys.
    """
    record = _object(record, where)
    if record.keys() >= KEPT_KEYS:
        return KEPT
    found = [form for fits, form in _FORMS if fits(record)]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(repr(str(key))[:40] for key in list(record)[:12]) or "none"
    if found:
        raise DataError(f"{where}: the keys {keys} fit several forms: keep those of one of {ACCEPTED}")
    raise DataError(f"{where}: the keys are {keys}; accepted are {ACCEPTED}")


def parse_record(record: object, form: Form, where: str, dataset: str, counts: DataCounts) -> Row:
    """The example of a record of a known form. counts: what its unused fields are counted in.

    Raises DataError with ``where`` for anything that is not as it has to be.
    """
    record = _object(record, where)
    if form is KEPT:
        try:
            return Row.from_record(record)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not an example as a run writes it: {type(error).__name__}: {error}") from error
    turns = form.parse(record, where)
    used = {"dataset", *form.used}
    if isinstance(record.get(form.used[0]), list):
        used.discard("context")  # which is read with a question that is text alone
    for key in MARKS:
        marks = _marks(record, key, turns, where)
        if marks is not None:
            used.add(key)
            turns = [(message, old and new) for (message, old), new in zip(turns, marks, strict=True)]
    if form.used[0] not in (TEXT, FRAGMENT):
        _refuse_lost(record, where, but=form.used)
        used.update(SYSTEM)
        for key in SYSTEM:
            system = _text(record, key, where, optional=True)
            if system and (not turns or turns[0][0].role != "system"):
                turns = [(Message("system", system), True), *turns]
            elif system and turns[0][0].content != system:
                raise DataError(f"{where}: {key!r} and the system message of the conversation differ: keep one")
    unused = {str(key) for key in record.keys() - used if not _is_empty(record[key])}
    for name in sorted({*unused, *_unused_of_turns(record, form)}):
        counts.unused[name] = counts.unused.get(name, 0) + 1
    named = record.get("dataset")
    named = _encodable(named, "dataset", where) if isinstance(named, str) and named else dataset
    context = tuple(number for number, (_, supervised) in enumerate(turns) if not supervised)
    return Row(tuple(message for message, _ in turns), named, context=context)


def _marks(record: Mapping[str, Any], key: str, turns: list[Turn], where: str) -> list[bool] | None:
    """The marks of an example, one per message; None for a field that is no mark, such as the weight 0.3."""
    value = record.get(key)
    if not isinstance(value, list):
        return [bool(value)] * len(turns) if _is_mark(value) else None
    if not value or not all(map(_is_mark, value)):
        return None
    if len(value) != len(turns):
        raise DataError(f"{where}: {key!r} has {len(value)} marks for {len(turns)} messages: give one for each message")
    for number, ((message, _), mark) in enumerate(zip(turns, value, strict=True)):
        if mark:
            _check_supervised(message.role, f"{where}, message {number} has {key} {mark!r}")
    return list(map(bool, value))


def _check_supervised(role: str, said: str) -> None:
    if role in ("system", "user"):
        raise DataError(
            f"{said} and is of the {role}: only answers are supervised one by one (train_on: all supervises every "
            "message that has no mark)"
        )


def _is_mark(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def _chat(key: str) -> Form:
    def parse(record: Mapping[str, Any], where: str) -> list[Turn]:
        turns = _list(record, key, where)
        first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
        by_role = key == "messages" or ("from" not in first and "role" in first)
        return _turns(turns, where, _MESSAGES if by_role else _SHAREGPT)

    return Form(parse, (key,))


def _alpaca(record: Mapping[str, Any], where: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, pair in enumerate([] if _is_empty(record.get("history")) else _list(record, "history", where)):
        here = f"{where}, turn {number} of 'history'"
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{here} is {_kind(pair)}, not [question, answer]")
        asked = dict(zip(("question", "answer"), pair, strict=True))
        turns += _asked(_text(asked, "question", here), _text(asked, "answer", here))
    return [*turns, *_asked(_with_input(record, "instruction", "input", where), _text(record, "output", where))]


def _with_input(record: Mapping[str, Any], asked: str, given: str, where: str) -> str:
    """The question, and after an empty line the text that it is about (``input`` of Alpaca, ``context`` of Dolly)."""
    question, about = _text(record, asked, where), _text(record, given, where, optional=True)
    return f"{question}\n\n{about}" if about else question


def _asked(question: str, answer: str) -> list[Turn]:
    return [(Message("user", question), True), (Message("assistant", answer), True)]


def _pair(asked: str, answered: str) -> Form:
    def parse(record: Mapping[str, Any], where: str) -> list[Turn]:
        if isinstance(record.get(asked), list) and isinstance(record.get(answered), list):  # conversations: TRL's form
            return [
                *((message, False) for message, _ in _turns(record[asked], f"{where}, {asked}")),
                *_turns(record[answered], f"{where}, {answered}"),
            ]
        return _asked(_with_input(record, asked, "context", where), _text(record, answered, where))

    return Form(parse, (asked, answered, "context"))


def _plain(record: Mapping[str, Any], where: str) -> list[Turn]:
    key = FRAGMENT if FRAGMENT in record else TEXT  # roles of messages, too
    return [(Message(key, _text(record, key, where)), True)]


_MESSAGES, _SHAREGPT = ("role", "content"), ("from", "value")
_OF_TURNS = {*_MESSAGES, *_SHAREGPT, *REASONING, *MARKS}


def _turns(turns: list[Any], where: str, keys: tuple[str, str] = _MESSAGES) -> list[Turn]:
    return [_turn(turn, f"{where}, message {number}", *keys) for number, turn in enumerate(turns)]


def _turn(turn: Any, here: str, role_key: str, content_key: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{here} is {_kind(turn)}, not an object with {role_key!r} and {content_key!r}")
    written = turn.get(role_key)
    role = ROLES.get(str(written).lower())
    if role is None:
        found = f"no {role_key!r}" if written is None else f"{role_key} {str(written)[:40]!r}"
        raise DataError(f"{here} has {found}: known are {', '.join(ROLES)}")
    _refuse_lost(turn, here)
    content = _text(turn, content_key, here)
    thoughts = {_text(turn, key, here).strip() for key in REASONING if not _is_empty(turn.get(key))}
    if thoughts:
        if role != "assistant" or len(thoughts) > 1 or content.lstrip().startswith("<think>"):
            raise DataError(
                f"{here} has {' and '.join(key for key in REASONING if turn.get(key))}: reasoning stands in one of "
                "these fields of an answer, or as <think>...</think> in its content"
            )
        content = f"<think>\n{thoughts.pop()}\n</think>\n\n{content}"
    marks = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    if unknown := [f"{key} {value!r}" for key, value in marks.items() if not _is_mark(value)]:
        raise DataError(f"{here} has {unknown[0]}: 0 and false mark context, 1 and true what is supervised")
    said = f"{here} has {' and '.join(f'{key} {value!r}' for key, value in marks.items())}"
    if len(set(map(bool, marks.values()))) > 1:
        raise DataError(f"{said}: keep one of them")
    if any(marks.values()):
        _check_supervised(role, said)
    return Message(role, content), all(marks.values())


def _refuse_lost(record: Mapping[str, Any], where: str, but: tuple[str, ...] = ()) -> None:
    for key in LOST:
        if key in record and key not in but and not _is_empty(record[key]):
            raise DataError(
                f"{where} has {key!r}, which fusekit does not render, so the models would read another example: write "
                "it into the contents, or leave the example out (data.on_bad_row: skip)"
            )


def _unused_of_turns(record: Mapping[str, Any], form: Form) -> Iterator[str]:
    """The fields of a record's messages that are not used, as ``messages.name``."""
    for key in form.used:
        turns = record.get(key)
        if isinstance(turns, list):
            for turn in turns:
                if isinstance(turn, Mapping):
                    yield from (f"{key}.{name}" for name in turn.keys() - _OF_TURNS if not _is_empty(turn[name]))


def _is_empty(value: object) -> bool:
    return value is None or value in ("", "[]", "{}", "null") or (isinstance(value, (list, dict)) and not value)


def _object(record: object, where: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: an example is {_kind(record)}, not an object with the keys {ACCEPTED}")
    return record


def _list(record: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        if key not in record:
            raise DataError(f"{where}: {key!r} is missing, which the file's first example has: use one form in a file")
        raise DataError(f"{where}: {key!r} is {_kind(value)}, not a list")
    return value


def _text(record: Mapping[str, Any], key: str, where: str, *, optional: bool = False) -> str:
    value = record.get(key)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {_kind(value) if key in record else 'missing'}, not text")
    return _encodable(value, key, where)


def _encodable(value: str, key: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key!r} has half of a surrogate pair at character {error.start}, which cannot be encoded"
        ) from error
    return value


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "text", type(None): "null"}
    return names.get(type(value), with_article(type(value).__name__))


def _has(keys: tuple[str, ...], without: tuple[str, ...] = ()) -> Callable[[Mapping[str, Any]], bool]:
    return lambda record: all(key in record for key in keys) and not any(key in record for key in without)


KEPT, KEPT_KEYS = Form(lambda _record, _where: [], ()), {"key", "dataset", "messages", "cut"}
"""What a run wrote into its folder ``data`` (:meth:`fusekit.types.Row.to_record`)."""
_CHAT = ("messages", "conversations")
_ANSWERS = (*_CHAT, "output", "response", "answer", "completion")
_FORMS = [
    (_has(("messages",)), _chat("messages")),
    (_has(("conversations",), without=("messages",)), _chat("conversations")),
    (_has(("instruction", "output"), without=_CHAT), Form(_alpaca, ("instruction", "input", "output", "history"))),
    *((_has(pair, without=(*_CHAT, "output")), _pair(*pair)) for pair in PAIRS),
    # Beside a key of those pairs, it is another field.
    (
        _has(("question", "response"), without=(*_CHAT, "output", "answer", "prompt", "instruction")),
        _pair("question", "response"),
    ),
    (_has((TEXT,), without=(FRAGMENT, *_ANSWERS)), Form(_plain, (TEXT,))),
    (_has((FRAGMENT,), without=(TEXT, *_ANSWERS)), Form(_plain, (FRAGMENT,))),
]
