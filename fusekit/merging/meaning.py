"""Whether models may be merged: one architecture, and configurations that mean the same where shapes agree."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers
from mergekit.architecture import arch_info_for_config

from fusekit.errors import MergeError
from fusekit.merging.models import Model, OrderedConfiguration, has_tokenizer, token_ids, tokenizer_rows
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
"""Share of the ids up to which a fine-tune may name tokens otherwise than its base: special tokens given a use."""
SMALL_RATIO = 10.5
"""Of two epsilons of a norm: up to here (1e-6 and 1e-5) they are small against the variances of activations."""


def load_configs(models: Iterable[Model], problems: Problems, trust_remote_code: bool) -> dict[Any, Any]:
    """The transformers configuration of every model with weights, by pinned reference. Raises MergeError."""
    configs: dict[Any, Any] = {}
    for model in models:
        if not model.weights:
            continue
        file = f"the config.json of {model.name}"
        try:
            config = configs[model.pinned] = model.pinned.config(trust_remote_code=trust_remote_code)
        except Exception as error:
            problems.add(model.place, f"{file} does not load: {' '.join(str(error).split())[:500]}")
            continue
        number = len(getattr(config, "architectures", None) or [])
        if number != 1:
            problems.add(model.place, f"{file} names {number} architectures, not 1")
    problems.raise_if_any(MergeError)
    return configs


def check_meaning(
    config: OrderedConfiguration, models: dict[Any, Model], configs: dict[Any, Any], crimes: bool, problems: Problems
) -> None:
    """Report models that do not fit the base (or the first): architecture, meaning of weights, depth, heads, layers.

    crimes: mergekit's --allow-crimes, which makes warnings of what is an error otherwise.
    """
    reference = config.base_model if config.base_model in configs else next(iter(configs))
    for pinned, found in configs.items():
        _check_pair((models[reference], configs[reference]), (models[pinned], found), crimes, problems)
    outputs: list[tuple[KeyPath, Any]] = [((), config)]
    outputs += [(("modules", str(name)), module) for name, module in (config.modules or {}).items()]
    for path, output in outputs:
        _check_depths(output, config.base_model, models, configs, problems)
        _check_layer_ranges(output, path, configs, problems)
    _check_tied_heads(config.donor, models, configs, problems)


def _check_pair(first: tuple[Model, Any], second: tuple[Model, Any], crimes: bool, problems: Problems) -> None:
    (model, config), (other, its_config) = first, second
    report = problems.warn if crimes else problems.add
    ours, theirs = config.architectures[0], its_config.architectures[0]
    if ours != theirs or arch_info_for_config(config) != arch_info_for_config(its_config):
        report(
            other.place,
            f"{other.name} is a {theirs} ({its_config.model_type}), {model.name} is a {ours} ({config.model_type}): "
            "only models of one architecture can be merged (a wrong base_model?)",
        )
        return
    for key in SAME_MEANING:
        values = _text_config(config, key), _text_config(its_config, key)
        if key == "hidden_activation" and None in values:  # not a field of the class, which reads hidden_act
            continue
        for part, mine, its in _differences(key, *values):
            report(
                other.place,
                f"{other.name} has {part} {its}, {model.name} has {mine}: their weights do not mean the same (a "
                "wrong base_model?); if they do, give both the same value in config.json, or use --allow-crimes",
            )
    for key in (*EPSILONS, "sliding_window"):
        mine, its = _text_config(config, key), _text_config(its_config, key)
        if mine == its:
            continue
        low, high = sorted(value if isinstance(value, (int, float)) else 0.0 for value in (mine, its))
        says = f"{other.name} has {key} {its}, {model.name} has {mine}, which the merged model gets"
        if key == "sliding_window" or high <= SMALL_RATIO * low:
            problems.warn(other.place, says)
        else:
            report(
                other.place, f"{says}: it would read the weights of the other differently; --allow-crimes merges them"
            )


def _differences(key: str, mine: Any, its: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of a config differ: the name of the innermost key, and both values. None is as if not given."""
    if isinstance(mine, dict) and isinstance(its, dict):
        for name in dict.fromkeys([*mine, *its]):
            if name != "type":  # the former name of rope_type, which transformers fills in
                yield from _differences(f"{key}.{name}", mine.get(name), its.get(name))
    elif mine != its:
        yield key, mine, its


