"""The input models of a merge: found, checked against what is allowed, described by their headers, and read.

`Model` carries the name that the recipe gives it and the folder that the name means; mergekit gets a `PinnedModel`,
whose path is that folder and which prints as that name. A LoRA adapter (``model+adapter``) is added to the weights as
they are read, so that no merged copy is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from mergekit.options import MergeOptions
from pydantic import BaseModel
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from fusekit import gguf, hub, mergekit_private
from fusekit.errors import MergeError, RecipeError
from fusekit.hub import Headers, TensorHeader, checkpoint_headers, read_headers, read_index, weight_entry
from fusekit.merge_methods.fusion_vectors import is_finite
from fusekit.merge_methods.mergekit_methods import SCALES, UNQUANTISED
from fusekit.yaml import KeyPath, Problems, nearest

Kind = TypeVar("Kind")

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NO_GGUF = (
    'which mergekit does not read: make a plain checkpoint of it, and name that in its place (python -c "from '
    "fusekit.capturing.models import dequantise; dequantise('{}', 'FOLDER')\")"
)
# Beginnings of dtypes that hold codes of quantised weights; of a model's own tensors only masks have them.
_CODES = ("float8", "int8", "uint8")
_MASKS = (".bias", ".masked_bias")
# Endings of names beside such codes.
_BESIDE_CODES = (
    *(f".weight{end}" for end in SCALES),
    *("_scale_inv", ".SCB", ".absmax", ".quant_map", ".qweight", ".qzeros", ".weight_packed", "_blocks"),
)


@dataclass(frozen=True)
class Settings:
    """What ``merge`` takes beside mergekit's own options. Models are named as in the recipe.

    Attributes:
        overwrite: replace a finished model at the output.
        ignore_estimates: start although it does not seem to fit.
        allow_pickle: models whose weights may be torch pickles.
        allow_remote_code: models whose own Python code may run.
        folders: where models are that the recipe calls by names which are neither paths nor hub ids; card, recipe and
            coefficients beside the merged model have these names.
        say: gets a line of plain text for the user.
        before_publishing: given the folder of the checked model, to add files to it.
    """

    overwrite: bool = False
    ignore_estimates: bool = False
    allow_pickle: frozenset[str] = frozenset()
    allow_remote_code: frozenset[str] = frozenset()
    folders: Mapping[str, Path] = field(default_factory=dict)
    say: Callable[[str], None] = print
    before_publishing: Callable[[Path], None] = lambda _folder: None


class PinnedModel(ModelReference):
    """A model reference whose ``model.path`` is the folder on disk, and whose ``name`` is what the recipe says.

    mergekit looks a hub id up again at every step; pinned, the recipe means one commit, and nothing asks the network.
    Tensors come from the loader that was registered, so that headers can be planned with before the weights are here.
    """

    name: str

    def __str__(self) -> str:
        return self.name

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> Any:  # noqa: ARG002
        return mergekit_private.loaders()[self]


class OrderedConfiguration(MergeConfiguration):
    """A configuration that lists its models in the order of the recipe, not of a hash set.

    mergekit takes tokenizer and config from the first when there is no base model: from another one on every run.
    """

    def referenced_models(self) -> list[Any]:
        wanted = set(super().referenced_models())
        return [model for model in dict.fromkeys(ref for ref, _ in instances(self, ModelReference)) if model in wanted]

    @property
    def donor(self) -> Any:
        """The model whose configuration and tokenizer the merged model gets: the base, or the first of the recipe."""
        return self.base_model or self.referenced_models()[0]


def instances(value: Any, kind: type[Kind], path: KeyPath = ()) -> Iterator[tuple[Kind, KeyPath]]:
    """Everything of a type in a configuration with its path, in the order of mergekit's fields."""
    if isinstance(value, kind):
        yield value, path
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, BaseModel):
        items = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, Mapping):
        items = ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, item in items:
        yield from instances(item, kind, (*path, key))


def with_models(config: MergeConfiguration, models: Mapping[Any, Any]) -> OrderedConfiguration:
    """The same configuration with every model reference replaced, and its models in the order of the recipe."""

    def replace(value: Any) -> Any:
        if isinstance(value, ModelReference):
            return models[value]
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: replace(getattr(value, name)) for name in type(value).model_fields})
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(replace(item) for item in value)
        return value

    return OrderedConfiguration(**{name: replace(getattr(config, name)) for name in MergeConfiguration.model_fields})


