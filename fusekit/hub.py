"""Models on the Hugging Face hub: what they contain before anything large is fetched, and errors with a way out."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
from huggingface_hub import constants, utils
from huggingface_hub import errors as hub_errors

from fusekit.artifacts import disk_fault
from fusekit.errors import ModelError

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
"""What is fetched before the weights: configuration, index, tokenizer, chat template."""

TIMEOUT = float(constants.HF_HUB_ETAG_TIMEOUT)
"""Seconds to wait for an answer; HF_HUB_ETAG_TIMEOUT changes it."""


class HubUnreachableError(ModelError):
    """The hub gave no answer, so that asking it about the next model would only take another timeout."""


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository. sizes: bytes by file name. folder: where the client's cache keeps it.

    online: whether the hub was reached; if not, ``sizes`` lists only what is in the cache.
    """

    repository: str
    revision: str
    commit: str
    folder: Path
    sizes: dict[str, int]
    online: bool
    cache: Path

    def missing(self, files: Iterable[str]) -> list[str]:
        """The files that are not in the cache yet."""
        return [name for name in files if not (self.folder / name).is_file()]

    def fetch(self, patterns: list[str], *, bar: bool = False) -> None:
        """Download the files that match, unless they are cached. bar: show progress. Raises ModelError with a hint."""
        if not self.online:
            return
        try:
            with _progress_bars(bar):
                huggingface_hub.snapshot_download(
                    self.repository, revision=self.commit, cache_dir=self.cache, allow_patterns=patterns
                )
            self._remember_revision()
        except Exception as error:
            needed = sum(self.sizes[name] for name in self.missing(self.sizes) if name in patterns)
            raise disk_fault(error, self.cache, needed or None) or explain(error, self.repository, None) from error

    def _remember_revision(self) -> None:
        """Note which commit the revision meant, as the client does when it looks the revision up itself."""
        note = self.folder.parent.parent / "refs" / self.revision
        if self.revision != self.commit and (not note.is_file() or note.read_text() != self.commit):
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary = note.with_name(f"{note.name}.{os.getpid()}")
            temporary.write_text(self.commit)
            temporary.replace(note)

    def headers(self, file: str) -> Headers:
        """Headers of one safetensors file, by range requests. Raises ModelError with a hint."""
        try:
            metadata = huggingface_hub.HfApi().parse_safetensors_file_metadata(
                self.repository, file, revision=self.commit, timeout=TIMEOUT
            )
            return {
                name: TensorHeader(DTYPES[info.dtype][0], tuple(info.shape), file, DTYPES[info.dtype][1])
                for name, info in metadata.tensors.items()
            }
        except Exception as error:
            raise explain(error, self.repository, None) from error


def neither(name: str) -> ModelError:
    """What to say of a model that is no folder, and whose name is none that the hub could have."""
    if "://" in name:
        way_out = "/".join(name.split("://", 1)[1].split("/")[1:3]) or "owner/name"
        return ModelError(f"{name} is a web address: give the model's name on the hub, {way_out}")
    if name.startswith("~"):
        return ModelError(f"there is no folder {name} ({Path(name).expanduser()})")
    return ModelError(f"there is no folder {name or repr(name)} (looked from {Path.cwd()})")


def find(repository: str, revision: str | None, cache: Path | None, notices: list[str]) -> Snapshot:
    """The commit that a hub id means now, with the names and sizes of its files.

    When the hub cannot be reached, the commit that the cache holds for the revision, with a line in ``notices``.
    Raises ModelError, at once and with a hint, for a model that is gated, missing, or neither reachable nor cached.
    """
    cache = Path(cache or constants.HF_HUB_CACHE).expanduser().resolve()
    try:
        info: Any = huggingface_hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=TIMEOUT
        )
    except Exception as error:
        if not unreachable(error):
            raise explain(error, repository, revision) from error
        cached = _cached(repository, revision, cache)
        if cached is None:
            raise explain(error, repository, revision) from error
        notices.append(f"{repository}: the hub cannot be reached, the cached commit {cached.commit[:10]} is used")
        return cached
    name = str(info.id or repository)
    folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / info.sha
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    return Snapshot(name, revision or constants.DEFAULT_REVISION, info.sha, folder, sizes, True, cache)


