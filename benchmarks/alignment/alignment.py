"""Time and exactness of token alignment: fusekit, encoding alone, FuseChat's aligner and TRL GOLD's walk.

python -m benchmarks.alignment.alignment [--fuseai CHECKOUT] [--trl CHECKOUT] [--tokens 512 2048]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.alignment import peers
from benchmarks.alignment.texts import piece, texts
from benchmarks.measure import RESULTS, median_ms, parser_of, write
from fusekit.alignment.alignment import align
from tests.alignment import reference
from tests.alignment.tokenizers import load

PAIRS = [
    ("mistral", "qwen"),
    ("qwen", "mistral"),
    ("qwen", "deepseek"),
    ("deepseek", "cl100k"),
    ("anthropic", "mistral"),
]


def wrong_share(links: list[tuple[int, int]], pivot_ends: list[int | None], source_ends: list[int | None]) -> float:
    """Share of links between positions that have not consumed the same bytes."""
    wrong = sum(pivot_ends[i] is None or pivot_ends[i] != source_ends[j] for i, j in links)
    return wrong / len(links) if links else 0.0


def links_of_groups(pivot_groups: list[list[int]], source_groups: list[list[int]]) -> list[tuple[int, int]]:
    """The common ends that groups claim."""
    return [(p[-1], s[-1]) for p, s in zip(pivot_groups, source_groups, strict=False) if p and s]


def attempt(
    name: str, call: Callable[[], Any], links: Callable[[Any], list[tuple[int, int]]], ends: Any
) -> dict[str, Any]:
    """One row: milliseconds, number of links, share of wrong ones; or what the peer raised."""
    try:
        result = call()
    except Exception as error:  # a peer that refuses is a result
        return {"aligner": name, "ms": "", "links": "", "wrong": "", "note": type(error).__name__}
    found = links(result)
    wrong = round(wrong_share(found, *ends), 4)
    return {"aligner": name, "ms": round(median_ms(call), 3), "links": len(found), "wrong": wrong, "note": ""}


def measure(pivot: str, source: str, text: str, fuseai: Any, trl: Any) -> list[dict[str, Any]]:
    """Every aligner on one text."""
    p, s = load(pivot), load(source)
    ends = reference.original_ends(p, text), reference.original_ends(s, text)
    plain = {"add_special_tokens": False, "return_offsets_mapping": True}
    floor = median_ms(lambda: (p(text, **plain), s(text, **plain)), runs=41)
    rows = [{"aligner": "encoding twice", "ms": round(floor, 3), "links": "", "wrong": "", "note": "the floor"}]

    def span_links(a: Any) -> list[tuple[int, int]]:
        return [(i, int(j)) for i, j in enumerate(a.source_at) if j >= 0]

    rows.append(attempt("fusekit span", lambda: align(text, p, s), span_links, ends))
    rows[-1]["note"] = f"linkable {sum(j >= 0 for j in reference.links(*ends))}"
    rows.append(attempt("fusekit dtw", lambda: align(text, p, s, method="dtw"), span_links, ends))
    if fuseai is not None:
        ids = [t(text, add_special_tokens=False)["input_ids"] for t in (p, s)]
        call = lambda: fuseai.transform_step_token(p, ids[0], s, ids[1])  # noqa: E731
        one_to_one = lambda r: [(i, a[0]) for i, a in enumerate(r[4]) if len(a) == 1]  # noqa: E731
        rows.append(attempt("FuseChat", call, one_to_one, ends))
    if trl is not None:

        def walk() -> tuple[list[list[int]], list[list[int]]]:
            [(_, a)] = trl.encode_with_byte_offsets(p.backend_tokenizer, [text])
            [(_, b)] = trl.encode_with_byte_offsets(s.backend_tokenizer, [text])
            return trl._align_by_byte_offsets(a, b)

        rows.append(attempt("TRL GOLD", walk, lambda r: links_of_groups(*r), ends))
    for row in rows:
        row["times floor"] = round(row["ms"] / floor, 3) if row["ms"] != "" else ""
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--fuseai", type=Path, help="a checkout of fanqiwan/FuseAI")
    parser.add_argument("--trl", type=Path, help="a checkout of huggingface/trl")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    options = parser.parse_args()
    marks = {type(load("mistral")): "▁", type(load("qwen")): "Ġ"}
    fuseai = peers.fuseai(options.fuseai, marks) if options.fuseai else None
    trl = peers.trl(options.trl) if options.trl else None
    rows: list[dict[str, Any]] = []
    try:
        measure_all(options.tokens, fuseai, trl, rows)
    finally:  # what was measured before an interruption is worth keeping
        write(RESULTS / "alignment-alignment.csv", rows)


def measure_all(sizes: list[int], fuseai: Any, trl: Any, rows: list[dict[str, Any]]) -> None:
    """Fill ``rows``; above 512 tokens one kind of text per pair, for the growth."""
    for tokens in sizes:
        for pivot, source in PAIRS:
            for kind, text in texts().items():
                cut = piece(text, load(pivot), tokens)
                for row in measure(pivot, source, cut, fuseai, trl):
                    head = {"tokens": tokens, "pivot": pivot, "source": source, "text": kind}
                    rows.append({**head, **row})
                    print(*rows[-1].values(), flush=True)
                if tokens > 512:
                    break


if __name__ == "__main__":
    main()
