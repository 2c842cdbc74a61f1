"""MinED over whole vocabularies against rapidfuzz's own rate, and projection of top-k rows.

python -m benchmarks.alignment.maps
"""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from benchmarks.measure import RESULTS, median_ms, write
from fusekit.alignment import vocabulary_surfaces
from fusekit.alignment.vocabulary_map import build_vocabulary_map
from tests.alignment import reference
from tests.alignment.tokenizers import load


def rapidfuzz_rate(queries: list[str], options: list[str]) -> float:
    """Pairs per second of ``cdist`` on a sample of the queries against all options, the best of three."""
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        cdist(queries, options, scorer=Levenshtein.distance, dtype=np.uint8, workers=-1)
        best = max(best, len(queries) * len(options) / (time.perf_counter() - started))
    return best


def text_surfaces(name: str) -> list[str]:
    """The decodable surfaces of a vocabulary."""
    found = []
    for surface in vocabulary_surfaces(load(name)).id_of:
        try:
            found.append(surface.decode())
        except UnicodeDecodeError:
            continue
    return found


def mined(pivot: str, source: str) -> dict[str, Any]:
    """Time of the map, and of what rapidfuzz would need for the same pairs, and for all pairs."""
    em = build_vocabulary_map(load(pivot), load(source), "em")
    unmatched = set(np.flatnonzero(em.targets < 0).tolist())
    ours = vocabulary_surfaces(load(source))
    queries = [s.decode() for s, i in ours.id_of.items() if i in unmatched and decodes(s)]
    options = text_surfaces(pivot)
    sample = np.random.default_rng(0).choice(len(queries), 800, replace=False)
    rate = rapidfuzz_rate([queries[i] for i in sample], options)
    started = time.perf_counter()
    build_vocabulary_map(load(pivot), load(source), "mined", cache=False)
    seconds = time.perf_counter() - started
    pairs = len(queries) * len(options)
    return {
        "what": f"mined {source} -> {pivot}",
        "size": f"{len(ours)} x {len(em.pivot)}, {len(queries)} unmatched",
        "seconds": round(seconds, 2),
        "peer": "rapidfuzz cdist, the same unmatched strings, by its rate",
        "peer_seconds": round(pairs / rate, 2),
        "ratio": round(seconds / (pairs / rate), 3),
        "peer_rate": f"{rate / 1e6:.0f} M pairs/s",
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def decodes(surface: bytes) -> bool:
    """Whether a surface is UTF-8."""
    try:
        surface.decode()
    except UnicodeDecodeError:
        return False
    return True


def projection(pivot: str, source: str, rows: int, k: int) -> dict[str, Any]:
    """Rows per second of one call against a dictionary loop."""
    mapping = build_vocabulary_map(load(pivot), load(source), "prefix")
    generator = np.random.default_rng(0)
    size = len(mapping.source)
    ids = generator.integers(0, size // k, (rows, k)) * k + np.arange(k)
    mass = generator.dirichlet(np.full(k + 1, 0.3), rows) + 1e-9
    mass /= mass.sum(axis=1, keepdims=True)
    logprobs, tail = np.log(mass[:, :k]), mass[:, k]
    targets = {i: ({int(t): 1.0} if t >= 0 else {}) for i, t in enumerate(mapping.targets)}

    def loop() -> None:
        for row in range(rows):
            reference.project(targets, ids[row].tolist(), logprobs[row].tolist(), float(tail[row]), False)

    ours, theirs = median_ms(lambda: mapping.project(ids, logprobs, tail)), median_ms(loop)
    return {
        "what": f"projection {source} -> {pivot}",
        "size": f"{rows} rows, k {k}",
        "seconds": round(ours / 1e3, 5),
        "peer": "a loop over dictionaries",
        "peer_seconds": round(theirs / 1e3, 5),
        "ratio": round(ours / theirs, 4),
        "peer_rate": f"{rows / ours * 1e3:.0f} rows/s here",
        "peak_mib": "",
    }


def main() -> None:
    rows = [mined("qwen", "mistral"), mined("mistral", "qwen"), mined("qwen", "llama3")]
    rows += [projection("mistral", "qwen", rows, k) for rows in (512, 4096) for k in (10, 50)]
    for row in rows:
        print(*row.values())
    write(RESULTS / "alignment-maps.csv", rows)


if __name__ == "__main__":
    main()
