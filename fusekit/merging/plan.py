"""What a merge will read and write, tensor by tensor, from headers and mergekit's own planner; and whether it may.

Only models of one architecture can be merged, and only if their configurations mean the same where shapes agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from mergekit import merge_methods
from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.config import ConditionalParameter
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.base import BasePolicy
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from fusekit import mergekit_private
from fusekit.errors import FusekitError, MergeError
from fusekit.hub import TensorHeader
from fusekit.merging.models import Model, OrderedConfiguration, has_tokenizer, instances, tokenizer_rows
from fusekit.yaml import KeyPath, Problems, nearest

# Weights of one shape that are read differently: merging them gives a model that is whole and wrong.
SAME_MEANING = (
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "hidden_activation", "rope_parameters"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier"),
    *("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb", "scale_depth"),
    *("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor"),
)
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
SMALL_RATIO = 10.5
"""Of two epsilons of a norm: up to here (1e-6 and 1e-5) they are small against the variances of activations."""
MAX_REPORTED = 8
ANY = -1
"""A dimension that is not known before the tokenizer is built."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result. shape may hold ANY; None: unknown. dtype: torch name; None: unknown.

    inputs: header by pinned model, for the models that have it. optional: the method may leave it out. converted: the
    models whose file has it in parts, under other names (experts one by one).
    loaded_bytes: of the inputs in the dtype that they are loaded in; copied_bytes: of those whose file has another one
    (the others are read from the mapped file).
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
    def elements(self) -> int:
        """Elements of the result, or of the largest input where the shape is not known."""
        return max((header.elements for header in self.inputs.values()), default=0)

    @property
    def nbytes(self) -> int:
        return self.elements * (_itemsize(self.dtype) if self.dtype else 4)


