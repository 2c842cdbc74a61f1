"""``fusekit verify``: whether artifacts on disk are what was committed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from fusekit.errors import FusekitError

MANIFEST = "manifest.json"
TARGET_RECORD = "training.json"

Check = Callable[[Path], tuple[list[str], str]]


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--quiet", is_flag=True, help="Print problems only.")
def verify(paths: tuple[Path, ...], quiet: bool) -> None:
    """Read every artifact under PATHS and compare it with what was committed: stores, and the stages of a run.

    Each problem is printed with its file. A target of a distillation without a manifest, of an earlier version, is
    named as not verified. Exit status 1 if there is a problem, or if there is nothing to verify.
    """
    found = problems = 0
    for path in paths:
        for folder, check in _artifacts(path):
            wrong, good = _checked(folder, check)
            found += check is not _target
            problems += len(wrong)
            for line in wrong:
                click.echo(line)
            if not wrong and not quiet:
                click.echo(good)
    if problems:
        click.echo(f"fusekit: {problems} problems in {found} artifacts", err=True)
    elif not found:
        click.echo(f"fusekit: nothing under {', '.join(map(str, paths))} has a {MANIFEST}", err=True)
    if problems or not found:
        click.get_current_context().exit(1)


def _artifacts(path: Path) -> Iterator[tuple[Path, Check]]:
    """What is at or below a path, in order, and how each is checked."""
    for name, below, files in os.walk(path if path.is_dir() else path.parent):
        below.sort()
        folder = Path(name)
        if MANIFEST in files:
            yield folder, _stage if _has_stage(folder) else _store
        elif TARGET_RECORD in files:
            yield folder, _target


def _has_stage(folder: Path) -> bool:
    """Whether a manifest is that of a stage: a store's has none, and what cannot be read is taken for a store's."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "stage" in found


def _checked(folder: Path, check: Check) -> tuple[list[str], str]:
    """What is wrong with an artifact, one line each, and what it is if nothing is."""
    try:
        return check(folder)
    except (FusekitError, OSError) as error:
        return [line if line.startswith(str(folder)) else f"{folder}: {line}" for line in str(error).splitlines()], ""


def _store(folder: Path) -> tuple[list[str], str]:
    from fusekit.capturing.store import Store

    store = Store.open(folder)
    good = f"{folder}: {len(store)} rows in {len(store.records)} shards, all as committed"
    return [f"{folder}/{problem}" for problem in store.verify()], good


def _stage(folder: Path) -> tuple[list[str], str]:
    from fusekit import artifacts as artifact

    wrong = artifact.problems(folder)
    known = artifact.read(folder)
    if known is None:
        return wrong, ""
    return wrong, f"{folder}: {len(known.files)} files of the stage {known.stage!r}, all as committed"


def _target(folder: Path) -> tuple[list[str], str]:
    """Only what the weights' own headers tell: whether a file was cut off."""
    from fusekit.hub import read_headers

    for file in sorted(folder.glob("*.safetensors")):
        read_headers(file, folder.name)
    return [], f"{folder}: not verified: the weights' headers are whole, but it has no {MANIFEST}"
