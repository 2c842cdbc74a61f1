"""The report of a run as one HTML page: no script, nothing loaded from elsewhere, everything from data escaped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fusekit.alignment.html import LEGEND, SAMPLE_STYLE, drawn
from fusekit.alignment.samples import LOST, MEANING, Sample
from fusekit.pipeline.layout import BASELINE, MERGED, PIVOT
from fusekit.report import provenance, results, sections, text
from fusekit.report.coefficients import Cell, HeatMap, heat_map
from fusekit.report.facts import Facts
from fusekit.report.teaching import teachers_of

_STRONGEST = 0.85  # opacity of the largest distance from equal shares

_CONTENTS = (
    ("results", "Results"),
    ("models", "What was fused"),
    ("teachers", "Who taught"),
    ("training", "Training"),
    ("alignment", "Alignment"),
    ("merge", "Merge"),
    ("rows", "Rows"),
    ("provenance", "Provenance"),
)
_FUSION = {
    "min_ce": "MinCE: for each target, of the pivot and its teachers, the model that predicted a row best teaches it.",
    "avg_ce": "AvgCE: all teach every row together, the better one of them a little more.",
    "reward_softmax": "All teach every row together, by their rewards.",
}
_EXPLAINED = {
    "bits_per_byte": "Bits per byte: what a model needs to guess a byte of the right answers, and for the ends of its "
    "turns. Lower is better.",
    "exact_match": "Exact match: how often a model writes the right answer itself. Higher is better.",
}
_TITLES = {PIVOT: "pivot", BASELINE: "plain fine-tuning", MERGED: "merged model"}


def page(facts: Facts) -> str:
    """The page. The same artifacts give the same text."""
    metrics = results.metrics_of(facts.results) if facts.results else []
    made, colours = provenance.made(facts), sections.colours(facts)
    head = results.headline(metrics)
    heat = heat_map(facts.coefficients, list(facts.targets)) if facts.coefficients else None
    rendered = (
        environment()
        .get_template("report.html.jinja")
        .render(
            facts=facts,
            title=f"Fusion of {text.listed([text.name(name) for name in facts.sources])} into {_pivot(facts)}",
            lead=sections.lead(facts),
            missing=sections.missing_stages(facts),
            headline=head,
            explained=_EXPLAINED.get(head.metric.name, f"{head.metric.direction.capitalize()}.") if head else "",
            bars=_bars(head, colours) if head else [],
            contents=_CONTENTS,
            metrics=metrics,
            graph=sections.recipe_graph(facts),
            models=sections.model_rows(facts),
            recipe=sections.recipe_text(facts.recipe),
            given=sections.given_text(facts),
            teachers=teachers_of(facts),
            fusion_words=_fusion_words(facts),
            training=sections.training_rows(facts),
            charts=sections.loss_charts(facts),
            meaning=MEANING,
            lost=LOST,
            legend=Markup(LEGEND),
            drawn=_drawn,
            heat=heat,
            heat_colours=[_colour_of(colours)(model) for model in heat.models] if heat else [],
            left_out=sections.left_out(facts),
            times=provenance.times(made),
            circumstances=provenance.circumstances(made),
            identities=provenance.identities(facts),
            artifacts=made,
            colour_of=_colour_of(colours),
            titled=titled,
            style=Markup(_style()),
            sample_style=Markup(SAMPLE_STYLE),
        )
    )
    return f"{rendered}\n"


@cache
def environment() -> Environment:
    """Templates of this package; everything that is put into HTML is escaped."""
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
        "fixed": text.fixed,
        "percent": text.percent,
        "seconds": text.seconds,
        "shorten": text.shorten,
        "breakable": _breakable,
        "tint": _tint,
    }
    found.filters.update(filters)
    return found


def titled(model: str) -> str:
    """What the page calls a model of ``results.json``: ``source llama``, ``target llama``."""
    kind, _, name = model.partition("/")
    if kind == "targets" and name:
        return f"target {name}"
    return f"source {name}" if kind == "sources" and name else _TITLES.get(model, model)


@dataclass(frozen=True)
class Bar:
    """A bar of the headline. width: per cent of the longest. main: whether it is the merged model's."""

    name: str
    shown: str
    width: float
    colour: str
    main: bool = False


def _bars(head: results.Headline, colours: dict[str, str]) -> list[Bar]:
    """Means of the pivot, plain fine-tuning, the targets and the merged model."""
    lines = [line for line in head.metric.lines if line.kind != "source" and head.metric.mean(line.model)]
    cells = {line.model: line.cells[-1] for line in lines}
    most = max((cell.value or 0.0 for cell in cells.values()), default=0.0)
    colour = _colour_of(colours)
    return [
        Bar(
            titled(model),
            cell.shown,
            round(80 * max(cell.value or 0.0, 0.0) / (most or 1.0), 2),
            colour(model),
            model == MERGED,
        )
        for model, cell in cells.items()
    ]


def _pivot(facts: Facts) -> str:
    name = facts.model_name(PIVOT).rstrip("/")
    return text.name(name if name.count("/") == 1 and facts.models.get(PIVOT) else name.rsplit("/", 1)[-1])


def _fusion_words(facts: Facts) -> str:
    function = str(facts.value("fusion.function"))
    level = " Chosen label by label." if facts.value("fusion.level") == "token" else ""
    return _FUSION.get(function, f"Fused by {text.name(function)}.") + level


def _colour_of(colours: dict[str, str]) -> Callable[[str], str]:
    return lambda model: colours.get(model.removeprefix("sources/").removeprefix("targets/"), "cp")


def _tint(cell: Cell, heat: HeatMap, index: int) -> str:
    share = cell.shares[index]
    if share is None or not heat.reach:
        return "0"
    return f"{_STRONGEST * abs(share - heat.equal) / heat.reach:.3f}"


def _breakable(place: str) -> Markup:
    """A path that may be broken after its slashes."""
    return Markup("/<wbr>").join(text.name(place).split("/"))  # join escapes the parts


def _drawn(sample: Sample) -> Markup:
    return Markup(drawn(sample))  # it escapes what it draws


@cache
def _style() -> str:
    return (resources.files("fusekit.report") / "templates" / "style.css").read_text(encoding="utf-8")
