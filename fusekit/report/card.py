"""The card of the merged model: what a model hub shows of it, from the same facts as the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fusekit.artifacts import Artifact
from fusekit.pipeline.layout import PIVOT
from fusekit.report import provenance, results, sections, text
from fusekit.report.coefficients import heat_map, short_names
from fusekit.report.facts import Facts
from fusekit.report.page import environment, titled

FUSEKIT = "fusekit"
_ARXIV = "https://arxiv.org/abs/"
_METHODS = {
    "fusechat_sce": ("SCE of FuseChat", "2408.07990"),
    "sce": ("SCE of FuseChat, mergekit's", "2408.07990"),
    "varm": ("VaRM of FuseChat", "2402.16107"),
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
    sources = [text.name(name) for name in facts.sources]
    made = (
        environment()
        .get_template("card.md.jinja")
        .render(
            metadata=_metadata(facts),
            title=_escaped(f"{_last(facts.model_name(PIVOT))} fused with {text.listed(sources)}"),
            lead=_escaped(" ".join(sections.lead(facts))),
            parents=_parents(facts),
            licence=_LICENCE,
            method=_method(facts),
            tables=[_table(metric) for metric in (results.metrics_of(facts.results) if facts.results else [])],
            data=_data(facts),
            loading=_LOADING,
            provenance=_provenance(facts, merged),
            coefficients=_coefficients(facts),
            recipe=_fenced(sections.recipe_text(_portable(facts.recipe)), "yaml"),
            merge=_fenced(sections.recipe_text(_merge_recipe(facts)), "yaml"),
        )
    )
    return f"{made.rstrip()}\n"


_LICENCE = (
    "**Licence:** the merged model is made from all of its parents, so the licences of each of them apply to it. This "
    "card names none: check them, also those of the data, before this model is shared."
)
_LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")

messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The tokenizer and its chat template are the pivot's. A model of plain text has no template: give it text instead."""


def _metadata(facts: Facts) -> str:
    """What hubs read: parents that are on the hub, the relation to them, tags and library."""
    known = [facts.models.get(name) for name in (PIVOT, *facts.sources)]
    parents = list(dict.fromkeys(m.repository for m in known if m and m.repository and _NAME.match(m.repository)))
    relation: dict[str, Any] = {"base_model": parents, "base_model_relation": "merge"} if parents else {}
    found = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **relation,
        "tags": ["mergekit", "merge", FUSEKIT],
    }
    return yaml.safe_dump(found, sort_keys=False).strip()


def _parents(facts: Facts) -> list[str]:
    return [_parent(facts, row) for row in sections.model_rows(facts)]


def _parent(facts: Facts, row: sections.ModelRow) -> str:
    known = facts.models.get(row.name)
    # A path of this machine is nobody's business; the last part of it is a name.
    shown = f"[{_escaped(row.model)}]({row.url})" if row.url else _code(_last(row.model))
    parts = [f"{row.architecture}", f"{row.parameters} parameters", row.tokenizer]
    said = ", ".join(_escaped(part) for part in parts if not part.startswith(text.NO_VALUE))
    commit = f", commit {_code(known.commit)}" if known and known.commit else ""
    role = "pivot" if row.role == "pivot" else f"source {_code(row.name)}"
    return f"{role}: {shown}{f' ({said})' if said else ''}{commit}"


def _method(facts: Facts) -> list[str]:
    mode = str(facts.value("fusion.mode"))
    paper, number = _PAPERS.get(mode, _PAPERS["pairwise"])
    preset = _code(str(facts.value("preset")))
    loss, weight = _code(str(facts.value("distill.loss"))), _escaped(str(facts.value("distill.lm_weight")))
    fused = f"{_code(str(facts.value('fusion.function')))} on {_code(str(facts.value('fusion.metric')))}"
    tokens, vocabulary = _code(str(facts.value("alignment.tokens"))), _code(str(facts.value("alignment.vocabulary")))
    weighting = str(facts.value("distill.lm_weighting"))
    share = f"{weight} of the loss is that of the text, the rest is {loss}"
    if weighting != "constant":
        share = f"the weight of the text is {_code(weighting)} from {weight} on, the rest of the loss is {loss}"
    merge = str(facts.value("merge.merge_method"))
    name, paper_of_merge = _METHODS.get(merge, (merge, None))
    link = f" ([arXiv {paper_of_merge}]({_ARXIV}{paper_of_merge}))" if paper_of_merge else ""
    return [
        f"Fusion: {_code(mode)}, after {paper} ([arXiv {number}]({_ARXIV}{number})), preset {preset} of fusekit",
        f"Tokenizers aligned by {tokens}, vocabularies mapped by {vocabulary}",
        *(f"{_code(source)} as a teacher: {_escaped(worth.summary[0])}" for source, worth in facts.worths.items()),
        f"Teachers chosen by {fused}; {share}",
        f"Merge: {_escaped(name)}{link}, by [mergekit](https://github.com/arcee-ai/mergekit) "
        "([arXiv 2403.13257](https://arxiv.org/abs/2403.13257))",
    ]


