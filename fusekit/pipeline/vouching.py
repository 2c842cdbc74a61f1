"""Models that a run has made: what identifies them."""

from __future__ import annotations

from pathlib import Path

from fusekit import artifacts as artifact
from fusekit.artifacts import MANIFEST, Artifact
from fusekit.errors import StorageError

_DECIDE = ("config.json", "tokenizer.json", "tokenizer_config.json")


def weights_hash(folder: Path) -> str:
    """Of a model's weights, configuration and tokenizer, as its manifest has them: what a merge and scores depend on.

    Nothing large is read. Raises StorageError where there is no manifest.
    """
    files = _manifest(folder).files
    names = sorted(name for name in files if "/" not in name and Path(name).suffix in (".safetensors", ".jinja"))
    return artifact.joined_hash(files[name].xxh3 for name in [*names, *(name for name in _DECIDE if name in files)])


def _manifest(folder: Path) -> Artifact:
    known = artifact.read(folder)
    if known is None:
        raise StorageError(
            f"{folder} has no {MANIFEST} that vouches for it: remove it and give the same command again, which makes "
            "it anew"
        )
    return known
