"""Named sets of values. A recipe's own values come on top of its preset's; ``source`` goes into every source.

The sections ``alignment``, ``fusion`` and ``distill`` are those of :mod:`fusekit.distillation.presets`; what a preset
does not name has the default of its section. The table of all values is in docs/recipe.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusekit.distillation.presets import PRESETS as DISTILLATION

_SCE: dict[str, Any] = {"merge_method": "fusechat_sce", "parameters": {"select_topk": 0.1}, "dtype": "bfloat16"}

_AROUND: dict[str, dict[str, Any]] = {
    "fusekit": {"merge": _SCE},
    "fusechat": {"source": {"chat_template": "pivot"}, "merge": _SCE},
    "fusellm": {"data": {"train_on": "all", "pack": True}},
    "uld": {"merge": _SCE},
}


def _preset(name: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"distill" if section == "training" else section: dict(values) for section, values in sections.items()}
    return renamed | _AROUND.get(name, {})


PRESETS: dict[str, dict[str, Any]] = {name: _preset(name, sections) for name, sections in DISTILLATION.items()}
