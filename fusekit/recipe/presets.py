"""Named sets of values. A recipe's own values come on top of its preset's; ``source`` goes into every source.

The sections ``alignment``, ``fusion`` and ``distill`` are those of :mod:`fusekit.distillation.presets`; what a preset
does not name has the default of its section. The table of all values is in docs/recipe.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusekit.distillation.presets import PRESETS as DISTILLATION


def _sce(select_topk: float, variant: str) -> dict[str, Any]:
    parameters = {"select_topk": select_topk, "variant": variant}
    return {"merge_method": "fusechat_sce", "parameters": parameters, "dtype": "bfloat16"}


# FuseChat's τ is 0.1. In the form that the authors' repository computes it selects what the coefficients are computed
# from; in the paper's form it also drops the other nine tenths of every fusion vector.
_AROUND: dict[str, dict[str, Any]] = {
    "fusekit": {"merge": _sce(1.0, "paper")},
    "fusechat": {"source": {"chat_template": "pivot"}, "merge": _sce(0.1, "fuseai")},
    "fusellm": {"data": {"train_on": "all", "pack": True}},
    "uld": {"merge": _sce(1.0, "paper")},
    "gold": {"merge": _sce(1.0, "paper")},
}


def _preset(name: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"distill" if section == "training" else section: dict(values) for section, values in sections.items()}
    return renamed | _AROUND.get(name, {})


PRESETS: dict[str, dict[str, Any]] = {name: _preset(name, sections) for name, sections in DISTILLATION.items()}
