"""A model before it is loaded: where its files are, how large they are, and what identifies its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from fusekit import artifacts as artifact
from fusekit import gguf, hub
from fusekit.capturing.settings import EngineSettings, plain_name
from fusekit.errors import CaptureError
from fusekit.hub import DTYPES, is_pickle, read_index, weight_entry

_ADAPTER = "adapter_config.json"
_HASHED_AT_A_TIME = 16 << 20
_ITEMSIZES = dict(DTYPES.values())
TRANSFORMERS = EngineSettings()


@dataclass(frozen=True)
class ModelChoice:
    """A model and how to load it; what is not said here is transformers' to decide.

    Attributes:
        model: a folder, or a name on the hub; or a GGUF file in either, ``folder/x.gguf``, ``owner/name/x.gguf``.
        revision: branch, tag or commit on the hub.
        dtype: of the weights; ``auto`` is the checkpoint's.
        device_map: as for ``from_pretrained``; None for one device, the process's own.
        quantization: fields of transformers' quantization config.
        attn_implementation: as for ``from_pretrained``.
        trust_remote_code: run Python code that comes with this model.
        allow_pickle: read pickled weights of this model (still with ``weights_only``).
        dequantised: folder of a plain checkpoint that :func:`fusekit.capturing.load.dequantise` makes of a GGUF
            file; read in its place once it is there.
        engine: what runs the model when it is captured; everything else runs it with transformers.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device_map: str | dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    dequantised: Path | None = None
    engine: EngineSettings = TRANSFORMERS

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", plain_name(self.model))


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found.

    Attributes:
        choice: what was asked for.
        folder: on disk; for a model on the hub, where its files are or will be.
        config: content of its config.json; of a GGUF file what transformers makes of its header.
        weights: bytes of each weight file.
        snapshot: the commit on the hub, None for a folder.
        notices: lines for the user.
        gguf: the header of a GGUF file.
        identity: the fingerprint of the GGUF file that a plain checkpoint was made of.
    """

    choice: ModelChoice
    folder: Path
    config: dict[str, Any]
    weights: dict[str, int]
    snapshot: hub.Snapshot | None = None
    notices: list[str] = field(default_factory=list)
    gguf: gguf.GgufHeader | None = None
    identity: str | None = None

    @property
    def download_bytes(self) -> int:
        """Bytes of weights that are not here yet."""
        return sum(self.weights[name] for name in self.snapshot.missing(self.weights)) if self.snapshot else 0

    @property
    def repository(self) -> str | None:
        """On the hub; None for a model in a folder."""
        if self.snapshot:
            return self.snapshot.repository
        parts = gguf.split(self.choice.model)
        return parts[0] if parts and self.commit else None

    @property
    def commit(self) -> str | None:
        """On the hub, also of the GGUF file that a plain checkpoint was made of."""
        if self.snapshot:
            return self.snapshot.commit
        kind, _, rest = (self.identity or "").partition(" ")
        return rest.split()[0] if kind == "commit" else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in the dtype of the configuration: of a GGUF file once they are dequantised."""
        if self.gguf is not None:
            return self.gguf.parameters * _ITEMSIZES[self.gguf.dtype]
        return sum(self.weights.values())

    def fetch(self, *, bar: bool = False) -> None:
        """Download the weights unless they are here. Raises CaptureError with a hint, StorageError for a full disk."""
        if self.snapshot and self.download_bytes:
            self.snapshot.fetch(sorted(self.weights), bar=bar)

    def fingerprint(self) -> str:
        """The commit of a model on the hub; of a folder, the xxh3-128 of its configuration and all of its weights.

        Of a GGUF file the commit and its name, or the xxh3-128 of the file. Call it after :meth:`fetch`.
        """
        if self.identity is not None:
            return self.identity
        if self.snapshot:
            return f"commit {self.snapshot.commit}{f' {self.gguf.file}' if self.gguf else ''}"
        path = self.folder
        try:
            if self.gguf is not None:
                return f"xxh3 {artifact.file_hash(self.folder / self.gguf.file)}"
            # Without what changes when a configuration is only saved again.
            config = {key: self.config[key] for key in self.config.keys() - {"transformers_version", "_name_or_path"}}
            digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode())
            for name in sorted(self.weights):
                digest.update(f"\0{name}\0".encode())
                path = self.folder / name
                with path.open("rb") as file:
                    while piece := file.read(_HASHED_AT_A_TIME):
                        digest.update(piece)
            return f"xxh3 {digest.hexdigest()}"
        except OSError as error:
            raise CaptureError(f"{self.choice.model}: {path} cannot be read: {error}") from error


