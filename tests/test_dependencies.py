"""Which part imports which library: what does not merge works without mergekit, and what only checks without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fusekit.errors import CaptureError, MergeError
from fusekit.hub import read_headers

PACKAGE = Path(__file__).parents[1] / "fusekit"
MERGES = (
    "merge_methods/",
    "merging/",
    "mergekit_plugin.py",
    "mergekit_private.py",
    "mergekit_yaml.py",
    "cli/recipe.py",  # checks a mergekit recipe
    "cli/merge.py",
    "cli/fuse.py",
    "pipeline/merging.py",
    "plan/merging.py",
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_only_what_merges_imports_mergekit():
    files = {str(path.relative_to(PACKAGE)): imports(path) for path in PACKAGE.rglob("*.py")}
    assert "mergekit.options" in files["cli/merge.py"]
    guilty = [
        f"{name}: {module}"
        for name, modules in files.items()
        for module in modules
        if module.split(".")[0] == "mergekit" or module.startswith("fusekit.merging")
        if name != "__init__.py"  # the lazy names, for type checkers
        if not name.startswith(MERGES)
    ]
    assert not guilty


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import fusekit; dir(fusekit)", "torch transformers mergekit"),
        (
            "import fusekit.recipe, fusekit.hub, fusekit.cli.recipe, fusekit.cli.run, "
            "fusekit.cli.capture, fusekit.cli.inspect, fusekit.cli.generate",
            "mergekit torch transformers",
        ),
        ("from fusekit.recipe import load_recipe; load_recipe('recipes/demo.yml')", "scipy rapidfuzz lm_eval torch"),
        (
            "import fusekit.capturing.capture, fusekit.capturing.store, fusekit.pipeline.run, fusekit.pipeline.plan, "
            "fusekit.report.card",
            "mergekit gguf",
        ),
        ("import fusekit.capturing.writer", "torch transformers datasets"),
    ],
)
def test_imports_leave_out_what_they_do_not_need(code, heavy):
    script = f"{code}\nimport sys\nprint([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]"


def test_a_damaged_model_is_an_error_of_merging_and_of_capturing(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"short")
    for kind in (MergeError, CaptureError):
        with pytest.raises(kind, match="not a whole safetensors file"):
            read_headers(tmp_path / "model.safetensors", "m")


def test_one_list_says_what_forked_children_have_imported():
    """A second one would replace the first in the whole test process, and every child would import for seconds."""
    tests = Path(__file__).parent
    setting = sorted(
        str(file.relative_to(tests)) for file in tests.rglob("*.py") if ".set_forkserver_" in file.read_text()
    )
    assert setting == ["processes.py", "test_dependencies.py"]
