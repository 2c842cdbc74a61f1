"""What a merge will read and write, tensor by tensor, from headers and mergekit's own planner; and what that takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from mergekit import merge_methods
from mergekit.architecture import get_architecture_info
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.config import ConditionalParameter
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.base import BasePolicy
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from fusekit import mergekit_private
from fusekit.devices import Need, disk, memory_limits
from fusekit.errors import FusekitError, MergeError
from fusekit.hub import TensorHeader
from fusekit.merging.meaning import check_meaning, check_tokenizers, generation_config, load_configs
from fusekit.merging.models import Model, OrderedConfiguration, instances
from fusekit.yaml import Problems, nearest

MAX_REPORTED = 8
"""Problems of tensors after which the rest is taken for the same."""
ANY = -1
"""A dimension that is not known before the tokenizer is built."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result. shape may hold ANY; None: unknown. dtype: torch name; None: unknown.

    inputs: header by pinned model. optional: the method may leave it out. loaded_bytes: of the inputs in the dtype that
    they are loaded in; copied_bytes: of those that are not read from the mapped file as they are. converted: the models
    whose file has it in parts, under other names (experts one by one).
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str | None
    optional: bool
    inputs: Mapping[Any, TensorHeader]
    loaded_bytes: int = 0
    copied_bytes: int = 0
    converted: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the result, or of the largest input where the shape is not known."""
        elements = max((header.elements for header in self.inputs.values()), default=0)
        return elements * (_itemsize(self.dtype) if self.dtype else 4)


@dataclass(frozen=True)
class Plan:
    """A merge as mergekit plans it. name: of the method; method: its pretty name. base: its name, None without one.

    models: those that are merged (into it). generation_config: the file that the merged model gets, if there is one.
    """

    name: str
    method: str
    tensors: list[PlannedTensor]
    warnings: list[str]
    base: str | None = None
    models: list[str] = field(default_factory=list)
    generation_config: Path | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def read_bytes(self) -> int:
        return sum(header.nbytes for tensor in self.tensors for header in tensor.inputs.values())


def make_plan(config: OrderedConfiguration, models: Iterable[Model], options: MergeOptions, problems: Problems) -> Plan:
    """Plan a merge with mergekit's planner and check every planned tensor against the headers.

    The loaders of the models are registered with mergekit already. Raises MergeError with all problems.
    """
    by_pin = {model.pinned: model for model in models}
    load_configs(by_pin.values(), problems, options.trust_remote_code)
    check_meaning(config, by_pin, options.allow_crimes, problems)
    problems.raise_if_any(MergeError)
    tasks, out_config, architecture = _mergekit_tasks(config, options)
    saves = [task for task in tasks if isinstance(task, SaveTensor)]
    donor = by_pin[config.donor]
    built = _built_shapes(out_config)
    tensors = []
    for save in saves:
        tensors.append(_planned_tensor(save, by_pin, built, problems))
        if len(problems.found) >= MAX_REPORTED:
            break
    problems.raise_if_any(MergeError)
    _check_sizes(built, tensors, donor, problems)
    check_tokenizers(config, by_pin, options.copy_tokenizer, problems)
    generation = generation_config(config, by_pin, problems)
    problems.raise_if_any(MergeError)
    method = merge_methods.get(config.merge_method)
    definitions = [architecture.all_weights(model.config) for model in by_pin.values() if model.weights]
    listed = {name for weights in definitions for weight in weights for name in _names(weight)}
    warnings = [*problems.warnings, *_unmatched_filters(config, saves), *_dropped_tensors(by_pin, tensors, listed)]
    takes_base = method.spec.contract.base != BasePolicy.IGNORED
    base = by_pin[config.base_model].name if takes_base and config.base_model in by_pin else None
    read = {pinned for tensor in tensors for pinned in (*tensor.inputs, *tensor.converted)}
    names = [model.name for pinned, model in by_pin.items() if pinned in read and model.name != base]
    return Plan(
        method.spec.name, method.spec.pretty_name or method.spec.name, tensors, warnings, base, names, generation
    )


def _mergekit_tasks(config: OrderedConfiguration, options: MergeOptions) -> tuple[list[Any], Any, Any]:
    """mergekit's tasks, the configuration of the merged model, and the definition of its architecture."""
    try:
        architecture = get_architecture_info(config, options)
        out_config = mergekit_private.out_config(config, architecture, options.trust_remote_code)
        # The planner rewrites the configuration that it is given.
        planner = MergePlanner(config.model_copy(deep=True), architecture, options=options, out_model_config=out_config)
        return list(planner.plan_to_disk(out_path="(planned only)")), out_config, architecture
    except FusekitError:
        raise
    except Exception as error:
        raise MergeError(f"mergekit cannot plan this merge: {error}") from error


def _gather(save: Any) -> Any:
    """The task that loads the inputs of a tensor, below what aligns or truncates vocabularies."""
    task = save.tensor_task.gather_tensors
    return getattr(task, "gather_tensors", task)


def _names(weight: Any) -> list[str]:
    """Under which a file may have a weight of mergekit's definition, the likeliest first."""
    return [weight.name, *(weight.aliases or ()), *(weight.tied_names or ())]


