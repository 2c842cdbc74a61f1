"""Growth of a whole merge with the number of parameters and of targets.

    python benchmarks/merge/growth.py --work /tmp/bench --runs 3

Time should be linear in both; peak memory beyond what `linear` takes on the same models should not grow.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from measure import RESULTS, checkpoints, merge, parser_of, write

SIZES = ["2:5", "5:5", "10:5", "10:3", "10:1"]  # layers:targets; 10 layers have 492 M parameters


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="LAYERS:TARGETS")
    parser.add_argument("--csv", type=Path, default=RESULTS / "merge-growth.csv")
    arguments = parser.parse_args()
    rows = []
    for layers, targets in (map(int, size.split(":")) for size in arguments.sizes):
        folders = checkpoints(arguments.work, layers, targets)
        parameters = (folders[0] / "model.safetensors").stat().st_size // 2
        for method, options in (("linear", {}), ("fusechat_sce", {"select_topk": 1.0 if targets == 1 else 0.1})):
            _, *results = (merge(arguments.work, method, folders, options) for _ in range(arguments.runs + 1))
            rows.append(
                {
                    "method": method,
                    "million_parameters": round(parameters / 1e6),
                    "targets": targets,
                    "runs": arguments.runs,
                    "wall_median_s": round(statistics.median(r.wall for r in results), 2),
                    "cpu_median_s": round(statistics.median(r.cpu for r in results), 2),
                    "peak_median_mib": round(statistics.median(r.peak for r in results) / 2**20),
                }
            )
            print(rows[-1])
    write(arguments.csv, rows)


if __name__ == "__main__":
    main()