@dataclass
class Model:
    """One input model. name: as in the recipe; place: where it first stands there; reference: as mergekit reads it.

    folder: on disk (for a hub model, the snapshot that its files go to). weights: False when only its tokenizer is
    wanted. headers: its tensors. download: weight files that are still to be fetched. config: transformers'.
    """

    name: str
    place: KeyPath
    reference: Any
    folder: Path
    weights: bool
    snapshot: hub.Snapshot | None = None
    adapter: Adapter | None = None
    headers: Headers = field(default_factory=dict)
    download: list[str] = field(default_factory=list)
    config: Any = None

    @cached_property
    def pinned(self) -> PinnedModel:
        # An adapter is added as weights are read: to mergekit there is none.
        architecture = self.reference.override_architecture
        return PinnedModel(
            model=ModelPath(path=str(self.folder)), override_architecture=architecture, name=self.name, lora=None
        )

    @property
    def download_bytes(self) -> int:
        return sum(self.snapshot.sizes[name] for name in self.download) if self.snapshot else 0

    @property
    def origin(self) -> str:
        """What identifies the model to somebody else: its name, with the commit of a hub model."""
        return f"{self.name} (commit {self.snapshot.commit})" if self.snapshot else self.name


def resolve(
    config: MergeConfiguration, problems: Problems, settings: Settings, options: MergeOptions
) -> dict[Any, Model]:
    """Find every model that a configuration names and read its headers; nothing large is read or fetched.

    Raises MergeError with all problems and their lines.
    """
    places: dict[Any, KeyPath] = {}
    with_weights: set[Any] = set()
    for reference, place in instances(config, ModelReference):
        places.setdefault(reference, place)
        if not (place and str(place[0]).startswith("tokenizer")):
            with_weights.add(reference)
    names = [str(reference) for reference in places]
    for option in ("allow_pickle", "allow_remote_code"):
        for name in sorted(getattr(settings, option).difference(names)):
            flag = f"--{option.replace('_', '-')}"
            raise RecipeError(f"{flag} {name}: the recipe has no such model{nearest(name, names)}")
    models: dict[Any, Model] = {}
    for reference, place in places.items():
        try:
            models[reference] = _resolve_one(reference, place, settings, options, weights=reference in with_weights)
        except hub.HubUnreachableError:
            raise
        except MergeError as error:
            problems.add(place, str(error))
    first: dict[Any, Model] = {}
    for model in models.values():
        other = first.setdefault((model.folder, model.adapter and model.adapter.file), model)
        if other is not model and model.weights and other.weights:
            problems.add(
                model.place,
                f"{model.name!r} and {other.name!r} are the same model ({model.folder}), but mergekit would merge them "
                "as two: spell it the same way in both places",
            )
    problems.raise_if_any(MergeError)
    return models


def _resolve_one(reference: Any, place: KeyPath, settings: Settings, options: MergeOptions, *, weights: bool) -> Model:
    name = str(reference)
    files = replace(_locate(reference.model, settings, options), label=name)
    runs_code = bool(options.trust_remote_code) or name in settings.allow_remote_code
    files.fetch_small(code=runs_code)
    model = Model(name, place, reference, files.folder, weights, files.snapshot)
    if weights and files.only_gguf:
        example = f"{reference.model.path.rstrip('/')}/{files.only_gguf[0]}"
        raise MergeError(f"{name} has no weights but GGUF files, {_NO_GGUF.format(example)}")
    config = files.config()
    # The tokenizer's configuration may name code as well, but says nothing of the model's type.
    with_tokenizer = {**(files.json("tokenizer_config.json") or {}), "model_type": None, **config}
    if not runs_code:
        # mergekit's switch is one for all models: once it is on for one that may, a model that transformers could load
        # without code would run its own as well, so that one needs permission too.
        files.refuse_code(with_tokenizer, f"`--allow-remote-code '{name}'`", always=bool(settings.allow_remote_code))
    if weights:
        _read_weights(model, files, config, pickles=name in settings.allow_pickle)
        if reference.lora:
            adapter = _locate(reference.lora, settings, options)
            if adapter.snapshot:
                adapter.snapshot.fetch([*hub.SMALL_FILES, ADAPTER_WEIGHTS])
            model.adapter = plain_adapter(adapter, model)
    return model


