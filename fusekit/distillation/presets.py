"""Named sets of settings: the papers' methods and the baselines, so that a comparison is one word.

Only what differs from the defaults of :mod:`fusekit.distillation.settings` is written here.
docs/distillation.md lists every value beside the paper's.
"""

from __future__ import annotations

from typing import Any

Preset = dict[str, dict[str, Any]]

# As the papers do it: source entries that meet on one pivot entry keep the largest, and positions without a row get a
# one-hot on the label. Tokens are aligned exactly; `tokens: dtw` is the papers' own.
_PAPERS_ALIGNMENT: dict[str, Any] = {"conditioning": False, "tail": "keep", "one_hot": True, "collisions": "max"}

# Rows in the source's own vocabulary, which the pivot's opinion cannot stand beside, nor be judged with.
_OWN_VOCABULARY: dict[str, Any] = {"mode": "pairwise", "include_pivot": False, "metric": "bits_per_byte"}

PRESETS: dict[str, Preset] = {
    # Chosen on validation text of a real pair of models: benchmarks/real.
    "fusekit": {"training": {"lm_weight": 0.0, "lm_weighting": "relative", "loss": "kl"}},
    # arXiv 2401.10491, sections 3 and 4.1.
    "fusellm": {
        "alignment": {**_PAPERS_ALIGNMENT, "vocabulary": "mined"},
        "fusion": {"mode": "joint", "function": "min_ce", "metric": "token_ce"},
        "training": {
            "lm_weight": 0.9,
            "loss": "ce",
            "truncation": "renormalize",
            "num_train_epochs": 1.0,
            "learning_rate": 1e-5,
            "warmup_steps": 0.008,
            "weight_decay": 0.1,
            "batch_size": 128,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "max_grad_norm": 1.0,
        },
    },
    # arXiv 2408.07990, sections 3 and 4.1.
    "fusechat": {
        "alignment": {**_PAPERS_ALIGNMENT, "vocabulary": "ms"},
        "fusion": {"mode": "pairwise", "function": "min_ce", "metric": "token_ce"},
        "training": {
            "lm_weight": 0.9,
            "loss": "ce",
            "truncation": "renormalize",
            "num_train_epochs": 3.0,
            "learning_rate": 5e-6,
            "warmup_steps": 0.03,
            "weight_decay": 0.0,
            "batch_size": 128,
        },
    },
    # The default, but in groups of the pivot's tokens that the source can tell apart.
    "grouped_kl": {
        "alignment": {"vocabulary": "grouped"},
        "training": {"lm_weight": 0.0, "lm_weighting": "relative", "loss": "grouped_kl"},
    },
    # X-Token's projection of the student into the source's vocabulary (arXiv 2605.21699).
    "p_kl": {"alignment": {"vocabulary": "pieces"}, "fusion": _OWN_VOCABULARY, "training": {"loss": "p_kl"}},
    # Approximate likelihood matching (arXiv 2503.20083).
    "alm": {"alignment": {"vocabulary": "chunks"}, "fusion": _OWN_VOCABULARY, "training": {"loss": "alm"}},
    # arXiv 2408.04998; the weights of the stages are published, the other values are not. Beta is (1 - lm_weight) /
    # lm_weight.
    "profuser": {
        "alignment": {**_PAPERS_ALIGNMENT, "vocabulary": "mined"},
        "fusion": {"mode": "joint", "function": "min_ce", "metric": "token_ce"},
        "training": {
            "lm_weight": 0.5,
            "loss": "kl",
            "truncation": "renormalize",
            "schedule": [{"epochs": 1, "responses": 1.0}, {"epochs": 2, "responses": 0.1, "data": 1.0}],
            "learning_rate": 5e-6,
            "warmup_steps": 0.03,
            "weight_decay": 0.0,
            "batch_size": 128,
        },
    },
    # Plain fine-tuning on the same rows, in the same order.
    "sft": {"fusion": {"mode": "joint"}, "training": {"lm_weight": 1.0}},
    # Universal logit distillation (arXiv 2402.12030): sorted probabilities, at the positions where both have read the
    # same text, cut off after the top k.
    "uld": {"alignment": {"vocabulary": "none"}, "fusion": _OWN_VOCABULARY, "training": {"loss": "uld_topk"}},
    # As uld, but entries whose string is a token of the pivot are compared with that token; after the hybrid loss of
    # TRL's GOLD trainer.
    "gold": {"alignment": {"vocabulary": "matched"}, "fusion": _OWN_VOCABULARY, "training": {"loss": "gold"}},
}
