"""Captured rows for the tests: random ones, and a strategy for awkward ones."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from fusekit.types import CapturedRow, TokenizedRow, TopK


def key(number: int) -> str:
    return f"{number:032x}"


def coordinates(T: int, rng: np.random.Generator, wild: bool = False) -> dict[str, np.ndarray]:
    """Messages of template, content and end, the second half of them labels; ``wild``: anything that has the shapes."""
    if wild:
        columns = {name: rng.integers(0, 1 << 40, T) for name in ("ends", "lows")}
        columns["message"] = rng.integers(0, 5, T)
        columns["part"] = rng.integers(0, 3, T)
        return columns | {"labels": rng.integers(0, 2, T).astype(bool)}
    message = np.sort(rng.integers(0, 3, T))
    part = np.ones(T, np.int64)
    ends = np.zeros(T, np.int64)
    for number in range(3):
        at = np.flatnonzero(message == number)
        part[at[:2]], part[at[-1:]] = 0, 2
        ends[at] = np.cumsum(rng.integers(0, 8, len(at)) * (part[at] == 1))
    labels = (message > 0) & (part > 0)
    labels[:1] = False
    return {"message": message, "part": part, "ends": ends, "lows": ends, "labels": labels}


def captured(
    rng: np.random.Generator,
    vocabulary: int,
    k: int,
    T: int,
    *,
    number: int = 0,
    dataset: str = "chat",
    ragged: bool = False,
    spread: float = 3.0,
    tail: bool = True,
    wild: bool = False,
) -> CapturedRow:
    """A row of a random model: log-probabilities of standard deviation ``spread``, labels drawn from them."""
    columns = coordinates(T, rng, wild)
    n = int(columns["labels"].sum())
    size = vocabulary if tail else k
    logits = rng.normal(0, spread, (n, size))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    names = np.stack([rng.permutation(vocabulary)[:size] for _ in range(n)]) if n else np.zeros((0, size), np.int64)
    order = np.argsort(-logprobs, axis=1)
    logprobs, names = np.take_along_axis(logprobs, order, 1), np.take_along_axis(names, order, 1)
    ids = rng.integers(0, vocabulary, T)
    drawn = (np.cumsum(np.exp(logprobs), axis=1) < rng.random((n, 1)) * 0.999).sum(axis=1)
    ids[columns["labels"]] = names[np.arange(n), drawn]
    actual = logprobs[np.arange(n), drawn]
    logprobs, names = logprobs[:, :k].copy(), names[:, :k].copy()
    if ragged:
        unused = np.arange(k) >= rng.integers(0, k + 1, n)[:, None]
        logprobs[unused], names[unused] = -np.inf, -1
    rest = np.clip(1 - np.exp(logprobs).sum(axis=1), 0, 1) if tail or ragged else np.zeros(n)
    return CapturedRow(
        TokenizedRow(key(number), ids, **columns), dataset, TopK(names, logprobs, rest), actual, -float(actual.sum())
    )


@st.composite
def awkward_rows(draw: st.DrawFn, vocabulary: int | None = None) -> tuple[CapturedRow, int, int]:
    """A row, its vocabulary and its top k.

    Small and large vocabularies, k from 1 to all of it, empty rows, ragged rows, flat and very peaked ones, with and
    without a tail, ordered and wild coordinates.
    """
    vocabulary = vocabulary or draw(st.sampled_from([1, 2, 3, 17, 256, 257, 5000, 151_936]))
    k = draw(st.sampled_from(sorted({1, 2, 10, vocabulary} & set(range(1, min(vocabulary, 300) + 1)))))
    row = captured(
        np.random.default_rng(draw(st.integers(0, 1 << 32))),
        vocabulary,
        k,
        draw(st.integers(0, 12)),
        number=draw(st.integers(0, (1 << 128) - 1)),
        dataset=draw(st.text(max_size=5)),
        ragged=draw(st.booleans()),
        spread=draw(st.sampled_from([0.0, 1.0, 5.0, 40.0])),
        tail=k < vocabulary and draw(st.booleans()),
        wild=draw(st.booleans()),
    )
    return row, vocabulary, k


def by_id(ids: np.ndarray, logprobs: np.ndarray) -> list[dict[int, float]]:
    """Per label its entries, id -> log-probability."""
    return [
        {int(i): float(p) for i, p in zip(row, values, strict=True) if i >= 0 and p > -math.inf}
        for row, values in zip(ids, logprobs, strict=True)
    ]
