"""The merge methods as slow, obvious loops: the truth that the fast code is compared with.

Values are Python floats (float64). Variances are exact rationals, so that ties are ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from fusekit.settings import Selection


def flat(tensor: torch.Tensor) -> list[float]:
    return [float(x) for x in tensor.detach().double().reshape(-1)]


def fusion_vectors(base: torch.Tensor, targets: Sequence[torch.Tensor]) -> list[list[float]]:
    theta = flat(base)
    return [[phi - t for phi, t in zip(flat(target), theta, strict=True)] for target in targets]


def population_variance(values: Sequence[float]) -> Fraction:
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    return sum((v - mean) ** 2 for v in exact) / len(exact)


def select(deltas: Sequence[Sequence[float]], tau: float) -> list[bool]:
    """The floor(tau * number of elements that vary) elements of highest variance, ties to the lower index."""
    n = len(deltas[0])
    if tau == 1:
        return [True] * n
    variances = [population_variance([delta[i] for delta in deltas]) for i in range(n)]
    k = math.floor(tau * sum(1 for v in variances if v > 0))
    order = sorted(range(n), key=lambda i: (-variances[i], i))
    chosen = set(order[:k])
    return [i in chosen for i in range(n)]


def shares(energies: Sequence[float]) -> list[float]:
    total = math.fsum(energies)
    return [e / total for e in energies] if total > 0 else [1 / len(energies)] * len(energies)


def coefficients(deltas: Sequence[Sequence[float]]) -> list[float]:
    return shares([math.fsum(d * d for d in delta) for delta in deltas])


def sce_deltas(
    deltas: Sequence[Sequence[float]], tau: float, variant: str, weights: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """(merged fusion vector, eta)."""
    n = len(deltas[0])
    mask = select(deltas, tau)
    selected = [[d if m else 0.0 for d, m in zip(delta, mask, strict=True)] for delta in deltas]
    eta = coefficients(selected)
    vectors = deltas if variant == "fuseai" else selected
    merged = []
    for i in range(n):
        column = [w * vector[i] for w, vector in zip(weights or [1.0] * len(vectors), vectors, strict=True)]
        plus = sum(column) >= 0
        survives = [d > 0 if plus else d < 0 for d in column]
        value = math.fsum(e * d for e, d, s in zip(eta, column, survives, strict=True) if s)
        if variant != "paper":
            divisor = math.fsum(e for e, s in zip(eta, survives, strict=True) if s)
            value = value / divisor if divisor > 0 else value
        merged.append(value)
    return merged, eta


def added(base: torch.Tensor, merged: Sequence[float]) -> torch.Tensor:
    """The base plus a merged fusion vector."""
    result = [t + d for t, d in zip(flat(base), merged, strict=True)]
    return torch.tensor(result, dtype=torch.float64).reshape(base.shape)


def sce(
    base: torch.Tensor,
    targets: Sequence[torch.Tensor],
    tau: float,
    variant: str,
    weights: Sequence[float] | None = None,
) -> tuple[torch.Tensor, list]:
    merged, eta = sce_deltas(fusion_vectors(base, targets), tau, variant, weights)
    return added(base, merged), eta


def varm(base: torch.Tensor, targets: Sequence[torch.Tensor], weights: Sequence[float] | None = None) -> torch.Tensor:
    deltas = fusion_vectors(base, targets)
    weights = coefficients(deltas) if weights is None else weights
    columns = zip(*deltas, strict=True)
    return added(base, [math.fsum(w * d for w, d in zip(weights, column, strict=True)) for column in columns])


def varm_element(
    base: torch.Tensor, targets: Sequence[torch.Tensor], factors: Sequence[float] | None = None
) -> torch.Tensor:
    merged = []
    for column in zip(*fusion_vectors(base, targets), strict=True):
        weights = shares([d**2 for d in column])
        merged.append(
            math.fsum(f * w * d for f, w, d in zip(factors or [1.0] * len(column), weights, column, strict=True))
        )
    return added(base, merged)


def unit_coefficients(units: Sequence[tuple[torch.Tensor, Sequence[torch.Tensor]]], aggregation: str) -> list[float]:
    """W of a unit of (base, targets) matrices."""
    k = len(units[0][1])
    per_matrix = [fusion_vectors(base, targets) for base, targets in units]
    energies = []
    for j in range(k):
        if aggregation == "elements":
            elements = [d for deltas in per_matrix for d in deltas[j]]
            energies.append(math.fsum(d * d for d in elements) / len(elements))
        else:
            means = [math.fsum(d * d for d in deltas[j]) / len(deltas[j]) for deltas in per_matrix if deltas[j]]
            energies.append(math.fsum(means))
    return shares(energies)


LabelRow = tuple[list[int], list[float], float, float, float]
"""ids, their log-probabilities, remaining mass, log-probability of the label, the same at temperature 1."""


def teacher_row(
    model: torch.nn.Module, ids: Sequence[int], at: int, selection: Selection, valid: set[int] | None = None
) -> LabelRow:
    """What a model says about the label at a position: one row, one plain forward in the model's own dtype."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0, at - 1].float()
    return label_row(logits.tolist(), ids[at], selection, valid)


