"""The model card of the merged model, from the same facts as the report; and both written where they change."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusekit import artifacts as artifact
from fusekit.artifacts import Artifact, weights_hash
from fusekit.disk import commit_file
from fusekit.layout import PIVOT
from fusekit.report import text
from fusekit.report.facts import Facts
from fusekit.report.page import (
    CARD,
    TEMPLATES,
    heat_map,
    identities,
    lead,
    left_out,
    made,
    model_rows,
    page,
    recipe_text,
    results,
    short_names,
    titled,
)

_METHODS = {
    "fusechat_sce": ("SCE of FuseChat", "2408.07990"),
    "sce": ("mergekit's SCE, after FuseChat", "2408.07990"),
    "varm": ("VaRM of FuseChat", "2402.16107"),
    "widen": ("WIDEN", "2408.03092"),
    "linear": ("linear", "2203.05482"),
    "task_arithmetic": ("task arithmetic", "2212.04089"),
    "ties": ("TIES", "2306.01708"),
    "dare_linear": ("DARE", "2311.03099"),
    "dare_ties": ("DARE and TIES", "2311.03099"),
    "slerp": ("SLERP", None),
}
_PAPERS = {"joint": ("FuseLLM", "2401.10491"), "pairwise": ("FuseChat", "2408.07990")}
_FOLDERS = re.compile(r"(?<![\w./:~-])(?:~/|/)(?:[^\s/:'\"]+/)*")  # of an absolute path, within a sentence
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")


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
    """
    facts, said = Facts(out), []
    if with_card and facts.merged is not None:
        folder = facts.layout.merged
        try:
            if artifact.replace_file(folder, CARD, _encoded(_card(facts, facts.merged))):
                said.append(str(folder / CARD))
        except artifact.ChangedError as error:
            said.append(f"warning: {error}")
        facts = Facts(out) if said else facts  # the page shows the artifacts with this card
    path, data = facts.layout.report, _encoded(page(facts))
    if path.is_file() and path.read_bytes() == data:
        return said
    # Without the lock another process may be writing the page: the temporary file then has a name of its own. One that
    # a killed process leaves is overwritten by the next that has the lock, or removed by `fusekit clean`.
    commit_file(path, data, rank=0 if with_card else uuid.uuid4().int)
    return [*said, str(path)]


def _encoded(said: str) -> bytes:
    return said.encode("utf-8", "backslashreplace")  # JSON files may hold half a surrogate pair


def _card(facts: Facts, merged: Artifact) -> str:
    """The card as Markdown with its metadata in front. merged: the manifest of the merged model."""
    method, paths = str(facts.value("merge.merge_method")), facts.value("data.path")
    versions = ("fusekit", "mergekit", "transformers", "torch")
    rendered = TEMPLATES.get_template("card.md.jinja").render(
        facts=facts,
        metadata=_metadata(facts),
        title=f"{_last(facts.model_name(PIVOT))} fused with {text.listed(facts.sources)}",
        lead=lead(facts),
        parents=model_rows(facts),
        paper=_PAPERS.get(str(facts.value("fusion.mode")), _PAPERS["pairwise"]),
        method=_METHODS.get(method, (method, None)),
        tables=[table.markdown(lambda name: _escaped(titled(name)), bold=True) for table in results(facts)],
        data=[str(path) for path in (paths if isinstance(paths, list) else [paths])],
        left_out=left_out(facts),
        versions={name: str(merged.made[name]) for name in versions if name in merged.made},
        weights=weights_hash(facts.layout.merged),
        identities=identities(facts),
        made=[one for one in made(facts) if one["stage"] in ("data", "capture")],
        heat=heat_map(facts.coefficients, list(facts.targets)),
        recipe=recipe_text(_portable(facts.recipe)),
        merge=recipe_text(_merge_recipe(facts)),
    )
    return f"{rendered.rstrip()}\n"


def _metadata(facts: Facts) -> str:
    """What hubs read: the parents that are on the hub, the relation to them, tags and library."""
    known = [facts.models.get(name) for name in (PIVOT, *facts.sources)]
    parents = list(dict.fromkeys(m.repository for m in known if m and m.repository and _NAME.match(m.repository)))
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


def _merge_recipe(facts: Facts) -> dict[str, Any]:
    """mergekit's recipe with names of models in place of paths of this machine."""
    recipe = dict(facts.merge_recipe or {"merge_method": facts.value("merge.merge_method")})
    models = recipe.get("models")
    if isinstance(models, list):
        entries = [dict(entry) if isinstance(entry, Mapping) else {"model": entry} for entry in models]
        names = short_names([str(entry.get("model")) for entry in entries])
        recipe["models"] = [{**entry, "model": f"targets/{names[str(entry.get('model'))]}"} for entry in entries]
    if "base_model" in recipe:
        known = facts.models.get(PIVOT)
        recipe["base_model"] = (known.repository if known else None) or _last(facts.model_name(PIVOT))
    return {key: _portable(value) for key, value in recipe.items()}


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1] or path


def _escaped(value: object) -> str:
    """Text from data within a line of Markdown or a table's cell: none of it is markup, HTML or the end of a cell."""
    shown = text.name(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", shown)


def _fence(shown: str, least: int) -> str:
    """More backticks than any run of them in a text."""
    return "`" * max(least, max((len(run) for run in re.findall(r"`+", shown)), default=0) + 1)


def _code(value: object) -> str:
    """Text from data as code within a line, without the end of a cell."""
    shown = text.name(value).replace("|", "¦")
    fence, pad = _fence(shown, 1), " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _fenced(value: str, language: str) -> str:
    """Text from data as a block of code."""
    return f"{_fence(value, 3)}{language}\n{text.block(value).rstrip()}\n{_fence(value, 3)}"


TEMPLATES.filters.update(
    md=_escaped, code=_code, fenced=_fenced, last=_last, no_folders=lambda said: _FOLDERS.sub("", said)
)
