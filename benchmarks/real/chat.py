"""Real conversations in four languages: the questions and answers of Debian's FAQ.

From the Debian packages ``debian-faq``, ``-de``, ``-fr`` and ``-it``; their licence allows copies, translations and
modified versions under the same terms. A question has the same number in every language and falls to the same split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.real.text import elements, split_of, write_rows

FAQS = {"debian-faq": "en", "debian-faq-de": "de", "debian-faq-fr": "fr", "debian-faq-it": "it"}
_NUMBERED = re.compile(r"(?P<number>[\d.]+) (?P<question>.+)")
LONGEST = 700
"""Characters of an answer: whole paragraphs, as many as fit."""


def _questions(page: Path) -> Iterator[tuple[str, str, str]]:
    """(number, question, answer) of every section with an answer."""
    number = question = ""
    answer: list[str] = []
    for heading, text in [*elements(page), (True, "")]:
        if not heading:
            if question and sum(map(len, answer)) + len(text) <= LONGEST:
                answer.append(text)
            continue
        if question and sum(map(len, answer)) >= 80:
            yield number, question, "\n\n".join(answer)
        found = _NUMBERED.fullmatch(text)
        number, question = (found["number"], found["question"]) if found else ("", "")
        answer = []


def write_chat(packages: Path, out: Path) -> None:
    """Write conversations of one question, a file per language under ``train``, ``validation`` and ``test``.

    packages: where the Debian packages were unpacked, a folder each.
    """
    for package, language in FAQS.items():
        rows: dict[str, list[dict[str, object]]] = {}
        root = packages / package / "usr/share/doc/debian/FAQ"
        for page in sorted(root.rglob(f"*.{language}.html")):
            for number, question, answer in _questions(page):
                roles = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                rows.setdefault(split_of(f"{page.name.split('.')[0]} {number}"), []).append({"messages": roles})
        for split, found in rows.items():
            write_rows(out / split / f"{language}.jsonl", found)
