"""Recipes of the demo's models on a few rows, and what tells an artifact that was made again from one that was kept."""

from __future__ import annotations

import json
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
