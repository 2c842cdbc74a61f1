"""The commit protocol: locks, files and folders that appear whole or not at all, and manifests that verify them.

A file is written beside its place, made durable, and moved there in one step; a folder likewise. A manifest, written
last, lists an artifact's files with size and hash, and the inputs that it was made from.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import xxhash
from pydantic import BaseModel, Field, ValidationError

from fusekit.errors import FusekitError, StorageError

# Rust libraries (safetensors, tokenizers) report the system's error as text.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up: free some space or write elsewhere",
    errno.EFBIG: "a file may not grow that large here: raise `ulimit -f` or write smaller shards (--out-shard-size)",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "permission denied: write elsewhere, or have the folder's owner grant it",
    errno.EPERM: "permission denied: write elsewhere, or have the folder's owner grant it",
    errno.EIO: "the disk reported an input/output error: check the disk, then run the same command again",
}


def existing_parent(path: Path) -> Path:
    """The nearest folder on the way up from ``path`` (itself included) that exists."""
    path = path.resolve()
    while not path.is_dir():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the file system of ``path``, which need not exist yet."""
    return shutil.disk_usage(existing_parent(path)).free


def human(size: float) -> str:
    """Bytes as people read them: ``14.5 GB`` (powers of 1000), exact below 10 kB."""
    if size < 10_000:
        return f"{int(size)} bytes"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.2f} TB"


def counted(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def with_article(noun: str) -> str:
    """``a list``, ``an int``."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def system_errno(error: BaseException) -> int | None:
    """The errno behind an exception: of an OSError, of what caused it, or named in a Rust library's message."""
    seen: set[int] = set()  # `raise error from error` makes a circle
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno:
            return current.errno
        if match := _OS_ERROR.search(str(current)):
            return int(match.group(1))
        current = current.__cause__ or current.__context__
    return None


def disk_fault(error: BaseException, path: Path | str, needed: int | None = None) -> StorageError | None:
    """A StorageError for an exception that came from the disk, or None for any other exception.

    path: where it was written to (an OSError that names its own file wins). needed: bytes to be written, if known.
    """
    code = system_errno(error)
    if code not in _ADVICE:
        return None
    where = Path(path)
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        where = Path(os.fsdecode(error.filename))
    wanted = "" if needed is None else f"{human(needed)} needed, "
    return StorageError(f"{where}: {os.strerror(code)} ({wanted}{human(free_bytes(where))} free); {_ADVICE[code]}")


@contextmanager
def output_lock(output: Path, patience: float = 0) -> Iterator[None]:
    """Hold the lock of an output folder, which need not exist, while the body runs.

    output: the resolved final path; its parent is created. patience: seconds to wait for another process. Raises
    StorageError naming the holder (process id, host, start time, command), or that the folder cannot be written.
    """
    lock_file = output.parent / f".{output.name}.fusekit.lock"
    # Beside the lock, not in it: some versions of filelock truncate the lock file of another process.
    holder = lock_file.with_suffix(".holder")
    temporary = holder.with_suffix(".tmp")
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    lock = filelock.FileLock(lock_file, timeout=patience)
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            temporary.write_text(json.dumps(about), encoding="utf-8")
            temporary.replace(holder)
        except filelock.Timeout:
            if not lock_file.exists():  # some file systems refuse in a way that filelock takes for a wait
                raise StorageError(f"{output}: cannot be locked: no file can be made in {output.parent}") from None
            raise StorageError(
                f"{output}: already being written by {_described(holder)}. Wait for it or choose another folder."
            ) from None
        except OSError as error:
            raise disk_fault(error, output.parent) or StorageError(f"{output}: cannot be locked: {error}") from error
        yield
    finally:
        if lock.is_locked:
            for path in (holder, temporary):  # on a full disk the description is not written
                with suppress(OSError):
                    path.unlink()
            lock.release()


def _described(holder: Path) -> str:
    try:
        found: Any = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} since {found['since']}: {found['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process (it has just started, or its description cannot be read)"


@dataclass
class Staging:
    """A folder that is being built. path: where to write. final: where ``publish`` moves it."""

    path: Path
    final: Path
    on_published: Callable[[], None]

    def publish(self) -> None:
        """Make everything durable and move it to the final path in one step, replacing what is there.

        After a crash at any moment the final path holds the old folder, whole, or the new one, whole. Raises
        StorageError with the path and the free bytes when the disk fails.
        """
        aside = None
        try:
            sync_tree(self.path)
            if not self.final.exists():
                self.path.rename(self.final)
            elif not _exchange(self.path, self.final):
                aside = self.final.parent / f".{self.final.name}.previous-{uuid.uuid4().hex[:8]}"
                self.final.rename(aside)
                self.path.rename(self.final)
            self.on_published()
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
            _sync(self.final.parent)
        except OSError as error:
            raise disk_fault(error, self.final) or StorageError(f"{self.final}: cannot publish: {error}") from error


@contextmanager
def staging(final: Path, on_published: Callable[[], None] = lambda: None) -> Iterator[Staging]:
    """A new, empty staging folder beside ``final``; removed at the end, whether it was published or not.

    on_published: called as soon as the folder stands at its final path, before anything is tidied up. The caller holds
    ``output_lock(final)``. Raises StorageError when the folder cannot be made.
    """
    path = final.parent / f".{final.name}.staging-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir()
    except OSError as error:
        raise disk_fault(error, final.parent) or StorageError(f"{path}: cannot be made: {error}") from error
    try:
        yield Staging(path, final, on_published)
    finally:
        # After an exchange the former output is here.
        shutil.rmtree(path, ignore_errors=True)


def recover(final: Path) -> list[Path]:
    """Clean up after writers of ``final`` that died, and put back what they moved aside; returns what was removed.

    The caller holds ``output_lock(final)``.
    """
    name = glob.escape(final.name)
    for previous in sorted(final.parent.glob(f".{name}.previous-*")):
        if final.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(final)
    stale = sorted(final.parent.glob(f".{name}.staging-*"))
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    return stale


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below ``folder``, and itself."""
    for path in [*sorted(folder.rglob("*")), folder]:
        if path.is_dir() or path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    """fsync a file, or a folder, so that the names in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECTORY if path.is_dir() else 0))
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2). False where the kernel or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    if rename(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(other))


