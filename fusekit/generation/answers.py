"""A file of answers, an example for distillation on each line; it is continued where it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fusekit.artifacts import differences, disk_fault, plain
from fusekit.errors import StorageError
from fusekit.generation.settings import Generation, GenerationError


class AnswerFile:
    """Answers as conversations (``messages``), or continued texts (``text``), as ``data.path`` of a recipe reads them.

    Beside them stand ``finish``, ``segments`` and ``made``: models and settings. A line is durable before the next
    answer is written; half a line, of a process that died, is written again.

    Args:
        path: of the file, which need not exist.
        prompts: texts and conversations (dicts), in order.
        made: models and settings.
        raw: whether prompts are continued as text.

    Attributes:
        done: how many prompts are answered.

    Raises:
        GenerationError: the answers there are to other prompts, or were made with other models or settings.
        StorageError: the file cannot be read or written.
    """

    def __init__(self, path: Path, prompts: Sequence[Any], made: Mapping[str, Any], *, raw: bool) -> None:
        self.path, self.prompts, self.made, self.raw = path, prompts, plain(dict(made)), raw
        try:
            self._file: BinaryIO = path.open("a+b")
            self._file.seek(0)
            lines = self._file.read().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            if len(whole) < len(lines):
                self._file.truncate(sum(map(len, whole)))
        except OSError as error:
            raise disk_fault(error, path) or StorageError(f"{path}: cannot be opened: {error}") from error
        for number, line in enumerate(whole):
            self._check(number, line)
        self.done = len(whole)

    def _check(self, number: int, line: bytes) -> None:
        where = f"{self.path}, line {number + 1}"
        try:
            record = json.loads(line)
            made, asked = record["made"], record["text"] if self.raw else record["messages"][:-1]
        except (ValueError, KeyError, TypeError) as error:
            raise GenerationError(f"{where}: no answer that fusekit wrote ({error!r}): choose another file") from error
        if changed := differences(made, self.made):
            raise GenerationError(f"{where} was made otherwise ({'; '.join(changed)}): choose another file")
        prompt = self.prompts[number] if number < len(self.prompts) else None
        same = prompt is not None and (asked.startswith(prompt) if self.raw else asked == _messages(prompt))
        if not same:
            raise GenerationError(f"{where} answers {asked!r:.80}, not {prompt!r:.80}: choose another file")

    def add(self, answer: Generation) -> None:
        """Write the answer to the next prompt. Raises StorageError."""
        prompt = self.prompts[self.done]
        record: dict[str, Any]
        if self.raw:
            record = {"text": prompt + answer.text}
        else:
            record = {"messages": [*_messages(prompt), {"role": "assistant", "content": answer.text}]}
        segments = [segment._asdict() for segment in answer.segments]
        line = json.dumps({**record, "finish": answer.finish, "segments": segments, "made": self.made})
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_fault(error, self.path) or StorageError(f"{self.path}: cannot be written: {error}") from error
        self.done += 1


def _messages(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
