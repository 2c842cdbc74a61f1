"""Fusion functions against hand-computed examples and plain loops, in the papers' words."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fusekit.alignment.rows import NO_ID
from fusekit.distillation.fusion import FUSION_FUNCTIONS, LM_WEIGHTS, Candidate, Fused
from fusekit.errors import DistillationError
from fusekit.types import TopK
from tests.distillation import reference
from tests.distillation.worlds import masses


def rows(*entries: dict[int, float]) -> TopK:
    """One row per dictionary {id: probability}, largest first; what is missing to 1 is its tail."""
    k = max(len(row) for row in entries)
    ids, logprobs = np.full((len(entries), k), -1), np.full((len(entries), k), -np.inf)
    for i, row in enumerate(entries):
        for j, (id_, p) in enumerate(sorted(row.items(), key=lambda item: -item[1])):
            ids[i, j], logprobs[i, j] = id_, math.log(p)
    return TopK(ids, logprobs, np.array([1 - math.fsum(row.values()) for row in entries]))


def chosen_of(fused: Fused) -> list[int]:
    """The candidate with the largest share of each label, the first of equal ones; -1 for none."""
    return np.where(fused.taught, fused.weights.argmax(axis=1), -1).tolist()


PIVOT = Candidate(
    "pivot",
    rows({1: 0.5, 2: 0.25}, {1: 0.9}, {7: 0.6, 8: 0.4}),
    np.array([True, True, True]),
    2.0,
    np.array([0.7, 0.1, 0.9]),
)
SOURCE = Candidate(
    "source",
    rows({2: 0.5, 3: 0.125}, {1: 0.5, 4: 0.5}, {9: 1.0}),
    np.array([True, True, False]),
    1.0,
    np.array([0.3, 0.4, 0.0]),
)


def random_candidates(seed: int, K: int, n: int = 9, k: int = 4, V: int = 12) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    found = []
    for j in range(K):
        dense = rng.dirichlet(np.full(V, 0.5), n)
        ids = np.argsort(-dense, axis=1)[:, :k]
        mass = np.take_along_axis(dense, ids, 1)
        top, taught = TopK(ids, np.log(mass), 1 - mass.sum(1)), rng.random(n) < 0.7
        taught[0] = True
        found.append(Candidate(f"model {j}", top, taught, float(rng.uniform(0.5, 3)), rng.uniform(0, 4, n)))
    return found


class TestMinCE:
    def test_what_is_not_taught_is_an_empty_row(self):
        fused = FUSION_FUNCTIONS["min_ce"]([PIVOT, SOURCE])
        assert chosen_of(fused) == [1, 1, -1]
        assert masses(fused.rows, 2) == {}
        assert fused.rows.tail.tolist() == pytest.approx([0.375, 0.0, 1.0])
        assert fused.weights.tolist() == [[0, 1], [0, 1], [0, 0]]

    @pytest.mark.parametrize("level", ["sequence", "token"])
    def test_a_tie_goes_to_the_first(self, level):
        twin = replace(SOURCE, cross_entropy=2.0, label_nll=PIVOT.label_nll, taught=PIVOT.taught)
        assert chosen_of(FUSION_FUNCTIONS["min_ce"]([PIVOT, twin], level=level)) == [0, 0, 0]
        assert chosen_of(FUSION_FUNCTIONS["min_ce"]([twin, PIVOT], level=level)) == [0, 0, 0]

    def test_one_candidate_keeps_its_bits(self):
        fused = FUSION_FUNCTIONS["min_ce"]([PIVOT])
        assert all(np.array_equal(a, b) for a, b in zip(fused.rows, PIVOT.rows, strict=True))

    @pytest.mark.parametrize("taught", [[True, True, True], [True, False, True], [False, False, True]])
    def test_the_chosen_one_keeps_entries_without_an_id(self, taught):
        own = SOURCE.rows._replace(ids=np.array([[NO_ID, NO_ID], [1, NO_ID], [NO_ID, -1]]))
        chosen = replace(SOURCE, rows=own, taught=np.array(taught))
        fused = FUSION_FUNCTIONS["min_ce"]([PIVOT, chosen])
        for i, known in enumerate(taught):
            assert fused.rows.ids[i].tolist() == (own.ids[i].tolist() if known else [-1, -1])
            assert fused.rows.tail[i] == (own.tail[i] if known else 1.0)
        for name, level in (("avg_ce", "sequence"), ("min_ce", "token")):
            with pytest.raises(DistillationError, match=r"have no id .* min_ce at level sequence"):
                FUSION_FUNCTIONS[name]([PIVOT, chosen], level=level)

    @pytest.mark.parametrize("fields", [{"taught": np.zeros(3, bool)}, {"cross_entropy": math.nan}])
    def test_who_has_nothing_to_say_is_not_chosen(self, fields):
        assert chosen_of(FUSION_FUNCTIONS["min_ce"]([PIVOT, replace(SOURCE, **fields)])) == [0, 0, 0]

    @pytest.mark.parametrize("seed", range(5))
    def test_against_a_loop(self, seed):
        candidates = random_candidates(seed, 4)
        best = min(range(4), key=lambda j: candidates[j].cross_entropy)
        by_row, by_token = (FUSION_FUNCTIONS["min_ce"](candidates, level=level) for level in ("sequence", "token"))
        for i in range(9):
            speaking = [j for j in range(4) if candidates[j].taught[i]]
            own = min(speaking, key=lambda j: candidates[j].label_nll[i]) if speaking else -1
            for fused, chosen in ((by_row, best if best in speaking else -1), (by_token, own)):
                assert chosen_of(fused)[i] == chosen
                assert fused.taught[i] == (chosen >= 0)
                if chosen >= 0:
                    listed, tail = reference.mixture([candidates[chosen]], [1.0], i)
                    assert masses(fused.rows, i) == pytest.approx(listed)
                    assert fused.rows.tail[i] == pytest.approx(tail)


class TestAvgCE:
    def test_by_hand(self):
        # exp(-2) = 0.1353, exp(-1) = 0.3679; softmax of these: 0.4421, 0.5579
        fused = FUSION_FUNCTIONS["avg_ce"]([PIVOT, SOURCE])
        first, second = fused.weights[0]
        assert (first, second) == pytest.approx((0.4421, 0.5579), abs=5e-5)
        assert masses(fused.rows, 0) == pytest.approx({1: first / 2, 2: first / 4 + second / 2, 3: second / 8})
        assert fused.rows.tail[0] == pytest.approx(first * 0.25 + second * 0.375)
        assert fused.weights[2].tolist() == [1, 0]  # only the pivot speaks of it
        assert masses(fused.rows, 2) == pytest.approx({7: 0.6, 8: 0.4})
        assert chosen_of(fused) == [1, 1, 0]

    @pytest.mark.parametrize("level", ["sequence", "token"])
    @pytest.mark.parametrize("seed", range(5))
    def test_against_a_loop(self, level, seed):
        candidates = random_candidates(seed, 3)
        fused = FUSION_FUNCTIONS["avg_ce"](candidates, level=level)
        for i in range(9):
            speaking = [c for c in candidates if c.taught[i]]
            assert fused.taught[i] == bool(speaking)
            if not speaking:
                continue
            if level == "sequence":
                weights = reference.avg_ce_weights([c.cross_entropy for c in candidates])
            else:
                among = reference.avg_ce_weights([c.label_nll[i] for c in speaking])
                weights = [among.pop(0) if c.taught[i] else 0.0 for c in candidates]
            listed, tail = reference.mixture(candidates, weights, i)
            assert masses(fused.rows, i) == pytest.approx(listed)
            assert fused.rows.tail[i] == pytest.approx(tail)
            assert math.fsum([*masses(fused.rows, i).values(), fused.rows.tail[i]]) == pytest.approx(1)
            assert sum(fused.weights[i]) == pytest.approx(1)

    def test_huge_cross_entropies(self):
        fused = FUSION_FUNCTIONS["avg_ce"]([replace(PIVOT, cross_entropy=1e4), replace(SOURCE, cross_entropy=1e5)])
        assert fused.weights[0].tolist() == [0.5, 0.5]


def test_rewards_weigh_by_their_softmax():
    weighed = FUSION_FUNCTIONS["reward_softmax"]
    for rewards, second in (((1.0, 3.0), 1 / (1 + math.exp(-2))), ((-1e5, -2e5), 0.0)):
        models = [replace(model, reward=reward) for model, reward in zip((PIVOT, SOURCE), rewards, strict=True)]
        fused = weighed(models)
        assert fused.weights[0].tolist() == pytest.approx([1 - second, second])
        assert fused.weights[2].tolist() == [1, 0]  # only the pivot speaks of it
    silent = [replace(model, taught=np.zeros(3, bool)) for model in models]
    assert not weighed(silent).weights.any()
    for wrong in ({"candidates": [PIVOT, models[1]]}, {"candidates": models, "level": "token"}):
        with pytest.raises(DistillationError, match="a reward of every model"):
            weighed(**wrong)


@pytest.mark.parametrize("name", ["min_ce", "avg_ce"])
class TestAll:
    def test_nobody_speaks(self, name):
        silent = [replace(c, taught=np.zeros(3, bool)) for c in (PIVOT, SOURCE)]
        fused = FUSION_FUNCTIONS[name](silent)
        assert not fused.taught.any()
        assert not fused.weights.any()
        assert fused.rows.ids.shape[0] == 3
        assert (fused.rows.ids == -1).all()

    @pytest.mark.parametrize("level", ["sequence", "token"])
    def test_no_labels(self, name, level):
        empty = Candidate(
            "m", TopK(np.zeros((0, 4), np.int64), np.zeros((0, 4)), np.zeros(0)), np.zeros(0, bool), 1.0, np.zeros(0)
        )
        assert len(FUSION_FUNCTIONS[name]([empty, empty], level=level).taught) == 0

    def test_token_level_needs_the_labels(self, name):
        with pytest.raises(DistillationError, match="source has no label_nll"):
            FUSION_FUNCTIONS[name]([PIVOT, replace(SOURCE, label_nll=None)], level="token")


@pytest.mark.parametrize(
    ("name", "weight", "known", "progress", "expected"),
    [
        ("constant", 0.9, [1.0, 2.0], 0.5, 0.9),
        ("soft", 0.9, [1.0, 2.0], 0.5, 1 - math.exp(-1.0)),
        ("soft", 0.9, [0.0], 0.5, 0),
        ("soft", 0.9, [], 0.5, 1),
        *[("hard_and_decay", 0.9, [1.0], done, value) for done, value in ((0, 0.9), (0.5, 0.95), (1, 1), (1.5, 1))],
        # with a teacher of half the pivot's bits per byte, .2 + .8 / 2; with a worse one the text alone
        ("relative", 0.2, [2.0, 1.0], 0.5, 0.6),
        ("relative", 0.2, [1.0, 2.0], 0.5, 1.0),
        ("relative", 0.2, [2.0, 1.5], 0.5, 0.8),
        ("relative", 0.2, [], 0.5, 1.0),
        ("relative", 0.2, [0.0, 0.0], 0.5, 1.0),
    ],
)
def test_lm_weights(name, weight, known, progress, expected):
    assert LM_WEIGHTS[name](weight, known, progress) == pytest.approx(expected)