@dataclass(frozen=True)
class Plan:
    """A merge as mergekit plans it. name: of the method; method: its pretty name. base: its name, None without one;
    models: those that are merged (into it). generation_config: the file that the merged model gets, if there is one.
    read_bytes: of all inputs; nbytes: of the result."""

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

    The loaders of the models are registered with mergekit already. Raises MergeError with all problems: other
    architectures, layers that do not exist, missing tensors, shapes that differ, parameters that the method refuses.
    """
    by_pin = {model.pinned: model for model in models}
    configs = _load_configs(by_pin.values(), problems, options.trust_remote_code)
    _check_meaning(config, by_pin, configs, options.allow_crimes, problems)
    _check_depths(config, by_pin, configs, problems)
    _check_tied_heads(config, by_pin, configs, problems)
    _check_layer_ranges(config, configs, problems)
    problems.raise_if_any(MergeError)
    tasks, out_config, architecture = _mergekit_tasks(config, options)
    saves = [task for task in tasks if isinstance(task, SaveTensor)]
    donor = by_pin[donor_of(config)]
    built = _built_shapes(out_config, donor, problems)
    tensors = [_planned_tensor(save, by_pin, configs, built, problems) for save in saves]
    _check_parts(by_pin, tensors, problems)
    if len(problems.found) > MAX_REPORTED:
        rest = len(problems.found) - MAX_REPORTED
        last = max(line for line, _, _ in problems.found[:MAX_REPORTED])
        problems.found[MAX_REPORTED:] = [(last, f"and {rest} more of the same kind", ())]
    problems.raise_if_any(MergeError)
    _check_sizes(built, tensors, donor, problems)
    _check_tokenizers(config, by_pin, tensors, options, problems)
    generation = _generation_config(config, by_pin, problems)
    problems.raise_if_any(MergeError)
    _check_method_parameters(saves, tensors)
    method = merge_methods.get(config.merge_method)
    listed = {name for each in configs.values() for weight in architecture.all_weights(each) for name in _names(weight)}
    warnings = [*problems.warnings, *_unmatched_filters(config, saves), *_dropped_tensors(by_pin, tensors, listed)]
    takes_base = method.spec.contract.base != BasePolicy.IGNORED
    base = by_pin[config.base_model].name if takes_base and config.base_model in by_pin else None
    read = {pinned for tensor in tensors for pinned in (*tensor.inputs, *tensor.converted)}
    names = [model.name for pinned, model in by_pin.items() if pinned in read and model.name != base]
    return Plan(
        method.spec.name, method.spec.pretty_name or method.spec.name, tensors, warnings, base, names, generation
    )


def donor_of(config: OrderedConfiguration) -> Any:
    """The model whose configuration and tokenizer the merged model gets: the base, or the first of the recipe."""
    return config.base_model or config.referenced_models()[0]


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


def _load_configs(models: Iterable[Model], problems: Problems, trust_remote_code: bool) -> dict[Any, Any]:
    """The transformers configuration of every model with weights, by pinned reference.

    Raises MergeError with all problems: a configuration that does not load or names no single architecture.
    """
    configs: dict[Any, Any] = {}
    for model in models:
        if not model.weights:
            continue
        try:
            config = model.pinned.config(trust_remote_code=trust_remote_code)
        except Exception as error:
            problems.add(
                model.place, f"the config.json of {model.name} does not load: {' '.join(str(error).split())[:500]}"
            )
            continue
        architectures = getattr(config, "architectures", None) or []
        if len(architectures) != 1:
            problems.add(
                model.place, f"the config.json of {model.name} names {len(architectures)} architectures, not 1"
            )
            continue
        configs[model.pinned] = config
    problems.raise_if_any(MergeError)
    return configs


def _check_meaning(
    config: OrderedConfiguration, models: dict[Any, Model], configs: dict[Any, Any], crimes: bool, problems: Problems
) -> None:
    """Report models whose architecture, or whose reading of the same weights, differs from the reference model's.

    The reference is the base model, or the first model of the recipe: its config is that of the merged model. crimes:
    mergekit's --allow-crimes, which makes warnings of what is an error otherwise.
    """
    reference = config.base_model if config.base_model in configs else next(iter(configs))
    first, first_config = models[reference], configs[reference]
    report = problems.warn if crimes else problems.add
    for pinned, other_config in configs.items():
        other = models[pinned]
        ours, theirs = first_config.architectures[0], other_config.architectures[0]
        if ours != theirs or arch_info_for_config(first_config) != arch_info_for_config(other_config):
            report(
                other.place,
                f"{other.name} is a {theirs} ({other_config.model_type}), {first.name} is a {ours} "
                f"({first_config.model_type}): only models of one architecture can be merged (a wrong base_model?)",
            )
            continue
        for key in SAME_MEANING:
            values = [_text_config(config, key) for config in (first_config, other_config)]
            if key == "hidden_activation" and None in values:  # not a field of the class, which reads hidden_act
                continue
            for part, mine, its in _differences(key, *values):
                report(
                    other.place,
                    f"{other.name} has {part} {its}, {first.name} has {mine}: their weights do not mean the same (a "
                    "wrong base_model?); if they do, give both the same value in config.json, or use --allow-crimes",
                )
        for key in (*EPSILONS, "sliding_window"):
            mine, its = _text_config(first_config, key), _text_config(other_config, key)
            if mine == its:
                continue
            numbers = sorted(value if isinstance(value, (int, float)) else 0.0 for value in (mine, its))
            small = key == "sliding_window" or numbers[1] <= SMALL_RATIO * numbers[0]
            (problems.warn if small else report)(
                other.place,
                f"{other.name} has {key} {its}, {first.name} has {mine}, which the merged model gets"
                + ("" if small else ": it would read the weights of the other differently; --allow-crimes merges them"),
            )


def _differences(key: str, mine: Any, its: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of a config differ: the name of the innermost key, and both values. None is as if not given."""
    if isinstance(mine, dict) and isinstance(its, dict):
        for name in dict.fromkeys([*mine, *its]):
            if name == "type":  # the former name of rope_type, which transformers fills in
                continue
            yield from _differences(f"{key}.{name}", mine.get(name), its.get(name))
    elif mine != its:
        yield key, mine, its


