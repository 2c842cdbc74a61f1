"""Recipes of the demo's models on a few rows, and what tells an artifact that was made again from one that was kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusekit import artifacts as artifact
from fusekit.errors import FusekitError
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe

DEMO = Path(__file__).parents[2] / "demo"
ROWS = [
    {
        "dataset": "add",
        "messages": [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(a + b)}],
    }
    for a in range(10, 14)
    for b in range(20, 26)
]


def write_recipe(folder: Path, sources: list[str], **changes: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    recipe: dict[str, Any] = {
        "pivot": {"model": str(DEMO / "models" / "pivot"), "load": {"dtype": "float32"}},
        "sources": [{"model": str(DEMO / "sources" / name), "load": {"dtype": "float32"}} for name in sources],
        "data": {"path": str(folder / "rows.jsonl"), "max_length": 64},
        "capture": {"top_k": 8},
        "distill": {
            "lm_weight": 0.5,
            "num_train_epochs": 4,
            "learning_rate": 3e-4,
            "batch_size": 6,
            "per_device_train_batch_size": 6,
        },
        "merge": {"merge_method": "linear", "parameters": {"weight": 1.0}, "dtype": "float32"},
        "evaluate": {"path": str(folder / "held_out.jsonl"), "metrics": ["bits_per_byte"]},
    }
    for name, values in changes.items():
        recipe[name] = recipe.get(name, {}) | values
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def stamps(folder: Path) -> dict[str, int]:
    """When each file of the artifacts was written; inodes tell a folder that was made again from one that was kept."""
    return {
        str(path.relative_to(folder)): path.stat().st_ino + path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def with_sources(recipe: Path, names: list[str]) -> Path:
    """The recipe with other sources, in a file beside it."""
    content = yaml.safe_load(recipe.read_text())
    content["sources"] = [{"model": str(DEMO / "sources" / name), "load": {"dtype": "float32"}} for name in names]
    path = recipe.with_name(f"{'-'.join(names)}.yml")
    path.write_text(yaml.safe_dump(content))
    return path


def weights(out: Path) -> dict[str, str]:
    """Hashes of the models that a run has made."""
    return {
        str(path.parent.relative_to(out)): artifact.file_hash(path) for path in sorted(out.rglob("model.safetensors"))
    }


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def go(recipe: Path, out: Path, *overrides: str, **how: Any) -> list[str]:
    """Run a recipe; returns what it said."""
    said: list[str] = []
    run(load_recipe(recipe, overrides), out, say=said.append, quiet=True, **how)
    return said


def refused(recipe: Path, out: Path, message: str, *overrides: str, **how: Any) -> None:
    """A run raises an error of fusekit with this message, and touches nothing but its log."""
    before = stamps(out)
    with pytest.raises(FusekitError, match=message):
        go(recipe, out, *overrides, **how)
    assert {name: at for name, at in stamps(out).items() if not name.startswith("logs/")} == {
        name: at for name, at in before.items() if not name.startswith("logs/")
    }


def with_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """The artifact as if it had been made from these, too."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"inputs": manifest["inputs"] | inputs}))


APART = {"logs", "report.html"}
"""At the top of an output: what a run said and when, and a page with the times of its stages."""
_LOCK = re.compile(r"\..*\.fusekit\.(lock|holder)")
_SAFE = {".safetensors", ".npz"}


def differences(a: Path, b: Path) -> list[str]:
    """One line for each file of two outputs that one of them lacks, or that differs; empty for equal ones.

    Files are compared byte by byte, text with each output's own path taken for the same. Of a manifest ``made`` is left
    out (times, versions), and so are the hashes of text files, which are compared themselves. Locks do not count; what
    a process that died left behind does.
    """
    a, b = a.resolve(), b.resolve()
    ours, theirs = _files(a), _files(b)
    lines = [f"{name}: only in {a}" for name in sorted(ours - theirs)]
    lines += [f"{name}: only in {b}" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        lines += [f"{name}: {what}" for what in _compared(a, b, name)]
    return lines


def _files(out: Path) -> set[str]:
    """Paths within an output; empty folders too, with a slash."""
    found = set()
    for path in out.rglob("*"):
        relative = path.relative_to(out)
        if relative.parts[0] in APART or _LOCK.fullmatch(path.name):
            continue
        if path.is_file():
            found.add(relative.as_posix())
        elif path.is_dir() and not any(path.iterdir()):
            found.add(relative.as_posix() + "/")
    return found


def _compared(a: Path, b: Path, name: str) -> list[str]:
    if name.endswith("/"):
        return []
    one, other = (_content(out, name) for out in (a, b))
    if one == other:
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        return artifact.differences(one, other)[:5]
    return ["its content differs"]


def _content(out: Path, name: str) -> Any:
    data = (out / name).read_bytes()
    if Path(name).suffix in _SAFE:
        return data
    try:
        text = data.decode().replace(str(out), "OUT")
        value = json.loads(text) if name.endswith(".json") else text
    except ValueError:
        return data
    if name.rsplit("/", 1)[-1] == "manifest.json" and isinstance(value, dict):
        value.pop("made", None)
        files = value.get("files")
        if isinstance(files, dict):
            value["files"] = {file: hashes if Path(file).suffix in _SAFE else "text" for file, hashes in files.items()}
    return value
