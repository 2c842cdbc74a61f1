"""The stage ``merge``: the distilled models into one, by mergekit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs, weights_hash
from fusekit.capturing import models as capture
from fusekit.devices import Need
from fusekit.disk import commit_file, output_lock, recover
from fusekit.hub import Headers
from fusekit.layout import PIVOT, Layout
from fusekit.pipeline.plan import Planner
from fusekit.pipeline.stage import DONE, STALE, Context, Stage, Status, Step, made_from
from fusekit.recipe import Recipe
from fusekit.yaml import Mistake, loads

DRAWING = ("dare_", "della")
"""Beginnings of the names of mergekit's methods that draw random numbers."""
CHANGE_THE_RESULT = (
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "out_shard_size",
    "copy_tokenizer",
    "write_model_card",
)
"""Options of mergekit that change what it writes."""


class Merge(Stage):
    """The distilled models as one, by mergekit."""

    name = "merge"
    places = ("merged", "merge.yml")
    needs = ("data", "distill")

    def artifacts(self, context: Context) -> dict[str, Path]:
        """The merged model, by the merge method, where the recipe merges."""
        section = context.recipe.merge
        return {} if section is None else {str(section.get("merge_method")): context.layout.merged}

    def inputs(self, context: Context, _name: str, _before: Inputs) -> Inputs:
        """Raises StorageError for a distilled model without a manifest.

        The seed counts only for methods that draw, and options of mergekit only where they change what is written.
        """
        section = context.recipe.merge or {}
        options = {name: value for name, value in context.merge_options.items() if name in CHANGE_THE_RESULT}
        seed = context.merge_options.get("random_seed", context.recipe.seed)
        return {
            "merge": dict(section),
            "pivot": context.fingerprint(PIVOT),
            "targets": {path.name: weights_hash(path) for path in context.targets},
            **({"seed": seed} if str(section.get("merge_method")).startswith(DRAWING) else {}),
            **({"options": options} if options else {}),
        }

    def check_place(self, context: Context, _name: str) -> None:
        """Refuse a folder that the merge will replace, but that holds files which are not of the run."""
        final, known = context.layout.merged, artifact.read(context.layout.merged, self.name)
        merged = dict(known.inputs.get("targets") or {}) if known is not None else {}
        there = {path.name: weights_hash(path) for path in context.targets if artifact.read(path) is not None}
        # A model that is to be trained again may come out as the one that was merged: the merge asks once it is there.
        names = {path.name for path in context.targets}
        if known is None or merged.keys() != names or any(merged[name] != found for name, found in there.items()):
            artifact.refuse_foreign(final, self.name)

    def status(self, context: Context, name: str) -> Status:
        """A merge of other models is out of date, and replaced; one of the same, but otherwise, is stale."""
        status, before = super().status(context, name), made_from(context.layout.merged, self.name)
        if status.state != STALE or before is None:
            return status
        if before.get("targets") == self.inputs(context, name, {})["targets"]:
            return status
        return Status(status.folder, note="a merge of other models is there, and is replaced")

    def make(self, context: Context) -> None:
        """Merge the distilled models, each of which is read through first, and write the recipe that repeats it."""
        recipe, layout, targets = context.recipe, context.layout, context.targets
        if recipe.merge is None:
            return
        [name] = self.artifacts(context)
        from mergekit.options import MergeOptions

        from fusekit.merging import Settings
        from fusekit.merging import merge as run_merge

        final, section, folders = layout.merged, dict(recipe.merge), _folders(context, targets)
        names = list(folders)

        def text(head: str, models: Sequence[str]) -> str:
            return f"# {head}\n" + yaml.safe_dump(
                _models(section, models) | section, sort_keys=False, allow_unicode=True
            )

        with output_lock(final):  # a process may have died while the new model took the place of the former
            recover(final)
        done = self.status(context, name).is_done()
        if not done:
            artifact.refuse_foreign(final, self.name)
            for path in targets:
                artifact.require_whole(path)
        by_itself = f"It can be repeated by mergekit alone: mergekit-yaml {layout.merge_recipe.name} OUT"
        data = text(f"The merge of this run. {by_itself}", [str(folder) for folder in folders.values()]).encode()
        # Where the merge is done it may be gone, or name the places that they had before.
        if not layout.merge_recipe.is_file() or layout.merge_recipe.read_bytes() != data:
            commit_file(layout.merge_recipe, data)
        if done:
            return
        started, made_of = time.monotonic(), self.inputs(context, name, {})

        def finish(folder: Path) -> None:
            artifact.seal(folder, self.name, made_of, context.made(started))

        settings = Settings(
            overwrite=artifact.read(final) is not None,
            ignore_estimates=context.ignore_estimates,
            allow_pickle=frozenset(names[len(targets) :] if recipe.pivot.allow_pickle else ()),
            allow_remote_code=frozenset(names if recipe.pivot.trust_remote_code else ()),
            folders=folders,
            say=lambda line: context.say(f"merge: {line}"),
            before_publishing=finish,
        )
        options = MergeOptions(**{"quiet": True, "random_seed": recipe.seed, **context.merge_options})
        # What is published names models, not folders of this machine.
        named = loads(text("The merge of this run, its models by name", names), str(layout.merge_recipe))
        context.say(f"merge: {run_merge(named, final, options, settings)}")

    def mistakes(self, recipe: Recipe, _layout: Layout | None = None) -> list[Mistake]:
        """What mergekit would refuse of a section ``merge``, or ignore a part of, once the models are trained."""
        if recipe.merge is None:
            return []
        from fusekit.merging.lint import check
        from fusekit.yaml import Document, Problems

        names = [f"targets/{name}" for name in recipe.targets] + [recipe.pivot.path] * _takes_base(recipe.merge)
        data = _models(recipe.merge, names) | dict(recipe.merge)
        problems = Problems(Document(data, "", "merge", {}))
        check(data, problems)
        return [Mistake(says, ("merge", *path)) for _, says, path in problems.found]

    def can_compare(self, planner: Planner, _name: str) -> bool:
        """Plain fine-tuning is not merged."""
        steps = [step for step in planner.plan.steps if step.stage == "distill"]
        return all(step.state == DONE for step in steps if step.name in planner.recipe.targets)

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        """From the pivot's tensors as stand-ins for those of models that are to be trained yet."""
        checkpoint, section = planner.models.get(PIVOT), planner.recipe.merge
        if not step.work or checkpoint is None or section is None:
            return []
        headers = checkpoint.headers()
        if headers is None:
            step.disk = checkpoint.weight_bytes
            return []
        needs = expected_needs(headers, section, len(planner.recipe.targets), planner.place / "merged")
        step.disk, step.memory = needs[0].needed, needs[1].needed
        return needs


