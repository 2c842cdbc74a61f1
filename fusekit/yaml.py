"""YAML for files that somebody else may have written: ``yaml.safe_load`` with limits, and the line of every key.

Also refused are tags (``!!float``, ``!mine``), duplicate keys, of which the last would win silently, aliases that
expand to billions of values, values that contain themselves, and nesting that exhausts the stack.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fusekit.errors import FusekitError, RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NODES = 50_000
MAX_NUMBER = 1000

_MERGE = "tag:yaml.org,2002:merge"
_STRING = "tag:yaml.org,2002:str"

KeyPath = tuple[str | int, ...]
TRUTH = ": put the word in quotes, since YAML reads no, off, yes and on as truth values"
SHOWN_NAMES = 40  # in an error where no known name is near


@dataclass(frozen=True)
class Document:
    """A parsed YAML document.

    text: the source. name: what errors call the file. lines: the line (from 1) of every key and list item, by its path
    of keys and indices, such as ``("models", 0, "parameters", "weight")``.
    """

    data: Any
    text: str
    name: str
    lines: dict[KeyPath, int] = field(repr=False)

    def line(self, path: KeyPath) -> int:
        """Line of a path, or of the nearest enclosing key that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses tags and deep nesting while it composes, so that nothing large is ever built."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if (tag := getattr(event, "tag", None)) is not None:
            raise _Refused(f"YAML tags are not allowed here, found {tag!r}", event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Refused(yaml.MarkedYAMLError):
    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


def load(path: Path | str) -> Document:
    """Read and parse a YAML file of at most MAX_BYTES bytes. Raises RecipeError naming the file and the line."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES} bytes; is this really a recipe?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    return loads(text, name=str(path))


def loads(text: str, name: str = "<recipe>") -> Document:
    """Parse one YAML document as ``yaml.safe_load`` would. Raises RecipeError with the line."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Document(None, text, name, {})
        lines: dict[KeyPath, int] = {}
        _check(root, loader)
        _collect_lines(root, (), lines)
        return Document(loader.construct_document(root), text, name, lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        parts = [part for part in (error.context, error.problem) if part]
        raise RecipeError(f"{where}: {', '.join(parts)}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: {' '.join(str(error).split())}") from error
    except (ValueError, OverflowError) as error:
        # int(), float() and date() of scalars that only look like one, such as 2026-13-45.
        raise RecipeError(f"{name}: a value cannot be read: {error}; put it in quotes if it is text") from error


def _check(root: Node, loader: _Loader) -> None:
    """Refuse more than MAX_NODES values once aliases are written out, and values that contain themselves.

    Every node is visited once, however many aliases point at it.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise _Refused("an alias refers to a value that contains it", node.start_mark)
        open_nodes.add(id(node))
        children: list[Node] = []
        if isinstance(node, SequenceNode):
            children = node.value
        elif isinstance(node, MappingNode):
            _check_keys(node, loader)
            children = [child for pair in node.value for child in pair]
        elif node.tag != _STRING and len(node.value) > MAX_NUMBER:
            raise _Refused(f"a number or date of {len(node.value)} characters: put it in quotes", node.start_mark)
        total = 1 + sum(size(child) for child in children)
        open_nodes.discard(id(node))
        if total > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES} values once aliases are written out", node.start_mark)
        sizes[id(node)] = total
        return total

    size(root)


def _check_keys(node: MappingNode, loader: _Loader) -> None:
    first: dict[Any, Node] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, ScalarNode):
            raise _Refused("a key must be a plain value, not a list or a mapping", key_node.start_mark)
        if key_node.tag == _MERGE:
            continue
        key = SafeConstructor.construct_object(loader, key_node)
        if key in first:
            line = first[key].start_mark.line + 1
            raise _Refused(f"duplicate key {key!r}, first given on line {line}", key_node.start_mark)
        first[key] = key_node


def _collect_lines(node: Node, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    """Record the line of every path below a node; what an alias or ``<<`` brings in has the line of its anchor."""
    if isinstance(node, SequenceNode):
        for index, child in enumerate(node.value):
            here = (*path, index)
            lines[here] = child.start_mark.line + 1
            _collect_lines(child, here, lines)
    elif isinstance(node, MappingNode):
        for key, value in node.value:
            if key.tag == _MERGE:
                for merged in value.value if isinstance(value, SequenceNode) else [value]:
                    inherited: dict[KeyPath, int] = {}
                    _collect_lines(merged, path, inherited)
                    for inherited_path, line in inherited.items():
                        lines.setdefault(inherited_path, line)
        for key, value in node.value:
            if key.tag != _MERGE:
                here = (*path, key.value)
                lines[here] = key.start_mark.line + 1
                _collect_lines(value, here, lines)


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'models'?`` where a known name is near, else the list of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(names)}" if 0 < len(names) <= SHOWN_NAMES else ""


def together(name: str, problems: Sequence[str]) -> str:
    """The text of one error for all problems of a document."""
    if len(problems) == 1:
        return problems[0]
    return f"{name}: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in problems)


class Mistake:
    """Something wrong with settings. says: what, with the way out. paths: of the value, of several where they clash."""

    def __init__(self, says: str, *paths: KeyPath) -> None:
        self.says, self.paths = says, paths


@dataclass
class Problems:
    """Collects what is wrong with one document."""

    document: Document
    found: list[tuple[int, str, KeyPath]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, path: KeyPath, message: str) -> None:
        entry = (self.document.line(path), message, path)
        if entry not in self.found:
            self.found.append(entry)

    def near(self, path: KeyPath) -> bool:
        """Whether something was already reported at ``path``, below it, or at a key that encloses it."""
        return any(path[: len(known)] == known[: len(path)] for _, _, known in self.found if known)

    def warn(self, path: KeyPath, message: str) -> None:
        text = f"{self.document.name}, line {self.document.line(path)}: {message}"
        if text not in self.warnings:
            self.warnings.append(text)

    def lines(self) -> list[str]:
        """Every problem with the document and its line, in the order of the lines."""
        rows = sorted(self.found, key=lambda entry: entry[0])
        return [f"{self.document.name}, line {line}: {message}" for line, message, _ in rows]

    def raise_if_any(self, kind: type[FusekitError] = RecipeError) -> None:
        """Raise one error with every problem and its line, if there is any."""
        lines = self.lines()
        named = f"{self.document.name}, " if len(lines) > 1 else ""
        if lines:
            raise kind(together(self.document.name, [line.removeprefix(named) for line in lines]))


def reasons(error: ValidationError) -> list[str]:
    """What a pydantic error says, one line each."""
    return [" ".join(str(detail["msg"]).split()) for detail in error.errors(include_url=False, include_context=False)]


def setting_problem(detail: Any) -> str:
    """``training.epochs = 0: Input should be greater than 0``: what pydantic found at a setting.

    detail: one of the ``errors()`` of a ValidationError.
    """
    where, says = ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")
    return f"{where} = {detail['input']!r}: {says}" if where else says


def by_place(error: ValidationError, data: Any) -> dict[KeyPath, list[str]]:
    """Messages of a pydantic error by the path in the recipe."""
    places: dict[KeyPath, list[str]] = {}
    for detail in error.errors(include_url=False, include_context=False):
        missing = detail["type"] == "missing"
        path = path_in(data, detail["loc"][:-1] if missing else detail["loc"])
        message = f"`{detail['loc'][-1]}` is missing" if missing else " ".join(str(detail["msg"]).split())
        if message not in places.setdefault(path, []):
            places[path].append(message)
    return places


def path_in(data: Any, location: Sequence[int | str]) -> KeyPath:
    """The part of a pydantic location that is in the data: names of union members are not."""
    path: KeyPath = ()
    for part in location:
        if isinstance(data, Mapping) and part in data:
            data, path = data[part], (*path, str(part))
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data, path = data[part], (*path, part)
    return path