def commit_file(path: Path, write: Callable[[BinaryIO], object], *, rank: int = 0) -> None:
    """Write a file beside its path, make it durable, and move it there in one step.

    After a crash at any moment the path holds what it held before, or all of the new. rank: of the process, by which
    :func:`sweep` tells what it left behind. Raises StorageError with the bytes free when the disk fails.
    """
    temporary = path.with_name(f".{path.name}.{rank}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path}: cannot be written: {error}") from error


def sweep(folder: Path, rank: int = 0, world: int = 1) -> list[Path]:
    """Remove what earlier processes of this rank left half-written in a folder; returns those files.

    Rank 0 also removes what ranks beyond this ``world`` left.
    """
    swept = []
    for path in sorted(folder.glob(".*.tmp")):
        owner = path.name.split(".")[-2]
        if owner.isdecimal() and (int(owner) == rank or (rank == 0 and int(owner) >= world)):
            remove(path)
            swept.append(path)
    return swept


def remove(path: Path) -> None:
    """Remove a file that may have gone already. Raises StorageError when the disk refuses."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path}: cannot be removed: {error}") from error


MANIFEST = "manifest.json"
FORMAT = 1

Inputs = dict[str, Any]
"""What an artifact was made from: plain JSON values by name."""


class ChangedError(StorageError):
    """A file was changed after it was written, and replacing it would lose the change."""


class File(BaseModel, extra="forbid", frozen=True):
    """A file of an artifact. size: bytes. xxh3: xxh3-128 of its content."""

    size: int = Field(ge=0)
    xxh3: str = Field(pattern=r"^[0-9a-f]{32}$")


class Artifact(BaseModel, extra="forbid", frozen=True):
    """``manifest.json`` of an artifact.

    stage: what made it. inputs: what it was made from. files: by path within the folder, in order. replacing: files
    that are about to be replaced, as they will be (:func:`replace_file`); until then both forms are valid. made: what
    may differ between equal artifacts (time, versions, host).
    """

    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT)
    stage: str
    inputs: Inputs
    files: dict[str, File]
    replacing: dict[str, File] = Field(default_factory=dict)
    made: Inputs = Field(default_factory=dict)


def publish(
    final: Path, stage: str, inputs: Inputs, write: Callable[[Path], object], made: Inputs | None = None
) -> Artifact:
    """Make an artifact: ``write`` fills a folder beside ``final``, which is moved there in one step.

    The caller holds the lock of the run. What a process that died left behind is removed first. ``final`` is as it was
    when the disk fails, when it holds files that are not its own (StorageError), and after whatever ``write`` raises.
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
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): _file(path) for path in paths}
    artifact = Artifact(stage=stage, inputs=plain(inputs), files=files, made=made or {})
    (folder / MANIFEST).write_bytes(_json(artifact))
    return artifact