def _folders(context: Context, targets: Sequence[Path]) -> dict[str, Path]:
    """The models of the merge by name: the distilled models, then the base if the method has one."""
    folders = {f"targets/{path.name}": path for path in targets}
    if _takes_base(context.recipe.merge or {}):
        checkpoint = context.checkpoint(PIVOT)
        folders[checkpoint.repository or Path(checkpoint.choice.model).name] = checkpoint.folder
    return folders


def expected_needs(headers: Headers, section: Mapping[str, Any], targets: int, final: Path) -> list[Need]:
    """Disk and memory of a merge of a pivot and ``targets`` models like it, as the merge itself will estimate them."""
    from mergekit.options import MergeOptions

    from fusekit.merging.plan import Plan as MergePlan
    from fusekit.merging.plan import PlannedTensor, estimate

    tensors = []
    for name, header in headers.items():
        dtype = str(section.get("dtype") or header.dtype)
        inputs = dict.fromkeys(range(targets + 1), header)
        loaded = len(inputs) * header.elements * capture.itemsize(dtype)
        copied = loaded if dtype != header.dtype else 0
        out = str(section.get("out_dtype") or dtype)
        tensors.append(PlannedTensor(name, header.shape, out, False, inputs, loaded, copied))
    method = str(section.get("merge_method"))
    return estimate(MergePlan(method, method, tensors, []), [], MergeOptions(quiet=True), final)


def _models(section: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """mergekit's keys for these models, the base last if the method has one."""
    base = {"base_model": models[-1]} if _takes_base(section) else {}
    return {"models": [{"model": model} for model in models[: len(models) - len(base)]], **base}


def _takes_base(section: Mapping[str, Any]) -> bool:
    """Whether a merge method has a base; where it ignores one, mergekit averages it in like any other model."""
    from mergekit.merge_methods import registered_methods

    import fusekit.merge_methods  # noqa: F401  registers fusekit's methods with mergekit

    found = {known.spec.name: known.spec.contract.base.value for known in registered_methods()}
    return found.get(str(section.get("merge_method"))) != "ignored"
