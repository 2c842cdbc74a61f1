"""The tables of the study's README, from the file of figures alone."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.fusion.arms import ARMS, MERGES
from benchmarks.fusion.claims import CLAIMS, Claim
from benchmarks.fusion.scores import Figure

MARKS = ("<!-- tables: written by ", "<!-- end of tables -->")
BITS = "bits_per_byte"
METRICS = {BITS: "bits per byte", "divergence": "KL", "exact_match": "exact match"}
TARGETS = "targets"


@dataclass(frozen=True)
class Results:
    """Values by model, metric, skill and seed. The seed of a model that no seed changes is empty."""

    of: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]

    @classmethod
    def from_figures(cls, figures: Iterable[Figure]) -> Results:
        """Figures by model, metric, skill and seed."""
        found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        for seed, model, skill, metric, value in figures:
            found.setdefault(model, {}).setdefault(metric, {}).setdefault(skill, {})[seed] = value
        return cls(found)

    def skills(self, metric: str) -> list[str]:
        """Skills that a metric is of, sorted."""
        return sorted({skill for by_metric in self.of.values() for skill in by_metric.get(metric, {})})

    def means(self, model: str, metric: str) -> dict[str, float]:
        """The mean over skills by seed. ``ARM/targets`` is the mean of that arm's targets."""
        if model.endswith(f"/{TARGETS}"):
            parts = [self.means(name, metric) for name in self.of if name.startswith(f"{model}/")]
            return {
                seed: statistics.fmean(part[seed] for part in parts)
                for seed in (parts[0] if parts else {})
                if all(seed in part for part in parts)
            }
        by_skill = self.of.get(model, {}).get(metric, {})
        seeds = sorted({seed for values in by_skill.values() for seed in values})
        values_of = {seed: [values[seed] for values in by_skill.values() if seed in values] for seed in seeds}
        return {seed: statistics.fmean(values) for seed, values in values_of.items()}

    def models(self) -> list[str]:
        """Every model: the pivot, the sources, then the arms in the order of :data:`ARMS`, each with its merges."""
        order = ["pivot", *sorted(name for name in self.of if name.startswith("sources/"))]
        single = [arm for arm in ARMS if not ARMS[arm].merged]
        order += sorted(single, key=lambda arm: (arm != "plain", single.index(arm)))
        for arm in (arm for arm in ARMS if ARMS[arm].merged):
            order += sorted(name for name in self.of if name.startswith(f"{arm}/{TARGETS}/"))
            order += [f"{arm}/{TARGETS}", *(f"{arm}/{merge}" for merge in MERGES)]
        return [name for name in order if self.means(name, BITS)]


def title_of(model: str) -> str:
    """What the tables call a model."""
    arm, _, rest = model.partition("/")
    if rest == TARGETS:
        return f"{arm}: mean of the targets"
    if rest in MERGES:
        return f"{arm}: {MERGES[rest].title}"
    return ARMS[model].title if model in ARMS else model


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation; the value alone where there is one."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def overview(results: Results) -> str:
    """A row per model: the mean over skills of every metric."""
    lines = ["| model | bits per byte | KL, bits | exact match, % | seeds |", "|---|---:|---:|---:|---:|"]
    for model in results.models():
        bits, divergence, exact = (list(results.means(model, metric).values()) for metric in METRICS)
        cells = [spread(bits), spread(divergence), spread([100 * value for value in exact], 1), str(len(bits))]
        lines.append(f"| {title_of(model)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_skill(results: Results, metric: str = BITS) -> str:
    """A row per model, a column per skill of one metric."""
    skills = results.skills(metric)
    scale, digits = (100, 1) if metric == "exact_match" else (1, 3)
    lines = [f"| {METRICS[metric]} | {' | '.join(skills)} |", f"|---|{'---:|' * len(skills)}"]
    for model in (name for name in results.models() if metric in results.of.get(name, {})):
        values = results.of[model][metric]
        cells = [spread([scale * value for value in values.get(skill, {}).values()], digits) for skill in skills]
        lines.append(f"| {title_of(model)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(differences: Sequence[float]) -> str:
    """``holds`` where every seed has the better model below the other, and by more than the seeds differ."""
    if len(differences) < 2:
        return "one seed"
    clear = abs(statistics.fmean(differences)) > statistics.stdev(differences)
    if clear and max(differences) < 0:
        return "holds"
    if clear and min(differences) > 0:
        return "does not"
    return "undecided"


def differences(results: Results, claim: Claim, metric: str) -> list[float]:
    """By seed, what the model that should be better has less what the other has."""
    better, worse = results.means(claim.better, metric), results.means(claim.worse, metric)
    return [value - worse[seed] for seed, value in sorted(better.items()) if seed in worse]


def orderings(results: Results) -> str:
    """A row per claim: the differences of means over skills, seed by seed, and what they say."""
    lines = [
        "| claim | better - worse | bits per byte | KL, bits | exact match, % | by bits per byte |",
        "|---|---|---:|---:|---:|---|",
    ]
    for claim in CLAIMS:
        bits, divergence, exact = (differences(results, claim, metric) for metric in METRICS)
        if bits:
            shown = [spread(bits), spread(divergence), spread([100 * value for value in exact], 1)]
            pair = f"{title_of(claim.better)} - {title_of(claim.worse)}"
            lines.append(f"| {claim.text} | {pair} | {' | '.join(shown)} | {verdict(bits)} |")
    return "\n".join(lines)


def tables(figures: Iterable[Figure]) -> str:
    """All tables with their headings."""
    results = Results.from_figures(figures)
    return "\n\n".join(
        [
            "### Every model, means over skills",
            overview(results),
            "### Orderings",
            orderings(results),
            "### Bits per byte by skill",
            by_skill(results),
            "### Divergence by skill, bits a question",
            by_skill(results, "divergence"),
            "### Exact match by skill, per cent",
            by_skill(results, "exact_match"),
        ]
    )


def put_between_marks(text: str, between: str) -> str:
    """The text with everything between the two marks replaced. Raises ValueError where a mark is missing."""
    whole = f"({MARKS[0]}\\S+ -->).*({MARKS[1]})"
    found, count = re.subn(whole, lambda match: f"{match[1]}\n{between}\n{match[2]}", text, flags=re.DOTALL)
    if not count:
        raise ValueError(f"there is no {MARKS[0]!r} followed by {MARKS[1]!r}")
    return found
