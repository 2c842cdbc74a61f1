"""Whether a merged model is whole: read back from the disk before it is published."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

from fusekit.errors import MergeError
from fusekit.hub import Headers, gather, is_pickle, read_headers, read_index, weight_entry
from fusekit.merging.loading import first_not_finite
from fusekit.merging.plan import ANY, Plan, PlannedTensor

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def verify(folder: Path, plan: Plan, *, trust_remote_code: bool, tokenizer: bool) -> Headers:
    """Check a merged model against its plan; returns the headers of its tensors.

    Every planned tensor is there with its shape and dtype and nothing else is, all values are finite, the index agrees
    with the shards, the configuration loads and agrees with the embedding, and the tokenizer is there if one was to be
    written. Raises MergeError saying what is wrong; nothing is changed.
    """
    headers = _read_result(folder)
    for planned in plan.tensors:
        _check_tensor(planned, headers)
    extra = sorted(headers.keys() - {planned.name for planned in plan.tensors})
    if extra:
        raise MergeError(f"the result holds a tensor that was not planned: {extra[0]}")
    _check_values(folder, headers, plan)
    _check_config(folder, headers, plan, trust_remote_code)
    if tokenizer and not any((folder / name).is_file() for name in (*TOKENIZER_FILES, "tokenizer_config.json")):
        raise MergeError("the result has no tokenizer, although the input has one; run with -v to see why")
    return headers


def _read_result(folder: Path) -> Headers:
    entry = weight_entry(path.name for path in folder.iterdir())
    if entry is None:
        raise MergeError(f"mergekit wrote no weights to {folder}")
    if is_pickle(entry):
        raise MergeError("the result is pickled, which fusekit does not publish: leave out --no-safe-serialization")
    if not entry.endswith(".index.json"):
        return read_headers(folder / entry, "the result")
    weight_map = read_index((folder / entry).read_text(encoding="utf-8"), f"the result: {entry}")
    shards = {name: read_headers(folder / name, "the result") for name in set(weight_map.values())}
    unlisted = sorted(name for shard in shards.values() for name in shard.keys() - weight_map.keys())
    if unlisted:
        raise MergeError(f"the result: {unlisted[0]} is in a shard but not in the index")
    return gather(weight_map, shards.__getitem__, "the result")


def _check_tensor(planned: PlannedTensor, headers: Headers) -> None:
    found = headers.get(planned.name)
    if found is None:
        if not planned.optional:
            raise MergeError(f"the result lacks the tensor {planned.name}")
        return
    if planned.shape is not None:
        same = len(planned.shape) == len(found.shape) and all(
            want in (ANY, have) for want, have in zip(planned.shape, found.shape, strict=True)
        )
        if not same:
            raise MergeError(f"the result: {planned.name} has shape {list(found.shape)}, not {list(planned.shape)}")
    if planned.dtype is not None and planned.dtype != found.dtype:
        raise MergeError(f"the result: {planned.name} is {found.dtype}, not {planned.dtype}")


def _check_values(folder: Path, headers: Headers, plan: Plan) -> None:
    by_file: dict[str, list[str]] = {}
    for name, header in headers.items():
        by_file.setdefault(header.file, []).append(name)
    for file, names in sorted(by_file.items()):
        with safe_open(folder / file, framework="pt") as shard:
            for name in names:
                found = first_not_finite(shard.get_tensor(name))
                if found is not None:
                    place, value = found
                    raise MergeError(
                        f"the result: {name} holds {value} at {place}, although all inputs are finite: {plan.method} "
                        f"overflowed in {headers[name].dtype}; set `dtype: float32` (and `out_dtype`) in the recipe"
                    )


def _check_config(folder: Path, headers: Headers, plan: Plan, trust_remote_code: bool) -> None:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        rows = config.get_text_config().vocab_size
    except AttributeError:
        rows = None
    except Exception as error:
        raise MergeError(f"the result's config.json does not load: {' '.join(str(error).split())}") from error
    for planned in plan.tensors:
        if rows is None or planned.shape is None or ANY not in planned.shape or planned.name not in headers:
            continue
        found = headers[planned.name].shape[planned.shape.index(ANY)]
        if found != rows:
            raise MergeError(f"the result: {planned.name} has {found} rows, its config a vocabulary of {rows}")