def _check_tied_heads(
    config: OrderedConfiguration, models: dict[Any, Model], configs: dict[Any, Any], problems: Problems
) -> None:
    """Report output heads that would be lost, or made of embeddings: the merged model takes the base's config."""
    donor = donor_of(config)
    tied = {pinned: bool(_text_config(found, "tie_word_embeddings")) for pinned, found in configs.items()}
    for pinned, is_tied in tied.items():
        if donor not in configs or is_tied == tied[donor]:
            continue
        name, of_donor = models[pinned].name, models[donor].name
        if is_tied:
            problems.warn(
                models[pinned].place,
                f"{name} has tie_word_embeddings: true and {of_donor}, whose config the merged model gets, false: its "
                "embedding is merged as its output head",
            )
        else:
            problems.add(
                models[pinned].place,
                f"{name} has an output head of its own (tie_word_embeddings: false) and {of_donor}, whose config the "
                "merged model gets, has not (true): the head would be lost; use a base_model without tied embeddings",
            )


def _outputs(config: OrderedConfiguration) -> list[tuple[KeyPath, Any]]:
    """What a recipe makes, by place: itself, and each of its modules."""
    return [((), config), *((("modules", str(name)), module) for name, module in (config.modules or {}).items())]


def _check_depths(
    config: OrderedConfiguration, models: dict[Any, Model], configs: dict[Any, Any], problems: Problems
) -> None:
    """Report models that are merged as a whole and have another number of layers than the base, or the first."""
    for _, output in _outputs(config):
        inputs = [each.model for each in output.models or () if each.model in configs]
        first = config.base_model if config.base_model in configs else next(iter(inputs), None)
        for pinned in inputs:
            mine, its = (_text_config(configs[each], "num_hidden_layers") for each in (first, pinned))
            if mine != its:
                problems.add(
                    models[pinned].place,
                    f"{models[pinned].name} has {its} layers, {models[first].name} has {mine}: choose models of one "
                    "depth, or pick layers of each with `slices:`",
                )


def _check_layer_ranges(config: OrderedConfiguration, configs: dict[Any, Any], problems: Problems) -> None:
    """Report slices that reach beyond the last layer of their model; mergekit would plan them all the same."""
    for path, output in _outputs(config):
        for index, piece in enumerate(output.slices or ()):
            for place, source in enumerate(piece.sources):
                layers = _text_config(configs.get(source.model), "num_hidden_layers")
                if source.layer_range is not None and layers is not None and source.layer_range[1] > layers:
                    problems.add(
                        (*path, "slices", index, "sources", place, "layer_range"),
                        f"layer_range {list(source.layer_range)}, but {source.model} has {layers} layers",
                    )


def _text_config(config: Any, key: str) -> Any:
    value = getattr(config, key, None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(), key, None)
    return value


def _gather(save: Any) -> Any:
    """The task that loads the inputs of a tensor, below what aligns or truncates vocabularies."""
    task = save.tensor_task.gather_tensors
    return getattr(task, "gather_tensors", task)


def _names(weight: Any) -> list[str]:
    """Under which a file may have a weight of mergekit's definition, the likeliest first."""
    return [weight.name, *(weight.aliases or ()), *(weight.tied_names or ())]


def _planned_tensor(
    save: Any,
    by_pin: dict[Any, Model],
    configs: dict[Any, Any],
    built: Mapping[str, tuple[int, ...]],
    problems: Problems,
) -> PlannedTensor:
    gather, task = _gather(save), save.tensor_task
    inputs: dict[Any, TensorHeader] = {}
    converted = []
    for pinned, weight in gather.weight_info.items():
        model = by_pin[pinned]
        header = next((model.headers[name] for name in _names(weight) if name in model.headers), None)
        if header is not None:
            inputs[pinned] = header
        elif can_convert_checkpoint_keys(configs[pinned].model_type, set(model.headers), weight.name):
            converted.append(pinned)
            if (whole := _whole(model, built.get(save.tensor_name))) is not None:
                inputs[pinned] = whole
        elif not weight.optional:
            problems.add(
                model.place,
                f"{model.name} lacks the tensor {weight.name}: is a shard missing, or is it another architecture?",
            )
    aligned = gather is not task.gather_tensors
    axis = task.output_weight.vocabulary_axis
    _check_shapes(save, inputs, axis if aligned else None, by_pin, problems)
    reference = _reference(inputs, task.base_model)
    shape = inputs[reference].shape if inputs else None
    known = all(pinned in inputs for pinned in converted)
    if not known:
        shape = None
    elif shape is not None and aligned and axis is not None:
        shape = (*shape[:axis], ANY, *shape[axis + 1 :])
    optional = save.optional and len(inputs) < len(gather.weight_info)
    loaded = _loaded_dtypes(gather, inputs)
    sizes = {pinned: header.elements * _itemsize(loaded[pinned]) for pinned, header in inputs.items()}
    adapted = {
        pinned for pinned in inputs if (lora := by_pin[pinned].lora) and gather.weight_info[pinned].name in lora.names
    }
    copied = sum(
        size
        for pinned, size in sizes.items()
        if pinned in {*adapted, *converted} or loaded[pinned] != inputs[pinned].dtype
    )
    if adapted:
        copied += 8 * max(header.elements for header in inputs.values())  # B A, and B A times s, of one model at a time
    dtype = _result_dtype(save, loaded.values()) if known else None
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


