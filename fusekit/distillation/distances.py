"""The distances between two distributions over a few outcomes, each with its slope in the student's log-probabilities.

An outcome is an id that the target lists, or "everything else". The student's log-probabilities are
z_o - logsumexp(z), so with slopes g_o = dL/d(log p_o) and G their sum, the gradient in the student's logit of a listed
id is g_o - G p_o, and in the logit of an unlisted id v (g_tail - G p_tail) times its share p_v / p_tail of the
rest. That is all that a distance needs to say of itself; `fusekit.distillation.losses` knows about the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log_q [n, o], log_p [n, o]) -> (value [n], slopes [n, o]): target and student, -inf for no probability."""

UNSEEN = 2.0**-24
"""What a target's probability of exactly zero counts as in the reverse KL divergence: half of the smallest step below 1
in float32, the most that 1 minus the listed probabilities loses by rounding. Without it one such row is infinite."""

MIXTURE = 0.5
"""The target's weight in the mixture of the Jensen-Shannon divergence."""


def _product(weight: Tensor, logarithm: Tensor) -> Tensor:
    """weight * logarithm with 0 * -inf = 0."""
    return torch.where(weight > 0, weight * logarithm, 0.0)


def cross_entropy(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """-Σ q log p. The D of arXiv 2401.10491."""
    q = log_q.exp()
    return -_product(q, log_p).sum(1), -q


def forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Σ q (log q - log p): the cross-entropy less a constant, so its gradient is the same."""
    q = log_q.exp()
    return (_product(q, log_q) - _product(q, log_p)).sum(1), -q


def reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p (log p - log q); a q of exactly zero counts as `UNSEEN`."""
    p = log_p.exp()
    slopes = _product(p, log_p - torch.where(log_q == -math.inf, math.log(UNSEEN), log_q))
    return slopes.sum(1), slopes  # the slope's other part, p, leaves no gradient


def jensen_shannon(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """β Σ q (log q - log m) + (1 - β) Σ p (log p - log m), m = β q + (1 - β) p, β = 1/2. arXiv 2306.13649."""
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_q + math.log(MIXTURE), log_p + math.log1p(-MIXTURE))
    slopes = (1 - MIXTURE) * _product(p, log_p - log_m)
    return (MIXTURE * _product(q, log_q - log_m) + slopes).sum(1), slopes


def absolute_difference(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ |p - q|``; over sorted probabilities the universal logit distillation loss, arXiv 2402.12030."""
    difference = log_p.exp() - log_q.exp()
    return difference.abs().sum(1), log_p.exp() * difference.sign()


def with_ranked(distance: Distance, log_q: Tensor, log_p: Tensor, ranked: Tensor) -> tuple[Tensor, Tensor]:
    """A distance, and the absolute difference in its place of the outcomes that stand by rank. ranked: bool [n, o]."""
    value, slopes = distance(log_q.masked_fill(ranked, -math.inf), log_p.masked_fill(ranked, -math.inf))
    sorted_q, sorted_p = log_q.masked_fill(~ranked, -math.inf), log_p.masked_fill(~ranked, -math.inf)
    difference, of_ranked = absolute_difference(sorted_q, sorted_p)
    return value + difference, slopes + of_ranked


DISTANCES: dict[str, Distance] = {
    "ce": cross_entropy,
    "kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": jensen_shannon,
    "grouped_kl": forward_kl,  # of groups of the student's tokens
    "uld_topk": absolute_difference,
    "gold": forward_kl,  # of the entries that have an id; of the others see `with_ranked`
}
"""The distances by the name that a recipe has for them."""
