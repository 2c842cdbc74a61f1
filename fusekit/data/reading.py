"""Examples from files, the hub or Python: the forms of records, how they are read, and what became of each."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fusekit.errors import DataError
from fusekit.types import FRAGMENT, TEXT, Message, Row

EXAMPLES, LISTED = 10, 1000
"""How many keys are kept per reason, and how many unusable examples."""

REASONS = {
    "unusable": "cannot be read, or has marks or fields that fusekit does not know, skipped",
    "empty": "no message with any text",
    "duplicate": "the same messages as an earlier example",
    "overlong": "longer than max_length for some model, dropped",
    "no_label": "no supervised token for some model, because of the example's marks or the cut",
    "refused": "a template refuses it, or a model cannot encode it",
    "cut": "kept up to where the first model reached max_length",
    "unlinked": "kept, with a message that some template rewrites: its tokens link to nothing",
    "shortened": "kept, with an answer whose beginning some template drops (earlier reasoning): it is not learned",
    "unended": "kept, with an answer whose end of turn is not a control token of some model: it links to nothing",
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
        first_refusal: why the first refused example was refused.
        unused: examples per field that has a value and is not used.
    """

    on_bad_row: str = "error"
    seen: int = 0
    kept: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    first_refusal: str = ""
    unused: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, key: str) -> None:
        """Count an example."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        keys = self.keys.setdefault(reason, [])
        if len(keys) < (LISTED if reason == "unusable" else EXAMPLES):
            keys.append(key)

    def unusable(self, error: DataError) -> None:
        """Count an example that cannot be read, or raise the error where ``on_bad_row`` is ``error``."""
        if self.on_bad_row != "skip":
            raise error
        self.seen += 1
        self.add("unusable", str(error)[:1000])

    @property
    def dropped(self) -> int:
        """Examples that are not used."""
        return sum(self.reasons.get(reason, 0) for reason in DROPPED)

    @property
    def lines(self) -> list[str]:
        """Lines for the user: the counts, the unused fields, and the first unusable examples."""
        lines = [str(self)]
        if self.unused:
            fields = [f"{name} ({count})" for name, count in sorted(self.unused.items(), key=lambda item: -item[1])]
            lines.append(
                f"fields that are not used: {', '.join(fields[:EXAMPLES])}{', ...' * (len(fields) > EXAMPLES)}"
            )
        return lines + [f"skipped: {line}" for line in self.keys.get("unusable", [])[:EXAMPLES]]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return f"{self.kept} of {self.seen} examples kept" + (f" ({counts})" if counts else "")


# ---- the forms of records

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

# The fields of each form, the first counts. Of a pair: the question, the answer, and what the question is about.
CHATS = ("messages", "conversations")
PAIRS = (
    ("instruction", "output", "input"),
    ("prompt", "response", "context"),
    ("question", "answer", "context"),
    ("prompt", "completion", "context"),
    ("instruction", "response", "context"),
    ("question", "response", "context"),
)
ANSWERS = {answer for _, answer, _ in PAIRS}
PREPARED = {"key", "dataset", "messages", "cut"}
"""The fields of an example that a run prepared (:meth:`fusekit.types.Row.to_record`)."""
SYSTEM = ("system", "system_prompt")
# Of a message or an example: 0 or false for what is context and not supervised (OpenAI, Axolotl, ms-swift).
MARKS = ("weight", "train", "training", "loss", "loss_mask")
REASONING = ("reasoning_content", "reasoning", "thinking")
# Fields that change a conversation, and that fusekit does not render.
LOST = ("tools", "functions", "tool_calls", "function_call", "history", "train_detail")
OF_MESSAGES = {"role", "content", "from", "value", *REASONING, *MARKS}
ACCEPTED = (
    "messages (a list of {role, content}), conversations (a list of {from, value}), instruction/input/output, "
    "instruction/context/response, prompt/response, question/answer, text, or fragment (text that is cut off)"
)

Record = tuple[str, Any]
"""Where a record is, for errors, and the record; a DataError in its place if it cannot be read."""
Turn = tuple[Message, bool]
"""A message, and whether it is supervised where its role is."""


def parse_record(record: Any, where: str, dataset: str, counts: DataCounts) -> Row:
    """The example of a record; its unused fields are counted. Raises DataError that begins with ``where``."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: an example is {type(record).__name__}, not an object with the keys {ACCEPTED}")
    if record.keys() >= PREPARED:
        try:
            return Row.from_record(record)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not an example as a run writes it: {error}") from error
    turns, used = _turns_of(record, where)
    turns = _with_marks(turns, record, where)
    used |= {"dataset"} | {key for key in MARKS if isinstance(record.get(key), list) or _is_mark(record.get(key))}
    if not used & {TEXT, FRAGMENT}:
        _refuse_lost(record, where)
        turns = _with_system(turns, record, where)
        used |= set(SYSTEM)
    unused = {str(key) for key in record.keys() - used if not _is_empty(record[key])}
    for key in used.difference(MARKS, {"dataset"}):  # what is a list there is one of messages
        for turn in record[key] if isinstance(record.get(key), list) else ():
            unused |= {f"{key}.{name}" for name in turn.keys() - OF_MESSAGES if not _is_empty(turn[name])}
    for name in sorted(unused):
        counts.unused[name] = counts.unused.get(name, 0) + 1
    if isinstance(record.get("dataset"), str):
        dataset = _text(record, "dataset", where) or dataset
    context = tuple(number for number, (_, supervised) in enumerate(turns) if not supervised)
    return Row(tuple(message for message, _ in turns), dataset, context=context)


