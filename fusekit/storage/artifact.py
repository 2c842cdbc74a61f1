"""What a stage makes: a folder, published in one step, with a manifest of its files and of what it was made from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusekit.errors import StorageError
from fusekit.storage.commit import commit_file, sweep
from fusekit.storage.faults import disk_fault
from fusekit.storage.publish import recover, staging

MANIFEST = "manifest.json"
FORMAT = 1
_FOREIGN = "is not of this artifact"
_AT_A_TIME = 16 << 20

Inputs = dict[str, Any]
"""What an artifact was made from: plain JSON values by name."""


class ChangedError(StorageError):
    """A file is not what was written, and somebody's work would be lost."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Model):
    """A file of an artifact. size: bytes. xxh3: xxh3-128 of its content."""

    size: int = Field(ge=0)
    xxh3: str = Field(pattern=r"^[0-9a-f]{32}$")


class Artifact(_Model):
    """``manifest.json`` of an artifact.

    Attributes:
        stage: what made it.
        inputs: what it was made from.
        files: by path within the folder, in order.
        replacing: files that are about to be replaced, as they will be (:func:`replace_file`); until they are, both
            forms are vouched for.
        made: what may differ between equal artifacts (time, versions, host).
    """

    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT)
    stage: str
    inputs: Inputs
    files: dict[str, File]
    replacing: dict[str, File] = Field(default_factory=dict)
    made: Inputs = Field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of the content: equal for artifacts whose files are equal."""
        return joined_hash(f"{name} {file.xxh3}" for name, file in self.files.items())


def publish(
    final: Path, stage: str, inputs: Inputs, write: Callable[[Path], object], made: Inputs | None = None
) -> Artifact:
    """Make an artifact: ``write`` fills a folder beside ``final``, which is moved there in one step.

    The caller holds the lock of the run. What a process that died left behind is removed first.

    Raises:
        StorageError: the disk failed; ``final`` holds files that are not its own (:func:`refuse_foreign`). Whatever
            ``write`` raises. ``final`` is then as it was.
    """
    recover(final)
    refuse_foreign(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    with staging(final) as folder:
        try:
            write(folder.path)
            artifact = seal(folder.path, stage, inputs, made)
        except OSError as error:
            raise disk_fault(error, final) or error from error
        folder.publish()
    return artifact


def seal(folder: Path, stage: str, inputs: Inputs, made: Inputs | None = None) -> Artifact:
    """Write the manifest of a folder that is complete but for it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    artifact = Artifact(stage=stage, inputs=plain(inputs), files=_files(folder), made=made or {})
    (folder / MANIFEST).write_bytes(_json(artifact))
    return artifact


def replace_file(folder: Path, name: str, data: bytes) -> bool:
    """Replace, or add, a file of an artifact that stands at its place; returns whether anything had to be done.

    Whenever the process dies, the file is the old one or the new one, whole, and :func:`problems` finds nothing: the
    manifest first says what the file is about to be, then the file is replaced, then the manifest says that it was. The
    caller holds the lock of the run.

    Args:
        folder: of an artifact.
        name: of the file, in the folder itself.
        data: what it is to hold.

    Raises:
        ChangedError: the file is not as the manifest says, so somebody else wrote it; nothing is touched.
        StorageError: there is no artifact; the disk failed.
    """
    artifact = read(folder)
    if artifact is None:
        raise StorageError(f"{folder} is no artifact of a run: it has no {MANIFEST}")
    sweep(folder)
    path, new = folder / name, File(size=len(data), xxh3=xxhash.xxh3_128_hexdigest(data))
    there = _file(path) if path.is_file() else None
    if there not in (None, new, artifact.files.get(name), artifact.replacing.get(name)):
        raise ChangedError(
            f"{path} was changed after it was written, and is left as it is; remove it to have it written again"
        )
    others = {known: file for known, file in artifact.files.items() if known != name}
    waiting = {known: file for known, file in artifact.replacing.items() if known != name}

    def commit(now: File | None, then: dict[str, File]) -> None:
        files = others if now is None else dict(sorted({**others, name: now}.items()))
        after = artifact.model_copy(update={"files": files, "replacing": {**waiting, **then}})
        commit_file(folder / MANIFEST, lambda file: file.write(_json(after)))

    if there != new:
        commit(there, {name: new})
        commit_file(path, lambda file: file.write(data))
    changed = there != new or artifact.files.get(name) != new or name in artifact.replacing
    if changed:
        commit(new, {})
    return changed


def read(folder: Path) -> Artifact | None:
    """The manifest of an artifact, None where there is none. Raises StorageError for a damaged one."""
    try:
        return Artifact.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{folder / MANIFEST} is damaged: {str(error).splitlines()[0]}; remove {folder}, or move it away if no run "
            "of fusekit made it"
        ) from error
    except OSError as error:
        raise disk_fault(error, folder) or StorageError(f"{folder / MANIFEST} cannot be read: {error}") from error