def _loaded_dtypes(gather: Any, inputs: Mapping[Any, TensorHeader]) -> dict[Any, str]:
    """The dtype in which mergekit loads every input."""
    wanted = {pinned: gather.weight_info[pinned].force_dtype or gather.dtype for pinned in inputs}
    return {pinned: (wanted[pinned] or header.dtype).removeprefix("torch.") for pinned, header in inputs.items()}


def _itemsize(dtype: str) -> int:
    return torch.empty(0, dtype=getattr(torch, dtype)).element_size()


def _result_dtype(save: Any, loaded: Iterable[str]) -> str | None:
    """The dtype that the result is written in: out_dtype, else what mergekit promotes the loaded inputs to."""
    dtypes = [getattr(torch, name) for name in loaded]
    if not dtypes:
        return None
    result = reduce(torch.promote_types, dtypes)
    return str(save.dtype or result).removeprefix("torch.")


def _reference(inputs: Mapping[Any, TensorHeader], base: Any) -> Any:
    return base if base in inputs else next(iter(inputs), None)


def _check_shapes(
    save: Any, inputs: Mapping[Any, TensorHeader], free_axis: int | None, by_pin: dict[Any, Model], problems: Problems
) -> None:
    """Report every model whose tensor differs from the base's (else the first model's), apart from ``free_axis``."""
    reference = _reference(inputs, save.tensor_task.base_model)
    for pinned, header in inputs.items():
        expected = inputs[reference].shape
        if _without(header.shape, free_axis) == _without(expected, free_axis):
            continue
        model, other = by_pin[pinned], by_pin[reference]
        advice = f"{model.name} is not a fine-tune of {other.name}, or one of the two is the wrong model"
        if save.tensor_task.output_weight.vocabulary_axis == 0 and header.shape[1:] == expected[1:]:
            advice = "if only the vocabularies differ, add `tokenizer: {source: base}` (or union) to the recipe"
        problems.add(
            model.place,
            f"{save.tensor_name}: {other.name} has shape {list(expected)}, {model.name} has "
            f"{list(header.shape)}: {advice}",
        )


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def _built_shapes(out_config: Any, donor: Model, problems: Problems) -> dict[str, tuple[int, ...]]:
    """The shapes that transformers gives tensors by the config of the merged model, which it builds on no device.

    Empty for a model with code of its own, and with a warning where it cannot be built.
    """
    kind = getattr(transformers, out_config.architectures[0], None)
    if kind is None:
        return {}
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in kind(out_config).state_dict().items()}
    except Exception as error:
        problems.warn(donor.place, f"transformers cannot build a model by the config.json of {donor.name}: {error}")
        return {}


def _check_sizes(
    built: Mapping[str, tuple[int, ...]], tensors: list[PlannedTensor], donor: Model, problems: Problems
) -> None:
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