def _turns_of(record: Mapping[str, Any], where: str) -> tuple[list[Turn], set[str]]:
    """The messages of a record, and the fields that they are read from."""
    given = {key for key, value in record.items() if value is not None}
    if chat := next((key for key in CHATS if key in given), None):
        return _messages(record, chat, where), {chat}
    if pair := next((pair for pair in PAIRS if given.issuperset(pair[:2])), None):
        asked, answered, about = pair
        if isinstance(record[asked], list):  # conversations: TRL's form
            context = [(message, False) for message, _ in _messages(record, asked, f"{where}, {asked}")]
            return context + _messages(record, answered, f"{where}, {answered}"), {asked, answered}
        question = _text(record, asked, where)
        if not _is_empty(record.get(about)):
            question += "\n\n" + _text(record, about, where)
        answer = _text(record, answered, where)
        return [(Message("user", question), True), (Message("assistant", answer), True)], set(pair)
    text = given & {TEXT, FRAGMENT}
    if len(text) == 1 and not given & ANSWERS:
        role = text.pop()
        return [(Message(role, _text(record, role, where)), True)], {role}
    keys = ", ".join(repr(key)[:40] for key in list(record)[:12]) or "none"
    raise DataError(f"{where}: the keys are {keys}; accepted are {ACCEPTED}")


def _messages(record: Mapping[str, Any], key: str, where: str) -> list[Turn]:
    if not isinstance(record[key], list):
        raise DataError(f"{where}: {key!r} is {type(record[key]).__name__}, not a list")
    return [_message(turn, f"{where}, message {number}") for number, turn in enumerate(record[key])]


