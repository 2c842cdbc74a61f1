"""Whether two outputs hold the same artifacts: weights, shards and manifests, apart from times, hosts and places."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact

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
