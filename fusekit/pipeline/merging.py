"""The stage ``merge``: the targets into one model, by mergekit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs, commit_file, output_lock, recover, weights_hash
from fusekit.capture import estimate as capture
from fusekit.capture.models import Checkpoint
from fusekit.errors import RecipeError, StorageError
from fusekit.hub import DTYPES, Headers, TensorHeader, read_headers
from fusekit.pipeline.context import DONE, STALE, Context, Status
from fusekit.pipeline.layout import PIVOT
from fusekit.recipe import Recipe
from fusekit.resources import Need

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


def artifacts(context: Context) -> dict[str, Path]:
    """The merged model, by the merge method, where the recipe merges."""
    section = context.recipe.merge
    return {} if section is None else {str(section.get("merge_method")): context.layout.merged}


def inputs(context: Context) -> Inputs:
    """What the merged model is made from. Raises StorageError for a target without a manifest.

    The seed counts only for methods that draw, and options of mergekit only where they change what is written.
    """
    section = context.recipe.merge or {}
    options = {name: value for name, value in context.merge_options.items() if name in CHANGE_THE_RESULT}
    seed = context.merge_options.get("random_seed", context.recipe.seed)
    return {
        "merge": dict(section),
        "pivot": context.readers.fingerprint(PIVOT),
        "targets": {path.name: weights_hash(path) for path in context.targets},
        **({"seed": seed} if str(section.get("merge_method")).startswith(DRAWING) else {}),
        **({"options": options} if options else {}),
    }


def check_place(context: Context, _name: str = "") -> None:
    """Refuse a merged model that is to be replaced, but holds files that are not of the run. Raises StorageError."""
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


def status(context: Context, _name: str = "") -> Status:
    """Of the merged model. The targets have to be there.

    One of other targets is out of date, and to be replaced; one of the same targets, but merged otherwise, is stale.
    """
    check_place(context)
    known, now = artifact.read(context.layout.merged), inputs(context)
    if known is None:
        return Status(context.layout.merged)
    changed = artifact.differences(known.inputs, now)
    if not changed:
        return Status(context.layout.merged, DONE)
    if known.inputs.get("targets") == now["targets"]:
        return Status(context.layout.merged, STALE, tuple(changed))
    return Status(context.layout.merged, note="a merge of other targets is there; it is replaced in one step")


def make(context: Context) -> None:
    """Merge the targets into one model, and leave the recipe that does it behind.

    Every target is read through first: one whose bytes are not those that were committed is refused.
    """
    recipe, layout, targets = context.recipe, context.layout, context.targets
    if recipe.merge is None:
        return
    from mergekit.options import MergeOptions

    from fusekit.merging import Settings
    from fusekit.merging import merge as run_merge

    final = layout.merged
    with output_lock(final):
        recover(final)  # of a process that died between moving a former model aside and putting the new one in place
    models = _models(recipe, targets, str(context.readers.checkpoint(PIVOT).folder))
    text = (
        "# The merge of this run. It can be repeated by mergekit alone: mergekit-yaml "
        f"{layout.merge_recipe.name} OUT\n" + _dumped(models | dict(recipe.merge))
    )
    if status(context).is_done():
        _write_recipe(layout.merge_recipe, text)  # it may be gone, or name the places that the targets had before
        return
    artifact.refuse_foreign(final)
    for path in targets:
        artifact.require_whole(path)
    _write_recipe(layout.merge_recipe, text)
    started, made_from = time.monotonic(), inputs(context)

    def finish(folder: Path) -> None:
        name_models(folder, _names(context, models), text)
        artifact.seal(folder, "merge", made_from, context.made(started))

    bases = [models["base_model"]] if "base_model" in models else []
    settings = Settings(
        overwrite=artifact.read(final) is not None,
        ignore_estimates=context.ignore_estimates,
        allow_pickle=frozenset(bases if recipe.pivot.allow_pickle else ()),
        allow_remote_code=frozenset([*map(str, targets), *bases] if recipe.pivot.trust_remote_code else ()),
        say=lambda line: context.say(f"merge: {line}"),
        before_publishing=finish,
    )
    options = MergeOptions(**{"quiet": True, "random_seed": recipe.seed, **context.merge_options})
    merged = run_merge(layout.merge_recipe, final, options, settings)
    context.say(f"merge: {merged}")


def check_section(recipe: Recipe) -> None:
    """Refuse a section ``merge`` that mergekit would refuse, or ignore a part of, once the targets are trained.

    Raises RecipeError with every problem and where it was written.
    """
    if recipe.merge is None:
        return
    from fusekit.merging.lint import check
    from fusekit.yaml import Document, Problems

    data = _models(recipe, [Path("targets", name) for name in recipe.targets], recipe.pivot.path) | dict(recipe.merge)
    problems = Problems(Document(data, "", "merge", {}))
    check(data, problems)
    found = [f"{recipe.place(('merge', *path))}: {message}" for _, message, path in problems.found]
    parameters = recipe.merge.get("parameters")
    share = parameters.get("select_topk") if isinstance(parameters, dict) else None
    of_sce = recipe.merge.get("merge_method") == "fusechat_sce"
    if not found and of_sce and len(recipe.targets) == 1 and isinstance(share, (int, float)) and share < 1:
        found.append(
            f"{recipe.place(('merge', 'parameters', 'select_topk'))}: select_topk is {float(share)}, but there is one "
            f"target ({recipe.targets[0]}), and SCE has no variance to rank with a single target: set select_topk to "
            "1, or leave the merge out with `merge: null`"
        )
    if len(found) == 1:
        raise RecipeError(found[0])
    if found:
        raise RecipeError(f"merge: {len(found)} problems\n" + "\n".join(f"  {line}" for line in found))


def expected_needs(checkpoint: Checkpoint, section: Mapping[str, Any], targets: int, final: Path) -> list[Need]:
    """Disk and memory of a merge of a pivot and ``targets`` models like it, as the merge itself will estimate them.

    Args:
        checkpoint: the pivot.
        section: ``merge`` of the recipe.
        targets: how many there will be.
        final: where the merged model will be.
    """
    from mergekit.options import MergeOptions

    from fusekit.merging.estimate import estimate
    from fusekit.merging.plan import Plan as MergePlan
    from fusekit.merging.plan import PlannedTensor

    tensors = []
    for name, header in _headers(checkpoint).items():
        dtype = str(section.get("dtype") or header.dtype)
        inputs = dict.fromkeys(range(targets + 1), header)
        loaded = len(inputs) * header.elements * capture.itemsize(dtype)
        copied = loaded if dtype != header.dtype else 0
        out = str(section.get("out_dtype") or dtype)
        tensors.append(PlannedTensor(name, header.shape, out, False, inputs, loaded, copied))
    method = str(section.get("merge_method"))
    return estimate(MergePlan(method, method, tensors, []), [], MergeOptions(quiet=True), final)


def _headers(checkpoint: Checkpoint) -> Headers:
    """Headers of the checkpoint's tensors, or such as make up its size where its files are not here."""
    files = [checkpoint.folder / name for name in checkpoint.weights if name.endswith(".safetensors")]
    found: Headers = {}
    if files and all(path.is_file() for path in files):
        for path in files:
            found |= read_headers(path, checkpoint.choice.model)
        return found
    shape, dtype = capture.shape_of(checkpoint.config), capture.stored_dtype(checkpoint)
    size = dict(DTYPES.values()).get(dtype, 4)
    left = checkpoint.weight_bytes // size
    while left > 0:
        rows = max(1, min(shape.wide if found else shape.vocabulary, left // shape.hidden))
        found[f"tensor {len(found)}"] = TensorHeader(dtype, (rows, shape.hidden), "(not here)", size)
        left -= rows * shape.hidden
    return found


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


def _names(context: Context, models: Mapping[str, Any]) -> dict[str, str]:
    """The models' names by path: what is published names no folder of this machine."""
    names = {str(path): f"targets/{path.name}" for path in context.targets}
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


def _models(recipe: Recipe, targets: list[Path], pivot: str) -> dict[str, Any]:
    """``models`` and, where the merge method has a base, ``base_model``."""
    from mergekit.merge_methods import registered_methods

    import fusekit.merge_methods  # noqa: F401  registers fusekit's methods with mergekit

    bases = {known.spec.name: known.spec.contract.base.value for known in registered_methods()}
    models: dict[str, Any] = {"models": [{"model": str(path)} for path in targets]}
    # Where a method ignores a base, mergekit averages it in like any other model.
    if bases.get(str((recipe.merge or {}).get("merge_method"))) != "ignored":
        models["base_model"] = pivot
    return models
