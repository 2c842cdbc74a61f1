"""The model card of the merged model, from the same facts as the report; and both written where they change."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusekit import artifacts as artifact
from fusekit.artifacts import weights_hash
from fusekit.disk import commit_file, output_lock
from fusekit.layout import MERGED, PIVOT
from fusekit.report import text
from fusekit.report.facts import Facts
from fusekit.report.page import CARD, TEMPLATES, heat_map, lead, left_out, page, results, stages, titled

_PAPERS = {
    "joint": "2401.10491",
    "pairwise": "2408.07990",
    "fusechat_sce": "2408.07990",
    "sce": "2408.07990",
    "varm": "2402.16107",
    "widen": "2408.03092",
    "linear": "2203.05482",
    "task_arithmetic": "2212.04089",
    "ties": "2306.01708",
    "dare_linear": "2311.03099",
    "dare_ties": "2311.03099",
}
"""On arXiv, by the mode of fusion or the merge method."""


def write_report(out: Path, *, with_card: bool = True) -> list[str]:
    """Write ``report.html`` of a run, finished or not, and the card of its merged model if there is one.

    The same artifacts give the same bytes. The card is a file of the artifact ``merged/`` and is replaced together with
    its entry in the manifest, so that ``fusekit verify`` passes at any moment. A card that somebody changed is kept.

    Args:
        out: folder of the run.
        with_card: False leaves the card alone; True needs the lock of the run.

    Returns:
        A line for each file that was written or could not be.

    Raises:
        StorageError: ``out`` is not the output of a run, or the disk failed.
        RecipeError: the recipe of the run cannot be read.
    """
    facts, said = Facts(out), []
    if with_card and MERGED in facts.artifacts:
        try:
            with output_lock(facts.layout.merged):  # `fusekit merge` may be writing there
                if artifact.replace_file(facts.layout.merged, CARD, _encoded(_card(facts))):
                    said.append(str(facts.layout.merged / CARD))
        except artifact.ChangedError as error:
            said.append(f"warning: {error}")
    path, data = facts.layout.report, _encoded(page(facts))
    if path.is_file() and path.read_bytes() == data:
        return said
    # Without the lock another process may be writing the page: the temporary file then has a unique name.
    commit_file(path, data, rank=0 if with_card else uuid.uuid4().int)
    return [*said, str(path)]


def _encoded(said: str) -> bytes:
    return said.encode("utf-8", "backslashreplace")  # JSON files may hold half a surrogate pair


def _card(facts: Facts) -> str:
    """The card as Markdown with its metadata in front."""
    recipe, known = facts.recipe, facts.artifacts[MERGED].made
    method = str((recipe.merge or {}).get("merge_method"))
    versions = ("fusekit", "mergekit", "transformers", "torch")
    rendered = TEMPLATES.get_template("card.md.jinja").render(
        facts=facts,
        recipe=recipe,
        metadata=_metadata(facts),
        title=f"{_last(facts.entries[PIVOT].path)} fused with {text.listed(facts.sources)}",
        lead=lead(facts),
        method=method,
        papers=_PAPERS,
        tables=[table.markdown(lambda name: _escaped(titled(name)), bold=True) for table in results(facts)],
        left_out=left_out(facts),
        versions={name: str(known[name]) for name in versions if name in known},
        weights=weights_hash(facts.layout.merged),
        stages={place: held for place, (held, *_) in stages(facts).items()},
        heat=heat_map(facts),
        values=yaml.safe_dump(_portable(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
    )
    return f"{rendered.rstrip()}\n"


def _metadata(facts: Facts) -> str:
    """What hubs read: the parents that are on the hub, the relation to them, tags and library."""
    parents = list(dict.fromkeys(known for name in facts.entries if (known := facts.model(name).repository)))
    relation: dict[str, Any] = {"base_model": parents, "base_model_relation": "merge"} if parents else {}
    found = {"library_name": "transformers", "pipeline_tag": "text-generation", **relation}
    return yaml.safe_dump(found | {"tags": ["mergekit", "merge", "fusekit"]}, sort_keys=False).strip()


def _portable(value: Any) -> Any:
    """Values of a recipe, with paths that only this machine has cut to their last part."""
    if isinstance(value, Mapping):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    return _last(value) if isinstance(value, str) and value.startswith(("/", "~")) else value


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1] or path


def _escaped(value: object) -> str:
    """Text from data within a line of Markdown or a table's cell: none of it is markup, HTML or the end of a cell."""
    shown = text.name(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", shown)


def _code(value: object) -> str:
    """Text from data as code within a line."""
    return f"`{text.name(value).replace('`', 'ˋ').replace('|', '¦')}`"


def _fenced(value: str, language: str) -> str:
    """Text from data as a block of code, in a fence that is longer than any in it."""
    fence = max(["``", *re.findall("`+", value)], key=len) + "`"
    return f"{fence}{language}\n{text.block(value).rstrip()}\n{fence}"


def _without_folders(value: str) -> str:
    """A sentence, with absolute paths in it cut to their last part."""
    return re.sub(r"(?<![\w./:~-])(?:~/|/)(?:[^\s/:'\"]+/)*", "", value)


TEMPLATES.filters.update(md=_escaped, code=_code, fenced=_fenced, last_part=_last, no_folders=_without_folders)
