"""Losses and fusion as slow, obvious truth: dense float64 distributions, plain autograd, one row after the other.

Nothing here uses fusekit's arithmetic; targets and candidates are read field by field.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

UNSEEN = 2.0**-24


def outcomes(x: Tensor, targets: Any, row: int, loss: str, truncation: str) -> tuple[Tensor, Tensor]:
    """(q, p) over the outcomes of one row. x: float64 [V], the student's logits at the loss's temperature."""
    V, p = len(x), x.softmax(0)
    listed = [(int(i), float(lp)) for i, lp in zip(targets.ids[row], targets.logprobs[row], strict=True) if int(i) >= 0]
    q = torch.tensor([math.exp(lp) for _, lp in listed], dtype=torch.float64)
    tail = float(targets.tail[row])
    if truncation == "renormalize":
        q, tail = (q / q.sum() if len(q) else q), 0.0
    if loss == "uld_topk":
        q = q.sort(descending=True).values
        q, tail = q[:V], tail + float(q[V:].sum())
        ids = p.sort(descending=True).indices[: len(q)]
    else:
        ids = torch.tensor([i for i, _ in listed], dtype=torch.int64)
    rest = torch.ones(V, dtype=torch.bool)
    rest[ids] = False
    if truncation == "renormalize" and loss != "uld_topk":
        dense = torch.zeros(V, dtype=torch.float64)
        dense[ids] = q
        return dense, p
    if not float(p[rest].sum().detach()) > 0:
        return q, p[ids]
    return torch.cat([q, torch.tensor([tail], dtype=torch.float64)]), torch.cat([p[ids], p[rest].sum()[None]])


def distance(q: Tensor, p: Tensor, loss: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(q, p, strict=True):
        if loss in ("ce", "kl") and a > 0:
            total = total - a * b.log() + (a * a.log() if loss == "kl" else 0.0)
        elif loss == "reverse_kl" and b > 0:
            total = total + b * (b.log() - math.log(float(a) or UNSEEN))
        elif loss == "js":
            m = (a + b) / 2
            if a > 0:
                total = total + a * (a.log() - m.log()) / 2
            if b > 0:
                total = total + b * (b.log() - m.log()) / 2
        elif loss == "uld_topk":
            total = total + (a - b).abs()
    return total


def gold(x: Tensor, targets: Any, row: int, truncation: str) -> Tensor:
    """Σ_matched q log(q / p) + Σ_r |q_(r) - p_(r)|, the tail as one more of the matched. x: float64 [V]."""
    p = x.softmax(0)
    entries = [(int(i), math.exp(lp)) for i, lp in zip(targets.ids[row], targets.logprobs[row], strict=True) if i != -1]
    tail = float(targets.tail[row])
    if truncation == "renormalize":
        whole = sum(q for _, q in entries)
        entries, tail = [(i, q / whole) for i, q in entries], 0.0
    matched = {i: q for i, q in entries if i >= 0}
    others = sorted((q for i, q in entries if i < 0), reverse=True)
    left = sorted((i for i in range(len(x)) if i not in matched), key=lambda i: -float(p[i].detach()))
    total = torch.zeros((), dtype=torch.float64)
    for id_, q in matched.items():
        total = total + (q * (math.log(q) - p[id_].log()) if q > 0 else 0.0)
    for rank, q in enumerate(others):
        total = total + (q - p[left[rank]]).abs() if rank < len(left) else total + q
    rest = p[left[len(others) :]].sum()
    if tail > 0 and rest > 0:
        total = total + tail * (math.log(tail) - rest.log())
    return total


def fusion_loss(
    logits: Tensor,
    labels: Tensor,
    targets: Any,
    loss: str = "ce",
    truncation: str = "tail",
    temperature: float = 1.0,
    lm_weight: float = 1.0,
    fusion_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, lm, fusion, gradient of the total), float64. logits: [n, V], one row per label."""
    x = logits.detach().double().requires_grad_()
    lm = fusion = (x * 0.0).nan_to_num(0.0).sum()
    for row in range(len(labels)):
        if int(labels[row]) == -100:
            continue
        lm = lm - x[row].log_softmax(0)[int(labels[row])]
        if targets is not None and bool(targets.taught[row]):
            if loss == "gold":
                value = gold(x[row] / temperature, targets, row, truncation)
            else:
                value = distance(*outcomes(x[row] / temperature, targets, row, loss, truncation), loss)
            fusion = fusion + value * temperature**2
    total = lm_weight * lm + fusion_weight * fusion
    (gradient,) = torch.autograd.grad(total, x)
    return total.detach(), lm.detach(), fusion.detach(), gradient


def avg_ce_weights(cross_entropies: list[float]) -> list[float]:
    powers = [math.exp(math.exp(-ce)) for ce in cross_entropies]
    return [power / sum(powers) for power in powers]


def mixture(candidates: Any, weights: list[float], position: int) -> tuple[dict[int, float], float]:
    """({id: probability}, tail) of one label, weights renormalised among the candidates that teach it."""
    speaking = [(c, w) for c, w in zip(candidates, weights, strict=True) if c.taught[position]]
    total = sum(w for _, w in speaking)
    listed: dict[int, float] = {}
    tail = 0.0
    for candidate, weight in speaking:
        for id_, logprob in zip(candidate.rows.ids[position], candidate.rows.logprobs[position], strict=True):
            if id_ >= 0:
                listed[int(id_)] = listed.get(int(id_), 0.0) + weight / total * math.exp(logprob)
        tail += weight / total * float(candidate.rows.tail[position])
    return listed, tail
