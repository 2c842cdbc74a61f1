"""The input models of a merge: found, checked against what is allowed, and described by their headers.

A model has one object from the recipe to the card: `Model` carries the name that the recipe gives it and the folder
that the name means; mergekit gets a `PinnedModel`, whose path is that folder and which prints as that name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING

from fusekit import gguf, hub, mergekit_private
from fusekit.errors import MergeError, RecipeError
from fusekit.hub import Headers, TensorHeader, gather, is_pickle, read_headers, read_index, weight_entry
from fusekit.merging.lora import Adapter, plain_adapter
from fusekit.merging.settings import Settings
from fusekit.yaml import KeyPath, Problems, nearest

Kind = TypeVar("Kind")

_NO_GGUF = (
    'which mergekit does not read: make a plain checkpoint of it, and name that in its place (python -c "from '
    "fusekit.capturing.models import dequantise; dequantise('{}', 'FOLDER')\")"
)


class PinnedModel(ModelReference):
    """A model reference whose ``model.path`` is the folder on disk, and whose ``name`` is what the recipe says.

    mergekit looks a hub id up again at every step (and even to print a card); pinned, the recipe means one commit from
    the first check to the last file, and nothing asks the network. Tensors come from the loader that was registered
    for the model, so that headers can be planned with before the weights are here.
    """

    name: str

    def __str__(self) -> str:
        return self.name

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> Any:  # noqa: ARG002
        return mergekit_private.loaders()[self]


class OrderedConfiguration(MergeConfiguration):
    """A configuration that lists its models in the order of the recipe.

    mergekit lists them in the order of a hash set, and takes tokenizer and config from the first of them when there
    is no base model: without this, from another model on every run.
    """

    def referenced_models(self) -> list[Any]:
        wanted = set(super().referenced_models())
        return [model for model in dict.fromkeys(ref for ref, _ in instances(self, ModelReference)) if model in wanted]


def instances(value: Any, kind: type[Kind], path: KeyPath = ()) -> Iterator[tuple[Kind, KeyPath]]:
    """Everything of a type in a configuration with its path, in the order of mergekit's fields."""
    if isinstance(value, kind):
        yield value, path
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from instances(getattr(value, name), kind, (*path, name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from instances(item, kind, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from instances(item, kind, (*path, index))


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


CODES = ("float8", "int8", "uint8")
"""Beginnings of dtypes that hold codes of quantised weights; of a model's own tensors only masks have them."""
SCALES = (
    "_scale_inv",
    ".weight_scale",
    ".SCB",
    ".absmax",
    ".quant_map",
    ".qweight",
    ".qzeros",
    ".weight_packed",
    "_blocks",
)
"""Endings of names beside such codes."""
MASKS = (".bias", ".masked_bias")
_UNQUANTISED = "merge the checkpoint that it was quantised from, or dequantise it first"


@dataclass
class Model:
    """One input model. name: as in the recipe; place: where it first stands there; reference: as mergekit reads it.

    folder: on disk (for a hub model, the snapshot that its files go to). weights: False when only its tokenizer is
    wanted. headers: its tensors. download: weight files that are still to be fetched. needs_code: its files ask to
    run Python code of their own. knows_type: transformers has its model type. quantisation: the method that its
    config.json names. lora: the adapter, if it can be added as weights are read.
    """

    name: str
    place: KeyPath
    reference: Any
    folder: Path
    weights: bool
    snapshot: hub.Snapshot | None = None
    adapter: Path | None = None
    headers: Headers = field(default_factory=dict)
    download: list[str] = field(default_factory=list)
    needs_code: bool = False
    knows_type: bool = True
    quantisation: str | None = None
    lora: Adapter | None = None

    @cached_property
    def pinned(self) -> PinnedModel:
        # An adapter that is added as weights are read is none to mergekit, which would write a merged copy.
        return PinnedModel(
            model=ModelPath(path=str(self.folder)),
            lora=ModelPath(path=str(self.adapter)) if self.adapter and not self.lora else None,
            override_architecture=self.reference.override_architecture,
            name=self.name,
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

    Raises MergeError with all problems and their lines: models that are missing, gated, damaged, pickled or that want
    to run code.
    """
    places: dict[Any, KeyPath] = {}
    with_weights: set[Any] = set()
    for reference, place in instances(config, ModelReference):
        places.setdefault(reference, place)
        if not (place and str(place[0]).startswith("tokenizer")):
            with_weights.add(reference)
    names = [str(reference) for reference in places]
    for option, allowed in (
        ("--allow-pickle", settings.allow_pickle),
        ("--allow-remote-code", settings.allow_remote_code),
    ):
        for name in sorted(allowed.difference(names)):
            raise RecipeError(f"{option} {name}: the recipe has no such model{nearest(name, names)}")
    models: dict[Any, Model] = {}
    for reference, place in places.items():
        try:
            models[reference] = _resolve_one(reference, place, settings, options, weights=reference in with_weights)
        except hub.HubUnreachableError:
            raise
        except MergeError as error:
            problems.add(place, str(error))
    _check_same_folder(models.values(), problems)
    _check_code(models.values(), settings, options, problems)
    problems.raise_if_any(MergeError)
    return models


def _resolve_one(reference: Any, place: KeyPath, settings: Settings, options: MergeOptions, *, weights: bool) -> Model:
    name = str(reference)
    folder, snapshot = _locate(reference.model, settings, options)
    if snapshot:
        snapshot.fetch([*hub.SMALL_FILES, *(["*.py"] if _may_run_code(name, settings, options) else [])])
    adapter = _adapter(reference, settings, options) if reference.lora else None
    model = Model(name, place, reference, folder, weights, snapshot, adapter)
    files = list(snapshot.sizes) if snapshot else [path.name for path in folder.iterdir()]
    if weights and weight_entry(files) is None and (there := gguf.among(files)):
        example = f"{reference.model.path.rstrip('/')}/{there[0]}"
        raise MergeError(f"{name} has no weights but GGUF files, {_NO_GGUF.format(example)}")
    _read_code_claims(model)
    if weights:
        _read_weights(model, files, settings.allow_pickle)
        if adapter and options.lora_merge_dtype is None:
            model.lora = plain_adapter(adapter, model.headers)
    return model


def _may_run_code(name: str, settings: Settings, options: MergeOptions) -> bool:
    return bool(options.trust_remote_code) or name in settings.allow_remote_code


def _locate(path: Any, settings: Settings, options: MergeOptions) -> tuple[Path, hub.Snapshot | None]:
    """The folder of a model path of the recipe, local or on the hub (mergekit: local if it exists, else the hub)."""
    name = path.path
    if (known := settings.folders.get(str(path))) is not None:
        if not known.is_dir():
            raise MergeError(f"{name} is said to be in {known}, and there is no such folder")
        return known.resolve(), None
    if not name or "\0" in name:
        raise MergeError(f"{name!r} is not the name of a model")
    if gguf.split(name) is not None:
        raise MergeError(f"{name} is a GGUF file, {_NO_GGUF.format(name)}")
    local = Path(name)
    try:
        if local.is_dir():
            if path.revision:
                raise MergeError(f"{name} is a local folder: the revision {path.revision!r} has no meaning there")
            return local.resolve(), None
        if local.exists():
            raise MergeError(f"{name} is a file: give the folder of the model")
    except OSError as error:
        raise MergeError(f"{name!r} cannot be read: {error.strerror or error}") from error
    if name[0] in "/~." or name.count("/") > 1:
        hint = "; `~` is not expanded here, write the path out" if name[0] == "~" else ""
        if "://" in name:
            hint = f"; of a model on the hub give the id alone, such as {'/'.join(name.rstrip('/').split('/')[3:5])}"
        raise MergeError(f"there is no folder {name} (looked from {Path.cwd()}){hint}")
    cache, notices = options.transformers_cache, list[str]()
    snapshot = hub.find(name, path.revision, Path(cache) if cache else None, notices)
    for line in notices:
        settings.say(f"notice: {line}")
    return snapshot.folder, snapshot


def _adapter(reference: Any, settings: Settings, options: MergeOptions) -> Path:
    folder, snapshot = _locate(reference.lora, settings, options)
    files = set(snapshot.sizes) if snapshot else {path.name for path in folder.iterdir()}
    if "adapter_model.safetensors" not in files and str(reference) not in settings.allow_pickle:
        raise MergeError(
            f"{reference.lora} has no adapter_model.safetensors; a pickled adapter is read only with "
            f"`--allow-pickle '{reference}'`"
        )
    if snapshot:
        snapshot.fetch([*hub.SMALL_FILES, "adapter_model.safetensors", "adapter_model.bin"])
    return folder


def checkpoint_headers(
    entry: str, folder: Path, label: str, shard_headers: Callable[[str], Headers] | None = None
) -> Headers:
    """Headers of a checkpoint by its entry file, an index or the only weight file. Raises MergeError.

    shard_headers: gives those of one file; None for a file of the folder.
    """
    headers_of = shard_headers or (lambda shard: read_headers(folder / shard, label))
    if not entry.endswith(".index.json"):
        return headers_of(entry)
    return gather(read_index(_read_text(folder / entry, label), f"{label}: {entry}"), headers_of, label)


def _read_text(path: Path, label: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MergeError(f"{label}: {path} cannot be read: {error}") from error


def _read_weights(model: Model, files: list[str], pickles: frozenset[str]) -> None:
    entry = weight_entry(files)
    if entry is None and model.snapshot and not model.snapshot.online:
        raise MergeError(f"{model.name}: its weights are not in the cache, and the hub cannot be reached")
    if entry is None:
        raise MergeError(f"{model.name} has no weights: no model.safetensors or its index in {model.folder}")
    if is_pickle(entry) and model.name not in pickles:
        raise MergeError(
            f"{model.name} has only pickled weights ({entry}), which can run any code when they are read: convert "
            f"it to safetensors, or, if you trust its author, give `--allow-pickle '{model.name}'`"
        )
    single = entry.removesuffix(".index.json")
    if single != entry and single in files and not _lists_all_of(model, entry, single, pickles):
        raise MergeError(
            f"{model.name} has both {single} and {entry}, which describe different weights: remove the one that is "
            f"left over from an earlier save (in {model.folder})"
        )
    model.headers = checkpoint_headers(
        entry, model.folder, model.name, lambda shard: _shard_headers(model, shard, pickles)
    )
    for name, header in model.headers.items():
        if header.dtype.startswith(CODES) and not name.endswith(MASKS):
            raise MergeError(f"{model.name} has quantised weights, {name} is {header.dtype}: {_UNQUANTISED}")
        if name.endswith(SCALES):
            raise MergeError(f"{model.name} has quantised weights, to which {name} belongs: {_UNQUANTISED}")
    if model.quantisation is not None:
        raise MergeError(
            f"{model.name}: its config.json has a quantization_config ({model.quantisation}): {_UNQUANTISED}; if its "
            "weights are plain, remove that entry"
        )
    if model.snapshot:
        model.download = model.snapshot.missing(sorted({tensor.file for tensor in model.headers.values()}))


def _lists_all_of(model: Model, index: str, single: str, pickles: frozenset[str]) -> bool:
    """Whether an index lists the tensors of one file and no others, as MLX writes it."""
    listed = read_index(_read_text(model.folder / index, model.name), f"{model.name}: {index}")
    return set(listed.values()) == {single} and listed.keys() == _shard_headers(model, single, pickles).keys()


def _shard_headers(model: Model, shard: str, pickles: frozenset[str]) -> Headers:
    path = model.folder / shard
    if shard.endswith(".bin"):
        if model.name not in pickles:
            raise MergeError(f"{model.name}: its index names the pickle {shard}; allow it with `--allow-pickle`")
        return _pickle_headers(model, path)
    if path.is_file():
        return read_headers(path, model.name)
    if model.snapshot is None or not model.snapshot.online:
        where = "in the cache, and the hub cannot be reached" if model.snapshot else "there"
        raise MergeError(f"{model.name}: the weight file {path} is not {where}: is the download complete?")
    if shard not in model.snapshot.sizes:
        raise MergeError(f"{model.name}: its index names {shard}, which the repository does not have")
    return model.snapshot.headers(shard)


def _pickle_headers(model: Model, path: Path) -> Headers:
    """Headers of a torch pickle, read without its data and without running code."""
    if model.snapshot and not path.is_file():
        # A pickle says what it contains only when all of it is here.
        model.snapshot.fetch([path.name])
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        raise MergeError(f"{model.name}: {path} cannot be read as plain weights: {error}") from error
    state = state.get("state_dict", state)
    return {
        name: TensorHeader(str(t.dtype).removeprefix("torch."), tuple(t.shape), path.name, t.element_size())
        for name, t in state.items()
        if isinstance(t, torch.Tensor)
    }


def _read_code_claims(model: Model) -> None:
    """Whether the files of a model ask transformers to import Python code that comes with them."""
    if not (model.folder / "config.json").is_file():
        if (model.folder / "adapter_config.json").is_file():
            raise MergeError(
                f"{model.name} is an adapter, not a model: name it behind its model, `model: {_base_of(model.folder)}+"
                f"{model.name}`"
            )
        raise MergeError(f"{model.name} has no config.json in {model.folder}: is it a model in Hugging Face's format?")
    for file in ("config.json", "tokenizer_config.json"):
        path = model.folder / file
        if not path.is_file():
            continue
        try:
            content = json.loads(_read_text(path, model.name))
        except (ValueError, RecursionError) as error:
            raise MergeError(f"{model.name}: {path} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise MergeError(f"{model.name}: {path} is not a JSON mapping")
        model.needs_code |= "auto_map" in content
        if file == "config.json":
            model.knows_type = content.get("model_type") in CONFIG_MAPPING
            inner = content.get("text_config")
            for part in (content, inner if isinstance(inner, dict) else {}):
                if found := part.get("quantization_config") or part.get("compression_config"):
                    model.quantisation = str(found.get("quant_method", "?") if isinstance(found, dict) else found)


def _base_of(adapter: Path) -> str:
    """The model that an adapter says it belongs to."""
    with suppress(OSError, ValueError, AttributeError):
        return str(json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path") or "MODEL")
    return "MODEL"


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a tokenizer of any kind."""
    return any(
        path.name.startswith(("tokenizer.", "vocab.")) or path.suffix in (".model", ".tiktoken")
        for path in folder.iterdir()
    )


def tokenizer_rows(folder: Path, label: str) -> int | None:
    """Rows of an embedding that the tokenizer.json of a model asks for, None without one. Raises MergeError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return 1 + max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as error:
        raise MergeError(f"{label}: the tokenizer {path} does not load: {error}") from error


def _check_code(models: Iterable[Model], settings: Settings, options: MergeOptions, problems: Problems) -> None:
    """Refuse models that would run their own code without permission.

    mergekit's switch is one for all models: once it is on for one that may, a model that transformers could load
    without code would run its own as well, so that one needs permission too.
    """
    switch_on = options.trust_remote_code or bool(settings.allow_remote_code)
    for model in models:
        if (
            model.needs_code
            and not _may_run_code(model.name, settings, options)
            and (switch_on or not model.knows_type)
        ):
            problems.add(
                model.place,
                f"{model.name} wants to run Python code of its own: if you trust its author, give "
                f"`--allow-remote-code '{model.name}'`",
            )


def _check_same_folder(models: Iterable[Model], problems: Problems) -> None:
    """Two names of one folder are two models to mergekit: the base would be merged as one of its own targets."""
    first: dict[tuple[Path, Path | None], Model] = {}
    for model in models:
        key = (model.folder.resolve(), model.adapter.resolve() if model.adapter else None)
        other = first.setdefault(key, model)
        if other is not model and model.weights and other.weights:
            problems.add(
                model.place,
                f"{model.name!r} and {other.name!r} (line {problems.document.line(other.place)}) are the same "
                f"model ({key[0]}), but mergekit would treat them as two: spell it the same way in both places",
            )
