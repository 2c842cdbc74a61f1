"""The report of a run, and an alignment, as one HTML page: no script, nothing loaded, all data escaped.

The templates hold the words and the markup; what they show is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from fusekit.alignment.quality import LOST, MEANING, Sample
from fusekit.artifacts import Artifact, counted, human, joined_hash
from fusekit.data.counts import DROPPED, REASONS
from fusekit.distillation.counts import CHOSEN, counts_by_data
from fusekit.evaluation.table import Table, fixed, tables
from fusekit.layout import BASELINE, MERGED, PIVOT
from fusekit.recipe import Recipe
from fusekit.report import text
from fusekit.report.charts import heat_map, loss_charts, recipe_graph
from fusekit.report.facts import BASELINE_PLACE, Facts, Quality, Training, Worth, merged_targets, source_name
from fusekit.report.models import ModelFacts

if TYPE_CHECKING:
    from fusekit.alignment.quality import AlignmentQuality

CARD = "README.md"
HUB = "https://huggingface.co/"
COLOURS = 8
_KEYS = 3  # of examples, in a table
_QUARANTINED = 10  # examples named per model
_TITLES = {PIVOT: "pivot", BASELINE: "plain fine-tuning", MERGED: "merged model"}
# Invisible characters that turn the direction of whatever follows them, also on this page.
_TURNS = dict.fromkeys(map(ord, "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"), "⋯")


def page(facts: Facts) -> str:
    """The report of a run as HTML. The same artifacts give the same text."""
    colour, everything = colours(facts), made(facts)
    metrics = results(facts)
    rendered = _template("report.html.jinja").render(
        facts=facts,
        title=f"Fusion of {text.listed([text.name(name) for name in facts.sources])} into {_pivot(facts)}",
        lead=lead(facts),
        missing=missing_stages(facts),
        metrics=metrics,
        head=next((table for table in metrics if table.mean(MERGED)), None),
        graph=recipe_graph(facts, colour),
        models=model_rows(facts),
        recipe=recipe_text(facts.recipe),
        given=given_text(facts),
        teachers={name: teachers(record) for name, record in facts.targets.items() if record.sources},
        training=training_rows(facts),
        charts=loss_charts(facts, colour),
        heat=heat_map(facts.coefficients, list(facts.targets)),
        left_out=left_out(facts),
        made=everything,
        times=_times(everything),
        circumstances=_circumstances(everything),
        identities=identities(facts),
        colour_of=lambda model: colour.get(model.removeprefix("sources/").removeprefix("targets/"), "cp"),
        **_shared(),
    )
    return f"{rendered}\n"


def alignment_page(quality: AlignmentQuality, samples: Sequence[Sample]) -> str:
    """An alignment as HTML: the figures over the texts, and samples (:func:`fusekit.alignment.quality.sample_of`)."""
    rendered = _template("alignment.html.jinja").render(
        title=f"Alignment of {text.name(quality.source)} with {text.name(quality.pivot)}",
        quality=Quality.model_validate(quality.to_dict()),
        worth=Worth.model_validate(quality.worth.to_dict()) if quality.worth is not None else None,
        samples=samples,
        **_shared(),
    )
    return f"{rendered}\n"


def _shared() -> dict[str, Any]:
    return {"style": Markup(_style()), "titled": titled}


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("fusekit.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "name": text.name,
        "block": text.block,
        "fixed": fixed,
        "percent": text.percent,
        "seconds": text.seconds,
        "scaled": text.scaled,
        "shorten": text.shorten,
        "listed": text.listed,
        "count": lambda number: f"{number:,.0f}",
        "straight": lambda shown: shown.translate(_TURNS),
        "breakable": lambda place: Markup("/<wbr>").join(text.name(place).split("/")),  # join escapes the parts
    }
    found.filters.update(filters)
    found.globals.update(MEANING=MEANING, LOST=LOST)
    return found


def _template(name: str) -> Any:
    return _environment().get_template(name)


@cache
def _style() -> str:
    return (resources.files("fusekit.report") / "templates" / "style.css").read_text(encoding="utf-8")


def titled(model: str) -> str:
    """What the report calls a model of ``results.json``: ``source llama``, ``target llama``."""
    kind, _, name = model.partition("/")
    if name and kind in ("sources", "targets"):
        return f"{kind.removesuffix('s')} {name}"
    return _TITLES.get(model, model)


def _pivot(facts: Facts) -> str:
    name = facts.model_name(PIVOT).rstrip("/")
    return text.name(name if name.count("/") == 1 and facts.models.get(PIVOT) else name.rsplit("/", 1)[-1])


def colours(facts: Facts) -> dict[str, str]:
    """Class of colour by name; a source, the target that it teaches and its part of the merge have the same."""
    names = [*facts.sources, *(name for name in facts.targets if name not in facts.sources)]
    found = {name: f"c{number % COLOURS + 1}" for number, name in enumerate(names)}
    return found | {PIVOT: "cp", BASELINE: "cb", MERGED: "cm"}


def results(facts: Facts) -> list[Table]:
    """A table per metric."""
    return tables(facts.results.model_dump()) if facts.results else []


def lead(facts: Facts) -> str:
    """What was fused, for somebody who has not heard of it."""
    joint, one = facts.value("fusion.mode") == "joint", len(facts.sources) == 1
    on = f"{facts.counts.kept:,} examples" if facts.counts else "the same examples"
    said = f"One model, the pivot, learned from {counted(len(facts.sources), 'other')}"
    said += f": {text.listed(facts.sources)}. "
    if joint or one:
        said += (
            f"A copy of the pivot, the target, learned what {'it' if one else 'they'} predicted at each token of {on}"
        )
    else:
        said += f"Each taught its own copy of the pivot, its target, what it predicted at each token of {on}"
    said += ", although each model reads text through its own tokenizer. "
    merged = len(merged_targets(facts.merged)) if facts.merged is not None and not joint else 0
    if merged > 1:
        said += f"The {merged} targets were then merged into one model. "
    return f"{said}The result has the architecture and the tokenizer of the pivot, and costs no more to run."


def missing_stages(facts: Facts) -> list[str]:
    """What the run has not done, or not yet, a sentence each."""
    said = [] if facts.counts else ["The data is not prepared yet."]
    live = {source_name(entry) for entry in facts.recipe["sources"] if entry.get("on_the_fly")}
    names = [name for name in (PIVOT, *facts.sources) if name not in live]
    if lacking := [name for name in names if name not in facts.stores or not facts.stores[name].complete]:
        said.append(f"Not captured completely yet: {text.listed(lacking)}.")
    if lacking := [name for name in facts.sources if name not in facts.qualities]:
        said.append(f"Not aligned yet: {text.listed(lacking)}.")
    if not facts.targets:
        said.append("No target is trained yet.")
    if facts.training:
        said.append(f"Training has begun and is not finished: {text.listed(facts.training)}.")
    if facts.value("merge") is None:
        said.append("The recipe has no merge: the targets are the result.")
    elif facts.merged is None:
        said.append("The targets are not merged yet.")
    if facts.value("evaluate") is None:
        said.append("The recipe has no evaluation.")
    elif facts.results is None:
        said.append("Nothing is evaluated yet.")
    return said


class ModelRow(NamedTuple):
    """A parent. url: on the hub, None for a folder. template: where its chat template comes from, and its date."""

    name: str
    model: str
    url: str | None
    known: ModelFacts
    architecture: str
    tokenizer: str
    template: str


def model_rows(facts: Facts) -> list[ModelRow]:
    """The pivot and the sources."""
    entries = {PIVOT: facts.recipe["pivot"]} | dict(zip(facts.sources, facts.recipe["sources"], strict=True))
    rows = []
    for name, entry in entries.items():
        known = facts.models.get(name) or ModelFacts(model=facts.model_name(name))
        on_hub = known.repository and not known.model.endswith(".gguf")
        details = facts.stores[name].spec.details if name in facts.stores else {}
        template = str(details.get("chat_template") or entry.get("chat_template") or "own")
        rows.append(
            ModelRow(
                name,
                str(known.repository if on_hub else known.model),
                f"{HUB}{known.repository}" if known.repository else None,
                known,
                (known.architecture or "").removesuffix("ForCausalLM"),
                _tokenizer(known),
                template + (f" ({details['date']})" if details.get("date") else ""),
            )
        )
    return rows


def _tokenizer(known: ModelFacts) -> str:
    """``BPE, byte-level; 768 tokens``."""
    found = known.tokenizer
    if found is None:
        return ""
    normalises = f"; normalises ({', '.join(found.normalises)})" if found.normalises else ""
    return f"{found.model}, {found.form}{', byte fallback' * found.byte_fallback}; {found.tokens:,} tokens{normalises}"


class Taught(NamedTuple):
    """Examples that training read. rows: how many, over all epochs. shares: taught by each candidate."""

    dataset: str
    rows: float
    shares: dict[str, float]


def teachers(record: Training) -> list[Taught]:
    """Who taught a target, as training counted it: by source of data where there are several, and in total at last."""
    fusion = record.settings.get("fusion")
    pivot = [PIVOT] if not isinstance(fusion, dict) or fusion.get("include_pivot", True) else []
    counted = sorted(counts_by_data(record.counts).items())
    parts = [*(counted if len(counted) > 1 else []), ("all examples", record.counts)]
    return [
        Taught(data, rows, {name: counts.get(CHOSEN + name, 0.0) / rows for name in [*pivot, *record.sources]})
        for data, counts in parts
        if (rows := counts.get("rows", 0.0)) > 0
    ]


class TrainingRow(NamedTuple):
    """A trained model: the last values of its log, None where there are none. linked, taught: shares of labels."""

    name: str
    teachers: list[str]
    steps: float | None
    epochs: float | None
    loss: float | None
    on_text: float | None
    on_teachers: float | None
    linked: float | None
    taught: float | None
    skipped: int
    seconds: float | None


def training_rows(facts: Facts) -> list[TrainingRow]:
    """The targets, and plain fine-tuning."""
    rows = []
    for place, record in facts.trained.items():
        counts, known = record.counts, facts.artifacts.get(place)
        labels, asked = counts.get("labels", 0.0), counts.get("asked", 0.0)
        seconds = _seconds(known.made) if known is not None else None
        rows.append(
            TrainingRow(
                BASELINE if place == BASELINE_PLACE else place,
                record.sources,
                record.last("step"),
                record.last("epoch"),
                record.last("loss"),
                record.last("lm_loss"),
                record.last("fusion_loss") if record.sources else None,
                counts.get("linked", 0.0) / asked if asked else None,
                counts.get("taught", 0.0) / labels if labels and asked else None,
                record.skipped_steps,
                record.last("train_runtime") if seconds is None else seconds,
            )
        )
    return rows


class LeftOut(NamedTuple):
    """Examples or steps that were not used as they are. used: whether they still took part. keys: some of them."""

    where: str
    number: int
    why: str
    used: bool
    keys: list[str]


def left_out(facts: Facts) -> list[LeftOut]:
    """What was skipped, cut, quarantined or not matched, with reasons and counts."""
    found = []
    if facts.counts is not None:
        for reason, count in facts.counts.reasons.items():
            why = REASONS.get(reason, reason)
            if reason == "refused" and facts.counts.first_refusal:
                why += f": {facts.counts.first_refusal}"
            found.append(LeftOut("data", count, why, reason not in DROPPED, facts.counts.keys.get(reason, [])[:_KEYS]))
        for name, count in facts.counts.unused.items():
            found.append(LeftOut("data", count, f"kept, without the field {name}, which is not used", True, []))
    for name, store in facts.stores.items():
        rows, where = store.quarantined, f"capture of {name}"
        found += [LeftOut(where, 1, f"quarantined: {row.reason}", False, [row.key]) for row in rows[:_QUARANTINED]]
        if rest := [row.key for row in rows[_QUARANTINED:]]:
            found.append(LeftOut(where, len(rest), "quarantined, like those above", False, rest[:_KEYS]))
    for place, record in facts.trained.items():
        where = f"training of {'plain fine-tuning' if place == BASELINE_PLACE else place.removeprefix('targets/')}"
        for model, keys in record.unmatched.items():
            why = f"not among the examples captured from {model}; trained without its teaching"
            found.append(LeftOut(where, len(keys), why, True, keys[:_KEYS]))
        if record.skipped_steps:
            why = "optimizer steps whose loss or gradient was non-finite"
            found.append(LeftOut(where, record.skipped_steps, why, False, []))
    return found


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def given_text(facts: Facts) -> str:
    """The recipe's values that are not the defaults, as YAML; empty where this version cannot read the recipe."""
    try:
        known = Recipe.model_validate(facts.recipe)
    except ValidationError:
        return ""
    return recipe_text(known.model_dump(mode="json", exclude_defaults=True))


