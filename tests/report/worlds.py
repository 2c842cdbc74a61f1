"""Runs for the tests of the report: every artifact as its stage leaves it, but of random rows and small files."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fusekit import artifacts as artifact
from fusekit.alignment.quality import AlignmentQuality, Group, Sample, Share, Token, Worst, write_samples
from fusekit.alignment.rows import Case
from fusekit.artifacts import weights_hash
from fusekit.capturing.store import StoreSpec
from fusekit.capturing.writer import StoreWriter
from fusekit.data.reading import DataCounts
from fusekit.distillation.worth import TeacherWorth
from fusekit.merge_methods.provenance import MergeRecord, TensorRecord
from fusekit.recipe import Recipe
from tests.capture.rows import captured, key

STAGES = ("data", "capture", "align", "distill", "merge", "evaluate")
HOSTILE = "</script><img src=x onerror=alert(1)>`|*[x](javascript:y)&amp;\u202e"
ROWS = 24
LAYERS, MODULES = 6, ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "input_layernorm")
SKILLS = ("add", "code", "facts")


def make_run(
    out: Path, sources: tuple[str, ...] = ("one", "two"), *, until: str = "evaluate", hostile: bool = False
) -> Path:
    """A run in ``out`` up to a stage. hostile: whatever a stranger may name has markup in it."""
    out.mkdir(parents=True)
    evil = HOSTILE if hostile else ""
    (out / "recipe.resolved.yml").write_text(yaml.safe_dump(_recipe(sources, evil), sort_keys=False))
    makers = (_data, _capture, _align, _distill, _merge, _evaluate)
    for make in makers[: STAGES.index(until) + 1]:
        make(out, sources, evil)
    return out


def _made(evil: str) -> dict[str, Any]:
    return {"fusekit": "1.0", "host": f"machine{evil}", "seconds": 1.5, "for": {"pivot": "x"}}


def _recipe(sources: tuple[str, ...], evil: str) -> dict[str, Any]:
    return Recipe.model_validate(
        {
            "pivot": {"model": f"org/pivot{evil}"},
            "sources": [{"model": f"/home/me/{name}"} for name in sources],  # called as their folders are
            "data": {"path": f"rows{evil}.jsonl", "max_length": 64},
            "merge": {"merge_method": "fusechat_sce", "parameters": {"select_topk": 1.0, "variant": "paper"}},
            "evaluate": {"path": "held-out"},
        }
    ).model_dump(mode="json")


def _data(out: Path, _sources: tuple[str, ...], evil: str) -> None:
    counts = DataCounts(seen=ROWS + 3, kept=ROWS, reasons={"empty": 1, "refused": 2, "cut": 4})
    counts.keys = {"empty": [key(1)], "cut": [f"k{evil}"]}
    counts.first_refusal = f"no system turn{evil}"
    artifact.publish(out / "data", "data", {}, lambda into: _json(into / "counts.json", vars(counts)), _made(evil))


def _capture(out: Path, sources: tuple[str, ...], evil: str) -> None:
    pivot = {"model": f"org/pivot{evil}", "repository": "org/pivot", "commit": "c" * 40, "parameters": 1_234_567}
    pivot |= {"architecture": f"LlamaForCausalLM{evil}", "tokenizer": f"byte-level BPE, NFC{evil}"}
    facts = {name: {"model": f"/home/me/{name}", "parameters": 7_240_000_000} for name in sources}
    _json(out / "models.json", {"pivot": pivot, **facts})
    keys = [key(number) for number in range(ROWS)]
    for number, name in enumerate(("pivot", *sources)):
        folder = out / "captures" / name
        folder.parent.mkdir(exist_ok=True)
        spec = StoreSpec(model=f"{name}{evil}", model_fingerprint=f"xxh3 {number}", vocabulary=60, top_k=4)
        writer = StoreWriter(folder, spec, keys)
        bad = {keys[5]: f"NaN at label 2{evil}"} if number == 1 else {}
        rows = [
            captured(np.random.default_rng([number, i]), 60, 4, 12, number=i, dataset=f"{'ab'[i % 2]}{evil}")
            for i in range(ROWS)
            if keys[i] not in bad
        ]
        for plan in writer.missing_shards():
            writer.write_shard(plan, rows, bad)
        writer.finish()


def _align(out: Path, sources: tuple[str, ...], evil: str) -> None:
    for number, source in enumerate(sources):
        write = partial(_write_alignment, number, evil)
        artifact.publish(out / "alignment" / source, "align", {}, write, _made(evil))


def _write_alignment(number: int, evil: str, into: Path) -> None:
    share = Share(100, 80, 90)
    quality = AlignmentQuality(
        f"org/pivot{evil}",
        f"source{evil}",
        texts=7,
        pivot_tokens=100,
        source_tokens=90 + number,
        cases=Counter(same=90, unlinked=10),
        scripts={f"latin{evil}": share},
        data={f"a{evil}": share, "b": share},
        worst=[Worst(0.5, f"text{evil}")],
    )
    _json(into / "quality.json", quality.to_dict())
    token = Token(shown=f"to{evil}", size=2, about=f"id 7{evil}")
    lost = Token(shown="ken", size=3, about="id 8", inner=True, lost=True)
    groups = [Group(read=f"token{evil}", pivot=[token, lost], source=[token])] * 3
    write_samples(into / "samples.json", [Sample(groups=groups), Sample(groups=groups[:2], left_out=1)])
    worth = TeacherWorth(f"prefix{evil}")
    cases = np.array([Case.SAME, Case.CLOSES, Case.UNLINKED])
    teacher, pivot = np.array([1.0, 2.5 + number, 0.0]), np.array([2.0, 3.0, 1.0])
    worth.add(cases, cases != Case.UNLINKED, teacher=teacher, pivot=pivot, source=4.5, carried=np.zeros(0))
    _json(into / "worth.json", worth.to_dict())


def _distill(out: Path, sources: tuple[str, ...], evil: str) -> None:
    for number, source in enumerate(sources):
        _target(out / "targets" / source, source, 2.0 - 0.1 * number, (source,))
    _target(out / "baselines" / "sft", "sft", 2.2, ())


def _target(folder: Path, name: str, loss: float, sources: tuple[str, ...]) -> None:
    folder.mkdir(parents=True)
    log: list[dict[str, Any]] = []
    for step in range(0, 110, 10):
        line = {"loss": loss + 1 / (step + 10), "step": step, "epoch": step / 50, "lm_loss": loss + 2 / (step + 10)}
        log.append(line | ({"fusion_loss": 0.5 + 1 / (step + 10)} if sources else {}))
    log += [{"loss": float("nan"), "step": 110, "lm_loss": float("nan")}, {"train_runtime": 12.5, "step": 110}]
    counts = {"rows": 48.0, "labels": 400.0, "asked": 400.0, "linked": 300.0, "taught": 390.0, "chosen/pivot": 12.0}
    record = {
        "target": name,
        "sources": list(sources),
        "unmatched": {source: [key(5)] for source in sources[:1]},
        "counts": counts | {f"chosen/{source}": 36.0 for source in sources},
        "skipped_steps": 1,
        "log": log,
    }
    _json(folder / "training.json", record)
    (folder / "model.safetensors").write_text(name)
    artifact.seal(folder, "distill", {"target": name}, {"seconds": 12.5})


def _merge(out: Path, sources: tuple[str, ...], evil: str) -> None:
    record, random = MergeRecord("org/pivot"), np.random.default_rng(0)
    ids = [f"/home/me/out/targets/{name}" for name in sources]
    names = [f"model.layers.{layer}.{module}.weight" for layer in range(LAYERS) for module in MODULES]
    names += [f"model.layers.0.mlp.experts.{i}.w1.weight" for i in range(3)] + ["lm_head.weight", f"norm{evil}.weight"]
    for name in names:
        shares = random.dirichlet(np.ones(len(ids))).tolist()
        record.tensors[name] = TensorRecord("fusechat_sce", {}, dict(zip(ids, shares, strict=True)))

    def write(into: Path) -> None:
        (into / "model.safetensors").write_bytes(b"weights")
        _json(into / "config.json", {})
        (into / "README.md").write_text("# The card of mergekit\n")
        _json(into / "coefficients.json", record.as_dict())

    inputs = {"targets": {name: weights_hash(out / "targets" / name) for name in sources}}
    artifact.publish(out / "merged", "merge", inputs, write, _made(evil))


def _evaluate(out: Path, sources: tuple[str, ...], evil: str) -> None:
    names = ["pivot", "baseline", *(f"sources/{s}" for s in sources), *(f"targets/{s}" for s in sources), "merged"]
    models = {}
    for number, name in enumerate(names):
        place = out / ("baselines/sft" if name == "baseline" else name)
        made_of = {"model": weights_hash(place) if place.is_dir() else "another's"}
        scores = out / "evaluation" / name
        bits = {f"{skill}{evil}": 3.0 - 0.25 * number + 0.01 * at for at, skill in enumerate(SKILLS)}
        models[name] = {"bits_per_byte": bits, "lm_eval": {"arc_easy": 0.4 + 0.02 * number}}
        own = {"bits_per_byte": bits}
        artifact.publish(scores, "evaluate", made_of, lambda into, s=own: _json(into / "scores.json", s), _made(evil))
    _json(out / "results.json", {"models": models})


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
