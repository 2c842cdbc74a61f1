"""What the autoload adds to the start of an interpreter that has nothing to do with merging.

    python benchmarks/merge/startup.py --runs 200

The cumulative time of importing the autoload module, as `python -X importtime` has it (install() itself is a look-up
and an insertion), and which heavy modules are loaded after a start. Needs fusekit installed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from measure import RESULTS, parser_of, write

LOADED = "import sys; print(sorted(m for m in ('torch', 'numpy', 'mergekit', 'fusekit') if m in sys.modules))"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--csv", type=Path, default=RESULTS / "merge-startup.csv")
    arguments = parser.parse_args()
    seconds = []
    for _ in range(arguments.runs):
        command = [sys.executable, "-X", "importtime", "-c", "pass"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        (line,) = [line for line in done.stderr.splitlines() if line.endswith("_fusekit_autoload")]
        seconds.append(int(line.split("|")[1]) / 1e6)
    loaded = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True).stdout.strip()
    row = {
        "runs": arguments.runs,
        "autoload_median_ms": round(1e3 * statistics.median(seconds), 3),
        "autoload_max_ms": round(1e3 * max(seconds), 3),
        "heavy_modules_loaded_at_start": loaded,
    }
    print(row)
    write(arguments.csv, [row])


if __name__ == "__main__":
    main()
