"""Peers' functions, taken unmodified from a checkout's files.

Their modules import trainers and whole model zoos, and FuseChat's names classes that transformers 5 no longer has, so
the functions that are measured are compiled from the peer's own source text, and nothing else of it is run.
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def functions_of(file: Path, names: set[str], environment: dict[str, Any]) -> SimpleNamespace:
    """The functions of a source file by name, also methods, compiled as they stand into ``environment``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
    missing = names - {node.name for node in found}
    if missing:
        raise SystemExit(f"{file} has no {', '.join(sorted(missing))}: another version than this benchmark knows")
    for node in found:
        node.decorator_list = []
    exec(compile(ast.Module(body=found, type_ignores=[]), str(file), "exec"), environment)
    return SimpleNamespace(**{name: environment[name] for name in names})


def fuseai(checkout: Path, marks: dict[type, str]) -> SimpleNamespace:
    """FuseChat's token aligner; ``marks`` are the word-start marks by tokenizer class, as its own table has them."""

    import editdistance
    import numpy as np
    from scipy import sparse

    environment: dict[str, Any] = {"np": np, "editdistance": editdistance, "sparse": sparse, "List": list, "Dict": dict}
    environment["TOKENIZER_TO_SPECIAL_TOKEN"] = marks
    file = checkout / "FuseChat" / "train" / "align_token_and_vocab.py"
    return functions_of(file, {"dtw", "transform_step_token"}, environment)


def trl(checkout: Path) -> SimpleNamespace:
    """GOLD's encoding with byte offsets and its walk over them."""
    import torch

    environment: dict[str, Any] = {"torch": torch, "Any": Any}
    utils = checkout / "trl" / "experimental" / "utils.py"
    source = ast.parse(utils.read_text(encoding="utf-8"))
    calls = {"encode_with_byte_offsets", "_normalize_byte_offsets", "is_byte_level_tokenizer"}
    helpers = {n.name for n in source.body if isinstance(n, ast.FunctionDef) and ("byte" in n.name)} | calls
    found = functions_of(utils, helpers, environment)
    for node in source.body:  # constants that the helpers read
        if isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) for t in node.targets):
            try:
                exec(compile(ast.Module(body=[node], type_ignores=[]), str(utils), "exec"), environment)
            except NameError:
                continue
    walk = checkout / "trl" / "experimental" / "gold" / "gold_trainer.py"
    found._align_by_byte_offsets = functions_of(walk, {"_align_by_byte_offsets"}, {})._align_by_byte_offsets
    return found
