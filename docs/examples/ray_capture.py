"""Capture one store with Ray Data: workers keep the model and capture one share after the other.

    python docs/examples/ray_capture.py MODEL DATA OUT --workers 8 --gpus 1

A share that fails or whose worker dies is the unit of retry. Call it again to resume.
"""

from __future__ import annotations

import argparse
from typing import Any

import ray

from fusekit.capturing.capture import capture_job
from fusekit.capturing.store import Store
from fusekit.devices import Processes


class Shares:
    """A worker: it finds the examples and the model once, and loads the model at its first share."""

    def __init__(self, model: str, data: str, out: str, world: int, settings: dict[str, Any]) -> None:
        self.job, self.world = capture_job(model, data, out, quiet=True, **settings), world

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for rank in batch["id"].tolist():
            self.job.run(Processes.separate(rank, self.world))
        return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1, help="of one worker; Ray needs one more for itself")
    parser.add_argument("--gpus", type=float, default=0, help="of one worker")
    parser.add_argument("--shares", type=int, default=64, help="parts of the store; a worker takes one at a time")
    parser.add_argument("--rows-per-shard", type=int, default=None)
    parser.add_argument("--max-length", type=int, default=2048)
    options = parser.parse_args()
    settings = {"max_length": options.max_length, "rows_per_shard": options.rows_per_shard}
    ray.data.range(options.shares, override_num_blocks=options.shares).map_batches(
        Shares,
        fn_constructor_args=(options.model, options.data, options.out, options.shares, settings),
        batch_size=1,
        concurrency=options.workers,
        num_cpus=options.cpus,
        num_gpus=options.gpus,
    ).materialize()
    print(f"{options.out}: {len(Store.open(options.out))} examples")


if __name__ == "__main__":
    main()