def _locate(path: Any, settings: Settings, options: MergeOptions) -> hub.Files:
    """The files of a model path of the recipe, local or on the hub (mergekit: local if it exists, else the hub)."""
    name = path.path
    if (known := settings.folders.get(str(path))) is not None:
        if not known.is_dir():
            raise MergeError(f"the folder given for {name} does not exist: {known}")
        return hub.Files(name, known.resolve())
    if gguf.split(name) is not None:
        raise MergeError(f"{name} is a GGUF file, {_NO_GGUF.format(name)}")
    cache = options.transformers_cache
    found = hub.locate(name, path.revision, Path(cache) if cache else None)
    for line in found.notices:
        settings.say(f"notice: {line}")
    return found


def _read_weights(model: Model, files: hub.Files, config: dict[str, Any], *, pickles: bool) -> None:
    """Read the headers of a model's weights; refuse two sets of them, quantised ones, unpermitted pickles."""
    entry = weight_entry(files.names) or ""
    single = entry.removesuffix(".index.json")
    # An index of one file is what MLX writes beside it.
    if entry != single in files.names and set(read_index(model.folder / entry, model.name).values()) != {single}:
        raise MergeError(
            f"{model.name} has both {single} and {entry}, which describe different weights: remove the one that is "
            f"left over from an earlier save (in {model.folder})"
        )
    files.weights(pickles=pickles, leave=f"`--allow-pickle '{model.name}'`")

    def headers_of(shard: str) -> Headers:
        path = model.folder / shard
        if shard.endswith(".bin"):
            return _pickle_headers(model, path)
        if model.snapshot and not path.is_file():
            return model.snapshot.headers(shard)
        return read_headers(path, model.name)

    model.headers = checkpoint_headers(entry, model.folder, model.name, headers_of)
    for name, header in model.headers.items():
        codes = header.dtype.startswith(_CODES) and not name.endswith(_MASKS)
        if codes or name.endswith(_BESIDE_CODES):
            raise MergeError(f"{model.name} has quantised weights ({name} is {header.dtype}): {UNQUANTISED}")
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        if found := part.get("quantization_config") or part.get("compression_config"):
            raise MergeError(
                f"{model.name}: its config.json has a quantization_config ({found}): {UNQUANTISED}; if its weights "
                "are plain, remove that entry"
            )
    if model.snapshot:
        model.download = model.snapshot.missing(sorted({header.file for header in model.headers.values()}))


def _pickle_headers(model: Model, path: Path) -> Headers:
    """Headers of a torch pickle, read without its data and without running code."""
    if model.snapshot and not path.is_file():
        # A pickle says what it contains only when all of it is here.
        model.snapshot.fetch([path.name])
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        raise MergeError(f"{model.name}: {path} cannot be read as plain weights: {error}") from error
    return {
        name: TensorHeader(str(t.dtype).removeprefix("torch."), tuple(t.shape), path.name, t.element_size())
        for name, t in state.get("state_dict", state).items()
        if isinstance(t, torch.Tensor)
    }


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a tokenizer of any kind."""
    return any(
        path.name.startswith(("tokenizer.", "vocab.")) or path.suffix in (".model", ".tiktoken")
        for path in folder.iterdir()
    )


def tokens_of(folder: Path, label: str) -> dict[int, str]:
    """The tokens in the tokenizer.json of a model by id, none without one. Raises MergeError if it does not load."""
    path = folder / "tokenizer.json"
    try:
        ids = Tokenizer.from_file(str(path)).get_vocab() if path.is_file() else {}
    except Exception as error:
        raise MergeError(f"{label}: the tokenizer {path} does not load: {error}") from error
    return {number: token for token, number in ids.items()}


# ---------------------------------------------------------------- reading

_PREFIX = "base_model.model."
# What a plain adapter may say. Anything else that is set (DoRA, patterns of alpha, whole modules, ...) is refused.
_PLAIN_KEYS = {
    *("r", "lora_alpha", "use_rslora", "peft_type", "bias", "init_lora_weights", "rank_pattern"),
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "task_type", "peft_version", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying"),
}


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: W + s B A for some of the weights of its model.

    names: of A and B in ``file``, by the weight's name. alpha, root: s is alpha / rank, or alpha / √rank with root.
    """

    file: Path
    names: Mapping[str, tuple[str, str]]
    alpha: float
    root: bool

    def applied(self, name: str, weight: Tensor) -> Tensor:
        """The weight plus s B A, as peft adds it: the product in float32, rounded once to the weight's dtype."""
        if name not in self.names:
            return weight
        with safe_open(self.file, framework="pt", device=str(weight.device)) as file:
            down, up = (file.get_tensor(each).float() for each in self.names[name])
        rank = down.shape[0]
        merged = weight.clone()
        merged += (up @ down) * (self.alpha / (math.sqrt(rank) if self.root else rank))
        return merged


