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
    sets = [[int(i)] for i in ids]
    if loss == "grouped_kl":
        sets = [[token for token, _ in members_of(targets.members, i)] for i, _ in listed]
    rest = torch.ones(V, dtype=torch.bool)
    rest[[token for tokens in sets for token in tokens]] = False
    if truncation == "renormalize" and loss not in ("uld_topk", "grouped_kl"):
        dense = torch.zeros(V, dtype=torch.float64)
        dense[ids] = q
        return dense, p
    masses = [p[tokens].sum() for tokens in sets]
    if float(p[rest].sum().detach()) > 0:
        q, masses = torch.cat([q, torch.tensor([tail], dtype=torch.float64)]), [*masses, p[rest].sum()]
    return q, torch.stack(masses)


def distance(q: Tensor, p: Tensor, loss: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(q, p, strict=True):
        if loss in ("ce", "kl", "grouped_kl") and a > 0:
            total = total - a * b.log() + (a * a.log() if loss != "ce" else 0.0)
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


def members_of(members: Any, id_: int) -> list[tuple[int, float]]:
    """(token, share) of everything that stands for an id."""
    places = range(int(members.starts[id_]), int(members.starts[id_ + 1]))
    return [(int(members.tokens[i]), 1.0 if members.shares is None else float(members.shares[i])) for i in places]


def chunks_of(labels: Tensor, targets: Any) -> list[list[int]]:
    """The rows of each chunk that is taught and has no ignored label."""
    found: dict[int, list[int]] = {}
    for row, number in enumerate(targets.chunks.tolist()):
        if number >= 0:
            found.setdefault(number, []).append(row)
    return [rows for rows in found.values() if all(bool(targets.taught[i]) and int(labels[i]) != -100 for i in rows)]


def p_kl(x: Tensor, targets: Any, chunks: list[list[int]]) -> list[Tensor]:
    """Of each chunk Σ_u q(u) log(q(u) / p(u)), of means over its rows, over all ids that any chunk lists."""
    some = {int(i) for rows in chunks for i in targets.ids[rows[0]] if i >= 0}
    found = []
    for rows in chunks:
        mean = torch.stack([x[row].softmax(0) for row in rows]).mean(0)
        p = {u: sum(share * mean[token] for token, share in members_of(targets.members, u)) for u in some}
        whole = sum(p.values())
        first = rows[0]
        q = {int(i): math.exp(lp) for i, lp in zip(targets.ids[first], targets.logprobs[first], strict=True) if i >= 0}
        listed = sum(q.values())
        found.append(
            sum(
                (a / listed * (math.log(a / listed) - (p[u] / whole).log()) for u, a in q.items() if a > 0),
                torch.zeros((), dtype=torch.float64),
            )
        )
    return found


def alm(x: Tensor, labels: Tensor, targets: Any, chunks: list[list[int]]) -> list[Tensor]:
    """τ KL(A^(1/τ) || S^(1/τ)) of two coins, A and S the likelihoods of a chunk, both times exp(-1e-6 τ); τ = 100."""
    found = []
    for rows in chunks:
        a = torch.tensor(math.exp(float(targets.logprobs[rows[0], 0]) / 100 - 1e-6), dtype=torch.float64)
        s = (sum(x[row].log_softmax(0)[int(labels[row])] for row in rows) / 100 - 1e-6).exp()
        found.append(100 * (a * (a / s).log() + (1 - a) * ((1 - a) / (1 - s)).log()))
    return found


def fusion_loss(
    logits: Tensor,
    labels: Tensor,
    targets: Any,
    loss: str = "ce",
    truncation: str = "tail",
    temperature: float = 1.0,
    lm_weight: Any = 1.0,
    fusion_weight: Any = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, lm, fusion, gradient of the total), float64. logits: [n, V], one row per label. weights: numbers, or [n].

    A chunk counts once, with the mean weight of its labels.
    """
    x = logits.detach().double().requires_grad_()
    scaled, learned = x / temperature, [row for row, label in enumerate(labels.tolist()) if label != -100]
    weights = [
        torch.as_tensor(weight, dtype=torch.float64).expand(len(labels)) for weight in (lm_weight, fusion_weight)
    ]
    nll = [-x[row].log_softmax(0)[int(labels[row])] for row in learned]
    parts = [[row] for row in learned if targets is not None and bool(targets.taught[row])]
    if targets is None:
        values = []
    elif loss in ("p_kl", "alm"):
        parts = chunks_of(labels, targets)
        values = p_kl(scaled, targets, parts) if loss == "p_kl" else alm(scaled, labels, targets, parts)
    elif loss == "gold":
        values = [gold(scaled[row], targets, row, truncation) for (row,) in parts]
    else:
        values = [distance(*outcomes(scaled[row], targets, row, loss, truncation), loss) for (row,) in parts]
    values = [value * temperature**2 for value in values]
    nothing = (x * 0.0).nan_to_num(0.0).sum()
    total = sum((weights[0][row] * value for row, value in zip(learned, nll, strict=True)), nothing)
    total = sum((weights[1][rows].mean() * value for rows, value in zip(parts, values, strict=True)), total)
    (gradient,) = torch.autograd.grad(total, x)
    return total.detach(), sum(nll, nothing).detach(), sum(values, nothing).detach(), gradient


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
