"""Rows from files, the hub or Python: the forms of records, how they are read, and what became of each."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fusekit.disk import with_article
from fusekit.errors import DataError
from fusekit.types import FRAGMENT, TEXT, Message, Row

EXAMPLES = 10
"""How many keys are kept per reason; of unusable examples ``LISTED``."""
LISTED = 1000

REASONS = {
    "unusable": "cannot be read, or has marks or fields that fusekit does not know, skipped",
    "empty": "no message with any text",
    "duplicate": "the same messages as an earlier example",
    "overlong": "longer than max_length for some model, dropped",
    "no_label": "no supervised token for some model, by the example's own marks or since the cut left none",
    "refused": "a template refuses it, or a model cannot encode it",
    "cut": "kept up to where the first model reached max_length",
    "unlinked": "kept, with a message that some template rewrites: its tokens link to nothing",
    "shortened": "kept, with an answer whose beginning some template drops (earlier reasoning): it is not learned",
    "unended": "kept, with an answer whose end of turn is no control token of some model: it links to nothing",
}
"""Why an example is not used, or not as it is."""

DROPPED = ("unusable", "empty", "duplicate", "overlong", "no_label", "refused")


@dataclass
class DataCounts:
    """What became of the examples. seen = kept + the sum of ``dropped``.

    Attributes:
        on_bad_row: ``error``: an unusable example raises; ``skip``: it is counted and listed.
        seen, kept: numbers of examples.
        reasons: examples per reason of :data:`REASONS`.
        keys: the first keys per reason; of unusable examples the file, the line and what is wrong.
        first_refusal: what the first refused example was refused for.
        unused: examples per field that has a value and is not used.
    """

    on_bad_row: str = "error"
    seen: int = 0
    kept: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    first_refusal: str = ""
    unused: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, key: str, most: int = EXAMPLES) -> None:
        """Count an example."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        keys = self.keys.setdefault(reason, [])
        if len(keys) < most:
            keys.append(key)

    def unusable(self, error: DataError) -> None:
        """Count an example that cannot be read. Raises the error where that is what ``on_bad_row`` says."""
        if self.on_bad_row != "skip":
            raise error
        self.seen += 1
        self.add("unusable", str(error)[:1000], LISTED)

    @property
    def dropped(self) -> int:
        """Examples that are not used."""
        return sum(self.reasons.get(reason, 0) for reason in DROPPED)

    def as_dict(self) -> dict[str, object]:
        """Plain types, for a manifest or a report."""
        return dataclasses.asdict(self)

    @property
    def lines(self) -> list[str]:
        """What a user is told: the counts, the unused fields, and the first unusable examples."""
        said = [str(self)]
        if self.unused:
            fields = [f"{name} ({count})" for name, count in sorted(self.unused.items(), key=lambda item: -item[1])]
            said.append(f"fields that are not used: {', '.join(fields[:EXAMPLES])}{', ...' * (len(fields) > EXAMPLES)}")
        unusable = self.keys.get("unusable", [])
        said += [f"skipped: {line}" for line in unusable[:EXAMPLES]]
        more = self.reasons.get("unusable", 0) - EXAMPLES
        return said + ([f"skipped: {more} more"] if more > 0 else [])

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return f"{self.kept} of {self.seen} examples kept" + (f" ({counts})" if counts else "")


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


MAX_DESCRIPTION = 64 << 20  # bytes of a manifest.json or config.json that is read to tell what a folder is

Record = tuple[str, Any]
"""Where it is, for errors, and what it is; a DataError where it cannot be read, but those after it can."""