def replace_file(folder: Path, name: str, data: bytes) -> bool:
    """Replace, or add, a file in the folder of an artifact; returns whether anything had to be done.

    Whenever the process dies, the file is the old one or the new one, whole, and :func:`problems` finds nothing: the
    manifest first says what the file is about to be, then the file is replaced, then the manifest says that it was. The
    caller holds the lock of the run.

    Raises ChangedError when somebody else wrote the file, which is left as it is; StorageError when there is no
    artifact or the disk fails.
    """
    artifact = read(folder)
    if artifact is None:
        raise StorageError(f"{folder} is not an artifact of a run: it has no {MANIFEST}")
    sweep(folder)
    path, new = folder / name, File(size=len(data), xxh3=xxhash.xxh3_128_hexdigest(data))
    there, listed, announced = _file(path) if path.is_file() else None, dict(artifact.files), dict(artifact.replacing)
    before, after = listed.pop(name, None), announced.pop(name, None)
    if there not in (None, new, before, after):
        raise ChangedError(
            f"{path} was changed after it was written, and is left as it is; remove it to have it written again"
        )

    def commit(now: File | None, then: dict[str, File]) -> None:
        files = listed if now is None else dict(sorted({**listed, name: now}.items()))
        told = artifact.model_copy(update={"files": files, "replacing": {**announced, **then}})
        commit_file(folder / MANIFEST, lambda file: file.write(_json(told)))

    if there != new:
        commit(there, {name: new})
        commit_file(path, lambda file: file.write(data))
    changed = not (there == before == new and after is None)
    if changed:
        commit(new, {})
    return changed


def is_stage(folder: Path) -> bool:
    """Whether a manifest is that of a stage: a store's has none, and what cannot be read is taken for a store's."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "stage" in found


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
    """Whether an artifact is there, made from these inputs, and whole: small ones are made again where they are not.

    Reads every file through. Raises StorageError for a damaged manifest.
    """
    known = read(folder)
    return known is not None and not differences(known.inputs, inputs) and not _differing(folder, known)


def problems(folder: Path) -> list[str]:
    """What is not as the manifest says, one line per file: missing, changed, or not of the artifact."""
    artifact = read(folder)
    if artifact is None:
        return [f"{folder / MANIFEST}: missing"]
    strangers = [f"{folder / name}: is not of this artifact" for name in _not_listed(folder, artifact)]
    return _differing(folder, artifact) + strangers


def _differing(folder: Path, artifact: Artifact) -> list[str]:
    found = []
    for name, file in artifact.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif name in artifact.replacing and _file(path) == artifact.replacing[name]:
            continue
        elif path.stat().st_size != file.size:
            found.append(f"{path}: has {path.stat().st_size} bytes, but was written with {file.size}")
        elif file_hash(path) != file.xxh3:
            found.append(f"{path}: its content is not what was written")
    return found


def require_whole(folder: Path) -> None:
    """Read an artifact through and compare it with its manifest. Raises StorageError naming every file that differs."""
    artifact = read(folder)
    wrong = [f"{folder / MANIFEST}: missing"] if artifact is None else _differing(folder, artifact)
    if wrong:
        raise StorageError(
            f"{folder} is not what was committed:\n  " + "\n  ".join(wrong) + "\nIt is not used. Restore it, or "
            f"remove {folder} and give the same command again: it alone is made again"
        )


def foreign(folder: Path) -> list[str]:
    """Files in a folder that its manifest does not list, in order; all of them where there is no manifest.

    Raises StorageError for a damaged manifest.
    """
    return _not_listed(folder, read(folder))


def refuse_foreign(folder: Path) -> None:
    """Raise StorageError, with the way out, for a folder with files that its manifest does not list, and would be lost.

    A file that the manifest lists does not count, whatever it holds by now.
    """
    if not folder.exists() or not (found := foreign(folder)):
        return
    what = found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
    if (folder / MANIFEST).is_file():
        holds = f"is to be replaced, but holds {what}, which its {MANIFEST} does not list: move that away"
    else:
        holds = f"has no {MANIFEST}, but holds {what}: move it away if it is yours, remove it to make it again"
    raise StorageError(f"{folder} {holds}, or choose another output; nothing was touched")


def refuse_occupied(folder: Path) -> None:
    """Refuse a folder that an artifact is to come to, if it is not empty and no artifact: :func:`refuse_foreign`."""
    if read(folder) is None:
        refuse_foreign(folder)


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
            f"{folder} has no {MANIFEST}: remove it and give the same command again, which makes it again"
        )
    names = sorted(name for name in known.files if "/" not in name and Path(name).suffix in (".safetensors", ".jinja"))
    names += [name for name in ("config.json", "tokenizer.json", "tokenizer_config.json") if name in known.files]
    return joined_hash(known.files[name].xxh3 for name in names)


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
