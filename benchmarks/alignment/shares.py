"""How many pivot positions are linked and get a row: per pair of tokenizers and kind of text, by case.

python -m benchmarks.alignment.shares
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.alignment.texts import texts
from benchmarks.measure import RESULTS, write
from fusekit.alignment.alignment import align
from fusekit.alignment.rows import HAS_ROW, Case, plan_rows
from tests.alignment.tokenizers import REAL, load

COLUMNS = ("linked", "same", "rows_without_conditioning", "rows")
PAIRS = [(p, s) for p in REAL for s in REAL if p != s]


def table(rows: list[dict[str, Any]]) -> str:
    """The shares as Markdown: a line per pair, English / code / Chinese / emoji mix in each cell."""
    lines = [
        "| pivot <- source | linked | same bytes next | rows without conditioning | rows |",
        "|---|---|---|---|---|",
    ]
    for pivot, source in PAIRS:
        of_pair = [row for row in rows if (row["pivot"], row["source"]) == (pivot, source)]
        cells = ["/".join(f"{row[key]:.3f}"[1:] if row[key] < 0.9995 else "1" for row in of_pair) for key in COLUMNS]
        lines.append(f"| {pivot} <- {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = []
    for pivot, source in PAIRS:
        for kind, text in texts().items():
            alignment = align(text, load(pivot), load(source))
            cases = plan_rows(alignment).cases
            n = len(cases)
            share = {case.name.lower(): float((cases == case).sum() / n) for case in Case}
            bare = plan_rows(alignment, conditioning=False).cases
            rows.append(
                {
                    "pivot": pivot,
                    "source": source,
                    "text": kind,
                    "positions": n,
                    "linked": round(float(np.mean(alignment.source_at >= 0)), 4),
                    "rows_without_conditioning": round(sum(int((bare == c).sum()) for c in HAS_ROW) / n, 4),
                    "rows": round(sum(int((cases == c).sum()) for c in HAS_ROW) / n, 4),
                    **{name: round(value, 4) for name, value in share.items() if name not in ("one_hot", "rule")},
                }
            )
    write(RESULTS / "alignment-shares.csv", rows)
    print(table(rows))
    worst = min(rows, key=lambda row: row["rows"])
    print(f"fewest rows: {worst['rows']} ({worst['pivot']} <- {worst['source']}, {worst['text']})")


if __name__ == "__main__":
    main()
