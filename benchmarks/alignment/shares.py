"""How many pivot positions are linked and get a row: per pair of tokenizers and kind of text, by case.

python -m benchmarks.alignment.shares
"""

from __future__ import annotations

from benchmarks.alignment.texts import texts
from benchmarks.alignment.timing import write
from fusekit.alignment import align, plan_rows
from fusekit.alignment.row_cases import HAS_ROW, Case
from tests.alignment.tokenizers import REAL, load

PAIRS = [(p, s) for p in REAL for s in REAL if p != s]


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
                    "linked": round(alignment.linked_share, 4),
                    "rows_without_conditioning": round(sum(int((bare == c).sum()) for c in HAS_ROW) / n, 4),
                    "rows": round(sum(int((cases == c).sum()) for c in HAS_ROW) / n, 4),
                    **{name: round(value, 4) for name, value in share.items() if name not in ("one_hot", "rule")},
                }
            )
    write("alignment-shares", rows)
    worst = min(rows, key=lambda row: row["rows"])
    print(f"fewest rows: {worst['rows']} ({worst['pivot']} <- {worst['source']}, {worst['text']})")


if __name__ == "__main__":
    main()