def _is_tied(config: Any) -> bool:
    """Whether a model's output head is its embedding, by its config or that of its text model."""
    return any(getattr(each, "tie_word_embeddings", True) for each in (config, config.get_text_config()))


def _planned_tensor(save: Any, by_pin: dict[Any, Model], built: Shapes, problems: Problems) -> PlannedTensor:
    gather, task = _gather(save), save.tensor_task
    inputs: dict[Any, TensorHeader] = {}
    converted = []
    for pinned, weight in gather.weight_info.items():
        model = by_pin[pinned]
        # mergekit would take the embedding for an output head that is missing, whatever the config says.
        apart = "embed" not in weight.name and not _is_tied(model.config)
        names = _names(weight.model_copy(update={"tied_names": None}) if apart else weight)
        header = next((model.headers[name] for name in names if name in model.headers), None)
        if header is not None:
            inputs[pinned] = header
        elif can_convert_checkpoint_keys(model.config.model_type, set(model.headers), weight.name):
            converted.append(pinned)
            if (whole := _whole(model, built.get(save.tensor_name))) is not None:
                inputs[pinned] = whole
        elif not weight.optional or (apart and weight.tied_names):
            problems.add(
                model.place,
                f"{model.name} lacks the tensor {weight.name}: is a shard missing, or is it another architecture?",
            )
    axis = task.output_weight.vocabulary_axis
    aligned = axis is not None and gather is not task.gather_tensors
    shape = _common_shape(save, by_pin, inputs, axis if aligned else None, problems)
    known = all(pinned in inputs for pinned in converted)
    # The dtype in which mergekit loads every input; the result has what they promote to, or out_dtype.
    wanted = {pinned: gather.weight_info[pinned].force_dtype or gather.dtype for pinned in inputs}
    loaded = {pinned: (wanted[pinned] or header.dtype).removeprefix("torch.") for pinned, header in inputs.items()}
    dtype = None
    if known and loaded:
        promoted = reduce(torch.promote_types, [getattr(torch, name) for name in loaded.values()])
        dtype = str(save.dtype or promoted).removeprefix("torch.")
    sizes = {pinned: header.elements * _itemsize(loaded[pinned]) for pinned, header in inputs.items()}
    copied = sum(
        sizes[pinned]
        for pinned, header in inputs.items()
        if loaded[pinned] != header.dtype or by_pin[pinned].adapter or pinned in converted
    )
    optional = save.optional and len(inputs) < len(gather.weight_info)
    shape = shape if known else None
    return PlannedTensor(
        save.tensor_name, shape, dtype, optional, inputs, sum(sizes.values()), copied, tuple(converted)
    )


def _whole(model: Model, shape: tuple[int, ...] | None) -> TensorHeader | None:
    """The header that a tensor of experts would have if they were in one tensor; None where that is not known."""
    dtypes = {(header.dtype, header.itemsize) for name, header in model.headers.items() if "expert" in name}
    if shape is None or len(dtypes) != 1:
        return None
    dtype, itemsize = dtypes.pop()
    return TensorHeader(dtype, shape, "(in parts)", itemsize)


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _common_shape(
    save: Any, by_pin: dict[Any, Model], inputs: Mapping[Any, TensorHeader], free_axis: int | None, problems: Problems
) -> tuple[int, ...] | None:
    """The shape of the base's tensor, else of the first model's, with ANY at ``free_axis``; None without inputs.

    Reports every model whose tensor has another one.
    """
    base = save.tensor_task.base_model
    reference = base if base in inputs else next(iter(inputs), None)
    if reference is None:
        return None
    expected = inputs[reference].shape
    allowed = tuple(ANY if axis == free_axis else size for axis, size in enumerate(expected))
    for pinned, header in inputs.items():
        if same_shape(allowed, header.shape):
            continue
        model, other = by_pin[pinned], by_pin[reference]
        advice = f"{model.name} is not a fine-tune of {other.name}, or one of the two is the wrong model"
        if save.tensor_task.output_weight.vocabulary_axis == 0 and header.shape[1:] == expected[1:]:
            advice = "if only the vocabularies differ, add `tokenizer: {source: base}` (or union) to the recipe"
        problems.add(
            model.place,
            f"{save.tensor_name}: {other.name} has shape {list(expected)}, {model.name} has {list(header.shape)}: "
            f"{advice}",
        )
    return allowed


def _built_shapes(out_config: Any) -> Shapes:
    """The shapes of transformers' own model of this config; empty where it has none, or cannot build it."""
    kind = getattr(transformers, out_config.architectures[0], None)
    if kind is None:
        return {}
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in kind(out_config).state_dict().items()}
    except Exception:
        return {}


def _check_sizes(built: Shapes, tensors: list[PlannedTensor], donor: Model, problems: Problems) -> None:
    """Report a tensor that transformers would not load with the config of the merged model."""
    for tensor in tensors:
        wanted = built.get(tensor.name)
        if wanted is not None and tensor.shape is not None and not same_shape(tensor.shape, wanted):
            problems.add(
                donor.place,
                f"{tensor.name} has shape {list(tensor.shape)}, and the config.json of {donor.name}, which the merged "
                f"model gets, makes it {list(wanted)}: the model could not be loaded; correct that config.json",
            )
            return


