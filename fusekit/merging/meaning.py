"""Whether models may be merged: one architecture, and configurations that mean the same where shapes agree."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers
from mergekit.architecture import arch_info_for_config

from fusekit.errors import MergeError
from fusekit.merging.models import Model, OrderedConfiguration, has_tokenizer, tokens_of
from fusekit.yaml import KeyPath, Problems

# Weights of one shape that are read differently: merging them gives a model that is whole and wrong.
SAME_MEANING = (
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "hidden_activation", "rope_parameters"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier"),
    *("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb", "scale_depth"),
    *("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor"),
)
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
RENAMED = 0.01
"""Share of the ids up to which a fine-tune may name tokens otherwise: special tokens given a use."""
SMALL_RATIO = 10.5
"""Of two epsilons of a norm: up to here (1e-6 and 1e-5) they are small against the variances of activations."""


def load_configs(models: Iterable[Model], problems: Problems, trust_remote_code: bool) -> None:
    """Load the transformers configuration of every model with weights. Raises MergeError."""
    for model in models:
        try:
            model.config = model.pinned.config(trust_remote_code=trust_remote_code) if model.weights else None
        except Exception as error:
            says = " ".join(str(error).split())[:500]
            problems.add(model.place, f"the config.json of {model.name} does not load: {says}")
            continue
        number = len(getattr(model.config, "architectures", None) or [])
        if model.weights and number != 1:
            problems.add(model.place, f"the config.json of {model.name} names {number} architectures, not 1")
    problems.raise_if_any(MergeError)


def check_meaning(config: OrderedConfiguration, models: dict[Any, Model], crimes: bool, problems: Problems) -> None:
    """Report models that do not fit the base (or the first): architecture, meaning of weights, depth, heads, layers.

    models: by pinned reference. crimes: mergekit's --allow-crimes, which makes warnings of some errors.
    """
    merged = [model for model in models.values() if model.weights]
    first = next((model for model in merged if model.pinned == config.base_model), merged[0])
    donor = models[config.donor]
    for model in merged:
        _check_pair(first, model, crimes, problems)
        _check_head(donor, model, problems)
    outputs: list[tuple[KeyPath, Any]] = [((), config)]
    outputs += [(("modules", str(name)), module) for name, module in (config.modules or {}).items()]
    for path, output in outputs:
        for model in [models[each.model] for each in output.models or ()]:
            mine, its = (_text_config(each.config, "num_hidden_layers") for each in (first, model))
            if mine != its:
                problems.add(
                    model.place,
                    f"{model.name} has {its} layers, {first.name} has {mine}: choose models of one depth, or pick "
                    "layers of each with `slices:`",
                )
        for index, piece in enumerate(output.slices or ()):
            for place, source in enumerate(piece.sources):
                (start, stop), model = source.layer_range, models[source.model]
                layers = _text_config(model.config, "num_hidden_layers")
                if not 0 <= start < stop <= (layers or stop):
                    problems.add(
                        (*path, "slices", index, "sources", place, "layer_range"),
                        f"layer_range {[start, stop]}, but {model.name} has {layers} layers: give [first, last + 1], "
                        "counted from 0",
                    )


def _check_pair(model: Model, other: Model, crimes: bool, problems: Problems) -> None:
    """Report what another model's config means otherwise."""
    report = problems.warn if crimes else problems.add
    config, its_config = model.config, other.config
    ours, theirs = config.architectures[0], its_config.architectures[0]
    if ours != theirs or arch_info_for_config(config) != arch_info_for_config(its_config):
        report(
            other.place,
            f"{other.name} is a {theirs} ({its_config.model_type}), {model.name} is a {ours} ({config.model_type}): "
            "only models of one architecture can be merged (a wrong base_model?)",
        )
        return
    for key in (*SAME_MEANING, *EPSILONS, "sliding_window"):
        values = _text_config(config, key), _text_config(its_config, key)
        if key == "hidden_activation" and None in values:  # not a field of the class, which reads hidden_act
            continue
        small = key == "sliding_window"
        if key in EPSILONS:
            low, high = sorted(value or 0.0 for value in values)
            small = high <= SMALL_RATIO * low
        for part, mine, its in _differences(key, *values):
            says = f"{other.name} has {part} {its}, {model.name} has {mine}"
            if small:
                problems.warn(other.place, f"{says}, which the merged model gets")
            else:
                report(
                    other.place,
                    f"{says}: their weights do not mean the same (a wrong base_model?); if they do, give both the same "
                    "value in config.json, or use --allow-crimes",
                )


