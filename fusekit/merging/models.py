"""The input models of a merge: found, checked against what is allowed, and described by their headers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from transformers import CONFIG_MAPPING

from fusekit import gguf, hub
from fusekit.errors import MergeError, RecipeError
from fusekit.hub import Headers, TensorHeader, gather, is_pickle, read_headers, read_index, weight_entry
from fusekit.merging.references import PinnedModel, pinned_model, references
from fusekit.yaml import KeyPath, Problems, nearest

_NO_GGUF = (
    'which mergekit does not read: make a plain checkpoint of it, and name that in its place (python -c "from '
    "fusekit.capturing.models import dequantise; dequantise('{}', 'FOLDER')\")"
)


@dataclass(frozen=True)
class Access:
    """How a merge gets at its inputs, and what it may do with them.

    pickle, remote_code: the models (as the recipe spells them) whose weights may be torch pickles, and whose own
    Python code may run. any_remote_code: mergekit's --trust-remote-code, for all models. cache: where hub models are
    kept, None for the client's default. notices: lines for the user, collected.
    """

    pickle: frozenset[str] = frozenset()
    remote_code: frozenset[str] = frozenset()
    any_remote_code: bool = False
    cache: Path | None = None
    notices: list[str] = field(default_factory=list)

    def may_run_code(self, spelling: str) -> bool:
        return self.any_remote_code or spelling in self.remote_code


@dataclass
class Model:
    """One input model. spelling: its name in the recipe; place: where it first stands there.

    folder: on disk (for a hub model, the snapshot that its files go to). weights: False when only its tokenizer is
    wanted. headers: its tensors. download: weight files that are still to be fetched. needs_code: its files ask to
    run Python code of their own.
    """

    spelling: str
    place: KeyPath
    folder: Path
    weights: bool
    pinned: PinnedModel
    snapshot: hub.Snapshot | None = None
    adapter: Path | None = None
    entry: str | None = None
    headers: Headers = field(default_factory=dict)
    download: list[str] = field(default_factory=list)
    needs_code: bool = False
    knows_type: bool = True

    @property
    def download_bytes(self) -> int:
        return sum(self.snapshot.sizes[name] for name in self.download) if self.snapshot else 0

    @property
    def origin(self) -> str:
        """What identifies the model to somebody else: its spelling, with the commit of a hub model."""
        return f"{self.spelling} (commit {self.snapshot.commit})" if self.snapshot else self.spelling


def resolve(config: MergeConfiguration, problems: Problems, access: Access) -> dict[Any, Model]:
    """Find every model that a configuration names and read its headers; nothing large is read or fetched.

    Raises MergeError with all problems and their lines: models that are missing, gated, damaged, pickled or that want
    to run code.
    """
    places: dict[Any, KeyPath] = {}
    with_weights: set[Any] = set()
    for reference, place in references(config):
        places.setdefault(reference, place)
        if not (place and str(place[0]).startswith("tokenizer")):
            with_weights.add(reference)
    _check_access_names(access, [str(reference) for reference in places])
    models: dict[Any, Model] = {}
    for reference, place in places.items():
        try:
            models[reference] = _resolve_one(reference, place, reference in with_weights, access)
        except hub.HubUnreachableError:
            raise
        except MergeError as error:
            problems.add(place, str(error))
    _check_same_folder(models.values(), problems)
    _check_code(models.values(), access, problems)
    problems.raise_if_any(MergeError)
    return models


def _resolve_one(reference: Any, place: KeyPath, weights: bool, access: Access) -> Model:
    spelling = str(reference)
    may_run_code = access.may_run_code(spelling)
    folder, snapshot = _locate(reference.model, access)
    names = snapshot.sizes if snapshot else [path.name for path in folder.iterdir()]
    if weights and weight_entry(names) is None and (there := gguf.among(names)):
        example = f"{reference.model.path.rstrip('/')}/{there[0]}"
        raise MergeError(f"{spelling} has no weights but GGUF files, {_NO_GGUF.format(example)}")
    small = [*hub.SMALL_FILES, *(["*.py"] if may_run_code else [])]
    if snapshot:
        snapshot.fetch(small)
    adapter = _adapter(reference, access) if reference.lora else None
    pinned = pinned_model(reference, str(folder), str(adapter) if adapter else None)
    model = Model(spelling, place, folder, weights, pinned, snapshot, adapter)
    _read_code_claims(model)
    if weights:
        _read_weights(model, access)
    return model


def _locate(path: Any, access: Access) -> tuple[Path, hub.Snapshot | None]:
    """The folder of a model path of the recipe, local or on the hub (mergekit: local if it exists, else the hub)."""
    name = path.path
    local = Path(name)
    if not name or "\0" in name:
        raise MergeError(f"{name!r} is not the name of a model")
    if gguf.split(name) is not None:
        raise MergeError(f"{name} is a GGUF file, {_NO_GGUF.format(name)}")
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
        raise MergeError(f"there is no folder {name} (looked from {Path.cwd()}){hint}")
    snapshot = hub.find(name, path.revision, access.cache, access.notices)
    return snapshot.folder, snapshot


def _adapter(reference: Any, access: Access) -> Path:
    folder, snapshot = _locate(reference.lora, access)
    names = set(snapshot.sizes) if snapshot else {path.name for path in folder.iterdir()}
    if "adapter_model.safetensors" not in names and str(reference) not in access.pickle:
        raise MergeError(
            f"{reference.lora} has no adapter_model.safetensors; a pickled adapter is read only with "
            f"`--allow-pickle '{reference}'`"
        )
    if snapshot:
        snapshot.fetch([*hub.SMALL_FILES, "adapter_model.safetensors", "adapter_model.bin"])
    return folder


def _read_weights(model: Model, access: Access) -> None:
    names = list(model.snapshot.sizes) if model.snapshot else [path.name for path in model.folder.iterdir()]
    for single in ("model.safetensors", "pytorch_model.bin"):
        if single in names and f"{single}.index.json" in names:
            raise MergeError(
                f"{model.spelling} has both {single} and {single}.index.json, which may describe different weights: "
                f"remove the one that is left over from an earlier save (in {model.folder})"
            )
    entry = weight_entry(names)
    if entry is None and model.snapshot and not model.snapshot.online:
        raise MergeError(f"{model.spelling}: its weights are not in the cache, and the hub cannot be reached")
    if entry is None:
        raise MergeError(f"{model.spelling} has no weights: no model.safetensors or its index in {model.folder}")
    if is_pickle(entry) and model.spelling not in access.pickle:
        raise MergeError(
            f"{model.spelling} has only pickled weights ({entry}), which can run any code when they are read: convert "
            f"it to safetensors, or, if you trust its author, give `--allow-pickle '{model.spelling}'`"
        )
    model.entry = entry
    if entry.endswith(".index.json"):
        weight_map = read_index(_small_file(model, entry), f"{model.spelling}: {entry}")
        model.headers = gather(weight_map, lambda shard: _shard_headers(model, shard, access), model.spelling)
    else:
        model.headers = _shard_headers(model, entry, access)
    if model.snapshot:
        model.download = model.snapshot.missing(sorted({tensor.file for tensor in model.headers.values()}))


def _small_file(model: Model, name: str) -> str:
    try:
        return (model.folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MergeError(f"{model.spelling}: {model.folder / name} cannot be read: {error}") from error


def _shard_headers(model: Model, shard: str, access: Access) -> Headers:
    path = model.folder / shard
    if shard.endswith(".bin"):
        if model.spelling not in access.pickle:
            raise MergeError(f"{model.spelling}: its index names the pickle {shard}; allow it with `--allow-pickle`")
        return _pickle_headers(model, path)
    if path.is_file():
        return read_headers(path, model.spelling)
    if model.snapshot is None or not model.snapshot.online:
        where = "in the cache, and the hub cannot be reached" if model.snapshot else "there"
        raise MergeError(f"{model.spelling}: the weight file {path} is not {where}: is the download complete?")
    if shard not in model.snapshot.sizes:
        raise MergeError(f"{model.spelling}: its index names {shard}, which the repository does not have")
    return model.snapshot.headers(shard)


def _pickle_headers(model: Model, path: Path) -> Headers:
    """Headers of a torch pickle, read without its data and without running code."""
    import torch

    if model.snapshot and not path.is_file():
        # A pickle says what it contains only when all of it is here.
        model.snapshot.fetch([path.name])
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        raise MergeError(f"{model.spelling}: {path} cannot be read as plain weights: {error}") from error
    state = state.get("state_dict", state)
    return {
        name: TensorHeader(str(t.dtype).removeprefix("torch."), tuple(t.shape), path.name, t.element_size())
        for name, t in state.items()
        if isinstance(t, torch.Tensor)
    }


def _read_code_claims(model: Model) -> None:
    """Whether the files of a model ask transformers to import Python code that comes with them."""
    if not (model.folder / "config.json").is_file():
        raise MergeError(
            f"{model.spelling} has no config.json in {model.folder}: is it a model in Hugging Face's format?"
        )
    for name in ("config.json", "tokenizer_config.json"):
        if not (model.folder / name).is_file():
            continue
        try:
            content = json.loads(_small_file(model, name))
        except (ValueError, RecursionError) as error:
            raise MergeError(f"{model.spelling}: {model.folder / name} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise MergeError(f"{model.spelling}: {model.folder / name} is not a JSON mapping")
        model.needs_code |= "auto_map" in content
        if name == "config.json":
            model.knows_type = content.get("model_type") in CONFIG_MAPPING


def _check_code(models: Iterable[Model], access: Access, problems: Problems) -> None:
    """Refuse models that would run their own code without leave.

    mergekit's switch is one for all models: once it is on for one that may, a model that transformers could load
    without code would run its own as well, so that one needs leave too.
    """
    switch_on = access.any_remote_code or bool(access.remote_code)
    for model in models:
        if not model.needs_code or access.may_run_code(model.spelling):
            continue
        if switch_on or not model.knows_type:
            problems.add(
                model.place,
                f"{model.spelling} wants to run Python code of its own: if you trust its author, give "
                f"`--allow-remote-code '{model.spelling}'`",
            )


def _check_access_names(access: Access, spellings: list[str]) -> None:
    for option, names in (("--allow-pickle", access.pickle), ("--allow-remote-code", access.remote_code)):
        for name in sorted(names - set(spellings)):
            raise RecipeError(f"{option} {name}: the recipe has no such model{nearest(name, spellings)}")


def _check_same_folder(models: Iterable[Model], problems: Problems) -> None:
    """Two spellings of one folder are two models to mergekit: the base would be merged as one of its own targets."""
    first: dict[tuple[Path, Path | None], Model] = {}
    for model in models:
        key = (model.folder.resolve(), model.adapter.resolve() if model.adapter else None)
        other = first.setdefault(key, model)
        if other is not model and model.weights and other.weights:
            problems.add(
                model.place,
                f"{model.spelling!r} and {other.spelling!r} (line {problems.document.line(other.place)}) are the same "
                f"model ({key[0]}), but mergekit would treat them as two: spell it the same way in both places",
            )