def is_kept(folder: Path, inputs: Inputs) -> bool:
    """Whether an artifact is there, made from these inputs, and whole: small ones are made anew where they are not.

    Reads every file through. Raises StorageError for a damaged manifest.
    """
    known = read(folder)
    if known is None or differences(known.inputs, inputs):
        return False
    return all(line.endswith(_FOREIGN) for line in problems(folder))


def problems(folder: Path) -> list[str]:
    """What is not as the manifest says, one line per file: missing, changed, or not its own."""
    artifact = read(folder)
    if artifact is None:
        return [f"{folder / MANIFEST}: missing"]
    found = []
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    for name, file in artifact.files.items():
        path = folder / name
        if name not in there:
            found.append(f"{path}: missing")
        elif name in artifact.replacing and _file(path) == artifact.replacing[name]:
            continue
        elif path.stat().st_size != file.size:
            found.append(f"{path}: has {path.stat().st_size} bytes, but was written with {file.size}")
        elif file_hash(path) != file.xxh3:
            found.append(f"{path}: its content is not what was written")
    return found + [f"{folder / name}: {_FOREIGN}" for name in _not_listed(folder, artifact)]


def require_whole(folder: Path) -> None:
    """Read an artifact through and compare it with its manifest. Raises StorageError naming every file that differs."""
    wrong = [line for line in problems(folder) if not line.endswith(_FOREIGN)]
    if wrong:
        raise StorageError(
            f"{folder} is not what was committed:\n  "
            + "\n  ".join(wrong)
            + "\nIt is not used. Put back what it was, or "
            f"remove {folder} and give the same command again: it alone is made anew"
        )


def foreign(folder: Path) -> list[str]:
    """Files in a folder that its manifest does not list, in order; all of them where there is no manifest.

    Raises StorageError for a damaged manifest.
    """
    return _not_listed(folder, read(folder))


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace a folder that holds what is not its artifact's: that would be lost.

    A file that the manifest lists does not count, whatever it holds by now. Raises StorageError naming the first file,
    and the way out; also for a damaged manifest.
    """
    if not folder.exists() or not (found := foreign(folder)):
        return
    what = found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
    if (folder / MANIFEST).is_file():
        raise StorageError(
            f"{folder} is to be made anew, but holds {what}, which its {MANIFEST} does not list: move that away, or "
            "choose another output; nothing was touched"
        )
    raise StorageError(
        f"{folder} has no {MANIFEST} that says what it was made from, but holds {what}: move it away if it is yours, "
        "remove it to make it anew, or choose another output; nothing was touched"
    )


def refuse_occupied(folder: Path) -> None:
    """Refuse a folder that an artifact is to come to, if it is not empty and no artifact: :func:`refuse_foreign`."""
    if read(folder) is None:
        refuse_foreign(folder)


def differences(before: Inputs, now: Inputs) -> list[str]:
    """One line per input that differs: ``alignment.tokens: 'span', now 'dtw'``."""
    ours, theirs = flat(plain(before)), flat(plain(now))
    return [
        f"{name}: {_shown(ours, name)}, now {_shown(theirs, name)}"
        for name in dict.fromkeys([*ours, *theirs])
        if (name in ours) != (name in theirs) or ours[name] != theirs[name]
    ]


def flat(inputs: Mapping[str, Any]) -> Inputs:
    """Nested values by the path of their names, with dots: ``{"a": {"b": 1}}`` is ``{"a.b": 1}``."""
    return dict(_flat("", inputs))


def plain(inputs: Inputs) -> Inputs:
    """As they come back from JSON."""
    found: Inputs = json.loads(json.dumps(inputs, default=str))
    return found


def file_hash(path: Path) -> str:
    """xxh3-128 of a file. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_AT_A_TIME):
            digest.update(piece)
    return digest.hexdigest()


def joined_hash(lines: Iterable[str]) -> str:
    """xxh3-128 of lines."""
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def _not_listed(folder: Path, artifact: Artifact | None) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    there = sorted(path.relative_to(folder).as_posix() for path in paths)
    if artifact is None:
        return there
    ours = {MANIFEST, *artifact.files}
    return [name for name in there if name not in ours and not _is_own(folder, name, artifact)]


def _is_own(folder: Path, name: str, artifact: Artifact) -> bool:
    """Whether a file that the manifest does not list is one that it announces, or the half of one that it lists."""
    if name in artifact.replacing:
        return _file(folder / name) == artifact.replacing[name]
    whole = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return whole is not None and whole[1] in {MANIFEST, *artifact.files, *artifact.replacing}


def _file(path: Path) -> File:
    return File(size=path.stat().st_size, xxh3=file_hash(path))


def _json(artifact: Artifact) -> bytes:
    exclude = set() if artifact.replacing else {"replacing"}
    return (json.dumps(artifact.model_dump(mode="json", exclude=exclude), indent=1, ensure_ascii=False) + "\n").encode()


def _files(folder: Path) -> dict[str, File]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _file(path) for path in paths}


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(prefix, value)]
    return [pair for key, inner in value.items() for pair in _flat(f"{prefix}.{key}" if prefix else str(key), inner)]


def _shown(values: Inputs, name: str) -> str:
    return repr(values[name]) if name in values else "not given"
