"""A model: where its files are, what identifies its weights, how large it is, and loading it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from fusekit import artifacts as artifact
from fusekit import gguf, hub
from fusekit.devices import Need, disk, is_out_of_memory, main_memory, missing_device, refuse_lacking
from fusekit.disk import counted
from fusekit.errors import CaptureError
from fusekit.layout import PIVOT
from fusekit.settings import EngineSettings
from fusekit.types import IntArray
from fusekit.yaml import nearest

_ITEMSIZES = dict(hub.DTYPES.values())
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
        dequantised: folder of a plain checkpoint that :func:`dequantise` makes of a GGUF file; read in its place once
            it is there.
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
        object.__setattr__(self, "model", os.path.expanduser(self.model))  # noqa: PTH111 - perhaps a name on the hub


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
        """The name on the hub; None for a model in a folder."""
        if self.snapshot:
            return self.snapshot.repository
        parts = gguf.split(self.choice.model)
        return parts[0] if parts and self.commit else None

    @property
    def commit(self) -> str | None:
        """The commit on the hub, also of the GGUF file that a plain checkpoint was made of."""
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

        Of a GGUF file the commit and its name, or the xxh3-128 of the file. Raises CaptureError.
        """
        if self.identity is not None:
            return self.identity
        if self.snapshot:
            return f"commit {self.snapshot.commit}{f' {self.gguf.file}' if self.gguf else ''}"
        try:
            if self.gguf is not None:
                return "xxh3 " + artifact.file_hash(self.folder / self.gguf.file)
            # Without what changes when a configuration is only saved again.
            config = {key: self.config[key] for key in self.config.keys() - {"transformers_version", "_name_or_path"}}
            digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode())
            for name in sorted(self.weights):
                digest.update(f"\0{name}\0".encode())
                with (self.folder / name).open("rb") as file:
                    while piece := file.read(16 << 20):
                        digest.update(piece)
            return f"xxh3 {digest.hexdigest()}"
        except OSError as error:
            raise CaptureError(f"{self.choice.model}: its weights cannot be read: {error}") from error


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
    files = hub.locate(choice.model, choice.revision)
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
    return Checkpoint(choice, files.folder, config, sizes(files) if weights else {}, files.snapshot, files.notices)


def _find_gguf(choice: ModelChoice, place: str, file: str, *, weights: bool, download: bool) -> Checkpoint:
    if choice.quantization:
        raise CaptureError(
            f"{choice.model} is a GGUF file, which is dequantised when it is loaded: the quantization "
            f"{choice.quantization.get('quant_method')!r} does not apply; leave it out, or take the original model"
        )
    files = hub.locate(place, choice.revision)
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
    notices = [*files.notices, *(f"{choice.model}: transformers does not read {line}" for line in header.left_out)]
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


class Shape(NamedTuple):
    """A decoder: width of its hidden states and of its feed-forward, layers, vocabulary."""

    hidden: int
    wide: int
    layers: int
    vocabulary: int


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the fields of its language model, which one of several modalities has in a part."""
    return {**config, **(config.get("text_config") or {})}


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes, whatever names it uses; a 7B model's where it says nothing."""
    known = text_config(config)

    def first(*names: str) -> int | None:
        return next((value for name in names if isinstance(value := known.get(name), int) and value > 0), None)

    hidden = first("hidden_size", "n_embd", "d_model") or 4096
    wide = first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    layers = first("num_hidden_layers", "n_layer", "n_layers") or 32
    return Shape(hidden, wide, layers, first("vocab_size") or 32000)


def parameters(checkpoint: Checkpoint) -> int:
    """How many parameters a checkpoint's files hold."""
    return checkpoint.weight_bytes // itemsize(stored_dtype(checkpoint))


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that a checkpoint's configuration names; float32 where it names none."""
    return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")


def itemsize(dtype: str) -> int:
    """Bytes of an element of a dtype by torch's name; 4 for an unknown name."""
    return _ITEMSIZES.get(dtype.removeprefix("torch."), 4)