def label_row(logits: Sequence[float], label: int, selection: Selection, valid: set[int] | None = None) -> LabelRow:
    """The softmax over the whole vocabulary in float64. valid: the ids that are tokens, None for all."""
    scores = [x if valid is None or i in valid else -math.inf for i, x in enumerate(logits)]
    logprobs = log_softmax([x / selection.temperature for x in scores])
    kept: list[int] = []
    mass = 0.0
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: selection.k]:
        if scores[i] == -math.inf or mass >= selection.keep_mass < 1:
            break
        kept.append(i)
        mass += math.exp(logprobs[i])
    left = set(range(len(scores))) - set(kept)
    tail = math.fsum(math.exp(logprobs[i]) for i in left)
    return kept, [logprobs[i] for i in kept], tail, logprobs[label], log_softmax(scores)[label]


def log_softmax(scores: Sequence[float]) -> list[float]:
    best = max(scores)
    total = math.log(math.fsum(math.exp(x - best) for x in scores))
    return [x - best - total for x in scores]


def text_bits_per_byte(model: torch.nn.Module, tokenizer: Any, texts: Sequence[str], *, ends: bool) -> float:
    """Bits of plain texts over their bytes, by the tokenizer itself and one forward each; ``ends``: of the eos too.

    A first token that nothing stands before is not predicted: neither its bits nor its bytes count.
    """
    nats, size = [], 0
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = encoded["input_ids"] + ([tokenizer.eos_token_id] if ends else [])
        with torch.inference_mode():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        has_bos = ids[0] == tokenizer.bos_token_id
        unread = "" if has_bos else text[: encoded["offset_mapping"][0][1]]
        nats += [-float(logprobs[at - 1, ids[at]]) for at in range(1, len(ids))]
        size += len(text.encode()) - len(unread.encode())
    return math.fsum(nats) / math.log(2) / size


def widen(
    base: torch.Tensor, targets: Sequence[torch.Tensor], threshold: float, score: float, ties: str
) -> tuple[list[list[float]], list[list[float]]]:
    """(merged matrix, score of every model's columns) of a matrix [out, in], as nested lists."""
    rows, columns = base.shape
    models = [[[float(m[i, j]) for i in range(rows)] for j in range(columns)] for m in (base, *targets)]
    lengths = [[math.sqrt(math.fsum(x * x for x in column)) for column in model] for model in models]

    def change_of_direction(n: int, j: int) -> float:
        if lengths[0][j] == 0 or lengths[n][j] == 0:
            return 0.0 if lengths[0][j] == lengths[n][j] else 1.0
        pairs = zip(models[n][j], models[0][j], strict=True)
        return math.fsum((x / lengths[n][j] - y / lengths[0][j]) ** 2 for x, y in pairs) / 2

    numbers = range(1, len(models))
    moved = [[abs(lengths[n][j] - lengths[0][j]) for j in range(columns)] for n in numbers]
    turned = [[change_of_direction(n, j) for j in range(columns)] for n in numbers]
    by_length, by_angle = (_widen_scores(x, threshold, score, ties) for x in (moved, turned))
    weights = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(by_length, by_angle, strict=True)]
    merged = [
        [
            models[0][j][i] + math.fsum(weights[n - 1][j] * (models[n][j][i] - models[0][j][i]) for n in numbers)
            for j in range(columns)
        ]
        for i in range(rows)
    ]
    return merged, weights


def _widen_scores(changes: list[list[float]], threshold: float, score: float, ties: str) -> list[list[float]]:
    ranks = []
    for exact in changes:
        model = [math.ldexp(round(m * 2**30), e) for m, e in map(math.frexp, exact)]  # equal but for rounding
        order = sorted(range(len(model)), key=lambda j: (model[j], j))
        places = {j: float(place) for place, j in enumerate(order)}
        if ties == "average":
            equal = [[k for k in range(len(model)) if model[k] == model[j]] for j in range(len(model))]
            places = {j: sum(places[k] for k in equal[j]) / len(equal[j]) for j in places} if model else {}
        ranks.append([Fraction(places[j]) / len(model) for j in range(len(model))])
    scores = []
    for rank in ranks:
        mean = sum(rank) / len(rank)
        softmax = [math.exp(r) / math.fsum(math.exp(x[j]) for x in ranks) for j, r in enumerate(rank)]
        scores.append([score if r > Fraction(threshold) * mean else s for r, s in zip(rank, softmax, strict=True)])
    return scores
