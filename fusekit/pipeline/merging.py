"""The stage ``merge``: the targets into one model, by mergekit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from fusekit.errors import StorageError
from fusekit.pipeline.layout import PIVOT
from fusekit.pipeline.stages import Context, merge_inputs
from fusekit.pipeline.vouching import require_whole
from fusekit.storage import artifact, commit_file


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
    models = _models(context, targets)
    inputs, final = merge_inputs(context, targets), layout.merged
    known = artifact.read(final)
    text = (
        "# The merge of this run. It can be repeated by mergekit alone: mergekit-yaml "
        f"{layout.merge_recipe.name} OUT\n"
        + yaml.safe_dump(models | dict(context.recipe.merge), sort_keys=False, allow_unicode=True)
    ).encode()
    if known is not None and not artifact.differences(known.inputs, artifact.plain(inputs)):
        _write_recipe(layout.merge_recipe, text)  # it may be gone, or name the places that the targets had before
        return
    if known is None and final.is_dir() and any(final.iterdir()):
        raise StorageError(
            f"{final} has no {artifact.MANIFEST}, so it is not known what it was made from: remove it to make it anew"
        )
    # Of other targets it is out of date, and is replaced; of the same ones somebody may still want it.
    if known is not None and known.inputs.get("targets") == inputs["targets"]:
        context.done(final, inputs)  # says what differs
    for path in targets:
        require_whole(path)
    _write_recipe(layout.merge_recipe, text)
    started = time.monotonic()

    def finish(folder: Path) -> None:
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


def _write_recipe(path: Path, text: bytes) -> None:
    """Leave a file that says the same alone."""
    if not path.is_file() or path.read_bytes() != text:
        commit_file(path, lambda file: file.write(text))


def check_merged(context: Context) -> None:
    """Refuse a merged model that is not there or was made from something else. Raises StorageError."""
    if context.recipe.merge is None:
        return
    if context.done(context.layout.merged, artifact.plain(merge_inputs(context, context.targets))) is None:
        raise StorageError(f"{context.layout.merged} is not there: the stage `merge` comes first")


def _models(context: Context, targets: list[Path]) -> dict[str, Any]:
    models: dict[str, Any] = {"models": [{"model": str(path)} for path in targets]}
    if _takes_base(str((context.recipe.merge or {}).get("merge_method"))):
        models["base_model"] = str(context.readers.checkpoint(PIVOT).folder)
    return models


def _takes_base(method: str) -> bool:
    """Whether a merge method has a base; where it ignores one, mergekit averages it in like any other model."""
    from mergekit.merge_methods import registered_methods

    import fusekit.merge_methods  # noqa: F401  registers fusekit's methods with mergekit

    found = {known.spec.name: known.spec.contract.base.value for known in registered_methods()}
    return found.get(method) != "ignored"