def same_shape(planned: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether a shape is the planned one, of which ANY fits everything."""
    return len(planned) == len(found) and all(want in (ANY, have) for want, have in zip(planned, found, strict=True))


def _unmatched_filters(config: OrderedConfiguration, saves: list[Any]) -> list[str]:
    """A warning for every filter of a parameter that no tensor's name contains."""
    names = {save.tensor_name for save in saves}
    names |= {weight.name for save in saves for weight in _gather(save).weight_info.values()}
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    filters = dict.fromkeys(found.filter for found, _ in instances(config, ConditionalParameter))
    return [
        f"the filter {text!r} matches no tensor{nearest(text, parts)}"
        for text in filters
        if text and text != "*" and not any(text in name for name in names)
    ]


def _dropped_tensors(by_pin: dict[Any, Model], tensors: list[PlannedTensor], listed: set[str]) -> list[str]:
    """mergekit writes what its definition of the architecture lists, and drops the rest without a word.

    listed: names in that definition, of which a recipe may leave out layers or a whole model.
    """
    if any(tensor.converted for tensor in tensors):
        return []
    read = {(pinned, id(header)) for tensor in tensors for pinned, header in tensor.inputs.items()}
    warnings = []
    for pinned, model in by_pin.items():
        dropped = [
            name
            for name, header in model.headers.items()
            if (pinned, id(header)) not in read and name not in listed and not name.endswith("inv_freq")
        ]
        if dropped and model.weights:  # its tokenizer may be all that is wanted
            more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
            warnings.append(f"{model.name}: {dropped[0]}{more} will not be in the result: mergekit does not merge it")
    return warnings


# ---------------------------------------------------------------- what it takes

SMALL_FILES_BYTES = 1 << 20
"""Config, card, provenance and the like, without the tokenizer."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")

WORKSPACE_COPIES = 4.5
"""Copies of its inputs that a method of mergekit works with; the worst one (`sce`) takes 4.2, see docs/merge.md."""

FRUGAL = ("fusechat_sce", "varm", "linear", "passthrough")
FRUGAL_COPIES, FRUGAL_BYTES = 3, 64 << 20
"""Methods that hold a few tensors of the size of the result and a fixed workspace, however many inputs there are."""


def estimate(plan: Plan, models: Iterable[Model], options: MergeOptions, final: Path) -> list[Need]:
    """Disk and memory that the merge needs, compared with what is free now. Nothing is read or allocated."""
    models = list(models)
    return [*_disk(plan, models, final), *_memory(plan, models, options)]


def _disk(plan: Plan, models: list[Model], final: Path) -> list[Need]:
    tokenizers = [[model.folder / name for name in TOKENIZERS] for model in models]
    largest = max((sum(file.stat().st_size for file in files if file.is_file()) for files in tokenizers), default=0)
    wanted: list[tuple[Path, int, str]] = [(final.parent, plan.nbytes + largest + SMALL_FILES_BYTES, "the result")]
    for model in models:
        if model.download_bytes and model.snapshot:
            wanted.append((model.snapshot.cache, model.download_bytes, f"the download of {model.name}"))
    return disk(wanted)


def _memory(plan: Plan, models: list[Model], options: MergeOptions) -> list[Need]:
    inputs = max((tensor.loaded_bytes for tensor in plan.tensors), default=0)
    # What the largest tensor takes while it is merged; inputs that are read from the mapped file do not count.
    working = int(WORKSPACE_COPIES * inputs)
    if plan.name in FRUGAL:
        working = max((t.copied_bytes + FRUGAL_COPIES * t.nbytes for t in plan.tensors), default=0) + FRUGAL_BYTES
    # Results that wait to be written: one shard, or everything when shards are written in the background.
    shard, wanted = plan.nbytes, int(options.out_shard_size)
    if not options.async_write and wanted > 0:
        shard = min(shard, max(wanted, max((tensor.nbytes for tensor in plan.tensors), default=0)))
    needs: list[Need] = []
    host = shard + working
    if str(options.device).startswith("cuda") and torch.cuda.is_available():
        device = working + inputs + (shard if options.low_cpu_memory else 0)
        host = inputs + (0 if options.low_cpu_memory else shard)
        free, _ = torch.cuda.mem_get_info(options.device)
        needs.append(Need("memory of the accelerator", device, free, f"free on {options.device}"))
    mapped = sum(_largest_file(model) for model in models)
    candidates = [
        Need("memory", host + mapped * limit.address_space, limit.available, limit.source) for limit in memory_limits()
    ]
    # One line, of the limit that is nearest to being hit.
    return [max(candidates, key=lambda need: need.needed - need.free), *needs]


def _largest_file(model: Model) -> int:
    sizes: dict[str, int] = {}
    for header in model.headers.values():
        sizes[header.file] = sizes.get(header.file, 0) + header.nbytes
    return max(sizes.values(), default=0)