def read_rows(
    path: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    name: str | None = None,
    counts: DataCounts | None = None,
) -> Iterator[Row]:
    """Read conversations or plain text, lazily: a large JSONL or Parquet file is never in memory as a whole.

    Args:
        path: a ``.jsonl``, ``.json`` (a list, ``{"data": [...]}``, or JSON lines), ``.parquet`` or ``.txt`` file (one
            document), a folder of such files (in order of their names), or the id of a data set on the hub; or several
            of these, one after the other.
        split, revision, name, streaming: of the data set on the hub; ``name`` is its configuration.
        limit: read at most so many rows; None for all.
        counts: what unusable examples (where its ``on_bad_row`` says ``skip``) and unused fields are counted in.

    Returns:
        The rows in order. ``Row.dataset`` is the record's ``dataset`` field, or else the file's name without its
        ending, or the id on the hub. The form is found once per file, by the keys of its first row.

    Raises:
        DataError: while iterating (for a missing file at once): names file and line, what was found, and the way out.
    """
    counts = DataCounts() if counts is None else counts
    if limit is not None and limit < 0:
        raise DataError(f"limit is {limit}: it is a number of examples, or None for all")
    limit = limit and min(limit, sys.maxsize)  # islice takes no larger one
    if not isinstance(path, (str, Path)):
        how: dict[str, Any] = {"split": split, "revision": revision, "name": name, "streaming": streaming}
        rows: Iterator[Row] = (row for one in path for row in read_rows(one, counts=counts, **how))
        return islice(rows, limit)
    local = Path(path).expanduser()
    if local.is_dir():
        rows = (row for file in files_of(path) for row in _rows_of_file(Path(file), counts))
    elif local.exists():
        rows = _rows_of_file(local, counts)
    elif isinstance(path, Path) or not is_on_hub(path):
        raise DataError(f"{path} does not exist")
    else:
        records = hub_records(path, split=split, revision=revision, name=name, streaming=streaming)
        rows = rows_of_records(records, path, counts)
    return islice(rows, limit)


def rows_of(dataset: Any, counts: DataCounts | None = None) -> Iterator[Row]:
    """The rows of whatever holds examples.

    Args:
        dataset: a ``datasets.Dataset``, or any iterable of mappings with the columns of a file's records (messages,
            ShareGPT's conversations, instruction triples, text), of rows, or a path or name as for :func:`read_rows`,
            or several of those.
        counts: as for :func:`read_rows`.

    Raises:
        DataError: no example that can be read; names its number and its columns.
    """
    counts = DataCounts() if counts is None else counts
    if isinstance(dataset, (str, Path)):
        yield from read_rows(dataset, counts=counts)
        return
    if not isinstance(dataset, Iterable) or isinstance(dataset, Mapping):
        raise DataError(
            f"{type(dataset).__name__} holds no examples: give a datasets.Dataset, the path of a file, or a list of "
            f"records with {ACCEPTED}"
        )

    def records() -> Iterator[Record]:
        for number, record in enumerate(dataset, 1):
            if isinstance(record, (str, Path)):
                yield from ((str(record), row) for row in read_rows(record, counts=counts))
            else:
                yield f"example {number}", record

    yield from rows_of_records(records(), "", counts)


def rows_of_records(records: Iterable[Record], dataset: str, counts: DataCounts) -> Iterator[Row]:
    """The rows of records of one form, which the first usable one tells; rows among them as they are.

    dataset: of rows whose record names none. counts: as for :func:`read_rows`.
    """
    form = None
    for where, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            if not isinstance(record, Row):
                form = form or form_of(record, where)
                record = parse_record(record, form, where, dataset, counts)  # noqa: PLW2901
        except DataError as error:
            counts.unusable(error)
        else:
            yield record


def files_of(path: str | Path) -> list[str | Path]:
    """The files of rows in a folder, in order of their names; anything else as it is.

    Raises DataError for a folder without such a file, or of something else.
    """
    local = Path(path).expanduser()
    if not local.is_dir():
        return [path]
    manifest = _mapping(local / "manifest.json")
    if (local / "rows.jsonl").is_file() and manifest.get("stage") == "data":
        return [local / "rows.jsonl"]  # what a run prepared
    if other := _other_folder(local, manifest):
        raise DataError(
            f"{path} is {other}, not examples of data: give files of examples ({', '.join(READERS)}), a folder of such "
            "files, or the id of a data set on the hub"
        )
    files = sorted(file for file in local.iterdir() if file.suffix.lower() in READERS and file.is_file())
    if not files:
        raise DataError(f"{local} is a folder without a file that ends in {', '.join(READERS)}")
    return list(files)


