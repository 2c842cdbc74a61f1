"""The model card of the merged model, from the same facts as the report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from fusekit.artifacts import Artifact, weights_hash
from fusekit.evaluation.table import fixed
from fusekit.layout import PIVOT
from fusekit.report import text
from fusekit.report.charts import heat_map, short_names
from fusekit.report.facts import Facts
from fusekit.report.page import identities, lead, left_out, made, model_rows, recipe_text, results, titled

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


def card(facts: Facts, merged: Artifact) -> str:
    """The card as Markdown with its metadata in front. merged: the manifest of the merged model."""
    versions = ("fusekit", "mergekit", "transformers", "torch")
    rendered = (
        _environment()
        .get_template("card.md.jinja")
        .render(
            facts=facts,
            metadata=_metadata(facts),
            title=f"{_last(facts.model_name(PIVOT))} fused with {text.listed(facts.sources)}",
            lead=lead(facts),
            parents=model_rows(facts),
            paper=_PAPERS.get(str(facts.value("fusion.mode")), _PAPERS["pairwise"]),
            method=_METHODS.get(merge := str(facts.value("merge.merge_method")), (merge, None)),
            tables=[table.markdown(lambda name: _escaped(titled(name)), bold=True) for table in results(facts)],
            data=_several(facts.value("data.path")),
            left_out=left_out(facts),
            versions={name: str(merged.made[name]) for name in versions if name in merged.made},
            weights=weights_hash(facts.layout.merged),
            identities=identities(facts),
            made=[one for one in made(facts) if one.stage in ("data", "capture")],
            heat=heat_map(facts.coefficients, list(facts.targets)),
            recipe=recipe_text(_portable(facts.recipe)),
            merge=recipe_text(_merge_recipe(facts)),
        )
    )
    return f"{rendered.rstrip()}\n"


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("fusekit.report"),
        autoescape=False,  # Markdown: the template escapes with its own filters
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        md=_escaped,
        code=_code,
        fenced=_fenced,
        last=_last,
        no_folders=lambda said: _FOLDERS.sub("", said),
        fixed=fixed,
        percent=text.percent,
        scaled=text.scaled,
        listed=text.listed,
        count=lambda number: f"{number:,.0f}",
    )
    return found


def _metadata(facts: Facts) -> str:
    """What hubs read: the parents that are on the hub, the relation to them, tags and library."""
    known = [facts.models.get(name) for name in (PIVOT, *facts.sources)]
    parents = list(dict.fromkeys(m.repository for m in known if m and m.repository and _NAME.match(m.repository)))
    relation: dict[str, Any] = {"base_model": parents, "base_model_relation": "merge"} if parents else {}
    found = {"library_name": "transformers", "pipeline_tag": "text-generation", **relation}
    return yaml.safe_dump(found | {"tags": ["mergekit", "merge", "fusekit"]}, sort_keys=False).strip()


def _several(value: Any) -> list[str]:
    return [str(part) for part in (value if isinstance(value, list) else [value])]


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


def _code(value: object) -> str:
    """Text from data as code within a line: between more backticks than it holds, without the end of a cell."""
    shown = text.name(value).replace("|", "¦")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _fenced(value: str, language: str) -> str:
    """Text from data as a block of code: between more backticks than any of its lines holds."""
    fence = "`" * max(3, max((len(run) for run in re.findall(r"`+", value)), default=0) + 1)
    return f"{fence}{language}\n{text.block(value).rstrip()}\n{fence}"
