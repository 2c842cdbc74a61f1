"""The page of faults names a test for each, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def rows() -> dict[int, str]:
    """The rows of the table by number."""
    text = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
    return {int(found[1]): found[0] for found in re.finditer(r"^\| (\d+) \|.*$", text, re.MULTILINE)}


@cache
def names() -> frozenset[str]:
    """Names of all test functions, those in classes too."""
    files = (REPOSITORY / "tests").rglob("test_*.py")
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in files)
    return frozenset(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_fault_has_a_row() -> None:
    assert list(rows()) == list(range(1, 27))


@pytest.mark.parametrize("number", range(1, 27))
def test_the_tests_of_a_fault_are_there(number: int) -> None:
    named = re.findall(r"`(test_\w+)`", rows()[number])
    assert named
    assert sorted(set(named) - names()) == []
