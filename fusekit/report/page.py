"""The report of a run, and an alignment, as one HTML page: no script, nothing loaded, all data escaped.

The templates hold the words and the markup; what they show is computed here, as plain values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from fusekit.alignment.quality import LOST, MEANING, Sample
from fusekit.artifacts import Artifact, joined_hash
from fusekit.data.reading import DROPPED, REASONS
from fusekit.disk import counted, human
from fusekit.distillation.dataset import CHOSEN, counts_by_data
from fusekit.evaluation.table import Table, fixed, tables
from fusekit.layout import BASELINE, MERGED, PIVOT
from fusekit.recipe import Recipe
from fusekit.report import text
from fusekit.report.charts import heat_map, loss_charts, recipe_graph
from fusekit.report.facts import BASELINE_PLACE, Facts, ModelFacts, Quality, Training, Worth

if TYPE_CHECKING:
    from fusekit.alignment.quality import AlignmentQuality

CARD = "README.md"
COLOURS = 8
_KEYS = 3  # of examples, in a table
_QUARANTINED = 10  # examples named per model
_KINDS = {"sources": "source", "targets": "distilled"}
_TITLES = {PIVOT: "pivot", BASELINE: "plain fine-tuning", MERGED: "merged model"}
# Invisible characters that turn the direction of whatever follows them, also on this page.
_TURNS = dict.fromkeys(map(ord, "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"), "⋯")


def titled(model: str) -> str:
    """What the report calls a model of ``results.json``: ``source llama``, ``distilled llama``."""
    kind, _, name = model.partition("/")
    if name and kind in _KINDS:
        return f"{_KINDS[kind]} {name}"
    return _TITLES.get(model, model)


TEMPLATES = Environment(
    loader=PackageLoader("fusekit.report"),
    autoescape=lambda name: name is not None and ".html" in name,  # that of the card escapes with its own filters
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters.update(
    name=text.name,
    block=text.block,
    fixed=fixed,
    percent=text.percent,
    seconds=text.seconds,
    scaled=text.scaled,
    shorten=text.shorten,
    listed=text.listed,
    count=lambda number: f"{number:,.0f}",
    straight=lambda shown: shown.translate(_TURNS),
    breakable=lambda place: Markup("/<wbr>").join(text.name(place).split("/")),  # join escapes the parts
)
_STYLE = (resources.files("fusekit.report") / "templates" / "style.css").read_text(encoding="utf-8")
TEMPLATES.globals.update(MEANING=MEANING, LOST=LOST, titled=titled, style=Markup(_STYLE))


def page(facts: Facts) -> str:
    """The report of a run as HTML. The same artifacts give the same text."""
    colour, everything, metrics = _colours(facts), made(facts), results(facts)
    pivot = facts.model_name(PIVOT).rstrip("/")
    pivot = pivot if pivot.count("/") == 1 and facts.models.get(PIVOT) else pivot.rsplit("/", 1)[-1]
    return _rendered(
        "report.html.jinja",
        facts=facts,
        title=f"Fusion of {text.listed([text.name(name) for name in facts.sources])} into {text.name(pivot)}",
        lead=lead(facts),
        missing=_missing_stages(facts),
        metrics=metrics,
        head=next((table for table in metrics if table.mean(MERGED)), None),
        graph=recipe_graph(facts, colour),
        models=model_rows(facts),
        recipe=recipe_text(facts.recipe),
        given=given_text(facts.recipe),
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
    )


def alignment_page(quality: AlignmentQuality, samples: Sequence[Sample]) -> str:
    """An alignment as HTML: the figures over the texts, and samples (:func:`fusekit.alignment.quality.sample_of`)."""
    return _rendered(
        "alignment.html.jinja",
        title=f"Alignment of {text.name(quality.source)} with {text.name(quality.pivot)}",
        quality=Quality.model_validate(quality.to_dict()),
        worth=Worth.model_validate(quality.worth.to_dict()) if quality.worth is not None else None,
        samples=samples,
    )


def _rendered(template: str, **values: Any) -> str:
    return TEMPLATES.get_template(template).render(**values) + "\n"


def _colours(facts: Facts) -> dict[str, str]:
    """Class of colour by name; a source, the model that it teaches and its part of the merge have the same."""
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
    if joint or one:
        learned = f"A copy of the pivot, the distilled model, learned what {'it' if one else 'they'} predicted"
    else:
        learned = "Each taught its own copy of the pivot, its distilled model, what it predicted"
    merged = (
        ""
        if joint or len(facts.merged_from) < 2
        else (f"The {len(facts.merged_from)} distilled models were then merged into one. ")
    )
    return (
        f"One model, the pivot, learned from {counted(len(facts.sources), 'other')}: {text.listed(facts.sources)}. "
        f"{learned} at each token of {on}, although each model reads text through its own tokenizer. {merged}"
        "The result has the architecture and the tokenizer of the pivot, and costs no more to run."
    )


def _missing_stages(facts: Facts) -> list[str]:
    """What the run has not done, or not yet, a sentence each."""
    captured = [name for name, entry in facts.entries.items() if name == PIVOT or not entry.get("on_the_fly")]
    lacking = [name for name in captured if name not in facts.stores or not facts.stores[name].complete]
    unaligned = [name for name in facts.sources if name not in facts.qualities]
    merges, evaluates = facts.value("merge") is not None, facts.value("evaluate") is not None
    said = {
        "The data is not prepared yet.": not facts.counts,
        f"Not captured completely yet: {text.listed(lacking)}.": lacking,
        f"Not aligned yet: {text.listed(unaligned)}.": unaligned,
        "No model is distilled yet.": not facts.targets,
        f"Training has begun and is not finished: {text.listed(facts.training)}.": facts.training,
        "The recipe has no merge: the distilled models are the result.": not merges,
        "The distilled models are not merged yet.": merges and facts.merged is None,
        "The recipe has no evaluation.": not evaluates,
        "Nothing is evaluated yet.": evaluates and facts.results is None,
    }
    return [line for line, applies in said.items() if applies]


def model_rows(facts: Facts) -> list[dict[str, Any]]:
    """The pivot and the sources. template: where the chat template comes from, and its date."""
    rows = []
    for name, entry in facts.entries.items():
        details = facts.stores[name].spec.details if name in facts.stores else {}
        template = str(details.get("chat_template") or entry.get("chat_template") or "own")
        template += f" ({details['date']})" if details.get("date") else ""
        known = facts.models.get(name) or ModelFacts(model=facts.model_name(name))
        rows.append({"name": name, "known": known, "template": template})
    return rows


def teachers(record: Training) -> list[dict[str, Any]]:
    """Who taught a distilled model, as training counted: by source of data where there are several, last in total.

    rows: examples that training read, over all epochs. shares: taught by each candidate.
    """
    fusion = record.settings.get("fusion")
    pivot = [PIVOT] if not isinstance(fusion, dict) or fusion.get("include_pivot", True) else []
    by_data = sorted(counts_by_data(record.counts).items())
    return [
        {
            "dataset": data,
            "rows": rows,
            "shares": {name: counts.get(CHOSEN + name, 0.0) / rows for name in [*pivot, *record.sources]},
        }
        for data, counts in [*(by_data if len(by_data) > 1 else []), ("all examples", record.counts)]
        if (rows := counts.get("rows", 0.0)) > 0
    ]


def training_rows(facts: Facts) -> list[dict[str, Any]]:
    """The distilled models and plain fine-tuning, with the last values of their logs. linked, taught: shares."""
    rows = []
    for place, record in facts.trained.items():
        counts, known = record.counts, facts.artifacts.get(place)
        labels, asked = counts.get("labels", 0.0), counts.get("asked", 0.0)
        seconds = _seconds(known.made) if known is not None else None
        rows.append(
            {
                "name": BASELINE if place == BASELINE_PLACE else place,
                "record": record,
                "linked": counts.get("linked", 0.0) / asked if asked else None,
                "taught": counts.get("taught", 0.0) / labels if labels and asked else None,
                "seconds": record.last("train_runtime") if seconds is None else seconds,
            }
        )
    return rows


def left_out(facts: Facts) -> list[dict[str, Any]]:
    """What was skipped, cut, quarantined or not matched: where, how many, why, whether it was still used, and keys."""
    found = []

    def add(where: str, number: int, why: str, used: bool, keys: Sequence[str] = ()) -> None:
        found.append({"where": where, "number": number, "why": why, "used": used, "examples": keys[:_KEYS]})

    if facts.counts is not None:
        for reason, count in facts.counts.reasons.items():
            refusal = f": {facts.counts.first_refusal}" if reason == "refused" and facts.counts.first_refusal else ""
            why, used = REASONS.get(reason, reason) + refusal, reason not in DROPPED
            add("data", count, why, used, facts.counts.keys.get(reason, []))
        for name, count in facts.counts.unused.items():
            add("data", count, f"kept, without the field {name}, which is not used", True)
    for name, store in facts.stores.items():
        rows, where = store.quarantined, f"capture of {name}"
        for row in rows[:_QUARANTINED]:
            add(where, 1, f"quarantined: {row.reason}", False, [row.key])
        if rest := [row.key for row in rows[_QUARANTINED:]]:
            add(where, len(rest), "quarantined, like those above", False, rest)
    for place, record in facts.trained.items():
        where = f"training of {'plain fine-tuning' if place == BASELINE_PLACE else place.removeprefix('targets/')}"
        for model, keys in record.unmatched.items():
            add(
                where,
                len(keys),
                f"not among the examples captured from {model}; trained without its teaching",
                True,
                keys,
            )
        if record.skipped_steps:
            add(where, record.skipped_steps, "optimizer steps whose loss or gradient was non-finite", False)
    return found


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def given_text(recipe: Mapping[str, Any]) -> str:
    """The values that are not the defaults, as YAML; empty where this version cannot read the recipe."""
    try:
        return recipe_text(Recipe.model_validate(recipe).model_dump(mode="json", exclude_defaults=True))
    except ValidationError:
        return ""


def made(facts: Facts) -> list[dict[str, Any]]:
    """Every artifact, in the order of the stages: what made it, what it holds, its hash, seconds and circumstances."""
    found = {place: _artifact(place, known) for place, known in facts.artifacts.items()}
    stores = [_store(facts, name) for name in (PIVOT, *facts.sources) if name in facts.stores]
    data = [one for one in found.values() if one["stage"] == "data"]
    return data + stores + [one for one in found.values() if one["stage"] != "data"]


def _artifact(place: str, known: Artifact) -> dict[str, Any]:
    # The card is left out: it is written when everything else is known.
    content = joined_hash(f"{name} {file.xxh3}" for name, file in known.files.items() if name != CARD)
    size = human(sum(file.size for file in known.files.values()))
    return _made(place, known.stage, f"{counted(len(known.files), 'file')}, {size}", content, known.made)


def _store(facts: Facts, name: str) -> dict[str, Any]:
    store, times = facts.stores[name], facts.captures.get(name, {})
    size = human(sum(record.size for record in store.records))
    holds = f"{counted(len(store), 'example')} in {counted(len(store.records), 'shard')}, {size}"
    content = joined_hash(record.xxh3 for record in store.records)
    if not any(isinstance(value, str) for value in times.values()):
        times = {str(k): str(v) for k, v in store.manifest.made.items()} | {"seconds": times.get("seconds")}
    return _made(f"captures/{name}", "capture", holds, content, times)


def _made(place: str, stage: str, holds: str, content: str, circumstances: Mapping[str, Any]) -> dict[str, Any]:
    strings = {str(name): value for name, value in circumstances.items() if isinstance(value, str)}
    one = {"place": place, "stage": stage, "holds": holds, "content": content}
    return one | {"seconds": _seconds(circumstances), "circumstances": strings}


def _seconds(values: Mapping[str, Any]) -> float | None:
    value = values.get("seconds")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _circumstances(artifacts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Hosts and versions of all artifacts; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for one in artifacts:
        for name, value in one["circumstances"].items():
            found.setdefault(name, {})[value] = None
    return {name: ", ".join(values) for name, values in found.items()}


def _times(artifacts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds per stage, and of all stages."""
    found: dict[str, float] = {}
    for one in artifacts:
        if one["seconds"] is not None:
            found[one["stage"]] = found.get(one["stage"], 0.0) + one["seconds"]
    return found | ({"all stages": sum(found.values())} if len(found) > 1 else {})


def identities(facts: Facts) -> list[dict[str, str]]:
    """What identifies the pivot and the sources, as their captures recorded it: weights, and how they read text."""
    return [
        {"name": name, "model": facts.model_name(name), "weights": spec.model_fingerprint, "tokenizer": spec.tokenizer}
        for name in (PIVOT, *facts.sources)
        if name in facts.stores
        for spec in [facts.stores[name].spec]
    ]
