"""The stage ``merge``: the targets into one model, by mergekit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusekit import artifacts as artifact
from fusekit.artifacts import commit_file, output_lock, recover
from fusekit.errors import RecipeError, StorageError
from fusekit.pipeline.layout import PIVOT
from fusekit.pipeline.stages import Context, merge_inputs
from fusekit.pipeline.vouching import weights_hash
from fusekit.recipe import Recipe
from fusekit.yaml import loads


def merge(context: Context) -> None:
    """Merge the targets into one model, and leave the recipe that does it behind.

    Every target is read through first: one whose bytes are not those that were committed is refused.
    """
    if context.recipe.merge is None:
        return
    from mergekit.options import MergeOptions

    from fusekit.merging import Settings
    from fusekit.merging import merge as run_merge

    layout, targets, section = context.layout, context.targets, dict(context.recipe.merge)
    folders = _folders(context, targets)
    names, paths = list(folders), [str(folder) for folder in folders.values()]
    inputs, final = merge_inputs(context, targets), layout.merged
    with output_lock(final):
        recover(final)  # of a process that died between moving a former model aside and putting the new one in place
    known = artifact.read(final)
    repeatable = (
        f"# The merge of this run. It can be repeated by mergekit alone: mergekit-yaml {layout.merge_recipe.name} OUT\n"
        + _dumped(_models(section, paths) | section)
    )
    if known is not None and not artifact.differences(known.inputs, artifact.plain(inputs)):
        _write_recipe(layout.merge_recipe, repeatable)  # it may be gone, or name the places that the targets had before
        return
    # Of other targets it is out of date, and is replaced; of the same ones somebody may still want it.
    if known is not None and known.inputs.get("targets") == inputs["targets"]:
        context.done(final, inputs)  # says what differs
    artifact.refuse_foreign(final)
    for path in targets:
        artifact.require_whole(path)
    _write_recipe(layout.merge_recipe, repeatable)
    started = time.monotonic()

    def finish(folder: Path) -> None:
        artifact.seal(folder, "merge", inputs, context.made(started))

    pivot = context.recipe.pivot
    settings = Settings(
        overwrite=known is not None,
        ignore_estimates=context.ignore_estimates,
        allow_pickle=frozenset(names[len(targets) :] if pivot.allow_pickle else ()),
        allow_remote_code=frozenset(names if pivot.trust_remote_code else ()),
        folders=folders,
        say=lambda line: context.say(f"merge: {line}"),
        before_publishing=finish,
    )
    options = MergeOptions(**{"quiet": True, "random_seed": context.recipe.seed, **context.merge_options})
    # What is published names models, not folders of this machine.
    named = f"# The merge of this run, its models by name\n{_dumped(_models(section, names) | section)}"
    merged = run_merge(loads(named, str(layout.merge_recipe)), final, options, settings)
    context.say(f"merge: {merged}")


def _folders(context: Context, targets: list[Path]) -> dict[str, Path]:
    """The models of the merge by name: the targets, then the base if the method has one."""
    folders = {f"targets/{path.name}": path for path in targets}
    if _takes_base(context.recipe.merge or {}):
        checkpoint = context.readers.checkpoint(PIVOT)
        folders[checkpoint.repository or Path(checkpoint.choice.model).name] = checkpoint.folder
    return folders


def _models(section: Mapping[str, Any], models: list[str]) -> dict[str, Any]:
    """mergekit's keys for these models, the base last if the method has one."""
    base = {"base_model": models[-1]} if _takes_base(section) else {}
    return {"models": [{"model": model} for model in models[: len(models) - len(base)]], **base}


def _takes_base(section: Mapping[str, Any]) -> bool:
    """Whether a merge method has a base; where it ignores one, mergekit averages it in like any other model."""
    from mergekit.merge_methods import registered_methods

    import fusekit.merge_methods  # noqa: F401  registers fusekit's methods with mergekit

    found = {known.spec.name: known.spec.contract.base.value for known in registered_methods()}
    return found.get(str(section.get("merge_method"))) != "ignored"


def check_place(context: Context) -> None:
    """Refuse a merged model that is to be replaced, but holds files that are not of the run. Raises StorageError."""
    if context.recipe.merge is None:
        return
    final, known = context.layout.merged, artifact.read(context.layout.merged)
    if known is None:
        artifact.refuse_foreign(final)
        if content := sorted(final.iterdir()) if final.is_dir() else []:
            raise StorageError(
                f"{final} holds {content[0].name}, a folder that no run made: move it away, or choose another output; "
                "nothing was touched"
            )
        return
    merged = dict(known.inputs.get("targets") or {})
    there = {path.name: weights_hash(path) for path in context.targets if artifact.read(path) is not None}
    # A target that is to be trained again may come out as the one that was merged: the merge asks once it is there.
    if merged.keys() != {path.name for path in context.targets} or any(merged[name] != there[name] for name in there):
        artifact.refuse_foreign(final)


def check_section(recipe: Recipe) -> None:
    """Refuse a section ``merge`` that mergekit would refuse, or ignore a part of, once the targets are trained.

    Raises RecipeError with every problem and where it was written.
    """
    if recipe.merge is None:
        return
    from fusekit.distillation.outputs import targets_of
    from fusekit.merging.lint import check
    from fusekit.yaml import Document, Problems

    targets = targets_of(recipe.settings, [source.label for source in recipe.sources], Path("targets"))
    names = [str(target.folder) for target in targets] + [recipe.pivot.path] * _takes_base(recipe.merge)
    data = _models(recipe.merge, names) | dict(recipe.merge)
    problems = Problems(Document(data, "", "merge", {}))
    check(data, problems)
    found = [f"{recipe.place(('merge', *path))}: {message}" for _, message, path in problems.found]
    share = _selected(recipe.merge)
    if not found and len(targets) == 1 and share is not None and share < 1:
        found.append(
            f"{recipe.place(('merge', 'parameters', 'select_topk'))}: select_topk is {share}, but there is one target "
            f"({targets[0].name}), and of one SCE has no variance to rank: set select_topk to 1, or leave the merge "
            "out with `merge: null`"
        )
    if len(found) == 1:
        raise RecipeError(found[0])
    if found:
        raise RecipeError(f"merge: {len(found)} problems\n" + "\n".join(f"  {line}" for line in found))


def _selected(section: Mapping[str, Any]) -> float | None:
    """The share that SCE selects by, where the section gives one for all tensors."""
    parameters = section.get("parameters")
    share = parameters.get("select_topk") if isinstance(parameters, dict) else None
    of_sce = section.get("merge_method") == "fusechat_sce"
    return float(share) if of_sce and isinstance(share, (int, float)) else None


def _dumped(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)


def _write_recipe(path: Path, text: str) -> None:
    """Leave a file that says the same alone."""
    data = text.encode()
    if not path.is_file() or path.read_bytes() != data:
        commit_file(path, lambda file: file.write(data))


def check_merged(context: Context) -> None:
    """Refuse a merged model that is not there or was made from something else. Raises StorageError."""
    if context.recipe.merge is None:
        return
    if context.done(context.layout.merged, artifact.plain(merge_inputs(context, context.targets))) is None:
        raise StorageError(f"{context.layout.merged} is not there: the stage `merge` comes first")