def _check_head(donor: Model, model: Model, problems: Problems) -> None:
    """Report an output head that would be lost, or made of embeddings: the merged model takes the donor's config."""
    donors, its = (bool(_text_config(each.config, "tie_word_embeddings")) for each in (donor, model))
    says = f"{model.name} has tie_word_embeddings {its}, {donor.name} has {donors}, which the merged model gets"
    if its and not donors:
        problems.warn(model.place, f"{says}: its embedding is merged as its output head")
    elif donors and not its:
        problems.add(model.place, f"{says}: its output head would be lost; use a base_model without tied embeddings")


def _differences(key: str, mine: Any, its: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of a config differ: the name of the innermost key, and both values. None is as if not given."""
    if isinstance(mine, dict) and isinstance(its, dict):
        for name in dict.fromkeys([*mine, *its]):
            if name != "type":  # the former name of rope_type, which transformers fills in
                yield from _differences(f"{key}.{name}", mine.get(name), its.get(name))
    elif mine != its:
        yield key, mine, its


def _text_config(config: Any, key: str) -> Any:
    value = getattr(config, key, None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(), key, None)
    return value


def check_tokenizers(config: OrderedConfiguration, models: dict[Any, Model], copied: bool, problems: Problems) -> None:
    """Report tokenizers that do not load, a donor without one, and models whose ids stand for other tokens than its.

    copied: whether mergekit copies the donor's.
    """
    donor = models[config.donor]
    built = bool(config.tokenizer or config.tokenizer_source)
    for model in models.values() if built else [donor] * copied:
        try:
            tokens_of(model.folder, model.name)
        except MergeError as error:
            problems.add(model.place, str(error))
    if copied and not built and not has_tokenizer(donor.folder):
        problems.warn(donor.place, f"{donor.name} has no tokenizer, so the merged model will have none")
    if not built:
        _check_ids(donor, [model for model in models.values() if model.weights], problems)


def _check_ids(donor: Model, models: list[Model], problems: Problems) -> None:
    """Warn of embeddings whose rows belong to other tokens."""
    file = donor.folder / "tokenizer.json"
    tokens: dict[int, str] = {}
    for model in models:
        other = model.folder / file.name
        if model is donor or not (file.is_file() and other.is_file()) or filecmp.cmp(file, other, shallow=False):
            continue
        try:
            tokens = tokens or tokens_of(donor.folder, donor.name)
            theirs = tokens_of(model.folder, model.name)
        except MergeError:  # that of the donor is reported; another is not used
            continue
        differ = [number for number, token in theirs.items() if tokens.get(number, token) != token]
        if len(differ) > RENAMED * len(theirs):
            number = min(differ)
            problems.warn(
                model.place,
                f"{model.name} has another tokenizer than {donor.name}: {len(differ):,} of {len(theirs):,} ids stand "
                f"for other tokens ({number} is {theirs[number]!r}, in {donor.name} {tokens[number]!r}), so embeddings "
                "are merged that do not belong together; `tokenizer: {source: union}` brings them together",
            )


def generation_config(config: OrderedConfiguration, models: dict[Any, Model], problems: Problems) -> Path | None:
    """The donor's, or that of the model whose tokens are taken: to another, the ids would mean something else.

    Reports one that does not load.
    """
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    model = models[source if source in models else config.donor]
    path = model.folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        transformers.GenerationConfig.from_pretrained(model.folder)
    except Exception as error:
        problems.add(model.place, f"the generation_config.json of {model.name} does not load: {error}")
    return path
