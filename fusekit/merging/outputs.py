"""Where a merge may write: never over an input, nor over something that is not a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fusekit.errors import MergeError


def final_path(out: Path | str, *, overwrite: bool) -> Path:
    """The resolved folder that a merge publishes to; checked without touching anything.

    Raises MergeError when it is a file, a mount point (nothing can be renamed over it), not empty without
    ``overwrite``, or holds something else than a model (config.json is the sign), which overwriting would delete.
    """
    final = Path(out).resolve()
    if final.exists() and not final.is_dir():
        raise MergeError(f"{out} is a file: give a folder for the merged model")
    if final.is_mount():
        raise MergeError(f"{out} is a mount point, so a finished model cannot be moved there: give a folder below it")
    try:
        content = sorted(path.name for path in final.iterdir()) if final.exists() else []
    except OSError as error:
        raise MergeError(f"{out} cannot be read: {error.strerror or error}") from error
    if content and not overwrite:
        raise MergeError(f"{out} is not empty ({', '.join(content[:3])}): choose another folder or give --overwrite")
    if content and "config.json" not in content:
        raise MergeError(
            f"{out} does not look like a model (no config.json; it holds {', '.join(content[:3])}), and --overwrite "
            "would delete it: remove it yourself or choose another folder"
        )
    return final


def check_apart(final: Path, kept: Iterable[tuple[str, Path]]) -> None:
    """Raise MergeError if publishing to ``final`` would replace something that is still needed.

    kept: what it is, for people, and where: input models, the recipe, caches. An output inside an input is refused as
    well: it would change the input.
    """
    for label, path in kept:
        resolved = path.resolve()
        if resolved == final:
            raise MergeError(f"{final} is {label}: choose another folder for the result")
        if final in resolved.parents:
            raise MergeError(f"{label} ({resolved}) lies inside the output {final}, which would be replaced")
        if resolved in final.parents and resolved.is_dir() and (resolved / "config.json").is_file():
            raise MergeError(f"the output {final} lies inside {label} ({resolved}): choose another folder")
