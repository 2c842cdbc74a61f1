"""What the report says about the pivot and the sources; a run writes it to ``models.json`` while it has the models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from fusekit.artifacts import commit_file

if TYPE_CHECKING:
    from fusekit.capturing.models import Checkpoint

_FORMS = ("byte-level", "metaspace", "WordPiece", "plain")  # by fusekit.alignment.surfaces.Form


class Tokenizer(BaseModel):
    """A tokenizer in words. model: ``BPE``, ``Unigram``, ... form: how its tokens write text.

    byte_fallback: whether it has a token for every byte. tokens: how many it has. normalises: how it changes text.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    form: str
    tokens: int
    byte_fallback: bool = False
    normalises: list[str] = []


class ModelFacts(BaseModel):
    """A model.

    Attributes:
        model: name or path, as in the recipe.
        repository, commit: on the hub; None for a folder.
        architecture, model_type, layers, width, vocabulary: from its configuration.
        parameters: elements of its tensors; None where they were not on disk.
        dtype: of the weights on disk; the format of a GGUF file (``GGUF Q4_K_M``).
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model: str
    repository: str | None = None
    commit: str | None = None
    architecture: str | None = None
    model_type: str | None = None
    layers: int | None = None
    width: int | None = None
    vocabulary: int | None = None
    parameters: int | None = None
    dtype: str | None = None
    tokenizer: Tokenizer | None = None


_FACTS = TypeAdapter(dict[str, ModelFacts])


def facts_of(checkpoint: Checkpoint, tokenizer: Any = None) -> ModelFacts:
    """Read a model's configuration, the headers of its weights where they are on disk, and its tokenizer."""
    config: dict[str, Any] = checkpoint.config
    text = config.get("text_config")
    layered = [config, text if isinstance(text, dict) else {}]

    def number(*names: str) -> int | None:
        found = (part.get(name) for part in layered for name in names)
        return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)

    gguf = checkpoint.gguf
    classes = config.get("architectures")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ModelFacts(
        model=checkpoint.choice.model,
        repository=checkpoint.repository,
        commit=checkpoint.commit,
        architecture=str(classes[0]) if isinstance(classes, list) and classes else None,
        model_type=str(config["model_type"]) if "model_type" in config else None,
        layers=number("num_hidden_layers", "n_layer"),
        width=number("hidden_size", "n_embd"),
        vocabulary=number("vocab_size"),
        parameters=gguf.parameters if gguf else count_parameters(checkpoint.folder, checkpoint.weights),
        dtype=f"GGUF {gguf.format}" if gguf else str(dtype) if dtype else None,
        tokenizer=describe_tokenizer(tokenizer) if tokenizer is not None else None,
    )


def count_parameters(folder: Path, files: Mapping[str, int]) -> int | None:
    """Elements of all tensors of safetensors files; None where one of them is not on disk, or cannot be read."""
    from fusekit.errors import FusekitError
    from fusekit.hub import read_headers

    names = sorted(name for name in files if name.endswith(".safetensors"))
    if not names or not all((folder / name).is_file() for name in names):
        return None
    try:
        return sum(tensor.elements for name in names for tensor in read_headers(folder / name, name).values())
    except FusekitError:
        return None


def describe_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """A tokenizer in words; None where its vocabulary cannot be read."""
    from fusekit.alignment import vocabulary_surfaces
    from fusekit.alignment.surfaces import Kind
    from fusekit.errors import FusekitError

    try:
        surfaces = vocabulary_surfaces(tokenizer)
    except FusekitError:
        return None
    model = type(surfaces.view.backend.model).__name__ if surfaces.view.backend is not None else "slow"
    normalises = sorted(surfaces.view.types("normalizer") - {"Sequence", "Prepend", "Replace"})
    return Tokenizer(
        model=model,
        form=_FORMS[surfaces.form],
        tokens=int((surfaces.kinds != Kind.HOLE).sum()),
        byte_fallback=bool((surfaces.kinds == Kind.BYTE).any()),
        normalises=normalises,
    )


def write_models(path: Path, facts: Mapping[str, ModelFacts]) -> bool:
    """Write ``models.json`` if its content changes. Returns whether it wrote."""
    plain = {name: found.model_dump(mode="json", exclude_defaults=True) for name, found in facts.items()}
    data = (json.dumps(plain, indent=1, ensure_ascii=False) + "\n").encode()
    if path.is_file() and path.read_bytes() == data:
        return False
    commit_file(path, lambda file: file.write(data))
    return True


def read_models(path: Path) -> dict[str, ModelFacts]:
    """Models by name, none where there is no file. Raises ValueError, OSError: the file is damaged."""
    try:
        return _FACTS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
