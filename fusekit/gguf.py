"""GGUF: one file with a model's weights, mostly quantised, its configuration and its tokenizer. Headers are read alone.

The format is that of ggml (docs/gguf.md there), versions 2 and 3, little-endian. gguf's own reader takes half a minute
for a vocabulary of 150,000 tokens, this one a fraction of a second.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fusekit.errors import ModelError

SUFFIX = ".gguf"
INSTALL = "pip install 'mergekit-fusekit[gguf]'"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of values; whatever else ggml has are blocks


@dataclass(frozen=True)
class GgufHeader:
    """What the header of a GGUF file says.

    Attributes:
        file: its name within the folder or repository.
        architecture: ggml's name of it, ``llama``.
        parameters: elements of all tensors.
        tokens: of its vocabulary.
        dtype: torch's name of the dtype that holds the values: of a file without blocks its own, else float32, which
            holds a dequantised block exactly.
        format: ggml's name of how the weights are stored, ``Q4_K_M``.
        left_out: what transformers does not read of it, a line for the user each.
    """

    file: str
    architecture: str
    parameters: int
    tokens: int
    dtype: str
    format: str
    left_out: tuple[str, ...] = ()


def split(model: str) -> tuple[str, str] | None:
    """The folder or hub repository of a GGUF file, and its name there; None for a model that is not a GGUF file.

    ``models/x.gguf`` is in ``models``; ``owner/name/x.gguf`` is in the repository ``owner/name``, if there is no folder
    of that name here.
    """
    path = Path(model).expanduser()
    if not model.endswith(SUFFIX) or path.is_dir():
        return None
    parts = model.split("/")
    if path.parent.is_dir() or len(parts) < 3 or not parts[0] or parts[0][0] in "~.":
        return str(path.parent), path.name
    return "/".join(parts[:2]), "/".join(parts[2:])


def among(names: Iterable[str]) -> list[str]:
    """The GGUF files among names, in order."""
    return sorted(name for name in names if name.endswith(SUFFIX))


def read_header(folder: Path, file: str, label: str) -> GgufHeader:
    """Read the header of a GGUF file; its weights are not touched. label: how errors call the model.

    Raises ModelError: the package gguf is missing; the file is cut off, damaged, or one part of several.
    """
    if find_spec("gguf") is None:
        raise ModelError(f"{label} is a GGUF file, and the package gguf is not installed: {INSTALL}")
    path = folder / file
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data)
            metadata, tensors = reader.metadata(), reader.tensors()
            architecture, start, size = str(metadata["general.architecture"]), reader.at, len(data)
    except OSError as error:
        raise ModelError(f"{label}: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        raise ModelError(f"{label}: {path} is not a GGUF file, or is damaged: {error}") from error
    if metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"{label}: {path} is one of the {metadata['split.count']} parts of a GGUF file: join them with "
            "`llama-gguf-split --merge FIRST WHOLE` of llama.cpp, and name the whole"
        )
    alignment = metadata.get("general.alignment", 32)
    end = -(-start // alignment) * alignment + max((one.offset + one.nbytes for one in tensors), default=0)
    if end > size:
        raise ModelError(
            f"{label}: {path} is cut off: {size} bytes, but its header describes {end}. "
            "Was the download or copy interrupted?"
        )
    elements = Counter[str]()
    for one in tensors:
        elements[one.kind] += one.elements
    # A block needs float32; the norms of a half-precision file are F32.
    halves = [_DTYPES[kind] for kind in ("BF16", "F16") if kind in elements]
    return GgufHeader(
        file,
        architecture,
        elements.total(),
        int(metadata.get("tokenizer.ggml.tokens", 0)),
        halves[0] if halves and elements.keys() <= _DTYPES.keys() else "float32",
        _format(metadata, elements),
        tuple(_left_out(metadata, tensors)),
    )


class Tensor(NamedTuple):
    """An entry of a header's table. kind: ggml's name of its type. offset: in the data."""

    name: str
    elements: int
    kind: str
    offset: int
    nbytes: int


class _Reader:
    """Reads on from a position. Strings of arrays are skipped: a vocabulary has hundreds of thousands."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4
        if data[:4] != b"GGUF":
            raise ValueError(f"it begins with {data[:4]!r}")
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, of which 2 and 3 can be read")
        self._tensors, self._entries = self.number("Q"), self.number("Q")

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def metadata(self) -> dict[str, Any]:
        """Values by key; of an array how long it is."""
        return {self.string(): self._value(self.number("I")) for _ in range(self._entries)}

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind} before byte {self.at}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.at += count * struct.calcsize(f"<{_SCALARS[inner]}")
        elif inner == _STRING:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        else:
            raise ValueError(f"an array of type {inner} before byte {self.at}")
        return count

    def tensors(self) -> list[Tensor]:
        """The table after the metadata. Raises ValueError for a type that gguf does not know."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        found = []
        for _ in range(self._tensors):
            name, dimensions = self.string(), self.number("I")
            elements = math.prod(self.number("Q") for _ in range(dimensions))
            kind, offset = GGMLQuantizationType(self.number("I")), self.number("Q")
            block, size = GGML_QUANT_SIZES[kind]
            found.append(Tensor(name, elements, kind.name, offset, elements // block * size))
        return found


def _format(metadata: dict[str, Any], elements: Counter[str]) -> str:
    from gguf.constants import LlamaFileType

    try:
        name = LlamaFileType(metadata["general.file_type"]).name
    except (KeyError, ValueError):
        return elements.most_common(1)[0][0] if elements else "empty"
    return str(name).removeprefix("MOSTLY_").removeprefix("ALL_")


def _left_out(metadata: dict[str, Any], tensors: list[Tensor]) -> Iterable[str]:
    """Scaled rotary positions, for which transformers' reading of GGUF has no place but in gpt-oss."""
    architecture = metadata["general.architecture"]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" and architecture != "gpt-oss":
        yield f"its rotary positions' scaling ({scaling}), which changes what it predicts"
    if any(one.name == "rope_freqs.weight" for one in tensors):
        yield "its rotary positions' factors (rope_freqs.weight), which change what it predicts"