def plain_adapter(files: hub.Files, model: Model) -> Adapter:
    """The adapter in a folder. Raises MergeError for one that is damaged, or more than products of two factors."""
    config = files.json("adapter_config.json") or {}
    plain = (
        config.get("peft_type") == "LORA"
        and isinstance(config.get("lora_alpha"), (int, float))
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in (True, False, "gaussian")
        and not any(value and key not in _PLAIN_KEYS for key, value in config.items())
        and (files.folder / ADAPTER_WEIGHTS).is_file()
    )
    headers = read_headers(files.folder / ADAPTER_WEIGHTS, files.label) if plain else {}
    modules = {name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in headers}
    names = {f"{at}.weight": (f"{_PREFIX}{at}.lora_A.weight", f"{_PREFIX}{at}.lora_B.weight") for at in sorted(modules)}
    plain = plain and headers.keys() == {each for pair in names.values() for each in pair}
    for name, (down, up) in names.items() if plain else ():
        product = (headers[up].shape[0], headers[down].shape[-1])
        plain = plain and name in model.headers and model.headers[name].shape == product
    if not plain:
        raise MergeError(
            f"{model.name}: {files.label} is not a plain LoRA adapter of this model (products of two factors in "
            f"{ADAPTER_WEIGHTS}; no DoRA, no alpha_pattern, no modules_to_save): merge it with peft and name that"
        )
    return Adapter(files.folder / ADAPTER_WEIGHTS, names, float(config["lora_alpha"]), bool(config.get("use_rslora")))


class CheckingLoader(LazyTensorLoader):
    """mergekit's loader for one model, which checks every tensor when it is first read: no second pass of the disk.

    on_read: called with the size in bytes of every tensor on its first read.
    """

    on_read: Callable[[int], object]

    def __init__(self, model: Model, lazy_unpickle: bool) -> None:
        files: dict[str, list[str]] = {}
        for name, header in model.headers.items():
            files.setdefault(header.file, []).append(name)
        index = ShardedTensorIndex(
            base_path=str(model.folder),
            is_safetensors=all(file.endswith(".safetensors") for file in files),
            tensor_paths={name: header.file for name, header in model.headers.items()},
            shards=[ShardInfo(file, names) for file, names in sorted(files.items())],
        )
        super().__init__(index, lazy_unpickle=lazy_unpickle)
        self.model = model
        self.on_read = lambda _size: None
        self.checked: set[str] = set()

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> Tensor | None:
        """As mergekit's, with the checks. Raises MergeError naming tensor, model and file."""
        header = self.model.headers.get(key)
        file = self.model.folder / (header.file if header else "?")
        try:
            tensor: Tensor | None = super().get_tensor(key, device, aliases, raise_on_missing)
        except KeyError:
            raise MergeError(f"{self.model.name} lacks the tensor {key}") from None
        except Exception as error:
            raise MergeError(f"{self.model.name}: the tensor {key} cannot be read from {file}: {error}") from error
        if tensor is not None and self.model.adapter is not None:
            tensor = self.model.adapter.applied(key, tensor)
        if tensor is None or key in self.checked:
            return tensor
        if header is not None:
            self.on_read(header.nbytes)
        if (found := first_not_finite(tensor)) is not None:
            raise MergeError(f"{self.model.name}: the tensor {key} holds {found} ({file}): the model is broken")
        self.checked.add(key)
        return tensor


@contextmanager
def registered(models: Iterable[Model], lazy_unpickle: bool) -> Iterator[list[CheckingLoader]]:
    """Register a checking loader for every model with mergekit, and take them out again at the end."""
    loaders = mergekit_private.loaders()
    ours = {model.pinned: CheckingLoader(model, lazy_unpickle) for model in models if model.weights}
    loaders.update(ours)
    try:
        yield list(ours.values())
    finally:
        for key in ours:
            if key in loaders:
                loaders.pop(key).flush()


def first_not_finite(tensor: Tensor) -> str | None:
    """Value and index of the first NaN or infinity in a tensor, such as ``nan at [3, 5]``, None if all are finite."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or is_finite(tensor):
        return None
    first = torch.isfinite(tensor).byte().argmin()  # of equal ones the first
    index = [int(each) for each in torch.unravel_index(first, tensor.shape)]
    return f"{float(tensor[tuple(index)])} at {index}"
