"""Chat templates: a model's own, those that ship with fusekit, or a file.

``foreign`` use (every model of a run under the pivot's template) needs to know what a template's control strings stand
for, so a template carries the roles of the model it was written for.
"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import xxhash

from fusekit.alignment.surfaces import vocabulary_surfaces
from fusekit.errors import DataError

MAX_FILE = 1_000_000
"""Bytes of a template file; the longest published ones have some thirty thousand."""

_DATE_CODES = [f"%{code}" for code in [*"aAbBcdDeFGhHIjmMpRSTuUVwWxXyYZ", "-d", "-m", "-H", "-I", "-j", "-y"]]

_PERCENT = "\U000fae04"  # for a percent sign that begins no code


@dataclass(frozen=True)
class _Shipped:
    bos: str | None
    eos: str
    end_of_turn: str
    markers: tuple[str, ...]  # added tokens by which a tokenizer without a template is recognised


SHIPPED = {
    "chatml": _Shipped(None, "<|im_end|>", "<|im_end|>", ()),
    "gemma": _Shipped("<bos>", "<eos>", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "internlm2": _Shipped("<s>", "</s>", "<|im_end|>", ("<|im_start|>", "<|im_end|>", "<|action_start|>")),
    "llama-3": _Shipped("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", ()),
    "llama-3.1": _Shipped("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", ("<|eom_id|>", "<|python_tag|>")),
    "mistral": _Shipped("<s>", "</s>", "</s>", ()),
    "openchat-3.5": _Shipped("<s>", "<|end_of_turn|>", "<|end_of_turn|>", ("<|end_of_turn|>", "<|pad_0|>")),
    "phi-3": _Shipped("<s>", "<|endoftext|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "qwen": _Shipped(None, "<|im_end|>", "<|im_end|>", ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "solar": _Shipped("<s>", "</s>", "</s>", ()),
    "vicuna": _Shipped("<s>", "</s>", "</s>", ()),
    "yi": _Shipped("<|startoftext|>", "<|im_end|>", "<|im_end|>", ("<|startoftext|>", "<|im_start|>", "<|im_end|>")),
}


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
        """The jinja text as it would write on a day (at 0:00), whatever the clock says.

        transformers passes no function on to a template, so the day is written into it.
        """
        if not self.prints_date:
            return self.source
        moment = datetime.datetime.combine(date, datetime.time())
        values = [("%%", _PERCENT), *((code, moment.strftime(code)) for code in _DATE_CODES), (_PERCENT, "%")]
        written = "".join(f"|replace({code!r}, {value!r})" for code, value in values)
        # The source begins a line, as it did: white space around blocks depends on it.
        return f"{{% macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{self.source}"

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over the source and the control strings."""
        whole = "\0".join(
            ["fusekit template 1", self.source, *(repr(s) for s in (self.bos, self.eos, self.end_of_turn))]
        )
        return xxhash.xxh3_128_hexdigest(whole.encode())

    @classmethod
    def own(cls, tokenizer: Any) -> ChatTemplate:
        """The template that comes with a tokenizer. Raises DataError where it has none."""
        source = getattr(tokenizer, "chat_template", None)
        if isinstance(source, dict):
            source = source.get("default")
        name = _name(tokenizer)
        if not isinstance(source, str) or not source:
            raise DataError(
                f"{name} has no chat template: name one of {', '.join(template_names())}, or give a jinja file"
            )
        return cls(f"{name}'s own", source, origin="the tokenizer's own").with_roles_of(tokenizer)

    @classmethod
    def named(cls, name: str) -> ChatTemplate:
        """One that ships with fusekit (:func:`template_names`). Raises DataError for an unknown name."""
        if name not in SHIPPED:
            raise DataError(f"no chat template {name!r} ships with fusekit: there are {', '.join(template_names())}")
        file = resources.files("fusekit.representation") / "chat_templates" / f"{name}.jinja"
        roles = SHIPPED[name]
        source, origin = file.read_text(encoding="utf-8"), f"{name}, shipped with fusekit"
        return cls(name, source, roles.bos, roles.eos, roles.end_of_turn, origin)

    @classmethod
    def from_file(cls, path: str | Path) -> ChatTemplate:
        """A jinja file, with the control strings of the tokenizer that uses it. Raises DataError."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE:
                raise DataError(f"{path} has {path.stat().st_size:,} bytes: no chat template is over {MAX_FILE:,}")
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
        if name not in SHIPPED and not Path(name).is_file():
            raise DataError(
                f"no chat template is called {name!r}: there are own, {', '.join(template_names())}; "
                "or give a jinja file"
            )
        return cls.named(name) if name in SHIPPED else cls.from_file(name)

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """A tokenizer's own template, or where it has none the one shipped template whose markers it alone has.

        Raises DataError where none or several fit, with the names to choose from.
        """
        if getattr(tokenizer, "chat_template", None):
            return cls.own(tokenizer)
        added = {token.content for token in vocabulary_surfaces(tokenizer).view.added_tokens.values()}
        fitting = [name for name, shipped in SHIPPED.items() if shipped.markers and added.issuperset(shipped.markers)]
        if len(fitting) == 1:
            found = cls.named(fitting[0])
            return dataclasses.replace(found, origin=f"{found.origin}, recognised by the tokenizer's added tokens")
        fits = f"its added tokens fit {' and '.join(fitting)}" if fitting else "its added tokens fit no shipped one"
        raise DataError(
            f"{_name(tokenizer)} has no chat template, and {fits}: name one of {', '.join(template_names())}, "
            "or give a jinja file"
        )

    def with_roles_of(self, tokenizer: Any) -> ChatTemplate:
        """With the control strings of a tokenizer where it has none of its own."""
        view = vocabulary_surfaces(tokenizer).view
        strings = {role: view.added_tokens[id_].content for role, id_ in view.roles.items() if id_ in view.added_tokens}
        return dataclasses.replace(
            self,
            bos=self.bos or strings.get("bos"),
            eos=self.eos or strings.get("eos"),
            end_of_turn=self.end_of_turn or strings.get("end_of_turn"),
        )


def kept_date(value: object) -> datetime.date | None:
    """A day as manifests keep it; None for anything else."""
    try:
        return datetime.date.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