def _check_depths(
    output: Any, base: Any, models: dict[Any, Model], configs: dict[Any, Any], problems: Problems
) -> None:
    """Report models that are merged as a whole and have another number of layers than the base, or the first."""
    inputs = [each.model for each in output.models or () if each.model in configs]
    first = base if base in configs else next(iter(inputs), None)
    for pinned in inputs:
        mine, its = (_text_config(configs[each], "num_hidden_layers") for each in (first, pinned))
        if mine != its:
            problems.add(
                models[pinned].place,
                f"{models[pinned].name} has {its} layers, {models[first].name} has {mine}: choose models of one depth, "
                "or pick layers of each with `slices:`",
            )


def _check_layer_ranges(output: Any, path: KeyPath, configs: dict[Any, Any], problems: Problems) -> None:
    """Report slices that reach beyond the last layer of their model; mergekit would plan them all the same."""
    for index, piece in enumerate(output.slices or ()):
        for place, source in enumerate(piece.sources):
            layers = _text_config(configs.get(source.model), "num_hidden_layers")
            if source.layer_range is not None and layers is not None and source.layer_range[1] > layers:
                problems.add(
                    (*path, "slices", index, "sources", place, "layer_range"),
                    f"layer_range {list(source.layer_range)}, but {source.model} has {layers} layers",
                )


def _check_tied_heads(donor: Any, models: dict[Any, Model], configs: dict[Any, Any], problems: Problems) -> None:
    """Report output heads that would be lost, or made of embeddings: the merged model takes the donor's config."""
    tied = {pinned: bool(_text_config(found, "tie_word_embeddings")) for pinned, found in configs.items()}
    for pinned, is_tied in tied.items():
        if donor not in configs or is_tied == tied[donor]:
            continue
        model, of_donor = models[pinned], f"{models[donor].name}, whose config the merged model gets,"
        if is_tied:
            problems.warn(
                model.place,
                f"{model.name} has tie_word_embeddings: true and {of_donor} false: its embedding is merged as its "
                "output head",
            )
        else:
            problems.add(
                model.place,
                f"{model.name} has an output head of its own (tie_word_embeddings: false) and {of_donor} has not "
                "(true): the head would be lost; use a base_model without tied embeddings",
            )


def _text_config(config: Any, key: str) -> Any:
    value = getattr(config, key, None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(), key, None)
    return value


def check_tokenizers(
    config: OrderedConfiguration, models: dict[Any, Model], rows: int | None, copied: bool, problems: Problems
) -> None:
    """Report tokenizers that do not load, none at all, one whose tokens are more than the embedding's rows, and models
    whose ids mean other tokens than those of the donor.

    rows: None where they are not known. copied: whether mergekit copies the tokenizer of the donor.
    """
    donor = models[config.donor]
    built = bool(config.tokenizer or config.tokenizer_source)
    for model in models.values() if built else [donor] * copied:
        try:
            tokens = tokenizer_rows(model.folder, model.name)
        except MergeError as error:
            problems.add(model.place, str(error))
            continue
        if not built and tokens is not None and rows is not None and tokens > rows > 0:
            problems.warn(
                donor.place,
                f"the tokenizer of {donor.name} has ids up to {tokens - 1}, its embedding {rows} rows: texts with the "
                "tokens beyond them will fail",
            )
    if copied and not built and not has_tokenizer(donor.folder):
        problems.warn(donor.place, f"{donor.name} has no tokenizer, so the merged model will have none")
    if not built:
        _check_ids(donor, [model for model in models.values() if model.weights], problems)


def _check_ids(donor: Model, models: list[Model], problems: Problems) -> None:
    """Warn of embeddings whose rows belong to other tokens. Fine-tunes may have renamed some of the special tokens."""
    file, same = donor.folder / "tokenizer.json", None
    for model in models:
        other = model.folder / file.name
        if model is donor or not (file.is_file() and other.is_file()) or filecmp.cmp(file, other, shallow=False):
            continue
        try:
            same = same or {number: token for token, number in (token_ids(donor.folder, donor.name) or {}).items()}
            theirs = token_ids(model.folder, model.name) or {}
        except MergeError:  # that of the donor is reported; another is not used
            continue
        differ = [(number, token) for token, number in theirs.items() if same.get(number, token) != token]
        if len(differ) > len(theirs) * RENAMED:
            number, token = min(differ)
            problems.warn(
                model.place,
                f"{model.name} has another tokenizer than {donor.name}: {len(differ):,} of {len(theirs):,} ids stand "
                f"for other tokens ({number} is {token!r}, in {donor.name} {same[number]!r}), so embeddings are merged "
                "that do not belong together; if both are right, `tokenizer: {source: union}` brings them together",
            )


def generation_config(config: OrderedConfiguration, models: dict[Any, Model], problems: Problems) -> Path | None:
    """That of the donor, or of the model whose tokens are taken: to another, the ids would mean something else.

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
