"""Whole `mergekit-yaml` processes: fusekit's methods against mergekit's `sce` and `linear` on the same models.

    python benchmarks/merge/whole_process.py --work /tmp/bench --runs 3

The contestants run in turn, each `runs` times after one warm-up that is not counted. `linear` is the floor: it reads
and writes the same tensors. Needs fusekit installed in the environment (the autoload is part of what is measured).
"""

from __future__ import annotations

import statistics
from pathlib import Path

from measure import RESULTS, Run, checkpoints, merge, parser_of, write

CONTESTANTS = {
    "mergekit linear": ("linear", {}),
    "fusechat_sce paper": ("fusechat_sce", {"select_topk": 0.1, "variant": "paper"}),
    "fusechat_sce renormalized": ("fusechat_sce", {"select_topk": 0.1, "variant": "renormalized"}),
    "fusechat_sce fuseai": ("fusechat_sce", {"select_topk": 0.1, "variant": "fuseai"}),
    "fusechat_sce tau 1": ("fusechat_sce", {"select_topk": 1.0}),
    "varm": ("varm", {}),
    "varm layer": ("varm", {"granularity": "layer"}),
    "mergekit sce": ("sce", {"select_topk": 0.1}),
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results of merges")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=10, help="10 layers have 492 M parameters")
    parser.add_argument("--targets", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of contestants")
    parser.add_argument("--csv", type=Path, default=RESULTS / "merge-whole-process.csv")
    arguments = parser.parse_args()

    folders = checkpoints(arguments.work, arguments.layers, arguments.targets)
    names = [name for name in CONTESTANTS if not arguments.only or name in arguments.only]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for turn in range(arguments.runs + 1):
        for name in names:
            if turn == 0 and name == "mergekit sce":
                continue  # the others have warmed the page cache; this one takes minutes
            method, parameters = CONTESTANTS[name]
            result = merge(arguments.work, method, folders, parameters)
            if turn:
                runs[name].append(result)
                print(f"{name:28} {result.wall:7.1f} s wall {result.cpu:7.1f} s cpu {result.peak / 2**30:6.2f} GiB")

    floor = statistics.median(r.wall for r in runs[names[0]])
    slowest = statistics.median(r.wall for r in runs[names[-1]])
    rows = []
    for name in names:
        walls = [r.wall for r in runs[name]]
        rows.append(
            {
                "contestant": name,
                "layers": arguments.layers,
                "targets": arguments.targets,
                "runs": arguments.runs,
                "wall_median_s": round(statistics.median(walls), 2),
                "wall_min_s": round(min(walls), 2),
                "wall_max_s": round(max(walls), 2),
                "cpu_median_s": round(statistics.median(r.cpu for r in runs[name]), 2),
                "peak_median_mib": round(statistics.median(r.peak for r in runs[name]) / 2**20),
                f"times_{names[0].replace(' ', '_')}": round(statistics.median(walls) / floor, 3),
                f"faster_than_{names[-1].replace(' ', '_')}": round(slowest / statistics.median(walls), 2),
            }
        )
        print(rows[-1])
    write(arguments.csv, rows)


if __name__ == "__main__":
    main()
