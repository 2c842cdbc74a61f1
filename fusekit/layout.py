"""Where the artifacts of a run are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PIVOT = "pivot"
BASELINE = "baseline"
MERGED = "merged"

STAGES = ("data", "respond", "judge", "capture", "align", "distill", "merge", "evaluate", "report")
"""The stages of a run, in order."""

SHARDS = ".work"
"""Ending of a folder of shards, beside the artifact that they become."""

NAMES = {
    PIVOT,
    "data",
    "responses",
    "judged",
    f"judged{SHARDS}",
    "winners",
    "captures",
    "alignment",
    "targets",
    "baselines",
    MERGED,
    "evaluation",
    "logs",
} | {
    "recipe.resolved.yml",
    "merge.yml",
    "results.json",
    "models.json",
    "report.html",
}
"""What a run may have at the top of its output."""


@dataclass(frozen=True)
class Layout:
    """The output folder of a run. out: resolved."""

    out: Path

    @property
    def recipe(self) -> Path:
        """Every value of the recipe, presets and defaults written out."""
        return self.out / "recipe.resolved.yml"

    @property
    def pivot(self) -> Path:
        """The pivot as a plain checkpoint, where it is a GGUF file."""
        return self.out / PIVOT

    @property
    def data(self) -> Path:
        """The rows that all models read, cut alike."""
        return self.out / "data"

    def responses(self, name: str) -> Path:
        """What a model answers to the questions of the data."""
        return self.out / "responses" / name

    @property
    def judged(self) -> Path:
        """The votes on the answers, and the winners' as rows."""
        return self.out / "judged"

    @staticmethod
    def shards(folder: Path) -> Path:
        """Where the shards of answers or scores are until they become an artifact."""
        return folder.with_name(folder.name + SHARDS)

    def winners(self, name: str) -> Path:
        """The top-k store of a model over the winners' answers: of the pivot over all, of a source over its own."""
        return self.out / "winners" / name

    def store(self, name: str) -> Path:
        """The top-k store of a model: ``pivot``, or a source's name."""
        return self.out / "captures" / name

    def alignment(self, source: str) -> Path:
        """Vocabulary map and quality of a pair."""
        return self.out / "alignment" / source

    def worth(self, source: str) -> Path:
        """What a source is worth as a teacher; a file of its alignment, there once both models are captured."""
        return self.alignment(source) / "worth.json"

    @property
    def targets(self) -> Path:
        """A plain checkpoint per target."""
        return self.out / "targets"

    @property
    def baselines(self) -> Path:
        """Plain fine-tuning on the same rows, in ``sft``."""
        return self.out / "baselines"

    @property
    def merge_recipe(self) -> Path:
        """What mergekit-yaml runs by itself."""
        return self.out / "merge.yml"

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.out / MERGED

    def evaluation(self, model: str) -> Path:
        """Scores of one model."""
        return self.out / "evaluation" / model

    @property
    def logs(self) -> Path:
        """What runs said, with times; no artifact."""
        return self.out / "logs"

    @property
    def begun(self) -> Path:
        """The recipe of a run that has begun, where another one made what is there; gone once all is of it."""
        return self.out / "logs" / "begun.yml"

    @property
    def results(self) -> Path:
        """Scores of all models."""
        return self.out / "results.json"

    @property
    def models(self) -> Path:
        """What is known of the pivot and the sources, for the report."""
        return self.out / "models.json"

    @property
    def times(self) -> Path:
        """How long captures took, for the report."""
        return self.out / "logs" / "captures.json"

    @property
    def report(self) -> Path:
        """What the run was, as one page."""
        return self.out / "report.html"
