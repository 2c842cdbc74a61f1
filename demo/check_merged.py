"""Fail unless the merged demo model beats the mean of its targets, on the average over all skills.

python demo/evaluate.py MERGED TARGET [TARGET ...] --json scores.json
python demo/check_merged.py scores.json
"""

import json
import sys
from pathlib import Path


def main() -> int:
    """Exit status 0 if the first model of the scores beats the mean of the others."""
    merged, *targets = (scores["average"] for scores in json.loads(Path(sys.argv[1]).read_text()).values())
    mean = sum(targets) / len(targets)
    print(f"merged {merged:.3f}, mean of {len(targets)} targets {mean:.3f}")
    return int(merged <= mean)


if __name__ == "__main__":
    sys.exit(main())
