"""Child processes that start in milliseconds: forked from one server that has imported what takes seconds.

Python has one such server per process, whatever asks for it, so what it imports is decided here and nowhere else.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "accelerate",
        "fusekit.cli.merge",
        "fusekit.cli.capture",
        "fusekit.cli.run",
        "fusekit.distillation.run",
        "fusekit.evaluation.metrics",
        "fusekit.merging.run",
        "fusekit.pipeline.run",
        "fusekit.pipeline.plan",
        "fusekit.capturing.capture",
        "transformers.models.gpt_neox.modeling_gpt_neox",
        "transformers.models.llama.modeling_llama",
        "tests.capture.store_processes",
    ]
)