def loaded_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weights once they are loaded."""
    choice = checkpoint.choice
    stored = itemsize(stored_dtype(checkpoint))
    if choice.quantization:
        fields = choice.quantization
        bits = 4 if fields.get("load_in_4bit") else fields.get("bits") or fields.get("w_bit") or 8
        # Embeddings, norms and the head usually stay as they are: a tenth of a large model.
        return int(checkpoint.weight_bytes * (0.9 * float(bits) / 8 / stored + 0.1))
    return checkpoint.weight_bytes * (stored if choice.dtype == "auto" else itemsize(choice.dtype)) // stored


def dequantise_needs(checkpoint: Checkpoint, folder: Path) -> list[Need]:
    """What the dequantised weights of a GGUF file need: main memory, and the disk of ``folder``."""
    name, size = checkpoint.choice.model, loaded_bytes(checkpoint)
    return [main_memory(f"main memory to dequantise {name}", size), *disk([(folder, size, f"{name}, dequantised")])]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's own tokenizer. Raises CaptureError saying why it does not load."""
    from transformers import AutoTokenizer

    choice = checkpoint.choice
    with _explained(checkpoint, "the tokenizer"):
        if (header := checkpoint.gguf) is not None:
            return _gguf_tokenizer(checkpoint.folder, header, choice.model, checkpoint.weights[header.file])
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=choice.trust_remote_code, local_files_only=True
        )


@lru_cache(maxsize=8)
def _gguf_tokenizer(folder: Path, header: gguf.GgufHeader, name: str, _size: int) -> Any:
    """The tokenizer in a GGUF file, which takes seconds: half a minute of a large vocabulary."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=header.file, local_files_only=True)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in state["added_tokens"] if token["id"] < header.tokens]
    if len(own) < len(state["added_tokens"]):
        # transformers adds GPT-2's <|endoftext|> to any byte-level BPE: the model has no row for it.
        backend = Tokenizer.from_str(json.dumps(state | {"added_tokens": own}))
        tokenizer = type(tokenizer)(tokenizer_object=backend, **tokenizer.init_kwargs)
    tokenizer.name_or_path = name
    return tokenizer


def load_model(checkpoint: Checkpoint, device: torch.device, kind: Any = None) -> Any:
    """The model, its weights on ``device`` or where its ``device_map`` says, ready to be run.

    A GGUF file is dequantised, on the CPU first; ``auto`` is then float32, but of a file without blocks its own dtype.
    kind: an auto class of transformers; None for a causal language model.

    Raises CaptureError: memory, a package that is missing, weights that do not fit the configuration.
    """
    import transformers

    choice, header = checkpoint.choice, checkpoint.gguf
    dtype = header.dtype if header is not None and choice.dtype == "auto" else choice.dtype
    how: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    device_map: Any = choice.device_map
    if device_map is None and device.type != "cpu":
        device_map = {"": device}  # weights go there straight from the file
    with _explained(checkpoint, "the model"):
        if header is None:
            how["quantization_config"] = _quantization(choice.quantization)
        else:  # its configuration would be read again, which takes seconds
            how |= {"gguf_file": header.file, "config": transformers.AutoConfig.for_model(**checkpoint.config)}
            if hasattr(transformers, "GgufConfig"):  # versions before 5.23 always dequantise
                how["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, report = (kind or transformers.AutoModelForCausalLM).from_pretrained(
            checkpoint.folder,
            **how,
            device_map=device_map,
            attn_implementation=choice.attn_implementation,
            trust_remote_code=choice.trust_remote_code,
            use_safetensors=None if choice.allow_pickle else True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise CaptureError(
            f"{choice.model} lacks {counted(len(missing), 'tensor')}, which would be random: {missing[0]}: are the "
            "weights those of another model?"
        )
    return model.eval()


def loading_mistakes(how: Any) -> Iterator[tuple[str, str]]:
    """Fields of a ModelChoice, or of a recipe's ``load``, that transformers or this machine do not know, and why."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known, attention = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()], how.attn_implementation
    if attention is not None and "/" not in attention and attention not in known:  # those with one are kernels' names
        yield "attn_implementation", f"unknown attn_implementation {attention!r}{nearest(attention, known)}"
    for device in how.device_map.values() if isinstance(how.device_map, dict) else [how.device_map]:
        if device not in _DEVICE_MAPS and (says := missing_device(device)):
            yield "device_map", says
    try:
        _quantization(how.quantization)
    except Exception as error:  # transformers', and those of the packages that it asks
        yield "quantization", f"transformers refuses the quantization: {' '.join(str(error).split())}"


