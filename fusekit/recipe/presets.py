"""Named sets of values. A recipe's own values come on top of its preset's; ``source`` goes into every source.

``fusekit`` is the sections' own defaults; the papers' values are those of their texts and training scripts. The table
of all three is in docs/recipe.md.
"""

from __future__ import annotations

from typing import Any

_SCE: dict[str, Any] = {"merge_method": "fusechat_sce", "parameters": {"select_topk": 0.1}, "dtype": "bfloat16"}

PRESETS: dict[str, dict[str, Any]] = {
    "fusekit": {
        "distill": {"trainer": {"lr_scheduler_type": "cosine", "warmup_steps": 0.03}},
        "merge": _SCE,
    },
    "fusechat": {
        "source": {"chat_template": "pivot"},
        "alignment": {"tokens": "dtw", "vocabulary": "ms", "conditioning": False, "one_hot": True},
        "fusion": {"mode": "pairwise", "function": "min_ce", "level": "sequence", "metric": "token_ce"},
        "distill": {
            "lm_weight": 0.9,
            "loss": "ce",
            "truncation": "renormalize",
            "epochs": 3,
            "learning_rate": 5.0e-6,
            "batch_size": 128,
            "trainer": {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0, "bf16": True},
        },
        "merge": _SCE,
    },
    "fusellm": {
        "data": {"train_on": "all"},
        "alignment": {"tokens": "dtw", "vocabulary": "mined", "conditioning": False, "one_hot": True},
        "fusion": {"mode": "joint", "function": "min_ce", "level": "sequence", "metric": "token_ce"},
        "distill": {
            "lm_weight": 0.9,
            "loss": "ce",
            "truncation": "renormalize",
            "epochs": 1,
            "learning_rate": 1.0e-5,
            "batch_size": 128,
            "trainer": {
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.008,
                "adam_beta1": 0.9,
                "adam_beta2": 0.95,
                "weight_decay": 0.1,
                "max_grad_norm": 1.0,
                "bf16": True,
            },
        },
    },
}