def find_checkpoint(choice: ModelChoice, *, weights: bool = True, download: bool = True) -> Checkpoint:
    """The model that a choice means, with configuration and tokenizer on disk, not yet weights; a GGUF file is fetched.

    Args:
        choice: the model.
        weights: False where only its tokenizer is wanted; there is no configuration of a GGUF file then.
        download: False to refuse a GGUF file that would have to be fetched.

    Raises:
        HubUnreachableError: a GGUF file is not here and ``download`` is False.
        CaptureError: missing, gated, unreachable or incomplete; pickled weights or code of its own without leave. Says
            what to do.
    """
    notices: list[str] = []
    if (parts := gguf.split(choice.model)) is not None:
        plain = choice.dequantised
        if plain is None or (known := artifact.read(plain)) is None:
            return _find_gguf(choice, *parts, weights=weights, download=download)
        config, identity = _read_json(choice, plain / "config.json"), str(known.inputs.get("gguf"))
        return Checkpoint(choice, plain, config, _weights(choice, plain, None), identity=identity)
    folder, snapshot = hub.locate(choice.model, choice.revision, None, notices)
    names = _names(folder, snapshot)
    if weight_entry(names) is None and gguf.among(names) and (weights or "config.json" not in names):
        raise CaptureError(f"{choice.model} {gguf.only_gguf(choice.model, names)}")
    if snapshot:
        snapshot.fetch([*hub.SMALL_FILES, *(["*.py"] if choice.trust_remote_code else [])])
    if _ADAPTER in names and "config.json" not in names:
        base = _read_json(choice, folder / _ADAPTER).get("base_model_name_or_path") or "a model that it does not name"
        raise CaptureError(
            f"{choice.model} is an adapter of {base}, not a model: merge it into its base first, by `fusekit merge` "
            f"with a recipe of one model, `{base}+{choice.model}`"
        )
    config = _read_json(choice, folder / "config.json")
    if "auto_map" in config and not choice.trust_remote_code:
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise CaptureError(
                f"{choice.model} wants to run Python code of its own (auto_map in {folder / 'config.json'}): if you "
                "trust its author, allow it for this model with --trust-remote-code"
            )
    sizes = _weights(choice, folder, snapshot) if weights else {}
    return Checkpoint(choice, folder, config, sizes, snapshot, notices)


def _find_gguf(choice: ModelChoice, place: str, file: str, *, weights: bool, download: bool) -> Checkpoint:
    if choice.quantization:
        raise CaptureError(
            f"{choice.model} is a GGUF file, which is dequantised when it is loaded: the quantization "
            f"{choice.quantization.get('quant_method')!r} does not apply; leave it out, or take the original model"
        )
    notices: list[str] = []
    folder, snapshot = hub.locate(place, choice.revision, None, notices)
    if file not in _names(folder, snapshot):
        there = ", ".join(gguf.among(_names(folder, snapshot))) or "none"
        raise CaptureError(f"{choice.model}: there is no file {file} in {place}; GGUF files there: {there}")
    if snapshot and snapshot.missing([file]):
        if not download:
            raise hub.HubUnreachableError(
                f"{choice.model} is not in the cache: what is in its header is known once it is fetched "
                f"({snapshot.sizes[file]:,} bytes)"
            )
        snapshot.fetch([file], bar=True)
    header = gguf.read_header(folder, file, choice.model)
    size = (folder / file).stat().st_size
    notices += [f"{choice.model}: transformers does not read {line}" for line in header.left_out]
    config = dict(_gguf_config(folder, file, choice.model, header.architecture, size)) if weights else {}
    found = Checkpoint(choice, folder, config, {file: size}, snapshot, notices, header)
    return replace(found, config=config | {"dtype": header.dtype})


@lru_cache(maxsize=16)
def _gguf_config(folder: Path, file: str, label: str, architecture: str, _size: int) -> dict[str, Any]:
    """What transformers makes of the header of a GGUF file, which takes it seconds to half a minute."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    try:
        config, _ = PreTrainedConfig.get_config_dict(folder, gguf_file=file, local_files_only=True)
    except Exception as error:  # transformers' and gguf's own, of many kinds
        raise CaptureError(
            f"{label}: transformers cannot read a GGUF file of the architecture {architecture!r}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}; take the original model"
        ) from error
    config = {name: value for name, value in config.items() if name != "_model_name_or_path"}
    if "architectures" not in config and config.get("model_type") in NAMES:
        config["architectures"] = [NAMES[config["model_type"]]]
    return config


def is_repository(name: str) -> bool:
    """Whether a model is one on the hub: nothing is there, and it does not look like a path."""
    place = (gguf.split(name) or (name, ""))[0]
    return bool(place) and place[0] not in "/~." and place.count("/") <= 1 and not Path(place).exists()


def _names(folder: Path, snapshot: hub.Snapshot | None) -> set[str]:
    """The files of a model, wherever they are yet."""
    return set(snapshot.sizes) if snapshot else {path.name for path in folder.iterdir()}


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


def _weights(choice: ModelChoice, folder: Path, snapshot: hub.Snapshot | None) -> dict[str, int]:
    """Bytes by name of the files that hold the weights."""
    names = _names(folder, snapshot)
    entry = weight_entry(names)
    if entry is None:
        where = "in the cache, and the hub cannot be reached" if snapshot and not snapshot.online else f"in {folder}"
        raise CaptureError(f"{choice.model} has no weights: no model.safetensors or its index {where}")
    files = [entry]
    if entry.endswith(".index.json"):
        files = sorted(set(read_index(folder / entry, choice.model).values()))
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
