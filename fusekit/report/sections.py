"""What the page says in words and in tables, section by section, as plain values for the template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import ValidationError

from fusekit.artifacts import human
from fusekit.capture.store import Store
from fusekit.data.prepare import DROPPED, REASONS
from fusekit.pipeline.layout import PIVOT
from fusekit.recipe import Recipe
from fusekit.recipe.loading import PRESETS
from fusekit.report import present, provenance, text
from fusekit.report.curves import Chart, chart
from fusekit.report.facts import Facts
from fusekit.report.graph import MOST_CHARACTERS, Graph, Node, graph
from fusekit.report.models import ModelFacts
from fusekit.report.records import Training

COLOURS = 8
_KEYS = 3  # of rows, in a table
_QUARANTINED = 10  # rows named per model

HUB = "https://huggingface.co/"


def colours(facts: Facts) -> dict[str, str]:
    """Class of colour by name, the same for a model, the target that it teaches and its part of the merge."""
    found = {name: f"c{number % COLOURS + 1}" for number, name in enumerate(facts.sources)}
    others = [name for name in facts.targets if name not in found]
    found |= {name: f"c{(len(facts.sources) + number) % COLOURS + 1}" for number, name in enumerate(others)}
    return found | {PIVOT: "cp", "baseline": "cb", "merged": "cm"}


@dataclass(frozen=True)
class ModelRow:
    """A parent, as the table of models shows it. url: on the hub, None for a folder."""

    name: str
    role: str
    colour: str
    model: str
    url: str | None
    architecture: str
    shape: str
    parameters: str
    tokenizer: str
    template: str


def model_rows(facts: Facts) -> list[ModelRow]:
    """The pivot and the sources."""
    colour = colours(facts)
    entries = {PIVOT: facts.recipe["pivot"]} | dict(zip(facts.sources, facts.recipe["sources"], strict=True))
    return [_model_row(facts, name, entry, colour[name]) for name, entry in entries.items()]


def _model_row(facts: Facts, name: str, entry: Mapping[str, Any], colour: str) -> ModelRow:
    known = facts.models.get(name) or ModelFacts(model=facts.model_name(name))
    sizes = [f"{known.layers} layers" if known.layers else "", f"width {known.width:,}" if known.width else ""]
    return ModelRow(
        name,
        "pivot" if name == PIVOT else "source",
        colour,
        known.repository if known.repository and not known.model.endswith(".gguf") else known.model,
        f"{HUB}{known.repository}" if known.repository else None,
        (known.architecture or "").removesuffix("ForCausalLM") or text.NO_VALUE,
        ", ".join(filter(None, [*sizes, known.dtype or ""])),
        text.scaled(known.parameters),
        tokenizer_words(known),
        _template_words(facts, name, str(entry.get("chat_template") or "own")),
    )


def _template_words(facts: Facts, name: str, said: str) -> str:
    """Where the template came from and the day that it prints, as the store has it; else what the recipe says."""
    details = facts.stores[name].spec.details if name in facts.stores else {}
    origin, date = details.get("chat_template"), details.get("date")
    return f"{origin or said}{f' ({date})' if date else ''}"


def tokenizer_words(known: ModelFacts) -> str:
    """``BPE, byte-level; 768 tokens``."""
    tokenizer = known.tokenizer
    if tokenizer is None:
        return text.NO_VALUE
    normalises = f"; normalises ({', '.join(tokenizer.normalises)})" if tokenizer.normalises else ""
    fallback = ", byte fallback" if tokenizer.byte_fallback else ""
    return f"{tokenizer.model}, {tokenizer.form}{fallback}; {tokenizer.tokens:,} tokens{normalises}"


def lead(facts: Facts) -> list[str]:
    """What was fused, for somebody who has not heard of it."""
    joint = facts.value("fusion.mode") == "joint"
    names, one = text.listed(facts.sources), len(facts.sources) == 1
    rows = facts.counts.kept if facts.counts else None
    on = f"on {rows:,} rows of data" if rows else "on the same rows of data"
    taught = (
        f"A copy of the pivot, the target, learned what {'it' if one else 'they'} predicted {on}, token by token"
        if joint or one
        else f"Each taught a copy of the pivot, its target, what it predicted {on}, token by token"
    )
    first = f"One model, the pivot, learned from {len(facts.sources)} other{'' if one else 's'}: {names}."
    across = "although each model reads text through its own tokenizer."
    last = "The result has the architecture and the tokenizer of the pivot, and costs no more to run."
    merged = len(present.merged_targets(facts.merged)) if facts.merged is not None and not joint else 0
    between = f"The {merged} targets were then merged into one model." if merged > 1 else ""
    return [part for part in (first, f"{taught}, {across}", between, last) if part]


def missing_stages(facts: Facts) -> list[str]:
    """What the run has not done, or not yet, a sentence each."""
    said = []
    if facts.counts is None:
        said.append("The rows are not prepared yet.")
    captured = [name for name in (PIVOT, *facts.sources) if name in facts.stores and facts.stores[name].complete]
    if lacking := [name for name in (PIVOT, *facts.sources) if name not in captured]:
        said.append(f"Not captured yet, or not to the end: {text.listed(lacking)}.")
    if lacking := [name for name in facts.sources if name not in facts.qualities]:
        said.append(f"Not aligned yet: {text.listed(lacking)}.")
    if not facts.targets:
        said.append("No target is trained yet.")
    if facts.training:
        said.append(f"Training was begun and is not finished: {text.listed(facts.training)}.")
    if facts.value("merge") is None:
        said.append("The recipe has no merge: the targets are the result.")
    elif facts.merged is None:
        said.append("The targets are not merged yet.")
    if facts.value("evaluate") is None:
        said.append("The recipe has no evaluation.")
    elif facts.results is None:
        said.append("Nothing is evaluated yet.")
    return said


def recipe_graph(facts: Facts) -> Graph:
    """Models, stores, targets and the merged model, those that are still to come too."""
    colour = colours(facts)
    names = [PIVOT, *facts.sources]
    joint = facts.value("fusion.mode") == "joint"
    targets = list(facts.targets) or (["joint"] if joint else list(facts.sources))
    targets += [name for name in facts.training if name not in targets]
    merges = facts.value("merge") is not None
    columns = [
        ("models", [_model_node(facts, name, colour[name]) for name in names]),
        ("what each predicts", [_store_node(facts, name, colour[name]) for name in names]),
        ("targets", [_target_node(facts, name, colour.get(name, "c1")) for name in targets]),
        ("result", [_merged_node(facts)] if merges else []),
    ]
    links = [(f"model {name}", f"store {name}") for name in names]
    for target in targets:
        record = facts.targets.get(target)
        teachers = list(record.sources) if record else (facts.sources if target not in facts.sources else [target])
        links += [(f"store {name}", f"target {target}") for name in [PIVOT, *teachers]]
        links.append((f"target {target}", "merged"))
    return graph(columns, links)


def _node(key: str, lines: list[str], colour: str, missing: bool = False) -> Node:
    return Node(key, [text.shorten(text.name(line), MOST_CHARACTERS) for line in lines if line], colour, missing)


def _model_node(facts: Facts, name: str, colour: str) -> Node:
    known = facts.models.get(name)
    if known is None:
        return _node(f"model {name}", [name, facts.model_name(name)], colour)
    kind = (known.architecture or "").removesuffix("ForCausalLM")
    size = f"{text.scaled(known.parameters)} parameters" if known.parameters else ""
    tokens = f"{known.tokenizer.tokens:,} tokens, {known.tokenizer.form}" if known.tokenizer else ""
    return _node(f"model {name}", [name, " · ".join(filter(None, (kind, size))), tokens], colour)


def _store_node(facts: Facts, name: str, colour: str) -> Node:
    store = facts.stores.get(name)
    if store is None:
        return _node(f"store {name}", ["not captured yet"], colour, missing=True)
    state = f"{len(store):,} rows" if store.complete else f"{len(store):,} rows so far"
    size = human(sum(record.size for record in store.records))
    return _node(f"store {name}", [f"top {store.spec.top_k} of each token", f"{state}, {size}"], colour)


def _target_node(facts: Facts, name: str, colour: str) -> Node:
    record = facts.targets.get(name)
    if record is None:
        state = "being trained" if name in facts.training else "not trained yet"
        return _node(f"target {name}", [name, state], colour, missing=True)
    loss = record.last("loss")
    taught = f"taught by {text.listed(record.sources)}" if record.sources else "from the text alone"
    said = f"last loss {text.fixed(loss, 2)}" if loss is not None else ""
    return _node(f"target {name}", [name, taught, said], colour)


def _merged_node(facts: Facts) -> Node:
    method = str(facts.value("merge.merge_method") or "")
    if facts.merged is None:
        return _node("merged", ["merged", f"not yet, by {method}"], "cm", missing=True)
    return _node("merged", ["merged model", f"by {method}"], "cm")


@dataclass(frozen=True)
class TrainingRow:
    """A trained model, as the table of training shows it."""

    name: str
    colour: str
    teachers: str
    values: dict[str, str]


def training_rows(facts: Facts) -> list[TrainingRow]:
    """The targets, and plain fine-tuning."""
    colour = colours(facts)
    rows = [
        TrainingRow(
            name,
            colour.get(name, "c1"),
            text.listed(record.sources) or "the text alone",
            _figures(record, provenance.training_seconds(facts, f"targets/{name}", record)),
        )
        for name, record in facts.targets.items()
    ]
    if facts.baseline is not None:
        seconds = provenance.training_seconds(facts, provenance.BASELINE_PLACE, facts.baseline)
        rows.append(TrainingRow("plain fine-tuning", "cb", "the text alone", _figures(facts.baseline, seconds)))
    return rows


def _figures(record: Training, seconds: float | None) -> dict[str, str]:
    counts, step, epochs = record.counts, record.last("step"), record.last("epoch")
    labels, asked = counts.get("labels", 0.0), counts.get("asked", 0.0)
    return {
        "steps": text.whole(step) if step is not None else text.NO_VALUE,
        "epochs": f"{epochs:.3g}" if epochs is not None else text.NO_VALUE,
        "loss": text.fixed(record.last("loss")),
        "text": text.fixed(record.last("lm_loss")),
        "teachers": text.fixed(record.last("fusion_loss")) if record.sources else text.NO_VALUE,
        "linked": text.percent(counts.get("linked", 0.0) / asked) if asked else text.NO_VALUE,
        "taught": text.percent(counts.get("taught", 0.0) / labels) if labels and asked else text.NO_VALUE,
        "skipped": text.whole(record.skipped_steps),
        "time": text.seconds(seconds),
    }


def loss_charts(facts: Facts) -> list[Chart]:
    """The loss on the text and the loss on the teachers over the steps, a curve per model."""
    colour = colours(facts)
    records = {name: (record, colour.get(name, "c1")) for name, record in facts.targets.items()}
    if facts.baseline is not None:
        records["plain fine-tuning"] = (facts.baseline, "cb")
    text_loss = [(name, c, record.points("lm_loss") or record.points("loss")) for name, (record, c) in records.items()]
    taught = [(name, c, record.points("fusion_loss")) for name, (record, c) in records.items() if record.sources]
    made = [
        chart("Loss on the text, nats per token", text_loss),
        chart("Loss on what the teachers predict, nats per token", taught),
    ]
    return [found for found in made if found is not None]


@dataclass(frozen=True)
class LeftOut:
    """Rows, or steps, that were not used as they are. used: whether they still took part."""

    where: str
    count: int
    why: str
    used: bool
    keys: list[str] = field(default_factory=list)


def left_out(facts: Facts) -> list[LeftOut]:
    """What was skipped, cut, quarantined or not matched, with reasons and counts."""
    found = []
    for reason, count in (facts.counts.reasons if facts.counts else {}).items():
        keys = facts.counts.keys.get(reason, [])[:_KEYS] if facts.counts else []
        why = REASONS.get(reason, reason)
        if reason == "refused" and facts.counts and facts.counts.first_refusal:
            why += f": {facts.counts.first_refusal}"
        found.append(LeftOut("data", count, why, reason not in DROPPED, keys))
    for name, store in facts.stores.items():
        found += _quarantined(name, store)
    records = facts.targets | ({"plain fine-tuning": facts.baseline} if facts.baseline else {})
    for target, record in records.items():
        for model, keys in record.unmatched.items():
            why = f"not among the rows that {model} was asked about; learned without it"
            found.append(LeftOut(f"training of {target}", len(keys), why, True, keys[:_KEYS]))
        if record.skipped_steps:
            why = "optimizer steps whose loss or gradient was no number"
            found.append(LeftOut(f"training of {target}", record.skipped_steps, why, False))
    return found


def _quarantined(name: str, store: Store) -> list[LeftOut]:
    rows = store.quarantined
    found = [LeftOut(f"capture of {name}", 1, f"quarantined: {row.reason}", False, [row.key]) for row in rows]
    if len(found) > _QUARANTINED:
        rest = [row.key for row in rows[_QUARANTINED:]]
        more = LeftOut(f"capture of {name}", len(rest), "quarantined, as those above", False, rest[:_KEYS])
        return [*found[:_QUARANTINED], more]
    return found


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def given_text(facts: Facts) -> str:
    """What the recipe says that its preset and the defaults do not, as YAML; empty where they are not known here."""
    preset = PRESETS.get(str(facts.value("preset")))
    if preset is None:
        return ""
    bare = {"pivot": {"model": ""}, "sources": [{"model": "(none)"}], "data": {"path": ""}}
    around = {name: {**bare.get(name, {}), **values} for name, values in preset.items() if name != "source"}  # type: ignore[dict-item]
    try:
        known = Recipe.model_validate({**bare, **around}).model_dump(mode="json")
    except ValidationError:
        return ""
    own = {key: value for key, value in facts.recipe.items() if key != "sources"}
    source = known["sources"][0] | preset.get("source", {})
    sources = [_beyond(source, entry) for entry in facts.recipe["sources"]]
    found = {"preset": facts.value("preset"), **_beyond(known, own), "sources": sources}
    return recipe_text({key: found[key] for key in facts.recipe if key in found})


def _beyond(known: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a mapping that another one does not have alike."""
    found = {}
    for key, value in own.items():
        before = known.get(key) if isinstance(known, Mapping) else None
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if inner := _beyond(before, value):
                found[key] = inner
        elif value != before:
            found[key] = value
    return found
