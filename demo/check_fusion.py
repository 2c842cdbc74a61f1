"""Fail unless the demo's merged model beats the pivot and plain fine-tuning, on the average over all skills.

fusekit run recipes/demo.yml OUT
python demo/check_fusion.py OUT/results.json
"""

import json
import statistics
import sys
from pathlib import Path


def means(results: Path) -> dict[str, float]:
    """Bits per byte by model, the mean over skills."""
    models = json.loads(results.read_text(encoding="utf-8"))["models"]
    return {name: statistics.fmean(found["bits_per_byte"].values()) for name, found in models.items()}


def main() -> int:
    """Exit status 0 if fewer bits per byte are needed by ``merged`` than by ``pivot`` and by ``baseline``."""
    found = means(Path(sys.argv[1]))
    print("bits per byte: " + ", ".join(f"{name} {found[name]:.3f}" for name in ("merged", "baseline", "pivot")))
    return int(found["merged"] >= min(found["baseline"], found["pivot"]))


if __name__ == "__main__":
    sys.exit(main())
