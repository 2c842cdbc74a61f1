"""The forms that a record of data can have, and how each becomes a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
}
"""What data sets call the three roles."""

PAIRS = (("prompt", "response"), ("question", "answer"), ("prompt", "completion"), ("instruction", "response"))
ACCEPTED = (
    "messages (a list of {role, content}), conversations (a list of {from, value}), instruction/input/output, "
    "prompt/response, question/answer, text, or fragment (text that is cut off)"
)

Parse = Callable[[Mapping[str, Any], str], tuple[Message, ...]]


def form_of(record: object, where: str) -> Parse:
    """The form of a record, by its keys.

    Args:
        record: of a file, a mapping from column to value.
        where: file and line or row number, for errors.

    Raises:
        DataError: it has none, or several, of the accepted forms; with the keys found.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a row is {_kind(record)}, not an object with the keys {ACCEPTED}")
    found = [parse for fits, parse in _FORMS if fits(record)]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(repr(str(key))[:40] for key in list(record)[:12]) or "none"
    if found:
        raise DataError(f"{where}: the keys {keys} fit several forms: keep those of one of {ACCEPTED}")
    raise DataError(f"{where}: the keys are {keys}; accepted are {ACCEPTED}")


def parse_record(record: object, parse: Parse, where: str, dataset: str) -> Row:
    """A row from a record of a known form. Raises DataError with ``where`` for anything that is not as it has to be."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a row is {_kind(record)}, not an object")
    named = record.get("dataset")
    named = _encodable(named, "dataset", where) if isinstance(named, str) and named else dataset
    return Row(parse(record, where), named)


def _messages(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    return _turns(_list(record, "messages", where), "role", "content", where)


def _sharegpt(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    turns = _list(record, "conversations", where)
    if turns and isinstance(turns[0], Mapping) and "from" not in turns[0] and "role" in turns[0]:
        return _turns(turns, "role", "content", where)
    messages = _turns(turns, "from", "value", where)
    system = record.get("system")
    if isinstance(system, str) and system and (not messages or messages[0].role != "system"):
        return (Message("system", _encodable(system, "system", where)), *messages)
    return messages


def _alpaca(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    instruction, given = _text(record, "instruction", where), _text(record, "input", where, optional=True)
    question = f"{instruction}\n\n{given}" if given else instruction
    return Message("user", question), Message("assistant", _text(record, "output", where))


def _pair(asked: str, answered: str) -> Parse:
    def parse(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
        return Message("user", _text(record, asked, where)), Message("assistant", _text(record, answered, where))

    return parse


def _plain(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    role, key = (FRAGMENT, "fragment") if "fragment" in record else (TEXT, "text")
    return (Message(role, _text(record, key, where)),)


def _turns(turns: list[Any], role_key: str, content_key: str, where: str) -> tuple[Message, ...]:
    messages = []
    for number, turn in enumerate(turns):
        here = f"{where}, message {number}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{here} is {_kind(turn)}, not an object with {role_key!r} and {content_key!r}")
        role = ROLES.get(str(turn.get(role_key)).lower())
        if role is None:
            raise DataError(f"{here} has {role_key} {str(turn.get(role_key))[:40]!r}: known are {', '.join(ROLES)}")
        messages.append(Message(role, _text(turn, content_key, here)))
    return tuple(messages)


def _list(record: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        said = _kind(value) if key in record else "missing, unlike in the file's first row"
        raise DataError(f"{where}: {key!r} is {said}, not a list")
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
    return {list: "a list", dict: "an object", str: "text", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda record: all(key in record for key in keys)


_CHAT_KEYS = ("messages", "conversations")
_OTHER_KEYS = (*_CHAT_KEYS, "output", "response", "answer", "completion")
_FORMS: list[tuple[Callable[[Mapping[str, Any]], bool], Parse]] = [
    (_has("messages"), _messages),
    (lambda record: "conversations" in record and "messages" not in record, _sharegpt),
    (lambda record: not any(key in record for key in _CHAT_KEYS) and _has("instruction", "output")(record), _alpaca),
    *(
        (
            lambda record, pair=pair: not any(key in record for key in (*_CHAT_KEYS, "output")) and _has(*pair)(record),
            _pair(*pair),
        )
        for pair in PAIRS
    ),
    (
        lambda record: ("text" in record) != ("fragment" in record) and not any(key in record for key in _OTHER_KEYS),
        _plain,
    ),
]
