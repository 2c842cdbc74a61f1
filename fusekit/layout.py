"""Where the artifacts of a run are."""

from __future__ import annotations

from pathlib import Path

PIVOT, BASELINE, MERGED = "pivot", "baseline", "merged"

STAGES = ("data", "respond", "judge", "capture", "align", "distill", "merge", "evaluate", "report")
"""The stages of a run, in order."""

TRAINING, WORK = ".training", ".work"
"""Endings of folders of unfinished work, beside the artifacts that they become: of a distilled model, and of others."""

_FOLDERS = ("data", "responses", "judged", "winners", "captures", "alignment", "targets", "baselines", "evaluation")
_FILES = ("recipe.resolved.yml", "merge.yml", "results.json", "models.json", "report.html")
NAMES = {PIVOT, MERGED, f"judged{WORK}", "logs", *_FOLDERS, *_FILES}
"""What a run may have at the top of its output."""


class Layout:
    """The output folder of a run. out: resolved."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.recipe = out / "recipe.resolved.yml"  # every value, presets and defaults written out
        self.pivot = out / PIVOT  # as a plain checkpoint, where it is a GGUF file
        self.data = out / "data"  # the examples that all models read, cut alike
        self.judged = out / "judged"  # the votes on the answers, and the winners' as examples
        self.targets = out / "targets"  # a plain checkpoint for each
        self.baselines = out / "baselines"  # plain fine-tuning on the same examples, in `sft`
        self.merge_recipe = out / "merge.yml"  # which mergekit-yaml runs by itself
        self.merged = out / MERGED
        self.logs = out / "logs"  # what runs said, with times; not an artifact
        self.begun = out / "logs" / "begun.yml"  # the recipe of an unfinished run, until all artifacts are of it
        self.results = out / "results.json"  # the scores of all models
        self.models = out / "models.json"  # facts about the pivot and the sources, for the report
        self.report = out / "report.html"

    @staticmethod
    def work(folder: Path) -> Path:
        """Where answers or scores are until they become an artifact."""
        return folder.with_name(folder.name + WORK)

    def responses(self, name: str) -> Path:
        """What a model answers to the questions of the data."""
        return self.out / "responses" / name

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

    def evaluation(self, model: str) -> Path:
        """Scores of one model."""
        return self.out / "evaluation" / model


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder that need not exist, in order, without hidden ones."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
