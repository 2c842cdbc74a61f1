"""Recipes of the demo's models on a few rows, and what tells an artifact that was made again from one that was kept."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusekit import artifacts as artifact
from fusekit.errors import FusekitError
from fusekit.pipeline.plan import Plan
from fusekit.pipeline.run import make_plan, run
from fusekit.recipe.loading import load_recipe
from tests.capture.conftest import write_rows
from tests.helpers import edit_manifest

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
    """A recipe and its data. changes: values of sections; None leaves one out."""
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
        section = recipe.get(name, {}) | values
        recipe[name] = {key: value for key, value in section.items() if value is not None}
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


RUN = ("run", "recipe.yml", "out")
SCHEDULE = [{"epochs": 1, "responses": 1.0}, {"epochs": 1, "responses": 0.1, "data": 1.0}]
JUDGES = [{"exact_match": True}, {"python": "judges:shortest", "allow_code": True}, {"bits_per_byte": True}]


def write_profuser(folder: Path) -> Path:
    """A recipe with every stage: two sources, eight rows in two shards, three judges, a schedule of two."""
    folder.mkdir(parents=True, exist_ok=True)
    training = {"batch_size": 4, "per_device_train_batch_size": 4, "save_steps": 1, "save_strategy": "steps"}
    write_recipe(
        folder,
        ["llama", "qwen"],
        data={"path": "rows.jsonl"},
        respond={"max_new_tokens": 6, "prompts_per_shard": 3, "judges": JUDGES},
        capture={"top_k": 4, "rows_per_shard": 4},
        fusion={"mode": "joint"},
        distill=training | {"num_train_epochs": None, "schedule": SCHEDULE},
        evaluate={"path": "held_out.jsonl"},
    )
    write_rows(folder / "rows.jsonl", 8)
    write_rows(folder / "held_out.jsonl", 2)
    (folder / "judges.py").write_text(
        "def shortest(messages, answers, references):\n"
        "    return {name: -len(text) for name, text in answers.items()}\n"
    )
    return folder


def on_path() -> None:
    """Import from the working folder, as ``python -m`` does: the judge."""
    sys.path.insert(0, "")


def stamps(folder: Path) -> dict[str, int]:
    """When each file of the artifacts was written; inodes tell a folder that was made again from one that was kept."""
    return {
        str(path.relative_to(folder)): path.stat().st_ino + path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


SUMMARIES = {
    "recipe.resolved.yml",
    "results.json",
    "models.json",
    "report.html",
    "logs/run.log",
    "merge.yml",  # names the targets where they are now: the run was copied from elsewhere
}
"""What a run may write although all artifacts are there."""


def changed(before: dict[str, int], out: Path) -> set[str]:
    """The files that were written, added or removed since these stamps."""
    return {name for name, _ in before.items() ^ stamps(out).items()}


def with_sources(recipe: Path, names: list[str]) -> Path:
    """The recipe with other sources, in a file beside it."""
    content = yaml.safe_load(recipe.read_text())
    content["sources"] = [{"model": str(DEMO / "sources" / name), "load": {"dtype": "float32"}} for name in names]
    path = recipe.with_name(f"{'-'.join(names)}.yml")
    path.write_text(yaml.safe_dump(content))
    return path


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


def planned(recipe: Path, out: Path | None, *overrides: str) -> Plan:
    return make_plan(load_recipe(recipe, overrides), "recipe.yml", out)


def refused(recipe: Path, out: Path, message: str, *overrides: str, **how: Any) -> None:
    """A run raises an error of fusekit with this message, and touches nothing but its log."""
    before = stamps(out)
    with pytest.raises(FusekitError, match=message):
        go(recipe, out, *overrides, **how)
    assert [name for name in changed(before, out) if not name.startswith("logs/")] == []


def with_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """The artifact as if it had been made from these, too."""
    edit_manifest(folder, lambda manifest: manifest["inputs"].update(inputs))


APART = {"logs", "report.html"}
"""At the top of an output: what a run said and when, and a page with the times of its stages."""
_LOCK = re.compile(r"\..*\.fusekit\.(lock|holder)")
_SAFE = {".safetensors", ".npz"}


def differences(a: Path, b: Path) -> list[str]:
    """One line for each file of two outputs that one of them lacks, or that differs; empty for equal ones.

    Files are compared byte by byte, text with each output's own path taken for the same. Of a manifest ``made`` is left
    out (times, versions), and so are its own hash and those of text files, which are compared themselves. Locks do not
    count; what a process that died left behind does.
    """
    a, b = a.resolve(), b.resolve()
    ours, theirs = _contents(a), _contents(b)
    lines = [f"{name}: only in {a}" for name in sorted(ours.keys() - theirs.keys())]
    lines += [f"{name}: only in {b}" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = ours[name], theirs[name]
        if isinstance(one, dict) and isinstance(other, dict):
            lines += [f"{name}: {line}" for line in artifact.differences(one, other)[:5]]
        elif one != other:
            lines.append(f"{name}: its content differs")
    return lines


def _contents(out: Path) -> dict[str, Any]:
    """What is to be compared, by paths within an output; empty folders too, with a slash."""
    found: dict[str, Any] = {}
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if name.split("/")[0] in APART or _LOCK.fullmatch(path.name):
            continue
        if path.is_file():
            found[name] = _content(path, out)
        elif path.is_dir() and not any(path.iterdir()):
            found[name + "/"] = None
    return found


def _content(path: Path, out: Path) -> Any:
    data = path.read_bytes()
    if path.suffix in _SAFE:
        return data
    try:
        text = data.decode().replace(str(out), "OUT")
        value = json.loads(text) if path.suffix == ".json" else text
    except ValueError:
        return data
    if path.name == "manifest.json" and isinstance(value, dict):
        value = {key: known for key, known in value.items() if key not in ("made", "xxh3")}
        files = value.get("files")
        if isinstance(files, dict):
            value["files"] = {file: hashes if Path(file).suffix in _SAFE else "text" for file, hashes in files.items()}
    return value