def _message(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {type(turn).__name__}, not an object with 'role' and 'content'")
    written = turn.get("from") if turn.get("role") is None else turn["role"]
    role = ROLES.get(str(written).lower())
    if role is None:
        has = "no role" if written is None else f"the role {str(written)[:40]!r}"
        raise DataError(f"{where} has {has}: known are {', '.join(ROLES)}")
    _refuse_lost(turn, where)
    content = _text(turn, "value" if "value" in turn and turn.get("content") is None else "content", where)
    thoughts = {key: _text(turn, key, where).strip() for key in REASONING if not _is_empty(turn.get(key))}
    if thoughts:
        if role != "assistant" or len(set(thoughts.values())) > 1 or content.lstrip().startswith("<think>"):
            raise DataError(
                f"{where} has {' and '.join(thoughts)}: give the reasoning of an answer in one of these fields, or as "
                "<think>...</think> in its content"
            )
        content = f"<think>\n{next(iter(thoughts.values()))}\n</think>\n\n{content}"
    message = Message(role, content)
    marks = [_supervised(message, key, turn[key], where) for key in MARKS if turn.get(key) is not None]
    return message, all(marks)


def _with_marks(turns: list[Turn], record: Mapping[str, Any], where: str) -> list[Turn]:
    """The messages with the marks of their example: one for all, or a list with one for each."""
    for key in MARKS:
        marks = record.get(key)
        if isinstance(marks, list) and marks:
            if len(marks) != len(turns):
                raise DataError(f"{where}: {key!r} has {len(marks)} marks for {len(turns)} messages")
            turns = [
                (message, supervised and _supervised(message, key, mark, f"{where}, message {number}"))
                for number, ((message, supervised), mark) in enumerate(zip(turns, marks, strict=True))
            ]
        elif _is_mark(marks):
            turns = [(message, supervised and bool(marks)) for message, supervised in turns]
    return turns


def _is_mark(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def _supervised(message: Message, key: str, mark: Any, where: str) -> bool:
    if not _is_mark(mark):
        raise DataError(f"{where} has {key} {mark!r}: 0 and false mark context, 1 and true what is supervised")
    if mark and message.role in ("system", "user"):
        raise DataError(
            f"{where} has {key} {mark!r} and the role {message.role}: a mark can only make an answer supervised "
            "(train_on: all supervises every message that has no mark)"
        )
    return bool(mark)


def _with_system(turns: list[Turn], record: Mapping[str, Any], where: str) -> list[Turn]:
    for key in SYSTEM:
        if not _is_empty(record.get(key)):
            system = Message("system", _text(record, key, where))
            if not turns or turns[0][0].role != "system":
                turns = [(system, True), *turns]
            elif turns[0][0] != system:
                raise DataError(f"{where}: {key!r} and the system message of the conversation differ: keep one")
    return turns


def _refuse_lost(record: Mapping[str, Any], where: str) -> None:
    for key in LOST:
        if not _is_empty(record.get(key)):
            raise DataError(
                f"{where} has {key!r}, which fusekit does not render, so the models would read a different example: "
                "write it into the contents, or leave the example out (data.on_bad_row: skip)"
            )


def _is_empty(value: object) -> bool:
    return value is None or value in ("", "[]", "{}", "null") or (isinstance(value, (list, dict)) and not value)


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {type(value).__name__ if key in record else 'missing'}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key!r} has half of a surrogate pair at character {error.start}") from error
    return value


# ---- reading


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
        limit: most examples to read; None for all.
        counts: counts unusable examples (where its ``on_bad_row`` is ``skip``) and unused fields.

    Returns:
        The rows in order. ``Row.dataset`` is the record's ``dataset`` field, or else the file's name without its
        ending, or the id on the hub.

    Raises:
        DataError: while iterating: names file and line, what was found, and the way out.
    """
    counts = DataCounts() if counts is None else counts
    paths = [path] if isinstance(path, (str, Path)) else path
    hub: dict[str, Any] = {"split": split, "revision": revision, "name": name, "streaming": streaming}
    rows = chain.from_iterable(_read(one, counts, hub) for one in paths)
    return islice(rows, limit and min(limit, sys.maxsize))  # islice takes no larger one


def _read(path: str | Path, counts: DataCounts, hub: Mapping[str, Any]) -> Iterator[Row]:
    if isinstance(path, str) and is_on_hub(path):
        yield from rows_of_records(hub_records(path, **hub), path, counts)
        return
    for file in files_of(path):
        local = Path(file).expanduser()
        if not local.exists():
            raise DataError(f"{path} does not exist; a data set on the hub is named OWNER/NAME")
        reader = READERS.get(local.suffix.lower())
        if reader is None:
            raise DataError(f"{local} ends in {local.suffix!r}: files of examples end in {', '.join(READERS)}")
        yield from rows_of_records(_guarded(reader, local), local.stem, counts)


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
    dataset = [dataset] if isinstance(dataset, (str, Path)) else dataset
    if not isinstance(dataset, Iterable) or isinstance(dataset, Mapping):  # a DatasetDict is a mapping
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
    """The rows of records, and rows among them as they are. dataset: of rows whose record names none."""
    for where, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            row = record if isinstance(record, Row) else parse_record(record, where, dataset, counts)
        except DataError as error:
            counts.unusable(error)
        else:
            yield row


def files_of(path: str | Path) -> list[str | Path]:
    """The files of examples in a folder, in order of their names; anything else as it is.

    Raises DataError for a folder without such a file.
    """
    local = Path(path).expanduser()
    if not local.is_dir():
        return [path]
    if (local / "rows.jsonl").is_file() and (local / "manifest.json").is_file():
        return [local / "rows.jsonl"]  # what a run prepared
    files = sorted(file for file in local.iterdir() if file.suffix.lower() in READERS and file.is_file())
    if not files:
        raise DataError(f"{local} is a folder without a file that ends in {', '.join(READERS)}")
    return list(files)


def is_on_hub(path: str) -> bool:
    """Whether a name is taken for a data set on the hub: OWNER/NAME, where no such file is."""
    local = Path(path)
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is not None
    return is_id and local.suffix.lower() not in READERS and not local.exists()


def json_lines(file: Path) -> Iterator[Record]:
    """The values of a file of JSON lines but blank ones. Raises DataError where the file cannot be read."""
    return _guarded(_json_lines, file)


def _guarded(reader: Callable[[Path], Iterable[Record]], file: Path) -> Iterator[Record]:
    try:
        yield from reader(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _json_lines(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                yield where, json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                yield where, DataError(f"{where}: invalid JSON: {error.msg} (column {error.colno})")
            except (ValueError, RecursionError) as error:
                yield where, DataError(f"{where}: invalid JSON: {error}")


def _json(file: Path) -> Iterator[Record]:
    """A list of rows, alone or under ``data``; JSON lines with the ending ``.json`` too, as data sets often have it."""
    try:
        value = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _json_lines(file)
        return
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise DataError(f"{file} is one JSON value: examples are a list, a list under 'data', or one object a line")
    for number, record in enumerate(value, 1):
        yield f"{file}, example {number}", record


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
    yield str(file), Row((Message(TEXT, file.read_bytes().decode("utf-8-sig")),), file.stem)


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

    from fusekit.hub import unreachable

    cached = Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")
    try:
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
    except Exception as error:  # the client's own, its HTTP library's, pyarrow's
        hint = "if it is gated or private, log in with `hf auth login` or set HF_TOKEN"
        if constants.is_offline_mode():
            hint = "HF_HUB_OFFLINE is set: unset it once, or download the data set and give its folder"
        elif unreachable(error):
            hint = "check the network, a proxy, or HF_ENDPOINT"
        said = " ".join(str(error).split())
        raise DataError(
            f"{repository} is not a file or folder here, and cannot be read from {constants.ENDPOINT}: "
            f"{type(error).__name__}: {said}; {hint}"
        ) from error
