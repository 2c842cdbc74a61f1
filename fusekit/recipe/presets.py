"""Named sets of values. A recipe's own values come on top of its preset's; ``source`` goes into every source.

``fusekit`` is the sections' own defaults. The papers' values are those of their training scripts and texts:

| value | fusellm (arXiv 2401.10491) | fusechat (arXiv 2408.07990) | fusekit |
|---|---|---|---|
| tokens, vocabulary | dtw, mined | dtw, ms | span, prefix |
| where no row is | one-hot on the label | one-hot on the label | no distillation term |
| entries kept | 10 | 10 | 10 |
| templates of sources | plain text | the pivot's | their own |
| targets | one (joint) | one per source (pairwise) | one per source |
| function, metric | min_ce over token_ce | min_ce over token_ce | min_ce over bits_per_byte |
| λ, loss, truncation | 0.9, ce, renormalize | 0.9, ce, renormalize | 0.9, kl, tail |
| epochs, learning rate | 1, 1e-5 | 3, 5e-6 | 3, 5e-6 |
| batch, schedule, warmup | 128, cosine, 0.008 | 128, cosine, 0.03 | 128, cosine, 0.03 |
| AdamW betas, weight decay | 0.9/0.95, 0.1 | 0.9/0.999, 0 | 0.9/0.999, 0 |
| merge | - | SCE, select_topk 0.1 | SCE, select_topk 0.1 |
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