def _check_parts(by_pin: dict[Any, Model], tensors: list[PlannedTensor], problems: Problems) -> None:
    """Report models whose parts do not add up to the tensors that mergekit makes of them: it stacks what is there."""
    for pinned, model in by_pin.items():
        of_parts = [tensor for tensor in tensors if pinned in tensor.converted]
        if not of_parts or any(pinned not in tensor.inputs for tensor in of_parts):
            continue
        whole = {id(tensor.inputs[pinned]) for tensor in tensors if pinned in tensor.inputs}
        parts = sum(header.elements for header in model.headers.values() if id(header) not in whole)
        wanted = sum(tensor.inputs[pinned].elements for tensor in of_parts)
        if parts < wanted:
            problems.add(
                model.place,
                f"{model.name}: the tensors that {of_parts[0].name} and others like it are made of have {parts:,} "
                f"elements, not {wanted:,}: is a shard missing?",
            )


def same_shape(planned: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether a shape is the planned one, of which ANY fits everything."""
    return len(planned) == len(found) and all(want in (ANY, have) for want, have in zip(planned, found, strict=True))


def _check_tokenizers(
    config: OrderedConfiguration,
    by_pin: dict[Any, Model],
    tensors: list[PlannedTensor],
    options: MergeOptions,
    problems: Problems,
) -> None:
    """Report tokenizers that do not load, none at all, and one whose tokens are more than the embedding has rows."""
    donor = by_pin[donor_of(config)]
    configured = bool(config.tokenizer or config.tokenizer_source)
    if not configured and not options.copy_tokenizer:
        return
    rows = None
    for model in by_pin.values() if configured else [donor]:
        try:
            found = tokenizer_rows(model.folder, model.name)
            rows = found if model is donor else rows
        except MergeError as error:
            problems.add(model.place, str(error))
    if configured:
        return
    if not has_tokenizer(donor.folder):
        problems.warn(donor.place, f"{donor.name} has no tokenizer, so the merged model will have none")
    embedding = next((t.shape[0] for t in tensors if t.shape and "embed" in t.name and len(t.shape) == 2), None)
    if rows is not None and embedding is not None and rows > embedding > 0:
        problems.warn(
            donor.place,
            f"the tokenizer of {donor.name} has ids up to {rows - 1}, its embedding {embedding} rows: texts with the "
            "tokens beyond them will fail",
        )


def _generation_config(config: OrderedConfiguration, by_pin: dict[Any, Model], problems: Problems) -> Path | None:
    """That of the base; where the tokens are those of another model, that model's, since ids would mean something else.

    Reports one that does not load.
    """
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    model = by_pin[source if source in by_pin else donor_of(config)]
    path = model.folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        transformers.GenerationConfig.from_pretrained(model.folder)
    except Exception as error:
        problems.add(model.place, f"the generation_config.json of {model.name} does not load: {error}")
    return path


def _check_method_parameters(saves: list[Any], tensors: list[PlannedTensor]) -> None:
    """What only the method knows about its parameters together with the number of models, for every tensor."""
    for save, tensor in zip(saves, tensors, strict=True):
        task = save.tensor_task
        check = getattr(merge_methods.get(task.method_name), "check_parameters", None)
        if check is not None and tensor.inputs:
            targets = sum(pinned != task.base_model for pinned in tensor.inputs)
            check(targets, dict(task.parameters.items()), tensor.name)


def _unmatched_filters(config: OrderedConfiguration, saves: list[Any]) -> list[str]:
    names = {save.tensor_name for save in saves}
    names |= {weight.name for save in saves for weight in _gather(save).weight_info.values()}
    warnings = []
    for text in dict.fromkeys(found.filter for found, _ in instances(config, ConditionalParameter)):
        if text and text != "*" and not any(text in name for name in names):
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            warnings.append(f"the filter {text!r} matches no tensor{nearest(text, parts)}")
    return warnings


def _dropped_tensors(by_pin: dict[Any, Model], tensors: list[PlannedTensor], listed: set[str]) -> list[str]:
    """mergekit writes what its definition of the architecture lists, and drops the rest without a word.

    listed: names in that definition; of those a recipe may pick some, and leave out layers or a whole model.
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
        if dropped and model.weights:
            more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
            warnings.append(f"{model.name}: {dropped[0]}{more} will not be in the result: mergekit does not merge it")
    return warnings
