"""Models on the Hugging Face hub: what they contain before anything large is fetched, and errors with a way out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, utils
from huggingface_hub import errors as hub_errors

from fusekit.errors import ModelError
from fusekit.models.headers import DTYPES, Headers, TensorHeader
from fusekit.storage.faults import disk_fault

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
        if not _unreachable(error):
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


def _unreachable(error: BaseException) -> bool:
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
    elif _unreachable(error):
        text = f"is not in the cache ({constants.HF_HUB_CACHE}) and {constants.ENDPOINT} does not answer "
        text += f"({type(error).__name__}: {error}): check the network, a proxy, or HF_ENDPOINT"
    else:
        text = f"cannot be fetched from {constants.ENDPOINT}: {type(error).__name__}: {error}"
    kind = HubUnreachableError if _unreachable(error) else ModelError
    return kind(f"{repository} {' '.join(text.split())}")
