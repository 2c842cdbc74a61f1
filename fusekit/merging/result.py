"""A merged model, read back from the disk and checked against its plan."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

from fusekit.errors import MergeError
from fusekit.hub import Headers, checkpoint_headers, read_headers, weight_entry
from fusekit.merging.loading import first_not_finite
from fusekit.merging.models import has_tokenizer, tokenizer_rows
from fusekit.merging.plan import ANY, Plan, PlannedTensor, same_shape


def check_result(folder: Path, plan: Plan, *, trust_remote_code: bool, tokenizer: bool) -> None:
    """Read a merged model back from the disk and check it against its plan.

    Every planned tensor is there with its shape and dtype and nothing else is, all values are finite, the index agrees
    with the shards, the configuration loads and agrees with the embedding, and the tokenizer loads where there is one,
    which there is if one was to be written. Raises MergeError; nothing is changed.
    """
    headers = _read_result(folder)
    for planned in plan.tensors:
        _check_tensor(planned, headers)
    extra = sorted(headers.keys() - {planned.name for planned in plan.tensors})
    if extra:
        raise MergeError(f"the result holds a tensor that was not planned: {extra[0]}")
    _check_values(folder, headers, plan)
    _check_config(folder, headers, plan, trust_remote_code)
    tokenizer_rows(folder, "the result")
    if tokenizer and not has_tokenizer(folder):
        raise MergeError("the result has no tokenizer, although the input has one; run with -v to see why")


def _read_result(folder: Path) -> Headers:
    entry = weight_entry(path.name for path in folder.iterdir())
    if entry is None:
        raise MergeError(f"mergekit wrote no weights to {folder}")
    headers = checkpoint_headers(entry, folder, "the result")
    for file in {header.file for header in headers.values()}:
        if unlisted := sorted(read_headers(folder / file, "the result").keys() - headers.keys()):
            raise MergeError(f"the result: {unlisted[0]} is in {file} but not in the index")
    return headers


def _check_tensor(planned: PlannedTensor, headers: Headers) -> None:
    found = headers.get(planned.name)
    if found is None and planned.optional:
        return
    if found is None:
        raise MergeError(f"the result lacks the tensor {planned.name}")
    if planned.shape is not None and not same_shape(planned.shape, found.shape):
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
