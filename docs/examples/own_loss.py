"""A distance of one's own, and the `fusekit` command that knows it.

    python docs/examples/own_loss.py run recipes/demo.yml out/brier --set distill.loss=brier

The Brier score: the sum of squared differences over the outcomes, which are the ids that a target lists and, with
`truncation: tail`, everything else.
"""

from __future__ import annotations

from torch import Tensor

from fusekit.distillation.distances import DISTANCES


def brier(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (p - q)², [n], and its slopes in log p, [n, o]. log_q, log_p: target and student, -inf for no probability."""
    p, difference = log_p.exp(), log_p.exp() - log_q.exp()
    return difference.square().sum(1), 2 * difference * p


DISTANCES["brier"] = brier

if __name__ == "__main__":
    from fusekit.cli import main

    main()