_DEVICE_MAPS = (None, "auto", "balanced", "balanced_low_0", "sequential", "disk")


def valid_ids(tokenizer: Any) -> IntArray:
    """int64, sorted: the ids that are tokens. A model may have more rows, and a tokenizer may leave holes."""
    return np.unique(np.fromiter(tokenizer.get_vocab().values(), np.int64))


def device_of(model: Any) -> torch.device:
    """Where the input of a loaded model goes: with layers offloaded some parameters are on no device."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def longest_input(checkpoint: Checkpoint) -> int | None:
    """Tokens that the model's configuration allows for, None where it does not say."""
    known = text_config(checkpoint.config)
    return known.get("max_position_embeddings", known.get("n_positions"))


def dequantise(
    choice: ModelChoice | str,
    folder: Path | str,
    *,
    overwrite: bool = False,
    ignore_estimates: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a GGUF file's weights, dequantised, with its configuration and tokenizer as a plain checkpoint, once.

    It is published in one step. The caller holds the lock of what ``folder`` is in.

    Args:
        choice: the GGUF file and the dtype to store (auto: see :func:`load_model`).
        folder: where it goes; one that is there already, of the same file and dtype, stays.
        overwrite: replace one of another file or dtype.
        ignore_estimates: start although disk or memory do not seem to suffice.
        say: told what is done.

    Raises:
        CaptureError: it is not a GGUF file, does not fit, or cannot be loaded.
        StorageError: ``folder`` was made from other inputs (says which), is damaged, or holds other files.
    """
    choice, folder = ModelChoice(choice) if isinstance(choice, str) else choice, Path(folder)
    if gguf.split(choice.model) is None:
        raise CaptureError(f"{choice.model} is not a GGUF file: there is nothing to dequantise")
    choice = replace(choice, dequantised=None, device_map=None)
    if (known := artifact.read(folder, PIVOT)) is not None:
        changed = artifact.differences(known.inputs, dequantised_from(choice, known))
        if not changed:
            artifact.require_whole(folder)
            return
        if not overwrite:
            artifact.refuse_changes(folder, changed)
    checkpoint = find_checkpoint(choice)
    for line in [*checkpoint.notices, f"dequantising {choice.model} into {folder}, which is done once"]:
        say(line)
    if not ignore_estimates:
        way_out = "Free some, write elsewhere, or choose the dtype bfloat16; --ignore-estimates starts it all the same"
        refuse_lacking(dequantise_needs(checkpoint, folder), "this model does not fit:", way_out, CaptureError)

    def write(into: Path) -> None:
        load_model(checkpoint, torch.device("cpu")).save_pretrained(into)
        load_tokenizer(checkpoint).save_pretrained(into)

    made: artifact.Inputs = {**artifact.circumstances(), "model": choice.model}
    artifact.publish(folder, PIVOT, dequantised_from(choice), write, made)


def dequantised_from(choice: ModelChoice, known: artifact.Artifact | None = None) -> artifact.Inputs:
    """What :func:`dequantise` makes a plain checkpoint of. known: one that is there, whose file may be gone by now.

    Raises CaptureError where the file cannot be found, and none is known of that name.
    """
    try:
        found = find_checkpoint(replace(choice, dequantised=None), weights=False).fingerprint()
    except CaptureError:
        if known is None or known.made.get("model") != choice.model:
            raise
        found = str(known.inputs.get("gguf"))
    return {"gguf": found, "dtype": choice.dtype}


def _quantization(fields: dict[str, Any] | None) -> Any:
    if fields is None:
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(dict(fields))


@contextmanager
def _explained(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    name = checkpoint.choice.model
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if is_out_of_memory(error):
            hint = "load it smaller (--dtype bfloat16, --quantization) or over several devices (--device-map auto)"
        elif isinstance(error, ImportError):
            hint = "install the package that it names"
        elif "trust_remote_code" in text:
            hint = "if you trust the author of its Python code, allow it for this model with --trust-remote-code"
        else:
            if type(error).__name__ == "SafetensorError":
                checkpoint.headers()  # says which file is cut off, and both sizes
            hint = f"check the files in {checkpoint.folder}"
        raise CaptureError(f"{what} {name} cannot be loaded: {type(error).__name__}: {text}; {hint}") from error
