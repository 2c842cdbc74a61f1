"""`fusekit merge`, its checks and fsync included, against stock `mergekit-yaml` on the same recipe, net of start-up.

    python benchmarks/merge/safe_merge.py --work /tmp/bench --runs 5

The two run in turn. Start-up is what the same command takes for the demo's models of 2 MB, measured in the same turn.
Where fsync costs much, wall time says more about the disk than about the code: both times are given.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from measure import RESULTS, Run, checkpoints, merge, mergekit_yaml, parser_of, write

DEMO = [Path(__file__).parents[2] / "demo" / "models" / name for name in ("pivot", "numbers", "strings", "facts")]
METHODS = {"linear": {}, "fusechat_sce": {"select_topk": 0.1}}


def fusekit_merge(config: Path, out: Path) -> list[str]:
    """The command of fusekit."""
    return [sys.executable, "-m", "fusekit.cli", "merge", str(config), str(out), "--quiet", "--no-copy-tokenizer"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results of merges")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=10, help="10 layers have 492 M parameters")
    parser.add_argument("--targets", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=RESULTS / "merge-safe.csv")
    arguments = parser.parse_args()
    models = checkpoints(arguments.work, arguments.layers, arguments.targets)

    def net(command: Callable[[Path, Path], list[str]], method: str) -> Run:
        """A merge without its start-up; the peak is the whole process's."""
        start, whole = (merge(arguments.work, method, folders, METHODS[method], command) for folders in (DEMO, models))
        return Run(whole.wall - start.wall, whole.cpu - start.cpu, whole.peak)

    rows = []
    for method in METHODS:
        turns = []
        for turn in range(arguments.runs + 1):
            ours, stock = net(fusekit_merge, method), net(mergekit_yaml, method)
            if turn:  # the first warms the page cache
                turns.append((ours, stock))
                print(f"{method}: {ours.cpu:.2f}, {stock.cpu:.2f} s CPU, {ours.wall:.2f}, {stock.wall:.2f} s wall")
        rows.append(
            {
                "method": method,
                "layers": arguments.layers,
                "targets": arguments.targets,
                "runs": arguments.runs,
                "fusekit_cpu_median_s": round(statistics.median(ours.cpu for ours, _ in turns), 2),
                "stock_cpu_median_s": round(statistics.median(stock.cpu for _, stock in turns), 2),
                "fusekit_wall_median_s": round(statistics.median(ours.wall for ours, _ in turns), 2),
                "stock_wall_median_s": round(statistics.median(stock.wall for _, stock in turns), 2),
                "times_stock_cpu": round(statistics.median(ours.cpu / stock.cpu for ours, stock in turns), 3),
                "times_stock_wall": round(statistics.median(ours.wall / stock.wall for ours, stock in turns), 3),
            }
        )
        print(rows[-1])
    write(arguments.csv, rows)


if __name__ == "__main__":
    main()