def _cached(repository: str, revision: str | None, cache: Path) -> Snapshot | None:
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, cache_dir=cache, allow_patterns=SMALL_FILES, local_files_only=True
        )
    except (hub_errors.LocalEntryNotFoundError, OSError):
        return None
    folder = Path(found)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Snapshot(repository, revision or constants.DEFAULT_REVISION, folder.name, folder, sizes, False, cache)


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    already_off = utils.are_progress_bars_disabled()
    if not wanted and not already_off:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if not wanted and not already_off:
            utils.enable_progress_bars()


def unreachable(error: BaseException) -> bool:
    """No answer from the hub, as opposed to an answer that says no. The client has changed its HTTP library twice."""
    if isinstance(error, hub_errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
        ("httpx", "requests")
    )


def explain(error: BaseException, repository: str, revision: str | None) -> ModelError:
    """A ModelError that says what to do about an exception of the hub client."""
    page = f"{constants.ENDPOINT}/{repository}"
    token = "a token is set" if huggingface_hub.get_token() else "no token is set"
    if isinstance(error, hub_errors.OfflineModeIsEnabled) or constants.is_offline_mode():
        text = f"is not in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set: unset it, or fetch the "
        text += f"model where there is a network with `hf download {repository}`"
    elif isinstance(error, hub_errors.GatedRepoError):
        text = f"is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN ({token})"
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        text = f"has no revision {revision!r}: see {page}/commits/main"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        text = f"is not a local folder and not a model on {constants.ENDPOINT}: check the spelling; if it is private, "
        text += f"log in with `hf auth login` or set HF_TOKEN ({token})"
    elif isinstance(error, hub_errors.HFValidationError):
        text = "is neither a local folder nor a hub id (owner/name)"
    elif isinstance(error, hub_errors.EntryNotFoundError):
        text = f"lacks a file that was expected: {error}"
    elif unreachable(error):
        text = f"is not in the cache ({constants.HF_HUB_CACHE}) and {constants.ENDPOINT} does not answer "
        text += f"({type(error).__name__}: {error}): check the network, a proxy, or HF_ENDPOINT"
    else:
        text = f"cannot be fetched from {constants.ENDPOINT}: {type(error).__name__}: {error}"
    kind = HubUnreachableError if unreachable(error) else ModelError
    return kind(f"{repository} {' '.join(text.split())}")


MAX_HEADER_BYTES = 100 << 20  # what safetensors itself accepts

# safetensors dtype -> (torch name, bytes per element)
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor: torch name of its dtype, shape, and the file (name within its folder) that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    itemsize: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize


Headers = dict[str, TensorHeader]


def weight_entry(names: Iterable[str]) -> str | None:
    """The file from which mergekit reads a checkpoint: an index or a single file, safetensors before pickles."""
    present = set(names)
    for single in ("model.safetensors", "pytorch_model.bin"):
        for name in (f"{single}.index.json", single):
            if name in present:
                return name
    return None


def is_pickle(entry: str) -> bool:
    """Whether the entry file of a checkpoint stands for torch pickles."""
    return entry.startswith("pytorch_model.bin")


