"""How fast the data side makes targets: labels per second and process, from stores to examples, and where time goes.

python -m benchmarks.distillation.targets [--tokens 2048] [--k 10] [--dtw]

Rows of real text under real tokenizers; what the models say about it is made up (the label and random tokens of the
text), which costs the same to read, align, project and fuse as what a model would say.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alignment.texts import piece, texts
from benchmarks.capture.store import stored
from benchmarks.measure import RESULTS, parser_of, write
from fusekit.alignment.vocabulary_map import build_vocabulary_map
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.projections import Projection, label_rows
from fusekit.distillation.settings import FusionSettings
from fusekit.types import TEXT, CapturedRow, Message, Row, TokenizedRow, TopK
from tests.alignment.tokenizers import load

PAIRS = [("mistral", "qwen"), ("qwen", "mistral"), ("qwen", "deepseek")]
CHARACTERS = 200_000
WARMING, MEASURED = 3, 9  # rows


def opinions(tokens: TokenizedRow, k: int, seed: int) -> CapturedRow:
    """Falling probabilities, the label at a random place among the entries or, at one in ten, outside of them."""
    rng = np.random.default_rng(abs(seed))
    labels = tokens.ids[tokens.label_positions]
    n, seen = len(labels), np.unique(tokens.ids)
    ids = np.stack([rng.choice(seen, k, replace=False) for _ in range(n)])
    place = rng.integers(0, k, n)
    inside = rng.random(n) < 0.9
    for row in np.flatnonzero(inside).tolist():
        ids[row][ids[row] == labels[row]] = ids[row, place[row]]
        ids[row, place[row]] = labels[row]
    mass = np.sort(rng.dirichlet(np.full(k + 1, 0.3), n), axis=1)[:, ::-1].clip(1e-9)
    logprobs, tail = np.log(mass[:, :k]), mass[:, k]
    listed = np.where(ids == labels[:, None], logprobs, -np.inf).max(axis=1)
    actual = np.where(np.isfinite(listed), listed, np.log(tail / 2))
    return CapturedRow(tokens, "", TopK(ids, logprobs, tail), actual, float(-actual.sum()))


def pieces(text: str, tokenizer: Any, tokens: int, count: int) -> list[str]:
    """``count`` stretches of a text, one after the other, of about ``tokens`` tokens each."""
    found = []
    for _ in range(count):
        found.append(piece(text, tokenizer, tokens))
        text = text[len(found[-1]) :]
    return found


def median_over(rows: range, call: Callable[[int], Any]) -> float:
    """Median milliseconds over rows that are each read once, as training reads them."""
    times = []
    for row in rows:
        begin = time.perf_counter()
        call(row)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def measure(pivot: str, source: str, kind: str, tokens: int, k: int, dtw: bool) -> dict[str, Any]:
    """Rows of ``tokens`` pivot tokens; the first few only warm up."""
    p, s = load(pivot), load(source)
    contents = pieces(texts(CHARACTERS)[kind], p, tokens, WARMING + MEASURED)
    rows = [Row((Message(TEXT, content),)) for content in contents]
    ours, theirs = ([RowTokenizer(t).tokenize(row) for row in rows] for t in (p, s))
    made = build_vocabulary_map(p, s, method="prefix")
    plain = {"add_special_tokens": False, "return_offsets_mapping": True}
    with tempfile.TemporaryDirectory() as folder:
        own = stored(Path(folder) / "pivot", [opinions(row, k, i) for i, row in enumerate(ours)], len(p), k)
        other = stored(Path(folder) / "source", [opinions(row, k, -i) for i, row in enumerate(theirs)], len(s), k)
        data = FusionDataset(
            rows,
            pivot=own,
            sources={"source": other},
            projections={"source": Projection(made)},
            fusion=FusionSettings(function="avg_ce"),  # reads both; min_ce takes one as it is
        )
        said, how = list(other), Projection(made)
        for i in range(WARMING):
            data[i], label_rows(rows[i], ours[i], said[i], how)
        measured = range(WARMING, WARMING + MEASURED)
        times = {
            "encoding twice, ms": median_over(measured, lambda i: (p(contents[i], **plain), s(contents[i], **plain))),
            "reading stores, ms": median_over(measured, lambda i: (own[i], other[i])),
            "aligning, ms": median_over(measured, lambda i: label_rows(rows[i], ours[i], said[i], how)),
            "example, ms": median_over(measured, lambda i: data[i]),
        }
        if dtw:
            warped = Projection(made, tokens="dtw", collisions="max")
            times["aligning by dtw, ms"] = median_over(
                range(WARMING, WARMING + 2), lambda i: label_rows(rows[i], ours[i], said[i], warped)
            )
    labels = int(np.median([len(ours[i].label_positions) for i in measured]))
    return {
        "pivot": pivot,
        "source": source,
        "text": kind,
        "labels": labels,
        "k": k,
        **{name: round(value, 2) for name, value in times.items()},
        "labels per second": round(labels / times["example, ms"] * 1e3),
        "times encoding": round(times["example, ms"] / times["encoding twice, ms"], 2),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="pivot tokens of a row")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--dtw", action="store_true", help="also the papers' alignment, which takes seconds a row")
    options = parser.parse_args()
    rows = []
    for pivot, source in PAIRS:
        for kind in texts():
            rows.append(measure(pivot, source, kind, options.tokens, options.k, options.dtw))
            print(rows[-1])
    write(RESULTS / "distillation-targets.csv", rows)


if __name__ == "__main__":
    main()
