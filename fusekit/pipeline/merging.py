"""The stage ``merge``: the targets into one model, by mergekit."""

from __future__ import annotations

import json
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


def merge(context: Context) -> None:
    """Merge the targets into one model, and leave the recipe that does it behind.

    Every target is read through first: one whose bytes are not those that were committed is refused.
    """
    if context.recipe.merge is None:
        return
    from mergekit.options import MergeOptions

    from fusekit.merging import Settings
    from fusekit.merging import merge as run_merge

    layout, targets = context.layout, context.targets
    models = _models(context.recipe, targets, str(context.readers.checkpoint(PIVOT).folder))
    inputs, final = merge_inputs(context, targets), layout.merged
    with output_lock(final):
        recover(final)  # of a process that died between moving a former model aside and putting the new one in place
    known = artifact.read(final)
    text = (
        "# The merge of this run. It can be repeated by mergekit alone: mergekit-yaml "
        f"{layout.merge_recipe.name} OUT\n" + _dumped(models | dict(context.recipe.merge))
    )
    if known is not None and not artifact.differences(known.inputs, artifact.plain(inputs)):
        _write_recipe(layout.merge_recipe, text)  # it may be gone, or name the places that the targets had before
        return
    # Of other targets it is out of date, and is replaced; of the same ones somebody may still want it.
    if known is not None and known.inputs.get("targets") == inputs["targets"]:
        context.done(final, inputs)  # says what differs
    artifact.refuse_foreign(final)
    for path in targets:
        artifact.require_whole(path)
    _write_recipe(layout.merge_recipe, text)
    started = time.monotonic()

    def finish(folder: Path) -> None:
        name_models(folder, _names(context, targets, models), text)
        artifact.seal(folder, "merge", inputs, context.made(started))

    used = [*(str(path) for path in targets), *([models["base_model"]] if "base_model" in models else [])]
    pivot = context.recipe.pivot
    settings = Settings(
        overwrite=known is not None,
        ignore_estimates=context.ignore_estimates,
        allow_pickle=frozenset(used[len(targets) :] if pivot.allow_pickle else ()),
        allow_remote_code=frozenset(used if pivot.trust_remote_code else ()),
        say=lambda line: context.say(f"merge: {line}"),
        before_publishing=finish,
    )
    options = MergeOptions(**{"quiet": True, "random_seed": context.recipe.seed, **context.merge_options})
    merged = run_merge(layout.merge_recipe, final, options, settings)
    context.say(f"merge: {merged}")


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
    data = _models(recipe, [target.folder for target in targets], recipe.pivot.path) | dict(recipe.merge)
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


def name_models(folder: Path, names: Mapping[str, str], recipe: str) -> None:
    """Name models in what is published beside the weights, where mergekit and the merge wrote paths of this machine.

    Args:
        folder: of the merged model.
        names: by path.
        recipe: of the merge, as the card and ``mergekit_config.yml`` have it.
    """
    from fusekit.merging.card import PROVENANCE_FILE

    merge = yaml.safe_load(recipe)
    merge["models"] = [{**entry, "model": names.get(entry["model"], entry["model"])} for entry in merge["models"]]
    if "base_model" in merge:
        merge["base_model"] = names.get(merge["base_model"], merge["base_model"])
    named = _dumped(merge)
    if (config := folder / "mergekit_config.yml").is_file():
        config.write_text(f"# The merge of this run, its models by name\n{named}", encoding="utf-8")
    if (card := folder / "README.md").is_file():
        text = card.read_text(encoding="utf-8").replace(recipe, named)
        for path in sorted(names, key=len, reverse=True):
            text = text.replace(path, names[path])
        card.write_text(text, encoding="utf-8")
    if (coefficients := folder / PROVENANCE_FILE).is_file():
        found = _renamed(json.loads(coefficients.read_bytes()), names)
        coefficients.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def _names(context: Context, targets: list[Path], models: Mapping[str, Any]) -> dict[str, str]:
    """What models are called where paths of this machine are nobody's business."""
    names = {str(path): f"targets/{path.name}" for path in targets}
    if "base_model" in models:
        checkpoint = context.readers.checkpoint(PIVOT)
        names[models["base_model"]] = checkpoint.repository or Path(checkpoint.choice.model).name
    return names


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


def _models(recipe: Recipe, targets: list[Path], pivot: str) -> dict[str, Any]:
    models: dict[str, Any] = {"models": [{"model": str(path)} for path in targets]}
    if _takes_base(str((recipe.merge or {}).get("merge_method"))):
        models["base_model"] = pivot
    return models


def _takes_base(method: str) -> bool:
    """Whether a merge method has a base; where it ignores one, mergekit averages it in like any other model."""
    from mergekit.merge_methods import registered_methods

    import fusekit.merge_methods  # noqa: F401  registers fusekit's methods with mergekit

    found = {known.spec.name: known.spec.contract.base.value for known in registered_methods()}
    return found.get(method) != "ignored"
