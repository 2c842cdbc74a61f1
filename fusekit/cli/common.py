"""What the commands share: options made from settings, how a command stops, and how it prints its result."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel


class TerminatedError(BaseException):
    """SIGTERM, as an exception that unwinds like KeyboardInterrupt."""


@contextmanager
def interruptible(stopped: Callable[[], object]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM unwind the body, so that locks are released and temporary files removed; then exit.

    stopped: says what is there; the exit status is that of the signal (130 or 143). Where another process of the run
    failed, which says why, it is 1.
    """
    from fusekit.devices import OtherProcessError

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TerminatedError

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
    except (KeyboardInterrupt, TerminatedError) as error:
        stopped()
        sys.exit(128 + (signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT))
    except OtherProcessError:
        sys.exit(1)


def command_again(*left_out: str) -> str:
    """The command line of this process, to be typed again; without the options that must not be repeated.

    Under ``torchrun`` or ``accelerate launch`` it is what follows the launcher and its options.
    """
    program = Path(sys.argv[0])
    arguments = [argument for argument in sys.argv[1:] if argument not in left_out]
    if program.name != "__main__.py":
        return shlex.join([program.name, *arguments])
    module = "fusekit.cli" if program.parent.name == "cli" else program.parent.name
    if "LOCAL_RANK" in os.environ:
        return shlex.join(["accelerate", "launch", "-m", module, *arguments]) + "   # with the launcher's own options"
    return shlex.join(["python", "-m", module, *arguments])


def print_json(value: Any) -> None:
    """The result of a command for programs; escaped where the output cannot take it (names that are not UTF-8)."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=1)
    click.echo(text)


def show(found: Any, *, as_json: bool) -> None:
    """A result that has ``as_dict``, for programs or for people."""
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(str(found))


def drop_noise() -> None:
    """Bars for loading weights and advice about generation: nothing that a user of a command could act on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


Command = TypeVar("Command", bound=Callable[..., Any])


def options_of(
    settings: type[BaseModel], *names: str, defaults: bool = True, prefix: str = ""
) -> Callable[[Command], Command]:
    """A decorator that adds an option for each named field of a pydantic model, in their order; no name: for all.

    A truth value becomes ``--name/--no-name``, a ``Literal`` a choice, a bounded number a range, a list an option that
    may be repeated, and a mapping JSON. An option that is not given is None, so that presets and defaults stay where
    they are declared (:func:`given`). defaults: whether the help shows them; not where a preset may replace them.
    prefix: of a section, ``engine_`` for ``--engine-url``; its field ``name`` is ``--engine``.
    """
    chosen = names or tuple(settings.model_fields)

    def decorate(command: Command) -> Command:
        for name in reversed(chosen):
            field = settings.model_fields[name]
            option = _named(prefix, name)
            flag, text = "--" + option.replace("_", "-"), field.description or ""
            several = get_origin(field.annotation) is list
            kind = _kind(get_args(field.annotation)[0] if several else field.annotation, field.metadata)
            if defaults and field.default not in (None, []) and not field.is_required() and kind is not JSON:
                text += f"  [default: {', '.join(map(str, field.default)) if several else field.default}]"
            declared = f"{flag}/--no-{flag[2:]}" if kind is click.BOOL else flag
            command = click.option(declared, option, default=None, type=kind, help=text, multiple=several)(command)
        return command

    return decorate


def given(options: Mapping[str, Any], settings: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The fields of a model that were given as options, by name. prefix: as of :func:`options_of`."""
    found = {name: options.get(_named(prefix, name)) for name in settings.model_fields}
    return {name: value for name, value in found.items() if value not in (None, ())}


def _named(prefix: str, field: str) -> str:
    return prefix.rstrip("_") if prefix and field == "name" else prefix + field


class _Json(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions
    """A JSON object, or a word where the field also takes one."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or not value.startswith("{"):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            return self.fail(f"{value!r} is not JSON: {error}", param, ctx)


JSON = _Json()


def _kind(annotation: Any, metadata: list[Any]) -> click.ParamType[Any]:
    """The click type of a field's annotation and its bounds; unions are what they are without None."""
    while get_origin(annotation) in (Union, types.UnionType, Annotated):
        if get_origin(annotation) is Annotated:
            annotation, *found = get_args(annotation)
            metadata = [*metadata, *(bound for item in found for bound in getattr(item, "metadata", [item]))]
            continue
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) > 1:
            return JSON
        annotation = members[0]
    if get_origin(annotation) is Literal:
        return click.Choice([str(value) for value in get_args(annotation)])
    if annotation is bool:
        return click.BOOL
    if annotation in (int, float):
        names = ("ge", "gt", "le", "lt")
        bounds = {name: getattr(item, name) for item in metadata for name in names if hasattr(item, name)}
        low, high = bounds.get("gt", bounds.get("ge")), bounds.get("lt", bounds.get("le"))
        kind = click.IntRange if annotation is int else click.FloatRange
        return kind(low, high, min_open="gt" in bounds, max_open="lt" in bounds)
    return click.STRING if annotation is str else JSON
