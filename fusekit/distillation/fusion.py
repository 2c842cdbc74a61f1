# ruff: noqa: ARG001 - strategies have one signature, whether they read all of it or not
"""From what several models say about a row to the one distribution per label that is taught.

    fused = FUSION_FUNCTIONS["min_ce"]([pivot, source], level="sequence")

Whether the pivot takes part is the caller's choice: list it, first, or leave it out. All candidates speak of the
pivot's labels in the pivot's vocabulary. Sources: FuseLLM (arXiv 2401.10491), FuseChat (arXiv 2408.07990).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusekit.alignment.rows import NO_ID, AlignedRows, Case, merge_entries
from fusekit.errors import DistillationError
from fusekit.types import BoolArray, CapturedRow, FloatArray, Part, TokenizedRow, TopK


@dataclass(frozen=True, eq=False)
class Candidate:
    """One model's word on a row of n labels of the pivot.

    Attributes:
        name: the model's, for messages.
        rows: [n, k] in the pivot's vocabulary.
        taught: bool [n], where it has something to say.
        cross_entropy: of the whole row, by one metric for every candidate (:func:`projected_ce`, :func:`metrics_of`).
        label_nll: float64 [n], minus the log-probability it gives each label; only read at ``token`` level.
        reward: a reward model's number for the row, higher is better; only read by ``reward_softmax``.
    """

    name: str
    rows: TopK
    taught: BoolArray
    cross_entropy: float
    label_nll: FloatArray | None = None
    reward: float | None = None


@dataclass(frozen=True, eq=False)
class Fused:
    """What is taught.

    Attributes:
        rows: [n, k'], k' at most the sum of the candidates' k.
        taught: bool [n]; where False the row is empty and its tail 1.
        weights: float64 [n, K], each candidate's share of each label's row; sums to 1 where taught, 0 elsewhere.
    """

    rows: TopK
    taught: BoolArray
    weights: FloatArray


FusionFunction = Callable[..., Fused]
"""(candidates, level="sequence") -> Fused"""


def min_ce(candidates: Sequence[Candidate], level: str = "sequence") -> Fused:
    """MinCE: the candidate of lowest cross-entropy on the row, or on each label; of equal ones the first listed.

    candidates: K >= 1, of one row. level: ``sequence`` or ``token``. At ``sequence`` level a label on which the chosen
    one has nothing to say is not taught, however much others know; a candidate that says nothing of the whole row is
    not chosen. Raises DistillationError: a missing ``label_nll``. arXiv 2401.10491.
    """
    scores = _scores(candidates, level)
    best = np.zeros_like(scores)
    if scores.size:
        best[np.arange(len(scores)), scores.argmin(axis=1)] = 1.0
    return mixture(candidates, np.where(np.isfinite(scores), best, 0.0))


def avg_ce(candidates: Sequence[Candidate], level: str = "sequence") -> Fused:
    """AvgCE: the mixture with weights softmax_j(exp(-CE_j)), which are nearly uniform.

    Inputs and errors as :func:`min_ce`. Where only some candidates speak of a label, the weights are renormalised among
    those. An id that one candidate lists and another has in its tail gets what the one gives it; the other's part of it
    stays in the mixture's tail. arXiv 2401.10491.
    """
    scores = _scores(candidates, level)
    return mixture(candidates, _softmax(np.exp(-scores), scores))


def reward_softmax(candidates: Sequence[Candidate], level: str = "sequence") -> Fused:
    """The mixture with weights softmax_j(reward_j). Inputs as :func:`avg_ce`, at ``sequence`` level, with rewards."""
    if level != "sequence" or any(candidate.reward is None for candidate in candidates):
        raise DistillationError("reward_softmax needs level sequence, and a reward of every model for every example")
    rewards = np.array([[candidate.reward for candidate in candidates]], np.float64)
    return mixture(candidates, _softmax(rewards, _scores(candidates, level)))


FUSION_FUNCTIONS: dict[str, FusionFunction] = {"min_ce": min_ce, "avg_ce": avg_ce, "reward_softmax": reward_softmax}


def constant(weight: float, cross_entropies: Sequence[float], progress: float) -> float:
    """λ as it is."""
    return weight


def soft(weight: float, cross_entropies: Sequence[float], progress: float) -> float:
    """1 - r with r = max_j exp(-CE_j): the surer the best candidate is of the row, the more it teaches."""
    if not len(cross_entropies):
        return 1.0
    return 1.0 - min(max(math.exp(-value) for value in cross_entropies), 1.0)


def hard_and_decay(weight: float, cross_entropies: Sequence[float], progress: float) -> float:
    """λ rising linearly from its value to 1 over training."""
    return weight + (1.0 - weight) * min(max(progress, 0.0), 1.0)


def relative(weight: float, typical: Sequence[float], progress: float) -> float:
    """λ + (1 - λ) · CE_best / CE_pivot, cross-entropies of an example's data set: the pivot's, then the best models'.

    Where no teacher knows more than the pivot, the text alone is learned; the better teachers are, the more they teach.
    It looks at the kind of example and not at the example, on whose label a good teacher disagrees exactly where the
    label is wrong.
    """
    if not len(typical):
        return 1.0
    return weight + (1.0 - weight) * (min(typical) / typical[0] if typical[0] > 0 else 1.0)


LM_WEIGHTS: dict[str, Callable[[float, Sequence[float], float], float]] = {
    "constant": constant,
    "soft": soft,
    "hard_and_decay": hard_and_decay,
    "relative": relative,
}
"""(λ of the recipe, the row's cross-entropies of all candidates, share of training that is done) -> the λ of a row, in
λ · L_CLM + (1 - λ) · L_fusion. The authors' other weightings, by their names for them; ``relative`` is fusekit's and
reads the typical cross-entropies of the row's data set."""


def _scores(candidates: Sequence[Candidate], level: str) -> FloatArray:
    """Cross-entropies [1 or n, K]; infinite where a candidate has nothing to say or no finite cross-entropy."""
    if level == "sequence":
        scores = np.array([[c.cross_entropy if c.taught.any() else np.inf for c in candidates]], np.float64)
    else:
        if lacking := [c.name for c in candidates if c.label_nll is None]:
            raise DistillationError(f"{lacking[0]} has no label_nll: level token compares them")
        scores = np.stack([np.where(c.taught, c.label_nll, np.inf) for c in candidates], axis=1)  # type: ignore[arg-type]
    finite: FloatArray = np.where(np.isfinite(scores), scores, np.inf)
    return finite


def _softmax(logits: FloatArray, scores: FloatArray) -> FloatArray:
    """Over the candidates whose score is finite; zeros where none is."""
    logits = np.where(np.isfinite(scores), logits, -np.inf)
    powers = np.exp(logits - np.nan_to_num(logits.max(axis=1, keepdims=True), neginf=0.0))
    shares: FloatArray = powers / np.maximum(powers.sum(axis=1, keepdims=True), 1.0)
    return shares


def mixture(candidates: Sequence[Candidate], weights: FloatArray) -> Fused:
    """Σ_j w_j P_j, weights [1 or n, K] in any unit: scaled to sum to 1 over the candidates that speak of a label."""
    speaks = np.stack([candidate.taught for candidate in candidates], axis=1)
    shares = np.where(speaks, weights, 0.0)
    total = shares.sum(axis=1, keepdims=True)
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    taught = total[:, 0] > 0
    return Fused(_rows(candidates, shares, taught), taught, shares)


def _rows(candidates: Sequence[Candidate], shares: FloatArray, taught: BoolArray) -> TopK:
    whole = [j for j in range(len(candidates)) if np.array_equal(shares[:, j], taught.astype(np.float64))]
    if whole:  # one candidate is all there is: its rows, bit for bit
        ids, logprobs, tail = candidates[whole[0]].rows
        known = taught[:, None]
        return TopK(np.where(known, ids, -1), np.where(known, logprobs, -np.inf), np.where(taught, tail, 1.0))
    if any((candidate.rows.ids == NO_ID).any() for candidate in candidates):
        raise DistillationError("rows with entries that have no id cannot be added up: use min_ce at level sequence")
    weighed = [(c.rows, shares[:, [j]]) for j, c in enumerate(candidates)]
    ids = np.concatenate([np.where(share > 0, rows.ids, -1) for rows, share in weighed], axis=1)
    mass = [np.exp(np.where(rows.ids >= 0, rows.logprobs, -np.inf)) * share for rows, share in weighed]
    tails = np.stack([candidate.rows.tail for candidate in candidates], axis=1)
    return merge_entries(ids, np.concatenate(mass, axis=1), np.where(taught, (tails * shares).sum(axis=1), 1.0))


PROJECTED = "projected_ce"
"""The metric of what is taught, not of the model: see :func:`projected_ce`."""


def projected_ce(given: Sequence[tuple[AlignedRows, FloatArray | None]]) -> list[float]:
    """The mean cross-entropy of each candidate's rows on the pivot's labels, over the labels that all of them teach.

    A one-hot that stands in for a missing row is the label itself and says nothing of a teacher, so it does not count.
    Where no label is taught by all, each candidate's own labels count.

    given: of each candidate its rows at the n labels, and minus the log-probability that they give to each, float64
    [n]; None for rows in another vocabulary, for which DistillationError is raised. Returns nats per label, one number
    per candidate; infinite for one that teaches nothing.
    """
    if any(nll is None for _, nll in given):
        raise DistillationError(f"metric {PROJECTED} needs rows in the pivot's vocabulary: use bits_per_byte")
    taught = [rows.taught & (rows.cases != Case.ONE_HOT) for rows, _ in given]
    common = np.logical_and.reduce(taught)
    counted = [common if common.any() else own for own in taught]
    pairs = zip(given, counted, strict=True)
    return [float(nll[at].mean()) if nll is not None and at.any() else np.inf for (_, nll), at in pairs]


def metrics_of(rows: Sequence[CapturedRow], metric: str) -> list[float]:
    """A metric of each model's own reading of an example, over what all of them have read of it.

    ``token_ce`` is the papers' (nats per token of its own tokenizer), and not comparable between tokenizers;
    ``bits_per_byte`` is. The models' rows may have been cut at different places. Then only labels up to the first of
    these places count, each model's cross-entropy being shared out by the log-probabilities of its labels.
    """
    return [getattr(row, metric) for row in over_the_same_text(rows)]


def over_the_same_text(rows: Sequence[CapturedRow]) -> list[CapturedRow]:
    """What several models said about one example, cut where the first of them ends."""
    stops = [_end(row.tokens) for row in rows]
    common = min(stops, default=(0, 0, False))
    return [row if stop == common else _until(row, *common) for row, stop in zip(rows, stops, strict=True)]


def _end(tokens: TokenizedRow) -> tuple[int, int, bool]:
    """Where the last token ends: message, bytes of its content consumed, and whether the turn is ended too."""
    inside = np.flatnonzero(tokens.part != Part.TEMPLATE)
    if not len(inside):
        return (0, 0, False)
    last = inside[-1]
    return int(tokens.message[last]), int(tokens.ends[last]), bool(tokens.part[last] == Part.END)


def _until(row: CapturedRow, message: int, end: int, closed: bool) -> CapturedRow:
    """The beginning of a row: the tokens that end at a place (:func:`_end`) or before."""
    tokens = row.tokens
    before = (tokens.message < message) | ((tokens.message == message) & (tokens.ends <= end))
    if not closed:
        before &= ~((tokens.message == message) & (tokens.part == Part.END))
    stop = int(np.argmin(before)) if not before.all() else len(tokens)
    arrays = ("ids", "message", "part", "ends", "lows", "labels")
    cut = replace(tokens, **{name: getattr(tokens, name)[:stop] for name in arrays})
    n, total = int(cut.labels.sum()), float(row.actual.sum())
    share = float(row.actual[:n].sum()) / total if total < 0 else 0.0
    nats = row.cross_entropy * share
    return replace(row, tokens=cut, rows=row.rows.select(slice(n)), actual=row.actual[:n], cross_entropy=nats)
