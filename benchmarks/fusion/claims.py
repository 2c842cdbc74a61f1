"""What the papers say is better than what, and what fusekit's own choices say, as pairs of models of the study."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.fusion.arms import ARMS


class Claim(NamedTuple):
    """A model that is said to be better than another. ``ARM/targets`` stands for the mean of an arm's targets."""

    text: str
    better: str
    worse: str


_TRAINING = (
    Claim("FuseLLM: fusion > continual training", "fusellm", "plain"),
    Claim("the same with fusekit's loss and map", "joint-prefix", "plain"),
    Claim("FuseLLM: MinED > EM, dtw", "fusellm", "fusellm-em"),
    Claim("FuseLLM: MinED > EM, span", "joint-mined", "joint-em"),
    Claim("FuseLLM: MinCE > AvgCE", "joint-prefix", "joint-avg"),
    Claim("FuseChat: MS > MinED, dtw", "fusellm-ms", "fusellm"),
    Claim("FuseChat: MS > MinED, span", "joint-ms", "joint-mined"),
    Claim("FuseChat: pairwise targets > joint", "pairwise/targets", "joint-prefix"),
    Claim("fusekit: prefix map > MS", "joint-prefix", "joint-ms"),
    Claim("fusekit: λ 0.5 > λ 0.9", "joint-prefix", "joint-weight-0.9"),
    Claim("fusekit: tail > renormalize", "joint-prefix", "joint-renormalize"),
    Claim("fusekit: its settings > FuseLLM's", "joint-prefix", "fusellm"),
    Claim("fusekit: its settings > FuseChat's", "pairwise/targets", "fusechat/targets"),
)

PUBLISHED = "sce-paper-0.1"
AUTHORS = "sce-fuseai-0.1"
"""What the authors' repository runs at the published τ."""


def _merging(arm: str) -> tuple[Claim, ...]:
    name = f"FuseChat, {arm}"
    others = {"varm": "VaRM", "ties": "TIES", "dare": "DARE", "task-arithmetic": "task arithmetic", "linear": "linear"}
    merges = {PUBLISHED: "SCE", AUTHORS: "SCE as run", "sce-paper-1.0": "SCE, τ 1", "varm": "VaRM", "linear": "linear"}
    found = [Claim(f"{name}: {title} > its targets", f"{arm}/{m}", f"{arm}/targets") for m, title in merges.items()]
    found += [Claim(f"{name}: {title} > plain fine-tuning", f"{arm}/{m}", "plain") for m, title in merges.items()]
    for merge, title in {PUBLISHED: "SCE", AUTHORS: "SCE as run"}.items():
        found += [Claim(f"{name}: {title} > {of}", f"{arm}/{merge}", f"{arm}/{other}") for other, of in others.items()]
    for other in ("ties", "dare", "task-arithmetic", "linear"):
        found.append(Claim(f"{name}: VaRM > {others[other]}", f"{arm}/varm", f"{arm}/{other}"))
    found += [Claim(f"{name}: SCE, τ 0.1 > τ 1", f"{arm}/{PUBLISHED}", f"{arm}/sce-paper-1.0")]
    return tuple(found)


_VARIANTS = (
    Claim("SCE renormalized: τ 0.1 > τ 1", "pairwise/sce-renormalized-0.1", "pairwise/sce-renormalized-1.0"),
    Claim("SCE as run: τ 0.1 > τ 1", f"pairwise/{AUTHORS}", "pairwise/sce-fuseai-1.0"),
    Claim("SCE at τ 1: paper > fuseai", "pairwise/sce-paper-1.0", "pairwise/sce-fuseai-1.0"),
)


CLAIMS: tuple[Claim, ...] = (
    *_TRAINING,
    *(claim for arm, of in ARMS.items() if of.merged for claim in _merging(arm)),
    *_VARIANTS,
    Claim("FuseChat: merged > joint", f"pairwise/{AUTHORS}", "joint-prefix"),
)