class Made(NamedTuple):
    """An artifact. place: in the folder of the run. content: hash of its files. seconds: to make it, if known."""

    place: str
    stage: str
    holds: str
    content: str
    seconds: float | None
    circumstances: dict[str, str]


def made(facts: Facts) -> list[Made]:
    """Every artifact, in the order of the stages."""
    data = [_artifact(place, known) for place, known in facts.artifacts.items() if known.stage == "data"]
    stores = [_store(facts, name) for name in (PIVOT, *facts.sources) if name in facts.stores]
    return (
        data + stores + [_artifact(place, known) for place, known in facts.artifacts.items() if known.stage != "data"]
    )


def _artifact(place: str, known: Artifact) -> Made:
    # The card is left out: it is written when everything else is known.
    content = joined_hash(f"{name} {file.xxh3}" for name, file in known.files.items() if name != CARD)
    size = sum(file.size for file in known.files.values())
    holds = f"{counted(len(known.files), 'file')}, {human(size)}"
    return Made(place, known.stage, holds, content, _seconds(known.made), _strings(known.made))


def _store(facts: Facts, name: str) -> Made:
    store, times = facts.stores[name], facts.captures.get(name, {})
    size = human(sum(record.size for record in store.records))
    holds = f"{counted(len(store), 'example')} in {counted(len(store.records), 'shard')}, {size}"
    content = joined_hash(record.xxh3 for record in store.records)
    circumstances = _strings(times) or {str(k): str(v) for k, v in store.manifest.made.items()}
    return Made(f"captures/{name}", "capture", holds, content, _seconds(times), circumstances)


