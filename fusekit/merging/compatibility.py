"""Whether the configurations of the input models can be merged at all, and mean the same where shapes agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mergekit.architecture import arch_info_for_config

from fusekit.errors import MergeError
from fusekit.merging.models import Model
from fusekit.merging.references import OrderedConfiguration, references
from fusekit.yaml import Problems

# Weights of one shape that are read differently: merging them gives a model that is whole and wrong.
SAME_MEANING = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")


def load_configs(models: Iterable[Model], problems: Problems, trust_remote_code: bool) -> dict[Any, Any]:
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
            problems.add(model.place, f"the config.json of {model.spelling} does not load: {_one_line(error)}")
            continue
        architectures = getattr(config, "architectures", None) or []
        if len(architectures) != 1:
            problems.add(
                model.place, f"the config.json of {model.spelling} names {len(architectures)} architectures, not 1"
            )
            continue
        configs[model.pinned] = config
    problems.raise_if_any(MergeError)
    return configs


def check_architectures(
    config: OrderedConfiguration,
    models: dict[Any, Model],
    configs: dict[Any, Any],
    problems: Problems,
) -> None:
    """Report models whose architecture, or whose reading of the same weights, differs from the reference model's.

    The reference is the base model, or the first model of the recipe.
    """
    reference = config.base_model if config.base_model in configs else next(iter(configs))
    first, first_config = models[reference], configs[reference]
    for pinned, other_config in configs.items():
        other = models[pinned]
        if pinned == reference:
            continue
        ours, theirs = first_config.architectures[0], other_config.architectures[0]
        if ours != theirs or arch_info_for_config(first_config) != arch_info_for_config(other_config):
            problems.add(
                other.place,
                f"{other.spelling} is a {theirs} ({other_config.model_type}), {first.spelling} is a {ours} "
                f"({first_config.model_type}): only models of one architecture can be merged (a wrong base_model?)",
            )
            continue
        for key in SAME_MEANING:
            mine, its = _text_config(first_config, key), _text_config(other_config, key)
            if mine != its:
                problems.add(
                    other.place,
                    f"{other.spelling} has {key} {its}, {first.spelling} has {mine}: their weights do not mean the "
                    "same (a wrong base_model?)",
                )


def check_tied_heads(
    config: OrderedConfiguration, models: dict[Any, Model], configs: dict[Any, Any], problems: Problems
) -> None:
    """Report output heads that would be lost: the merged model takes the base's config, which may tie them."""
    donor = config.base_model or config.referenced_models()[0]
    if donor not in configs or not _ties(configs[donor]):
        return
    for pinned, other_config in configs.items():
        if not _ties(other_config):
            problems.add(
                models[pinned].place,
                f"{models[pinned].spelling} has an output head of its own (tie_word_embeddings: false) and "
                f"{models[donor].spelling}, whose config the merged model gets, has not (true): the head would be "
                "lost; use a base_model without tied embeddings",
            )


def check_layer_ranges(config: OrderedConfiguration, configs: dict[Any, Any], problems: Problems) -> None:
    """Report slices that reach beyond the last layer of their model; mergekit would plan them all the same."""
    for reference, place in references(config):
        if place[-1] != "model" or reference not in configs:
            continue
        item: Any = config
        for part in place[:-1]:
            keyed: Any = item
            item = keyed[part] if isinstance(item, (dict, list)) else getattr(item, str(part))
        layers = _text_config(configs[reference], "num_hidden_layers")
        wanted = getattr(item, "layer_range", None)
        if wanted is not None and layers is not None and wanted[1] > layers:
            problems.add(
                (*place[:-1], "layer_range"), f"layer_range {list(wanted)}, but {reference} has {layers} layers"
            )


def _ties(config: Any) -> bool:
    return bool(_text_config(config, "tie_word_embeddings"))


def _text_config(config: Any, key: str) -> Any:
    value = getattr(config, key, None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(), key, None)
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
