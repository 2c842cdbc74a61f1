"""Texts of four kinds, long enough to cut pieces of any number of tokens from."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path

CHINESE = (
    "自然语言处理是人工智能和语言学领域的分支学科，此领域探讨如何处理及运用自然语言。",
    "今天早上他坐地铁去上班，路上看了一本关于唐代历史的小说，觉得非常有意思。",
    "经济学家认为，明年的通货膨胀率可能会下降到百分之二左右，但仍存在不确定性。",
    "妈妈说：“晚饭做了红烧肉和清炒菠菜，你们快来吃吧！”孩子们高兴地跑了过来。",
    "这座桥建于一九三七年，全长一千四百五十三米，是当时国内最长的公路铁路两用桥。",
    "医生建议患者每天至少步行三十分钟，并且少吃油腻、辛辣的食物。",
)
EMOJI = (
    "Great news 🎉🎉! I ❤️ it so much… ",
    "👨‍👩‍👧‍👦 going to 🇩🇪 & 🇯🇵 next week ✈️ — see ya 🤖✨ ",
    "mañana 日本 ok? สวัสดีครับ 👍🏽 مرحبا بك ",
    "lol 😂😂😂 that's so 🔥💯, naïve café ☕️ ",
    "Привет 👋 как дела? 좋아요 👌🏿 ",
)


def texts(characters: int = 12_000) -> dict[str, str]:
    """English (the licence texts and docstrings of the interpreter), code, Chinese, and a mix with emoji."""
    generator = random.Random(0)
    library = Path(textwrap.__file__).parent
    code = "\n".join((library / name).read_text() for name in ("textwrap.py", "heapq.py", "argparse.py"))
    import argparse
    import decimal
    import statistics
    import turtle

    prose = [inspect_doc(m) for m in (statistics, decimal, argparse, turtle, random)]
    prose += [line for name in ("heapq.py", "textwrap.py") for line in docstrings((library / name).read_text())]
    english = " ".join(" ".join(part.split()) for part in prose)
    chinese = "".join(generator.choice(CHINESE) for _ in range(characters // 30))
    emoji = "".join(generator.choice(EMOJI) for _ in range(characters // 20))
    return {
        "english": (english * (characters // len(english) + 1))[:characters],
        "code": code[:characters],
        "chinese": chinese[:characters],
        "emoji mix": emoji[:characters],
    }


def inspect_doc(module: object) -> str:
    """A module's docstring."""
    return module.__doc__ or ""


def docstrings(source: str) -> list[str]:
    """The docstrings of functions and classes in a source text."""
    import ast

    nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return [doc for node in nodes if (doc := ast.get_docstring(node))]


def piece(text: str, tokenizer: object, tokens: int) -> str:
    """The beginning of ``text`` that ``tokenizer`` cuts into about ``tokens`` tokens."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]  # type: ignore[operator]
    return text[: offsets[min(tokens, len(offsets)) - 1][1]]
