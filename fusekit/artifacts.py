"""Artifacts: folders that are published in one step, with a manifest that verifies them.

The manifest, written last, lists an artifact's files with size and hash, and the inputs that it was made from. What
stages make and checkpoints have manifests of one form; that of a store says more of each file.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusekit import __version__
from fusekit.disk import commit_file, disk_errors, recover, refuse_file, staging
from fusekit.errors import FusekitError, StorageError

MANIFEST = "manifest.json"
FORMAT = 3

Inputs = dict[str, Any]
"""What an artifact was made from: plain JSON values by name."""

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class ChangedError(StorageError):
    """A file was changed after it was written, and replacing it would lose the change."""


class Strict(BaseModel):
    """A manifest, or a part of one: values of their own types alone."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class File(Strict):
    """A file of an artifact. size: bytes. xxh3: xxh3-128 of its content."""

    size: Count
    xxh3: Hash


class Artifact(Strict):
    """``manifest.json`` of an artifact; in the file, ``xxh3`` is the xxh3-128 of the rest.

    stage: what made it. inputs: what it was made from. files: by path within the folder, in order. made: what may
    differ between equal artifacts (time, versions, host).
    """

    format: int = FORMAT
    stage: str
    inputs: Inputs
    files: Mapping[str, File]
    made: Inputs = Field(default_factory=dict)


AnyArtifact = TypeVar("AnyArtifact", bound=Artifact)


def publish(
    final: Path, stage: str, inputs: Inputs, write: Callable[[Path], object], made: Inputs | None = None
) -> Artifact:
    """Make an artifact: ``write`` fills a folder beside ``final``, which is moved there in one step.

    The caller holds the lock of the run. What a process that died left behind is removed first. ``final`` is as it was
    when the disk fails, when it holds another stage's artifact or files that no manifest lists (StorageError), and
    after whatever ``write`` raises.
    """
    recover(final)
    refuse_foreign(final, stage)
    with staging(final) as folder, disk_errors(final):
        write(folder)
        return seal(folder, stage, inputs, made)


def seal(folder: Path, stage: str, inputs: Inputs, made: Inputs | None = None) -> Artifact:
    """Write the manifest of a folder that is complete but for it. Raises StorageError when the disk fails."""
    with disk_errors(folder, "cannot be read"):
        artifact = Artifact(stage=stage, inputs=plain(inputs), files=files_of(folder), made=plain(made or {}))
    write(folder / MANIFEST, artifact)
    return artifact


def write(path: Path, artifact: Artifact, rank: int = 0) -> None:
    """Commit a manifest. rank: the number of this process. Raises StorageError when the disk fails."""
    content = plain(artifact.model_dump())
    commit_file(path, json.dumps({**content, "xxh3": own_hash(content)}, indent=1).encode() + b"\n", rank=rank)


def own_hash(content: Inputs) -> str:
    """xxh3-128 of a manifest's content without its ``xxh3``."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def files_of(folder: Path) -> dict[str, File]:
    """Every file in a folder but its manifest, by its path within it, in order. Raises OSError."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): _file(path) for path in paths}


def replace_file(folder: Path, name: str, data: bytes) -> bool:
    """Replace, or add, a file of an artifact, which is published again; returns whether anything had to be done.

    The other files are the same ones (hard links). The caller holds the lock of the run. Raises ChangedError when
    somebody else wrote the file, which is left as it is; StorageError when there is no artifact or the disk fails.
    """
    folder = folder.resolve()
    recover(folder)
    artifact = read(folder)
    if artifact is None:
        raise StorageError(f"{folder} is not an artifact of a run: it has no {MANIFEST}")
    path, before = folder / name, artifact.files.get(name)
    new = File(size=len(data), xxh3=xxhash.xxh3_128_hexdigest(data))
    there = _file(path) if path.is_file() else None
    if there == new == before:
        return False
    if there not in (None, new, before):
        raise ChangedError(
            f"{path} was changed after it was written, and is left as it is; remove it to have it written again"
        )
    files = dict(sorted({**artifact.files, name: new}.items()))
    with staging(folder) as copy, disk_errors(folder):
        shutil.copytree(folder, copy, copy_function=_link, symlinks=True, dirs_exist_ok=True)
        for changed in (name, MANIFEST):  # links: their content is also that of the former folder
            (copy / changed).unlink(missing_ok=True)
        (copy / name).write_bytes(data)
        write(copy / MANIFEST, artifact.model_copy(update={"files": files}))
    return True