def is_on_hub(path: str) -> bool:
    """Whether rows are taken for a data set on the hub: nothing is there, and it does not look like a file."""
    local = Path(path).expanduser()
    return not (local.exists() or local.suffix.lower() in READERS or path.startswith((".", "/", "~")))


def no_data_set(name: str) -> str | None:
    """Why a name is not taken for a data set on the hub, which is not asked: it is no id, or one without an owner.

    The hub knows some data sets without their owners, too; such a one is taken if it is in the cache.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return f"{name!r} is neither a file or folder nor the id of a data set (owner/name)"
    if "/" in name:
        return None
    import datasets

    if (Path(datasets.config.HF_DATASETS_CACHE) / name).is_dir():
        return None
    return (
        f"there is no file or folder {name!r} here: write a file with its ending ({', '.join(READERS)}), and a data "
        f"set on the hub with its owner (OWNER/{name})"
    )


def _other_folder(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """What a folder is that holds JSON files of something else; None where it may hold rows."""
    if (folder / "recipe.resolved.yml").is_file():
        return "the output of a run"
    if "stage" in manifest:
        return f"what the stage {str(manifest['stage'])!r} of a run made"
    if "spec" in manifest:
        return "a store of what a model said about examples"
    if {"model_type", "architectures"} & _mapping(folder / "config.json").keys():
        return "a model"
    return "an adapter of a model" if (folder / "adapter_config.json").is_file() else None


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes()) if file.is_file() and file.stat().st_size < MAX_DESCRIPTION else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows_of_file(file: Path, counts: DataCounts) -> Iterator[Row]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file} ends in {file.suffix!r}: files of examples end in {', '.join(READERS)}")
    return rows_of_records(_guarded(reader, file), file.stem, counts)


def _guarded(reader: Callable[[Path], Iterable[Record]], file: Path) -> Iterator[Record]:
    try:
        yield from reader(file)
    except (OSError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{file} cannot be read: {reason}") from error


def _decoded(data: bytes, file: Path, line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line, start = line + data.count(b"\n", 0, error.start), data.rfind(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line}: invalid UTF-8 at byte {error.start - start} of the line: convert the file"
        ) from error


def _loaded(data: bytes, file: Path, line: int = 1) -> Any:
    """The value of JSON text that begins at a line of a file."""
    try:
        return json.loads(_decoded(data, file, line))
    except json.JSONDecodeError as error:
        whole = file.suffix == ".jsonl" and line == 1 and data.strip() in (b"[", b"{")
        hint = ": a file of one JSON value over several lines has to end in .json" if whole else ""
        raise DataError(
            f"{file}, line {line + error.lineno - 1}: invalid JSON: {error.msg} (column {error.colno}){hint}"
        ) from error
    except ValueError as error:  # numbers of too many digits
        raise DataError(f"{file}, line {line}: invalid JSON: {error}") from error


def _json_lines(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip(_BLANK):
                try:
                    # Without its end, else a line that is cut short is said to be wrong in the next one.
                    record = _loaded(line.rstrip(b"\r\n"), file, number)
                except DataError as error:
                    record = error
                yield f"{file}, line {number}", record


_BLANK = b"\xef\xbb\xbf \t\r\n"


def _json(file: Path) -> Iterator[Record]:
    """A list of rows, alone or under ``data``; JSON lines with the ending ``.json`` too, as data sets often have it."""
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip(_BLANK)), b"")
    try:
        record = json.loads(first.decode("utf-8-sig"))
    except ValueError:  # a value over several lines
        record = None
    if isinstance(record, dict) and not isinstance(record.get("data"), list):
        yield from _json_lines(file)
        return
    rows = _loaded(file.read_bytes(), file)
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list):
        raise DataError(f"{file} is one JSON value: examples are a list, a list under 'data', or one object a line")
    for number, row in enumerate(rows, 1):
        yield f"{file}, example {number}", row


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", record
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file}, after row {number}: not readable as Parquet: {error}") from error


def _document(file: Path) -> Iterator[Record]:
    """The whole file is one document."""
    yield str(file), Row((Message(TEXT, _decoded(file.read_bytes(), file)),), file.stem)


def json_lines(file: Path) -> Iterator[Record]:
    """The values of a file of JSON lines; blank lines are none. Raises DataError where the file cannot be read."""
    return _guarded(_json_lines, file)


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _document,
}
"""Endings of files of examples."""


def hub_records(
    repository: str, *, split: str, revision: str | None, name: str | None, streaming: bool
) -> Iterator[Record]:
    """The records of a data set, with where each is. No code of the data set is run.

    Raises DataError while iterating, with a hint: offline, gated, missing, several configurations, no such split.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from fusekit.hub import unreachable

    cached = Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")
    try:
        validate_repo_id(repository)
        if not constants.is_offline_mode():
            try:  # one short question, since ``datasets`` asks an unreachable hub again and again
                timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
                huggingface_hub.HfApi().dataset_info(repository, revision=revision, timeout=timeout)
            except Exception as error:
                if not unreachable(error) or not cached.is_dir():
                    raise
        data = datasets.load_dataset(repository, name, split=split, revision=revision, streaming=streaming)
        for number, record in enumerate(data, 1):
            yield f"{repository} ({split}), row {number}", record
    except HFValidationError as error:
        raise DataError(f"{repository!r} is neither a file or folder nor the id of a data set (owner/name)") from error
    except Exception as error:  # the client's own, its HTTP library's, pyarrow's
        reason = _explained(error, repository, revision, name, split)
        raise DataError(f"{repository} {reason}") from error


