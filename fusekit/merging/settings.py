"""What a merge takes beside mergekit's own options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What ``merge`` takes beside mergekit's own options. Models are named as in the recipe.

    Attributes:
        overwrite: replace a finished model at the output.
        ignore_estimates: start although it does not seem to fit.
        allow_pickle: models whose weights may be torch pickles.
        allow_remote_code: models whose own Python code may run.
        folders: where models are that the recipe calls by names which are neither paths nor hub ids; card, recipe and
            coefficients beside the merged model have these names.
        say: gets a line of plain text for the user.
        before_publishing: given the folder of the checked model, to add files to it.
        on_published: called as soon as the merged model stands at its final path; what follows is tidying up.
    """

    overwrite: bool = False
    ignore_estimates: bool = False
    allow_pickle: frozenset[str] = frozenset()
    allow_remote_code: frozenset[str] = frozenset()
    folders: Mapping[str, Path] = field(default_factory=dict)
    say: Callable[[str], None] = print
    before_publishing: Callable[[Path], None] = lambda _folder: None
    on_published: Callable[[], None] = lambda: None