def _link(file: str, place: str) -> None:
    try:
        os.link(file, place, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(file, place, follow_symlinks=False)


def circumstances() -> dict[str, str]:
    """Where and with what an artifact is made: versions of what decides the last bits, and the host's name."""
    versions = {name: found for name in ("torch", "transformers", "mergekit") if (found := installed(name))}
    return {"fusekit": __version__, **versions, "python": platform.python_version(), "host": platform.node()}


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def read(folder: Path, stage: str | None = None) -> Artifact | None:
    """The manifest of an artifact, None where there is none: :func:`read_manifest`."""
    return read_manifest(folder / MANIFEST, Artifact, stage)


def read_manifest(path: Path, kind: type[AnyArtifact], stage: str | None = None) -> AnyArtifact | None:
    """A manifest, None where there is no file. stage: that it has to be of, if one is given.

    Raises StorageError naming the file and what is wrong in it, or the stage that it is of.
    """
    try:
        with disk_errors(path, "cannot be read"), suppress(FileNotFoundError, NotADirectoryError):
            content = dict(json.loads(path.read_bytes()))
            if content.get("format") != FORMAT:
                raise ValueError(f"its format is {content.get('format')!r}, and this fusekit reads {FORMAT}")
            if content.pop("xxh3", None) != own_hash(content):
                raise ValueError("it is not what was written")
            if stage not in (None, content.get("stage")):
                raise StorageError(
                    f"{path.parent} holds a result of the stage {content.get('stage')!r}, not of {stage!r}: move it "
                    "away, or choose another folder"
                )
            return kind.model_validate(content)
        return None
    except (ValueError, TypeError, RecursionError) as error:
        why = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise StorageError(
            f"{path} is damaged, or of another version: {why}; remove {path.parent}, or move it away if no run of "
            "fusekit made it"
        ) from error


MADE_FROM = "made_from.json"
"""In a folder of unfinished work: what it is made from."""


def begin(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Say what the work in a folder is made from. Raises StorageError when the disk fails."""
    with disk_errors(folder, "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    commit_file(folder / MADE_FROM, json.dumps(plain(dict(inputs)), indent=1).encode() + b"\n")


def begun(folder: Path) -> Inputs | None:
    """What the unfinished work in a folder is made from, None where none was begun. Raises StorageError."""
    path = folder / MADE_FROM
    try:
        with suppress(FileNotFoundError):
            if not (inputs := dict(json.loads(path.read_bytes()))):
                raise ValueError("it names nothing")
            return inputs
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {error}; remove {folder} to start over") from error


def is_kept(folder: Path, stage: str, inputs: Inputs) -> bool:
    """Whether an artifact is there, made from these inputs, and whole: small ones are made again where they are not.

    Reads every file through. Raises StorageError for a damaged manifest, or one of another stage.
    """
    known = read(folder, stage)
    return known is not None and not differences(known.inputs, inputs) and not differing(folder, known.files)


def problems(folder: Path) -> list[str]:
    """What is not as the manifest says, one line per file: missing, changed, or not of the artifact."""
    artifact = read(folder)
    if artifact is None:
        return [f"{folder / MANIFEST}: missing"]
    strangers = [f"{folder / name}: is not of this artifact" for name in foreign(folder)]
    return differing(folder, artifact.files) + strangers


def differing(folder: Path, files: Mapping[str, File], *, hashes: bool = True) -> list[str]:
    """One line for each file that is missing or not as listed.

    hashes: read every file through; otherwise only its size is looked at.
    """

    def wrong(path: Path, file: File) -> str | None:
        try:
            if not path.is_file():
                return "missing"
            if (size := path.stat().st_size) != file.size:
                return f"has {size} bytes, but was written with {file.size}"
            return "its content is not what was written" if hashes and file_hash(path) != file.xxh3 else None
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    found = ((folder / name, wrong(folder / name, file)) for name, file in files.items())
    return [f"{path}: {what}" for path, what in found if what]


def require_whole(folder: Path) -> None:
    """Read an artifact through and compare it with its manifest. Raises StorageError naming every file that differs."""
    artifact = read(folder)
    wrong = [f"{folder / MANIFEST}: missing"] if artifact is None else differing(folder, artifact.files)
    if wrong:
        raise StorageError(
            f"{folder} is not what was committed:\n  " + "\n  ".join(wrong) + "\nIt is not used. Restore it, or "
            f"remove {folder} and run the same command again: it alone is made again"
        )


def foreign(folder: Path, stage: str | None = None) -> list[str]:
    """Files in a folder that its manifest does not list, in order; all of them where there is no manifest.

    Raises StorageError for a damaged manifest, or one of another stage.
    """
    artifact = read(folder, stage)
    listed = set() if artifact is None else {MANIFEST, *artifact.files}
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in paths} - listed)


def refuse_foreign(folder: Path, stage: str) -> None:
    """Raise StorageError, with the way out, for a folder with files that its manifest does not list, and would be lost.

    An artifact of another stage is refused too. A file that the manifest lists does not count, whatever it holds.
    """
    refuse_file(folder)
    if folder.exists() and (found := foreign(folder, stage)):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise StorageError(
            f"{folder} holds {found[0]}{more}, which no {MANIFEST} lists: move it away, or choose another output; "
            "nothing was touched"
        )


def refuse_occupied(folder: Path, stage: str) -> None:
    """Refuse a place for an artifact that is neither empty nor holds one of this stage: :func:`refuse_foreign`."""
    if read(folder, stage) is None:
        refuse_foreign(folder, stage)


def differences(before: Inputs, now: Inputs) -> list[str]:
    """One line per input that differs: ``alignment.tokens: 'span', now 'dtw'``."""
    ours, theirs, missing = flat(plain(before)), flat(plain(now)), object()

    def said(values: Inputs, name: str) -> str:
        return repr(values[name]) if name in values else "not given"

    return [
        f"{name}: {said(ours, name)}, now {said(theirs, name)}"
        for name in ours | theirs
        if ours.get(name, missing) != theirs.get(name, missing)
    ]


def refuse_changes(
    folder: Path, changed: Iterable[str], way_out: str | None = None, kind: type[FusekitError] = StorageError
) -> None:
    """Raise an error of this kind, with the way out, where what a folder was made from has changed.

    changed: a line per input, as of :func:`differences`.
    """
    if lines := "\n  ".join(changed):
        raise kind(
            f"cannot use {folder}: its inputs changed:\n  {lines}\nGo back to the former values, or "
            + (way_out or f"remove {folder} to make it again, or choose another output")
        )


def flat(inputs: Mapping[str, Any], prefix: str = "") -> Inputs:
    """Nested values by the path of their names, with dots: ``{"a": {"b": 1}}`` is ``{"a.b": 1}``."""
    found: Inputs = {}
    for key, value in inputs.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def plain(inputs: Inputs) -> Inputs:
    """As they come back from JSON."""
    found: Inputs = json.loads(json.dumps(inputs, default=str))
    return found


def file_hash(path: Path) -> str:
    """xxh3-128 of a file. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(16 << 20):
            digest.update(piece)
    return digest.hexdigest()


def joined_hash(lines: Iterable[str]) -> str:
    """xxh3-128 of lines."""
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def weights_hash(folder: Path) -> str:
    """xxh3-128 over a model's weights, configuration and tokenizer, from the hashes in its manifest: no file is read.

    Raises StorageError where there is no manifest.
    """
    known = read(folder)
    if known is None:
        raise StorageError(
            f"{folder} has no {MANIFEST}: remove it and run the same command again, which makes it again"
        )
    names = sorted(name for name in known.files if "/" not in name and Path(name).suffix in (".safetensors", ".jinja"))
    names += [name for name in ("config.json", "tokenizer.json", "tokenizer_config.json") if name in known.files]
    return joined_hash(known.files[name].xxh3 for name in names)


def _file(path: Path) -> File:
    return File(size=path.stat().st_size, xxh3=file_hash(path))