def read_headers(path: Path, label: str) -> Headers:
    """Headers of one safetensors file on disk. Raises ModelError naming the file when it is cut off or damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(
                    f"{label}: {path} is not a whole safetensors file: {size} bytes, of which the header alone "
                    f"needs {length + 8}. Was the download or copy interrupted?"
                )
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{label}: {path} cannot be read: {error.strerror or error}") from error
    headers, end = parse_header(raw, path.name, f"{label}: {path}")
    if 8 + length + end != size:
        raise ModelError(
            f"{label}: {path} is damaged: {size} bytes, but its header describes {8 + length + end}. "
            "Was the download or copy interrupted?"
        )
    return headers


def parse_header(raw: bytes, file: str, label: str) -> tuple[Headers, int]:
    """Headers and the number of data bytes from a safetensors header. Raises ModelError for anything malformed."""
    try:
        header: Any = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        headers = {name: _tensor_header(entry, file) for name, entry in entries.items()}
        spans = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
        sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"{label} has a damaged safetensors header: {error}") from error
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            raise ModelError(f"{label} has a damaged safetensors header: tensors overlap or leave holes")
        end = stop
    for name, tensor in headers.items():
        if tensor.nbytes != sizes[name]:
            raise ModelError(f"{label} has a damaged safetensors header: the size of {name} is not that of its shape")
    return headers, end


def _tensor_header(entry: dict[str, Any], file: str) -> TensorHeader:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"the dtype {entry['dtype']!r} is not one that can be merged")
    name, itemsize = DTYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("a shape or offset is not a whole number")
    return TensorHeader(name, shape, file, itemsize)


def read_index(text: str, label: str) -> dict[str, str]:
    """Tensor name -> shard of an index file. Raises ModelError when it is malformed or names a file elsewhere."""
    try:
        weight_map = json.loads(text)["weight_map"]
        pairs = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{label} is not an index of shards: {error}") from error
    for shard in pairs.values():
        # A name such as ../../other/file.bin would be read, or unpickled, from anywhere.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith((".safetensors", ".bin")):
            raise ModelError(f"{label} names {shard!r}, which is not a weight file in the same folder")
    return pairs


def gather(weight_map: dict[str, str], shard_headers: Callable[[str], Headers], label: str) -> Headers:
    """Headers of a sharded checkpoint. Raises ModelError when the index and the shards disagree."""
    by_shard = {shard: shard_headers(shard) for shard in sorted(set(weight_map.values()))}
    lacking = sorted(name for name, shard in weight_map.items() if name not in by_shard[shard])
    if lacking:
        shard = weight_map[lacking[0]]
        raise ModelError(
            f"{label}: its index says that {lacking[0]} is in {shard}, but it is not there"
            + (f" (and {len(lacking) - 1} tensors more)" if len(lacking) > 1 else "")
        )
    return {name: by_shard[shard][name] for name, shard in weight_map.items()}


@dataclass(frozen=True)
class Limit:
    """Bytes that are still available, and what limits them. address_space: mapped files count as well."""

    available: int
    source: str
    address_space: bool = False


def memory_limits() -> list[Limit]:
    """Every limit that applies: free memory of the machine, cgroups (containers), ``ulimit -v``."""
    limits = [Limit(psutil.virtual_memory().available, "free on this machine")]
    limits += cgroup_limits(Path("/sys/fs/cgroup"), _cgroup_paths())
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        used = psutil.Process().memory_info().vms
        limits.append(Limit(max(0, soft - used), "left of the address space limit (ulimit -v)", address_space=True))
    return limits


def taken_bytes() -> int:
    """Memory that this process has taken already: interpreter, libraries, tokenizers, and what it did before."""
    return int(psutil.Process().memory_info().rss)


def _cgroup_paths() -> dict[str, str]:
    """controller -> path of this process; the unified hierarchy of cgroup 2 has the name ``""``."""
    paths: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                paths[controller] = path
    return paths


def cgroup_limits(root: Path, paths: dict[str, str]) -> list[Limit]:
    """The tightest memory limit of the cgroups that enclose a process, as a list of one or none.

    root: where cgroups are mounted. paths: as in /proc/self/cgroup, by controller. The page cache of inactive files
    counts as free: the kernel drops it first.
    """
    found: list[int] = []
    for base, path, names in (
        (root, paths.get(""), ("memory.max", "memory.current", "inactive_file")),
        (
            root / "memory",
            paths.get("memory"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ):
        if path is None:
            continue
        relative = Path(path.lstrip("/"))
        # In a container the path may be the host's: then only the mount's own root is visible.
        for folder in [base / relative, *(base / parent for parent in relative.parents), base]:
            with suppress(OSError, ValueError):
                limit = int((folder / names[0]).read_text())  # "max" is a ValueError: no limit here
                if limit < 1 << 60:
                    used = int((folder / names[1]).read_text()) - _stat(folder / "memory.stat", names[2])
                    found.append(max(0, limit - used))
    return [Limit(min(found), "left of the container's memory limit (cgroup)")] if found else []


def _stat(file: Path, key: str) -> int:
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, value = line.split()
            if name == key:
                return int(value)
    return 0
