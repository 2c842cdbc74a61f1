"""``fusekit verify``: whether artifacts on disk are what was committed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click

from fusekit.errors import FusekitError


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--quiet", is_flag=True, help="Print problems only.")
def verify(paths: tuple[Path, ...], quiet: bool) -> None:
    """Read every artifact with a manifest under PATHS and compare it with what was committed.

    Each problem is printed with its file. Exit status 1 if there is one, or if there is nothing to verify.
    """
    from fusekit.storage.manifest import MANIFEST

    found = problems = 0
    for path in paths:
        for folder in _artifacts(path, MANIFEST):
            found += 1
            wrong, good = _check(folder)
            problems += len(wrong)
            for line in wrong:
                click.echo(line)
            if not wrong and not quiet:
                click.echo(good)
    if not found:
        click.echo(f"fusekit: nothing under {', '.join(map(str, paths))} has a {MANIFEST}", err=True)
    elif problems:
        click.echo(f"fusekit: {problems} problems in {found} artifacts", err=True)
    if problems or not found:
        click.get_current_context().exit(1)


def _artifacts(path: Path, manifest: str) -> Iterator[Path]:
    """Folders with a manifest at or below a path, in order."""
    for folder, below, files in os.walk(path if path.is_dir() else path.parent):
        below.sort()
        if manifest in files:
            yield Path(folder)


def _check(folder: Path) -> tuple[list[str], str]:
    """What is wrong with an artifact, one line each, and what it is if nothing is."""
    from fusekit.storage import Store

    try:
        store = Store.open(folder)
        wrong = [f"{folder}/{problem}" for problem in store.verify()]
    except FusekitError as error:
        wrong = [line if line.startswith(str(folder)) else f"{folder}: {line}" for line in str(error).splitlines()]
        return wrong, ""
    return wrong, f"{folder}: {len(store)} rows in {len(store.records)} shards, all as committed"
