"""A model before it is loaded: where its files are, how large they are, and what identifies its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from fusekit import artifacts as artifact
from fusekit import gguf, hub
from fusekit.capturing.settings import EngineSettings, plain_name
from fusekit.errors import CaptureError
from fusekit.hub import DTYPES

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

    def headers(self) -> hub.Headers | None:
        """Headers of its tensors, None where it has no safetensors files or not all are here. Raises CaptureError."""
        files = [self.folder / name for name in sorted(self.weights) if name.endswith(".safetensors")]
        if not files or not all(path.is_file() for path in files):
            return None
        return {name: header for path in files for name, header in hub.read_headers(path, self.choice.model).items()}

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

    def sizes(files: hub.Files) -> dict[str, int]:
        return files.weights(pickles=choice.allow_pickle, leave="--allow-pickle")

    if (parts := gguf.split(choice.model)) is not None:
        plain = choice.dequantised
        if plain is None or (known := artifact.read(plain)) is None:
            return _find_gguf(choice, *parts, weights=weights, download=download)
        files, identity = hub.Files(choice.model, plain), str(known.inputs.get("gguf"))
        return Checkpoint(choice, plain, files.config(), sizes(files), identity=identity)
    notices: list[str] = []
    files = hub.locate(choice.model, choice.revision, None, notices)
    if files.only_gguf and (weights or "config.json" not in files.names):
        there = files.only_gguf
        raise CaptureError(
            f"{choice.model} has no weights but GGUF files ({', '.join(there)}): name one, as "
            f"{choice.model.rstrip('/')}/{there[0]}, or in a recipe by `gguf_file: {there[0]}`"
        )
    files.fetch_small(code=choice.trust_remote_code)
    config = files.config()
    if not choice.trust_remote_code:
        files.refuse_code(config, "--trust-remote-code")
    return Checkpoint(choice, files.folder, config, sizes(files) if weights else {}, files.snapshot, notices)


def _find_gguf(choice: ModelChoice, place: str, file: str, *, weights: bool, download: bool) -> Checkpoint:
    if choice.quantization:
        raise CaptureError(
            f"{choice.model} is a GGUF file, which is dequantised when it is loaded: the quantization "
            f"{choice.quantization.get('quant_method')!r} does not apply; leave it out, or take the original model"
        )
    notices: list[str] = []
    files = hub.locate(place, choice.revision, None, notices)
    folder, snapshot = files.folder, files.snapshot
    if file not in files.names:
        there = ", ".join(gguf.among(files.names)) or "none"
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
    return Checkpoint(choice, folder, config | {"dtype": header.dtype}, {file: size}, snapshot, notices, header)


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