def _seconds(values: Mapping[str, Any]) -> float | None:
    value = values.get("seconds")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _strings(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): value for name, value in values.items() if isinstance(value, str)}


def _circumstances(artifacts: Sequence[Made]) -> dict[str, str]:
    """Hosts and versions of all artifacts; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for one in artifacts:
        for name, value in one.circumstances.items():
            found.setdefault(name, {})[value] = None
    return {name: ", ".join(values) for name, values in found.items()}


def _times(artifacts: Sequence[Made]) -> dict[str, float]:
    """Seconds per stage, and of all stages."""
    found: dict[str, float] = {}
    for one in artifacts:
        if one.seconds is not None:
            found[one.stage] = found.get(one.stage, 0.0) + one.seconds
    return found | ({"all stages": sum(found.values())} if len(found) > 1 else {})


class Identity(NamedTuple):
    """What identifies a model: commit on the hub or hash of its weights, and how it reads text."""

    name: str
    model: str
    weights: str
    tokenizer: str


def identities(facts: Facts) -> list[Identity]:
    """The pivot and the sources, as their captures recorded them."""
    return [
        Identity(name, facts.model_name(name), spec.model_fingerprint, spec.tokenizer)
        for name in (PIVOT, *facts.sources)
        if name in facts.stores
        for spec in [facts.stores[name].spec]
    ]
