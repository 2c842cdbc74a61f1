"""Models on the Hugging Face hub: what they contain before anything large is fetched, and errors with a way out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, utils
from huggingface_hub import errors as hub_errors

from fusekit import gguf
from fusekit.disk import disk_fault
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
        # The small files by the revision, whose commit the client then notes for when there is no network.
        revision = self.revision if set(SMALL_FILES) <= set(patterns) else self.commit
        hidden = not bar and not utils.are_progress_bars_disabled()
        if hidden:
            utils.disable_progress_bars()
        try:
            huggingface_hub.snapshot_download(
                self.repository, revision=revision, cache_dir=self.cache, allow_patterns=patterns
            )
        except Exception as error:
            needed = sum(self.sizes[name] for name in self.missing(self.sizes) if name in patterns)
            raise disk_fault(error, self.cache, needed or None) or explain(error, self.repository) from error
        finally:
            if hidden:
                utils.enable_progress_bars()

    def headers(self, file: str) -> Headers:
        """Headers of one safetensors file, by range requests. Raises ModelError."""
        try:
            metadata = huggingface_hub.HfApi().parse_safetensors_file_metadata(
                self.repository, file, revision=self.commit, timeout=TIMEOUT
            )
            return {name: _tensor_header(vars(info), file) for name, info in metadata.tensors.items()}
        except Exception as error:
            raise explain(error, self.repository) from error


@dataclass(frozen=True)
class Files:
    """The files of a model, in a folder or at a commit of the hub; nothing large is read or fetched.

    label: how errors call the model. folder: on disk; for a model on the hub, where its files are or will be.
    """

    label: str
    folder: Path
    snapshot: Snapshot | None = None

    @cached_property
    def names(self) -> set[str]:
        """Names of all files, also of those that are not fetched yet."""
        return set(self.snapshot.sizes) if self.snapshot else {path.name for path in self.folder.iterdir()}

    @property
    def notices(self) -> list[str]:
        """A line for the user where the hub could not be reached."""
        if self.snapshot is None or self.snapshot.online:
            return []
        name, commit = self.snapshot.repository, self.snapshot.commit[:10]
        return [f"{name}: the hub cannot be reached, the cached commit {commit} is used"]

    @property
    def only_gguf(self) -> list[str]:
        """The GGUF files of a model that has no weights but these, in order."""
        return gguf.among(self.names) if weight_entry(self.names) is None else []

    def fetch_small(self, *, code: bool) -> None:
        """Fetch configuration and tokenizer, unless they are here. code: Python code too. Raises ModelError."""
        if self.snapshot:
            self.snapshot.fetch([*SMALL_FILES, *(["*.py"] if code else [])])

    def json(self, name: str) -> dict[str, Any] | None:
        """The mapping in a file, None where there is no such file. Raises ModelError naming a file that has none."""
        path = self.folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{self.label}: {path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ModelError(f"{self.label}: {path} is not a JSON mapping")
        return content

    def config(self) -> dict[str, Any]:
        """Content of config.json. Raises ModelError where there is none, for an adapter with the way to merge it."""
        config = self.json("config.json")
        if config is not None:
            return config
        if (adapter := self.json("adapter_config.json")) is not None:
            base = adapter.get("base_model_name_or_path")
            raise ModelError(
                f"{self.label} is an adapter{f' of {base}' if base else ''}, not a model: `fusekit merge` merges it "
                f"into its base, which the recipe names before it, `model: {base or 'MODEL'}+{self.label}`"
            )
        raise ModelError(f"{self.label} has no config.json in {self.folder}: is it a model in Hugging Face's format?")

    def refuse_code(self, config: Mapping[str, Any], leave: str, *, always: bool = False) -> None:
        """Raise ModelError for a model that transformers cannot load without the Python code that comes with it.

        config: what may name such code. leave: the option that allows it. always: also refuse code that transformers
        could do without.
        """
        if "auto_map" not in config:
            return
        from transformers import CONFIG_MAPPING

        if always or str(config.get("model_type")) not in CONFIG_MAPPING:
            raise ModelError(
                f"{self.label} wants to run Python code of its own (auto_map in {self.folder}): if you trust its "
                f"author, allow it for this model with {leave}"
            )

    def weights(self, *, pickles: bool, leave: str) -> dict[str, int]:
        """Bytes by name of the files that hold the weights.

        Raises ModelError: there are none, one is missing or a malformed index, or they are pickled without ``pickles``.
        leave: the option that allows them.
        """
        entry = weight_entry(self.names)
        absent = "not there: is it downloaded?"
        if self.snapshot and not self.snapshot.online:
            absent = "not in the cache, and the hub cannot be reached"
        if entry is None:
            raise ModelError(
                f"{self.label} has no weights: model.safetensors or its index in {self.folder} is {absent}"
            )
        files = [entry]
        if entry.endswith(".index.json"):
            files = sorted(set(read_index(self.folder / entry, self.label).values()))
        pickled = [name for name in (entry, *files) if name.startswith("pytorch_model.bin") or name.endswith(".bin")]
        if pickled and not pickles:
            raise ModelError(
                f"{self.label}: its weights are pickled ({self.folder / pickled[0]}), which can run any code when they "
                f"are read: convert them to safetensors, or, if you trust their author, allow it with {leave}"
            )
        if self.snapshot:
            sizes = self.snapshot.sizes
        else:  # a link to a file that is gone is a name, and no file
            paths = (self.folder / name for name in files)
            sizes = {path.name: path.stat().st_size for path in paths if path.is_file()}
        for name in files:
            if name not in sizes:
                raise ModelError(f"{self.label}: the weight file {self.folder / name} is {absent}")
        return {name: sizes[name] for name in files}


def locate(name: str, revision: str | None, cache: Path | None = None) -> Files:
    """The files of a model by its path or its name on the hub.

    Raises ModelError, with a way out: no such folder, a file, a revision of a folder, and whatever :func:`find` does.
    """
    try:
        local = Path(name).expanduser()
        if name and local.is_dir():
            if revision:
                raise ModelError(f"{name} is a local folder: the revision {revision!r} has no meaning there")
            return Files(name, local.resolve())
        if name and local.exists():
            raise ModelError(f"{name} is a file, but not a GGUF file (.gguf): give the folder of the model")
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that does not exist
        raise ModelError(f"{name!r} cannot be read: {error}") from error
    if _is_path(name):
        raise ModelError(
            f"there is no folder {name or repr(name)} (looked from {Path.cwd()}); on the hub, models are OWNER/NAME"
        )
    snapshot = find(name, revision, cache)
    return Files(name, snapshot.folder, snapshot)


def is_repository(name: str) -> bool:
    """Whether a model is one on the hub: nothing is there, and it does not look like a path."""
    place = (gguf.split(name) or (name, ""))[0]
    return not _is_path(place) and not Path(place).exists()


def _is_path(name: str) -> bool:
    return not name or name[0] in "/~." or name.count("/") > 1


def find(repository: str, revision: str | None, cache: Path | None) -> Snapshot:
    """The commit that a hub id means now, with the names and sizes of its files; offline, the one in the cache.

    Raises ModelError, at once and with a hint, for a model that is gated, missing, or neither reachable nor cached.
    """
    cache = Path(cache or constants.HF_HUB_CACHE).expanduser().resolve()
    api = huggingface_hub.HfApi()
    try:
        info: Any = api.model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except Exception as error:
        cached = _cached(repository, revision, cache) if unreachable(error) else None
        if cached is None:
            raise explain(error, repository) from error
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


def unreachable(error: BaseException) -> bool:
    """No answer from the hub, not one that says no. The client has changed its HTTP library twice."""
    if isinstance(error, hub_errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
        ("httpx", "requests")
    )


def explain(error: BaseException, repository: str) -> ModelError:
    """A ModelError that says what to do about an exception of the hub client."""
    login = f"log in with `hf auth login` or set HF_TOKEN ({'a' if huggingface_hub.get_token() else 'no'} token is set)"
    nowhere = f"{repository} is not in the cache ({constants.HF_HUB_CACHE}), there is no folder of that name, and"
    text = f"{repository} cannot be fetched from {constants.ENDPOINT}: {' '.join(str(error).split())}"
    if constants.is_offline_mode():
        text = (
            f"{nowhere} HF_HUB_OFFLINE is set: unset it, or "
            f"fetch the model where there is a network with `hf download {repository}`"
        )
    elif unreachable(error):
        text = (
            f"{nowhere} {constants.ENDPOINT} does not answer "
            f"({type(error).__name__}: {error}): check the network, a proxy, or HF_ENDPOINT"
        )
    elif isinstance(error, hub_errors.GatedRepoError):
        text = f"{repository} is gated: accept its licence at {constants.ENDPOINT}/{repository}, then {login}"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        text = (
            f"{repository} is not a local folder and not a model on {constants.ENDPOINT}: check the spelling; if it is "
            f"private, {login}"
        )
    return HubUnreachableError(text) if unreachable(error) else ModelError(text)


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


def read_headers(path: Path, label: str) -> Headers:
    """Headers of one safetensors file on disk. Raises ModelError naming the file when it is cut off or damaged.

    safetensors itself maps the whole file for that, which a limit of the address space may forbid.
    """
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
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        headers = {name: _tensor_header(entry, path.name) for name, entry in entries.items()}
        spans = [(*entry["data_offsets"], name) for name, entry in entries.items()]
        end = 0
        for start, stop, name in sorted(spans):
            if start != end or stop - start != headers[name].nbytes:
                raise ValueError(f"{name} overlaps another tensor, leaves a hole, or has not the size of its shape")
            end = stop
    except OSError as error:
        raise ModelError(f"{label}: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{label}: {path} has a damaged safetensors header: {error}") from error
    if 8 + length + end != size:
        raise ModelError(
            f"{label}: {path} is damaged: {size} bytes, but its header describes {8 + length + end}. Was the "
            "download or copy interrupted?"
        )
    return headers


def _tensor_header(entry: dict[str, Any], file: str) -> TensorHeader:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"the dtype {entry['dtype']!r} is not one that can be merged")
    name, itemsize = DTYPES[entry["dtype"]]
    shape, offsets = tuple(entry["shape"]), entry["data_offsets"]
    if len(offsets) != 2 or not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise ValueError("a shape or offset is not a whole number")
    return TensorHeader(name, shape, file, itemsize)


def read_index(path: Path, label: str) -> dict[str, str]:
    """Tensor name -> shard of an index file. Raises ModelError when it is malformed or names a file elsewhere."""
    try:
        pairs = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{label}: {path.name} is not an index of shards: {error}") from error
    for shard in pairs.values():
        # A name such as ../../other/file.bin would be read, or unpickled, from anywhere.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith((".safetensors", ".bin")):
            raise ModelError(f"{label}: {path.name} names {shard!r}, which is not a weight file in the same folder")
    return pairs


def checkpoint_headers(
    entry: str, folder: Path, label: str, shard_headers: Callable[[str], Headers] | None = None
) -> Headers:
    """Headers of a checkpoint by its entry file, an index or the only weight file.

    shard_headers: gives those of one file; None for a file of the folder. Raises ModelError, also when the index and
    the shards disagree.
    """
    headers_of = shard_headers or (lambda shard: read_headers(folder / shard, label))
    if not entry.endswith(".index.json"):
        return headers_of(entry)
    weight_map = read_index(folder / entry, label)
    by_shard = {shard: headers_of(shard) for shard in sorted(set(weight_map.values()))}
    lacking = sorted(name for name, shard in weight_map.items() if name not in by_shard[shard])
    if lacking:
        raise ModelError(
            f"{label}: its index says that {lacking[0]} is in {weight_map[lacking[0]]}, but it is not there"
            + (f" (and {len(lacking) - 1} tensors more)" if len(lacking) > 1 else "")
        )
    return {name: by_shard[shard][name] for name, shard in weight_map.items()}