def _explained(error: BaseException, repository: str, revision: str | None, name: str | None, split: str) -> str:
    """What an exception of ``datasets`` or the hub client means, and what to do about it."""
    import huggingface_hub
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import constants, errors

    from fusekit.hub import unreachable

    chain = [error]
    while len(chain) < 10 and (link := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(link)

    def has(kind: type[BaseException]) -> bool:
        return any(isinstance(link, kind) for link in chain)

    hub, said = constants.ENDPOINT, " ".join(str(error).split())
    page = f"{hub}/datasets/{repository}"
    token = "a token is set" if huggingface_hub.get_token() else "no token is set"
    log_in = f"log in with `hf auth login` or set HF_TOKEN ({token})"
    silent = f"{hub} does not answer ({type(error).__name__}: {said}): check the network, a proxy, or HF_ENDPOINT"
    uncached = (
        f"is not in the cache of data sets ({HF_DATASETS_CACHE}) and HF_HUB_OFFLINE is set: unset it once, or fetch "
        f"its files where there is a network (`hf download {repository} --repo-type dataset --local-dir ROWS`) and "
        "give the folder that holds them as the path"
    )
    missing = f"is neither a file or folder nor a data set on {hub}: check the spelling; if it is private, {log_in}"
    of_its_own = f"is made by code of its own, which fusekit does not run: fetch its files and give their path ({said})"
    cases = (
        (has(errors.GatedRepoError), f"is gated: accept its terms at {page}, then {log_in}"),
        (constants.is_offline_mode(), uncached),
        (has(errors.RevisionNotFoundError), f"has no revision {revision!r}: see {page}/commits/main"),
        (has(errors.RepositoryNotFoundError), missing),
        (
            "Config name is missing" in said or "BuilderConfig" in said,
            f"needs the name of one of its configurations, not {name!r}: {said}",
        ),
        ("split" in said.lower() and isinstance(error, ValueError), f"has no split {split!r}: {said}"),
        (any(map(unreachable, chain)), f"is not a file or folder, and {silent}"),
        ("script" in said.lower(), of_its_own),
        (True, f"cannot be read from {hub}: {type(error).__name__}: {said}"),
    )
    return next(text for applies, text in cases if applies)
