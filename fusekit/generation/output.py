"""Answers in a file, an example for distillation on each line and continued where it ends; and on a page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

from fusekit.artifacts import differences, plain
from fusekit.disk import disk_fault
from fusekit.errors import StorageError
from fusekit.generation.settings import Generation, GenerationError


class AnswerFile:
    """Answers as conversations (``messages``), or continued texts (``text``), as ``data.path`` of a recipe reads them.

    Beside them stand ``finish``, ``segments`` and ``made``: models and settings. A line is durable before the next
    answer is written; half a line, of a process that died, is written again. ``done`` counts the answers.

    Args:
        path: of the file, which need not exist.
        prompts: texts and conversations (dicts), in order.
        made: models and settings.
        raw: whether prompts are continued as text.

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
        said = [] if self.raw else [*_messages(prompt), {"role": "assistant", "content": answer.text}]
        record = {"text": prompt + answer.text} if self.raw else {"messages": said}
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


COLOURS = ("#1f6feb", "#b35900", "#1a7f37", "#8250df", "#cf222e", "#0a7f8c")
_STYLE = (
    "body{font:16px/1.6 system-ui,sans-serif;max-width:50em;margin:2em auto;padding:0 1em;color-scheme:light dark}"
    "pre{white-space:pre-wrap;font:inherit;padding:.6em 1em;border-left:3px solid #8888}"
    "pre.prompt{opacity:.7}span{border-bottom:2px solid}small{opacity:.7}"
)


def page(prompts: Sequence[str], answers: Sequence[Generation], models: Sequence[str], mode: str) -> str:
    """HTML without scripts that shows who wrote what: each segment in the colour of its model, scores as a tooltip.

    Args:
        prompts: as they are shown, one for each answer.
        answers: from :func:`fusekit.generation.generate`.
        models: names, in their order.
        mode: named in the heading.
    """
    colour = {model: COLOURS[number % len(COLOURS)] for number, model in enumerate(models)}
    legend = " ".join(f'<span style="color:{colour[model]}">{escape(model)}</span>' for model in models)
    parts = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>fusekit generate: {escape(mode)}</title>',
        f"<style>{_STYLE}</style>\n<h1>{escape(mode)}</h1><p>{legend}</p>",
    ]
    for prompt, answer in zip(prompts, answers, strict=True):
        parts.append(f'<pre class="prompt">{escape(prompt)}</pre>\n<pre>')
        for text, model, _, scores in answer.segments:
            title = escape(f"{model}: {', '.join(f'{name} {score:.3g}' for name, score in scores.items())}")
            parts[-1] += f'<span style="color:{colour[model]}" title="{title}">{escape(text)}</span>'
        parts[-1] += f"</pre><small>{answer.finish}</small>"
    return "\n".join(parts) + "\n</html>\n"
