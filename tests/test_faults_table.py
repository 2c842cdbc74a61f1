"""The page of faults names a test for each, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(?:\w+::)?(\w+)`")


def rows() -> dict[int, str]:
    """The rows of the table by number."""
    text = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
    return {int(found[1]): found[0] for found in re.finditer(r"^\| (\d+) \|.*$", text, re.MULTILINE)}


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the test functions of a file, those in classes too."""
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def test_every_fault_has_a_row() -> None:
    assert list(rows()) == list(range(1, 27))


@pytest.mark.parametrize("number", range(1, 27))
def test_the_tests_of_a_fault_are_there(number: int) -> None:
    named = TEST.findall(rows()[number])
    assert named
    assert [f"{file}::{name}" for file, name in named if name not in names_in(file)] == []
    assert len(named) == rows()[number].count("tests/"), "a test that is not written as `tests/file.py::name`"
