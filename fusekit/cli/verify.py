"""``fusekit verify``: whether artifacts on disk are what was committed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click

from fusekit import artifacts as artifact
from fusekit.cli.common import print_json
from fusekit.disk import counted
from fusekit.errors import FusekitError

MANIFEST = "manifest.json"


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-q", "--quiet", is_flag=True, help="Print problems only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: problems by the folder of each artifact.")
def verify(paths: tuple[Path, ...], quiet: bool, as_json: bool) -> None:
    """Read every artifact under PATHS and compare it with what was committed: stores, and the stages of a run.

    The result of `fusekit merge` alone has nothing to compare it with.

    Each problem is printed with its file. The exit status is 1 if there is a problem, or nothing to verify.
    """
    found: dict[str, list[str]] = {}
    for folder in (folder for path in paths for folder in _artifacts(path)):
        try:
            wrong, good = _checked(folder)
        except (FusekitError, OSError) as error:
            wrong = [line if line.startswith(str(folder)) else f"{folder}: {line}" for line in str(error).splitlines()]
            good = ""
        found[str(folder)] = wrong
        for line in [] if as_json else wrong or ([] if quiet else [good]):
            click.echo(line)
    problems = sum(map(len, found.values()))
    if as_json:
        print_json(found)
    elif problems:
        click.echo(f"fusekit: {counted(problems, 'problem')} in {counted(len(found), 'artifact')}", err=True)
    elif not found:
        click.echo(
            f"fusekit: nothing under {', '.join(map(str, paths))} has a {MANIFEST}, which stores and the stages of a "
            "run have: nothing to compare with. What `fusekit merge` writes is checked before it is published",
            err=True,
        )
    if problems or not found:
        click.get_current_context().exit(1)


def _artifacts(path: Path) -> Iterator[Path]:
    """The folders with a manifest at or below a path, in order."""
    for name, below, files in os.walk(path if path.is_dir() else path.parent):
        below.sort()
        if MANIFEST in files:
            yield Path(name)


def _checked(folder: Path) -> tuple[list[str], str]:
    """What is wrong with an artifact, one line each, and what it is if nothing is. Raises FusekitError, OSError."""
    if not artifact.is_stage(folder):
        from fusekit.capturing.store import Store

        store = Store.open(folder)
        held = f"{counted(len(store), 'example')} in {counted(len(store.records), 'shard')}"
        return [f"{folder}/{problem}" for problem in store.verify()], f"{folder}: {held}, all as committed"
    known = artifact.read(folder)
    assert known is not None
    held = f"{counted(len(known.files), 'file')} of the stage {known.stage!r}"
    return artifact.problems(folder), f"{folder}: {held}, all as committed"
