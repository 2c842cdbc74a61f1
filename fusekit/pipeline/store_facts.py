"""What the recipe says of a store of captured rows: what a partial run compares with what was captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusekit.errors import CaptureError
from fusekit.pipeline.stages import Context


def store_facts(context: Context, name: str, before: Mapping[str, Any], *, thorough: bool) -> dict[str, Any]:
    """What a store of this recipe would say of itself, by the names of StoreSpec; a detail is ``details.dtype``.

    A model that is not at hand, but is called what it was, is taken to be the same; so is a folder that is where it
    was, unless ``thorough``. A folder that is called otherwise is the same if its weights are.

    Args:
        context: of the run.
        name: of the model.
        before: the same of what is there, as far as it is known.
        thorough: read the weights of a folder through.

    Raises:
        CaptureError: the model cannot be found, and is called otherwise than before, or has a revision that is not the
            commit that it was.
    """
    from fusekit.capturing.capture import details_of, vocabulary_size

    section, choice = context.recipe.capture, context.readers.choice(name)
    details = details_of(choice, context.recipe.data.train_on)
    facts: dict[str, Any] = {
        "top_k": min(section.top_k, before.get("vocabulary", section.top_k)),
        "keep_mass": section.keep_mass if section.keep_mass < 1 else None,
        "temperature": section.temperature,
        "max_error": section.max_error,
        **({} if section.rows_per_shard is None else {"rows_per_shard": section.rows_per_shard}),
        **{f"details.{key}": value for key, value in details.items()},
    }
    is_called_the_same = choice.model == before.get("model")
    try:
        checkpoint, reader = context.readers.checkpoint(name), context.readers.reader(name)
    except CaptureError:
        if not is_called_the_same or not _is_commit(choice.revision, before):
            raise
        return facts  # it has served, and may be gone
    facts |= {"tokenizer": reader.fingerprint, "vocabulary": vocabulary_size(checkpoint, reader)}
    if is_called_the_same and checkpoint.snapshot is None and not thorough:
        return facts
    if (fingerprint := context.readers.fingerprint(name)) != before.get("model_fingerprint"):
        facts |= {"model": choice.model, "model_fingerprint": fingerprint}
    return facts


def _is_commit(revision: str | None, before: Mapping[str, Any]) -> bool:
    """Whether a revision names what was captured, as far as that can be told without the hub."""
    captured = str(before.get("model_fingerprint")).split()[:2]  # a GGUF file's name may follow
    return revision is None or captured == ["commit", revision]
