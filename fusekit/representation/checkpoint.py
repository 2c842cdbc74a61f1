"""A model before it is loaded: where its files are, how large they are, and what identifies its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from fusekit.errors import CaptureError
from fusekit.models import hub
from fusekit.models.headers import is_pickle, read_index, weight_entry

_HASHED_AT_A_TIME = 16 << 20


@dataclass(frozen=True)
class ModelChoice:
    """A model and how to load it; what is not said here is transformers' to decide.

    Attributes:
        model: a folder, or a name on the hub.
        revision: branch, tag or commit on the hub.
        dtype: of the weights; ``auto`` is the checkpoint's.
        device_map: as for ``from_pretrained``; None for one device, the process's own.
        quantization: fields of transformers' quantization config.
        attn_implementation: as for ``from_pretrained``.
        trust_remote_code: run Python code that comes with this model.
        allow_pickle: read pickled weights of this model (still with ``weights_only``).
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device_map: str | dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found.

    Attributes:
        choice: what was asked for.
        folder: on disk; for a model on the hub, where its files are or will be.
        config: content of its config.json.
        weights: bytes of each weight file.
        snapshot: the commit on the hub, None for a folder.
        notices: lines for the user.
    """

    choice: ModelChoice
    folder: Path
    config: dict[str, Any]
    weights: dict[str, int]
    snapshot: hub.Snapshot | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def download_bytes(self) -> int:
        """Bytes of weights that are not here yet."""
        return sum(self.weights[name] for name in self.snapshot.missing(self.weights)) if self.snapshot else 0

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    def fetch(self, *, bar: bool = False) -> None:
        """Download the weights unless they are here. Raises CaptureError with a hint, StorageError for a full disk."""
        if self.snapshot and self.download_bytes:
            self.snapshot.fetch(sorted(self.weights), bar=bar)

    def fingerprint(self) -> str:
        """The commit of a model on the hub; of a folder, the xxh3-128 of its configuration and all of its weights.

        Call it after :meth:`fetch`. A folder is read once from end to end, as it will be again to be loaded.
        """
        if self.snapshot:
            return f"commit {self.snapshot.commit}"
        digest = xxhash.xxh3_128(json.dumps(_identity(self.config), sort_keys=True).encode())
        for name in sorted(self.weights):
            digest.update(f"\0{name}\0".encode())
            try:
                with (self.folder / name).open("rb") as file:
                    while piece := file.read(_HASHED_AT_A_TIME):
                        digest.update(piece)
            except OSError as error:
                raise CaptureError(f"{self.choice.model}: {self.folder / name} cannot be read: {error}") from error
        return f"xxh3 {digest.hexdigest()}"


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes when it is only saved again."""
    return {name: value for name, value in config.items() if name not in ("transformers_version", "_name_or_path")}


def find_checkpoint(choice: ModelChoice, *, weights: bool = True) -> Checkpoint:
    """The model that a choice means, with its configuration and tokenizer on disk, but not yet its weights.

    weights: False where only its tokenizer is wanted.

    Raises:
        CaptureError: missing, gated, unreachable or incomplete; pickled weights or code of its own without leave. Says
            what to do.
    """
    notices: list[str] = []
    folder, snapshot = _locate(choice, notices)
    if snapshot:
        snapshot.fetch([*hub.SMALL_FILES, *(["*.py"] if choice.trust_remote_code else [])])
    config = _read_json(choice, folder / "config.json")
    _refuse_code(choice, folder, config)
    sizes = _weights(choice, folder, snapshot) if weights else {}
    return Checkpoint(choice, folder, config, sizes, snapshot, notices)


def _locate(choice: ModelChoice, notices: list[str]) -> tuple[Path, hub.Snapshot | None]:
    name = choice.model
    local = Path(name).expanduser()
    if local.is_dir():
        if choice.revision:
            raise CaptureError(f"{name} is a local folder: the revision {choice.revision!r} has no meaning there")
        return local.resolve(), None
    if local.exists():
        raise CaptureError(f"{name} is a file: give the folder of the model")
    if not name or name[0] in "/~." or name.count("/") > 1:
        raise CaptureError(f"there is no folder {name or repr(name)} (looked from {Path.cwd()})")
    snapshot = hub.find(name, choice.revision, None, notices)
    return snapshot.folder, snapshot


def _read_json(choice: ModelChoice, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CaptureError(
            f"{choice.model} has no {path.name} in {path.parent}: is it a model in Hugging Face's format?"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CaptureError(f"{choice.model}: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CaptureError(f"{choice.model}: {path} is not a JSON mapping")
    return content


def _refuse_code(choice: ModelChoice, folder: Path, config: dict[str, Any]) -> None:
    """Refuse a model that transformers can only load by running code that comes with it."""
    if choice.trust_remote_code or "auto_map" not in config:
        return
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise CaptureError(
            f"{choice.model} wants to run Python code of its own (auto_map in {folder / 'config.json'}): if you trust "
            "its author, allow it for this model with --trust-remote-code"
        )


def _weights(choice: ModelChoice, folder: Path, snapshot: hub.Snapshot | None) -> dict[str, int]:
    """Bytes by name of the files that hold the weights."""
    names = set(snapshot.sizes) if snapshot else {path.name for path in folder.iterdir()}
    entry = weight_entry(names)
    if entry is None:
        where = "in the cache, and the hub cannot be reached" if snapshot and not snapshot.online else f"in {folder}"
        raise CaptureError(f"{choice.model} has no weights: no model.safetensors or its index {where}")
    files = [entry]
    if entry.endswith(".index.json"):
        text = (folder / entry).read_text(encoding="utf-8", errors="replace")
        files = sorted(set(read_index(text, f"{choice.model}: {entry}").values()))
    pickles = [name for name in (entry, *files) if is_pickle(name) or name.endswith(".bin")]
    if pickles and not choice.allow_pickle:
        raise CaptureError(
            f"{choice.model}: its weights are pickled ({folder / pickles[0]}), which can run any code when they are "
            "read: convert them to safetensors, or, if you trust their author, allow it for this model with "
            "--allow-pickle"
        )
    lacking = [name for name in files if name not in names]
    if lacking:
        raise CaptureError(f"{choice.model}: the weight file {folder / lacking[0]} is not there: is it downloaded?")
    size: Callable[[str], int] = snapshot.sizes.__getitem__ if snapshot else lambda n: (folder / n).stat().st_size
    return {name: size(name) for name in files}
