"""A fusion function of one's own, and the `fusekit` command that knows it.

    python docs/examples/own_fusion.py run recipes/demo.yml out/soft --set fusion.function=soft_min_ce

AvgCE weighs candidates by softmax(exp(-CE)), which is nearly uniform; MinCE takes the best alone. This one lies between
them: softmax(-CE / WIDTH).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusekit.distillation.fusion import FUSION_FUNCTIONS, Candidate, Fused, mixture

WIDTH = 0.1  # in the units of fusion.metric; towards 0 it becomes MinCE


def soft_min_ce(candidates: Sequence[Candidate], level: str = "sequence") -> Fused:  # noqa: ARG001 - of whole rows
    """The mixture with weights softmax_j(-CE_j / WIDTH)."""
    scores = np.array([candidate.cross_entropy for candidate in candidates])
    return mixture(candidates, np.exp((scores.min() - scores) / WIDTH)[None])


FUSION_FUNCTIONS["soft_min_ce"] = soft_min_ce

if __name__ == "__main__":
    from fusekit.cli import main

    main()
