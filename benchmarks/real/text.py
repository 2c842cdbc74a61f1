"""Real text in four languages and code, from Debian packages and Python's standard library, as rows of plain text.

| text | from | licence |
|---|---|---|
| en, de, fr, es: training, validation, test | Debian package `debian-handbook` | GPL-2+ or CC-BY-SA-3.0 |
| en, de, fr, es, another book: test | Debian packages `debian-reference-*` | GPL-2+ |
| Python code: training, validation, test | the standard library of the Python that runs | PSF-2.0 |

Training, validation and test have files apart. A file of the handbook is the same section in every language and falls
to the same split, so no section that is trained on in one language is tested on in another.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

LANGUAGES = {"en": "en-US", "de": "de-DE", "fr": "fr-FR", "es": "es-ES"}
BOOKS = ("debian-handbook", *(f"debian-reference-{language}" for language in LANGUAGES))
KINDS = (*LANGUAGES, "code")
SPLITS = ("train", "validation", "test")
_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
_BLOCK = {"p", "div", "li", "td", "th", "dt", "dd", "ul", "ol", "dl", "table", *_HEADINGS}
_SKIPPED = {"pre", "script", "style", "head"}


class _Reader(HTMLParser):
    """Headings, and the text of ``<p>`` and ``<div class="para">``; white space folded, without listings."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[bool, str]] = []
        self._parts: list[str] | None = None
        self._heading = False
        self._skipped = 0

    def _end(self) -> None:
        text = " ".join("".join(self._parts or ()).split())
        if text:
            self.found.append((self._heading, text))
        self._parts = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCK:
            self._end()
            self._heading = tag in _HEADINGS
            if tag == "p" or self._heading or (tag == "div" and ("class", "para") in attrs):
                self._parts = []
        self._skipped += tag in _SKIPPED

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCK:
            self._end()
        self._skipped -= tag in _SKIPPED

    def handle_data(self, data: str) -> None:
        if self._parts is not None and not self._skipped:
            self._parts.append(data)


def elements(page: Path) -> list[tuple[bool, str]]:
    """The headings (True) and paragraphs (False) of an HTML page, in order."""
    reader = _Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    return reader.found


def paragraphs(page: Path) -> list[str]:
    """The paragraphs of an HTML page of at least 80 characters, each once."""
    return [text for text in dict.fromkeys(text for heading, text in elements(page) if not heading) if len(text) >= 80]


def split_of(name: str) -> str:
    """The split of a file, by its name alone: half of the files train, a quarter each validates and tests."""
    return ("train", "train", "validation", "test")[sha256(name.encode()).digest()[0] % 4]


def _handbook(packages: Path) -> Iterator[tuple[str, str, str]]:
    """(language, split, text) of every file. Paragraphs that were left in English are not of their language."""
    root = packages / "debian-handbook" / "usr/share/doc/debian-handbook/html"
    english = {text for page in (root / LANGUAGES["en"]).glob("*.html") for text in paragraphs(page)}
    for language, folder in LANGUAGES.items():
        for page in sorted((root / folder).glob("*.html")):
            own = [text for text in paragraphs(page) if language == "en" or text not in english]
            if own:
                yield language, split_of(page.name), "\n\n".join(own)


def _reference(packages: Path, language: str) -> Iterator[str]:
    root = packages / f"debian-reference-{language}" / "usr/share/debian-reference"
    for page in sorted(root.glob(f"*.{language}.html")):
        if own := paragraphs(page):
            yield "\n\n".join(own)


def _code() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in (
        sorted(root.glob("*.py")) + sorted((root / "email").glob("*.py")) + sorted((root / "json").glob("*.py"))
    ):
        text = file.read_text(encoding="utf-8")
        if len(text) > 2000:
            yield split_of(file.name), text


def blocks(texts: list[str], size: int) -> list[str]:
    """Pieces of at most ``size`` characters, cut before white space. Those shorter than half of that are left out."""
    found = []
    for text in texts:
        start = 0
        while len(text) - start >= size // 2:
            stop = min(start + size, len(text))
            if stop < len(text):
                while stop > start and not text[stop].isspace():
                    stop -= 1
            if stop == start:
                break
            found.append(text[start:stop])
            start = stop
    return found


def write_text(packages: Path, out: Path, rows: int, held_out: int, size: int) -> None:
    """Write a file per text under ``train``, ``validation`` and ``test``; the same inputs give the same files.

    Args:
        packages: where the Debian packages were unpacked, a folder each.
        out: the folder.
        rows: to train on, of each kind.
        held_out: rows of each text of validation and test.
        size: characters of a row at the most.
    """
    texts: dict[tuple[str, str], list[str]] = {}
    for language, split, text in _handbook(packages):
        texts.setdefault((language, split), []).append(text)
    for split, text in _code():
        texts.setdefault(("code", split), []).append(text)
    files: dict[str, list[str]] = {}
    for (kind, split), found in sorted(texts.items()):
        number = rows if split == "train" else held_out
        files[f"{split}/{kind}"] = _drawn(blocks(found, size), number, f"{split}/{kind}")
    for language in LANGUAGES:
        files[f"test/{language}-other"] = _drawn(blocks(list(_reference(packages, language)), size), held_out, language)
    for name, chosen in files.items():
        write_rows(out / f"{name}.jsonl", [{"fragment": text} for text in chosen])


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a JSON line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def _drawn(found: list[str], number: int, name: str) -> list[str]:
    if len(found) < number:
        raise SystemExit(f"{name}: {number} rows are wanted, there is text for {len(found)}: ask for fewer")
    return random.Random(name).sample(found, number)