def _table(metric: results.Metric) -> str:
    """A metric as a Markdown table; the best of a column is bold."""
    head = [f"{metric.title} ({metric.direction})", *metric.columns]
    lines = [_line(head), f"|---|{'---:|' * len(metric.columns)}"]
    for line in metric.lines:
        cells = [f"**{cell.shown}**" if cell.best else cell.shown for cell in line.cells]
        lines.append(f"| {_escaped(titled(line.model))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _data(facts: Facts) -> list[str]:
    path = facts.value("data.path")
    names = [_last(str(part)) for part in (path if isinstance(path, list) else [path])]
    found = [f"Rows from {', '.join(map(_code, names))}"]
    if facts.counts is not None:
        found.append(f"{facts.counts.kept:,} of {facts.counts.seen:,} rows used")
    for entry in sections.left_out(facts):
        used = "used" if entry.used else "not used"
        found.append(f"{_escaped(entry.where)}: {entry.count:,} {used}; {_escaped(_FOLDERS.sub('', entry.why))}")
    return found


def _provenance(facts: Facts, merged: Artifact) -> list[str]:
    versions = [
        (name, str(merged.made[name])) for name in (FUSEKIT, "mergekit", "transformers", "torch") if name in merged.made
    ]
    found = [", ".join(f"{name} {_escaped(version)}" for name, version in versions)] if versions else []
    found.append(f"weights of this model: xxh3 {_code(provenance.weights_hash(merged))}")
    for known in provenance.identities(facts):
        found.append(f"{_code(known.name)}: weights {_code(known.weights)}, reads as {_code(known.tokenizer)}")
    for one in provenance.made(facts):
        if one.stage in ("data", "capture"):
            found.append(f"{_code(one.place)}: {one.holds}, {_code(one.content)}")
    return found


def _coefficients(facts: Facts) -> str:
    heat = heat_map(facts.coefficients, list(facts.targets)) if facts.coefficients else None
    if heat is None:
        return ""
    lines = [
        f"{_escaped(text.listed(heat.methods))}, {heat.tensors:,} tensors; `coefficients.json` has those of each.",
        "",
        "| target | mean | least | greatest | erased |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in heat.summaries:
        shares = " | ".join(text.fixed(value, 4) for value in (one.mean, one.least, one.greatest))
        lines.append(f"| {_escaped(one.model)} | {shares} | {text.percent(one.erased)} |")
    if heat.selected is not None:
        lines += ["", f"Selected: {text.percent(heat.selected)} of the elements of a tensor, on average."]
    return "\n".join(lines)


def _portable(value: Any) -> Any:
    """Values of a recipe, with the last part of a path in the place of one that only this machine has."""
    if isinstance(value, Mapping):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    return _last(value) if isinstance(value, str) and value.startswith(("/", "~")) else value


def _merge_recipe(facts: Facts) -> dict[str, Any]:
    """mergekit's recipe with the names of models in the place of paths of this machine."""
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


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(value: str) -> str:
    """Text from data within a line of Markdown: nothing of it is markup, HTML or a cell's end."""
    shown = text.name(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", shown)


def _code(value: str) -> str:
    """Text from data as code within a line: between more backticks than it holds, no cell's end in it."""
    shown = text.name(value).replace("|", "¦")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _fenced(value: str, language: str) -> str:
    """Text from data as a block: between more backticks than any of its lines holds."""
    fence = "`" * max(3, max((len(run) for run in re.findall(r"`+", value)), default=0) + 1)
    return f"{fence}{language}\n{text.block(value).rstrip()}\n{fence}"
