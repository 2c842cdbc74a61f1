"""Losses in the source's space, and those of stretches of text: against plain loops, on random and on nasty inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fusekit.alignment import vocabulary_surfaces
from fusekit.alignment.alignment import align_tokens
from fusekit.alignment.groups import pivot_groups, source_pieces
from fusekit.distillation.batching import FusionCollator
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.label_rows import label_rows
from fusekit.distillation.losses import Members, SparseTargets, fusion_loss
from fusekit.distillation.projections import Projection
from fusekit.distillation.settings import FusionSettings
from fusekit.errors import DistillationError
from tests.distillation import reference, worlds
from tests.distillation.targets import N, V, labels, logits, top
from tests.distillation.test_losses import TOLERANCES, compare, run

U = 23
"""Ids of the source."""


def members(seed: int, shares: bool = False) -> Members:
    """Every id stands for one of the student's tokens at least; with ``shares`` they overlap, without some are free."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(V, generator=generator).tolist()
    of = [[order[u]] for u in range(U)]
    for token in order[U : V - 6]:
        of[int(torch.randint(0, U, (1,), generator=generator))].append(token)
    if shares:
        for u in range(U):
            of[u] = sorted({*of[u], *torch.randperm(V, generator=generator)[:5].tolist()})
    sizes = torch.tensor([0, *map(len, of)])
    tokens = torch.tensor([token for tokens in of for token in tokens])
    weights = torch.rand(len(tokens), generator=generator) if shares else None
    return Members(torch.cumsum(sizes, 0), tokens, weights)


Case = tuple[Tensor, Tensor, SparseTargets]


def ordinary(k: int = 5, shares: bool = False) -> Case:
    targets = top(logits(3, size=U) * 0.7, k)
    return logits(1), labels(2), replace(targets, members=members(4, shares))


def ragged(shares: bool = False) -> Case:
    x, y, full = ordinary(6, shares)
    used = torch.arange(6) < torch.tensor([6, 1, 3, 2, 5, 2, 6])[:, None]
    tail = 1 - torch.where(used, full.logprobs.exp(), 0.0).sum(1)
    return x, y, replace(full, ids=torch.where(used, full.ids, -1), tail=tail)


def partly_taught(shares: bool = False) -> Case:
    x, y, targets = ordinary(5, shares)
    logprobs = targets.logprobs.clone()
    logprobs[2] = torch.nan
    return x, y, replace(targets, logprobs=logprobs, taught=torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool())


def ignored(shares: bool = False) -> Case:
    x, y, targets = ordinary(5, shares)
    y[torch.tensor([0, 5])] = -100
    return x, y, targets


def large_logits(shares: bool = False) -> Case:
    _, y, targets = ordinary(5, shares)
    return logits(1, 64.0) + 1024, y, targets


def peaked_student(shares: bool = False) -> Case:
    """All but 1e-13 of a row's mass is on one token; rows 4 on beyond what float32 can hold as a probability."""
    x, y, targets = ordinary(4, shares)
    x.scatter_(1, y[:, None], 40.0)
    x[4:] = torch.where(x[4:] == 40, 400.0, x[4:])
    return x, y, targets


def padded_vocabulary(shares: bool = False) -> Case:
    """Logits of -inf: in some groups, but in none all."""
    x, _, targets = ordinary(5, shares)
    starts, tokens = targets.members.starts, targets.members.tokens
    for u in range(0, U, 2):
        group = tokens[starts[u] : starts[u + 1]].tolist()
        for token in group[1:]:
            if token not in tokens[starts[:-1]].tolist():
                x[:, token] = -torch.inf
    return x, torch.tensor([int(row.argmax()) for row in x]), targets


CASES = {
    "ordinary": ordinary,
    "k = 1": lambda shares=False: ordinary(1, shares),
    "k = U": lambda shares=False: ordinary(U, shares),
    "ragged": ragged,
    "partly taught": partly_taught,
    "ignored": ignored,
    "large logits": large_logits,
    "peaked student": peaked_student,
    "padded vocabulary": padded_vocabulary,
}


def test_the_worked_example():
    """Pivot tokens 2, 0, 1, 201; source tokens 2, 0, 1, x, which no token of the pivot begins with."""
    x, y = torch.tensor([[0.10, 0.05, 0.05, 0.80]], dtype=torch.float64).log(), torch.tensor([3])
    q = torch.tensor([[0.90, 0.04, 0.03]], dtype=torch.float64)
    targets = SparseTargets(torch.tensor([[0, 1, 2]]), q.log(), torch.tensor([0.03]), torch.ones(1).bool())
    groups = replace(targets, members=Members(torch.tensor([0, 2, 3, 4]), torch.tensor([0, 3, 1, 2])))
    p = torch.tensor([0.90, 0.05, 0.05], dtype=torch.float64)
    loss, gradient = run(x, y, groups, loss="grouped_kl", lm_weight=0.0)
    assert float(loss.fusion) == pytest.approx(float((q[0] * (q[0] / p).log()).sum()), abs=1e-12)  # no rest: no tail
    assert float(gradient[0, 0] + gradient[0, 3]) == pytest.approx(0.97 * 0.90 - 0.90)  # of the group
    assert float(gradient[0, 0] / gradient[0, 3]) == pytest.approx(0.10 / 0.80)
    scaled = fusion_loss(x, y, groups, loss="grouped_kl", truncation="renormalize")
    assert float(scaled.fusion) == pytest.approx(0.0055, abs=5e-5)
    whole = torch.tensor([0.9, 0.09, 0.009]) / 0.999
    shares = Members(
        torch.tensor([0, 2, 4, 6]), torch.tensor([0, 3, 1, 3, 2, 3]), torch.stack([torch.ones(3), whole], 1).flatten()
    )
    chunks = replace(targets, members=shares, chunks=torch.zeros(1, dtype=torch.int64))
    assert float(fusion_loss(x, y, chunks, loss="p_kl").fusion) == pytest.approx(0.0500, abs=5e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("truncation", ["tail", "renormalize"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_grouped_values_and_gradients_are_the_dense_ones(case, truncation, dtype):
    x, y, targets = CASES[case]()
    x = x.to(dtype)
    settings = {"loss": "grouped_kl", "truncation": truncation, "lm_weight": 0.9, "fusion_weight": 0.1}
    expected = reference.fusion_loss(x, y, targets, **settings)
    compare(run(x, y, targets, **settings), expected, dtype)
    compare(run(x, y, targets, **settings, chunk=2 * V), expected, dtype)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_grouped_temperature(temperature):
    x, y, targets = ordinary()
    settings = {"loss": "grouped_kl", "temperature": temperature, "fusion_weight": 0.25}
    targets = replace(targets, temperature=temperature)
    compare(run(x, y, targets, **settings), reference.fusion_loss(x, y, targets, **settings), torch.float64)


def test_groups_of_one_token_are_the_kl_divergence():
    x, y = logits(1), labels(2)
    targets = top(logits(3) * 0.7, 5)
    alone = replace(targets, members=Members(torch.arange(V + 1), torch.arange(V)))
    expected, gradient = run(x, y, targets, loss="kl")
    loss, got = run(x, y, alone, loss="grouped_kl")
    torch.testing.assert_close(tuple(loss), tuple(expected))
    torch.testing.assert_close(got, gradient)


def test_a_teacher_that_is_the_grouped_student_teaches_nothing():
    x, y, targets = ordinary()
    p, groups = x.softmax(1), targets.members
    mass = torch.stack([p[:, groups.tokens[groups.starts[u] : groups.starts[u + 1]]].sum(1) for u in range(U)], 1)
    best = mass.topk(5, dim=1)
    same = replace(targets, ids=best.indices, logprobs=best.values.log(), tail=1 - best.values.sum(1))
    loss, gradient = run(x, y, same, loss="grouped_kl", lm_weight=0.0)
    assert abs(float(loss.fusion)) < 1e-12
    assert float(gradient.abs().max()) < 1e-14


def in_chunks(targets: SparseTargets, numbers: tuple[int, ...] = (5, 5, 5, 2, -1, 8, 8)) -> SparseTargets:
    """The labels of a chunk have the row of its first."""
    chunks = torch.tensor(numbers)
    first = torch.tensor([numbers.index(number) if number >= 0 else row for row, number in enumerate(numbers)])
    same = targets.select(first)
    return replace(same, chunks=chunks)


@pytest.mark.parametrize("block", [None, 1, 3 * V])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", ["p_kl", "alm"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_losses_of_chunks_are_the_dense_ones(monkeypatch, case, loss, dtype, block):
    if block is not None:
        monkeypatch.setattr("fusekit.distillation.chunk_losses.BLOCK", block)
    x, y, targets = CASES[case](shares=True)
    if loss == "alm":
        likelihood = torch.tensor([-3.0, -0.5, -7.0, -1e-9, -2.0, -20.0, 0.0]).double()[:, None]
        targets = replace(targets, ids=torch.zeros(N, 1).long(), logprobs=likelihood, members=None)
    targets, x = in_chunks(targets), x.to(dtype)
    weight = torch.linspace(0.1, 0.7, N, dtype=torch.float64)
    value, gradient = reference.chunk_loss(x, y, targets, loss, fusion_weight=weight)
    got, grad = run(x, y, targets, loss=loss, lm_weight=0.0, fusion_weight=weight)
    # Float32 rounds likelihoods, whose difference from 1 is a hundredth of the nats here.
    slack = 1e-12 if dtype == torch.float64 else 2e-4 if loss == "alm" else 1e-5
    torch.testing.assert_close(got.fusion, value, rtol=slack, atol=slack)
    _, relative, absolute = TOLERANCES[dtype]
    torch.testing.assert_close(grad.double(), gradient, rtol=max(relative, slack), atol=max(absolute, slack))


@pytest.mark.parametrize("loss", ["p_kl", "alm"])
def test_the_likelihood_is_added_and_other_rows_stay(loss):
    x, y, targets = ordinary(1, shares=True)
    targets = in_chunks(targets if loss == "p_kl" else replace(targets, ids=targets.ids * 0, members=None))
    batch, places = torch.full((2, 8, V), 3.0, dtype=torch.float64), torch.tensor([1, 2, 3, 9, 11, 12, 13])
    batch.view(16, V)[places] = x
    alone, together = run(x, y, targets, loss=loss, lm_weight=0.3), run(x, y, None, lm_weight=0.3, fusion_weight=0.0)
    only = run(x, y, targets, loss=loss, lm_weight=0.0)
    torch.testing.assert_close(alone[1], together[1] + only[1])
    torch.testing.assert_close(alone[0].total, together[0].total + only[0].total)
    assert (alone[0].labels, alone[0].taught) == (N, N)
    leaf = batch.requires_grad_()
    value = fusion_loss(leaf * 1, y, targets, positions=places, loss=loss, lm_weight=0.3, overwrite_logits=True)
    value.total.backward()
    torch.testing.assert_close(leaf.grad.view(16, V)[places], alone[1])
    assert int(leaf.grad.view(16, V).abs().sum(1).count_nonzero()) == N


@pytest.mark.parametrize("loss", ["p_kl", "alm"])
def test_gradcheck_and_temperature(loss):
    x, y, targets = ordinary(2, shares=True)
    targets = in_chunks(targets if loss == "p_kl" else replace(targets, ids=targets.ids * 0 - 1, members=None))
    targets = replace(targets, temperature=2.0)
    if loss == "alm":
        targets = replace(targets, ids=targets.ids[:, :1] * 0, logprobs=targets.logprobs[:, :1])

    def total(leaf: Tensor) -> Tensor:
        return fusion_loss(leaf, y, targets, loss=loss, temperature=2.0, lm_weight=0.5).total

    assert torch.autograd.gradcheck(total, (x.requires_grad_(),))
    value, _ = reference.chunk_loss(x, y, targets, loss, temperature=2.0)
    torch.testing.assert_close(fusion_loss(x, y, targets, loss=loss, temperature=2.0).fusion, value)


def test_alm_of_large_tau_is_the_divergence_of_two_poisson_rates():
    """A log(A / S) + S - A, with A and S the nats of the teacher and of the student."""
    x, y, targets = ordinary(1)
    nats, own = 1.5, -x[0].log_softmax(0)[y[0]]
    row = replace(targets, members=None, chunks=torch.tensor([0, -1, -1, -1, -1, -1, -1]), ids=targets.ids * 0)
    row = replace(row, logprobs=torch.full((N, 1), -nats, dtype=torch.float64))
    found = float(fusion_loss(x, y, row, loss="alm").fusion)
    assert found == pytest.approx(nats * math.log(nats / float(own)) + float(own) - nats, rel=0.05)


@pytest.mark.parametrize(
    ("loss", "fields", "message"),
    [
        ("grouped_kl", {"members": None}, "grouped_kl needs members"),
        ("p_kl", {"members": None, "chunks": torch.zeros(N).long()}, "p_kl needs members"),
        ("kl", {}, "kl takes no members"),
        ("p_kl", {}, "targets have none"),
        ("alm", {"members": None}, "targets have none"),
        ("grouped_kl", {"ids": torch.full((N, 5), U)}, f"token id {U}"),
    ],
)
def test_refusals(loss, fields, message):
    x, y, targets = ordinary()
    with pytest.raises(DistillationError, match=message):
        fusion_loss(x, y, replace(targets, **fields), loss=loss)


def test_targets_move_with_their_members():
    targets = in_chunks(ordinary(5, shares=True)[2]).to("cpu")
    assert targets.members is not None
    assert len(targets.select(torch.arange(3)).chunks) == 3


PIVOT, SOURCE, ROLES = worlds.PIVOT, worlds.SOURCE, worlds.ROLES
SIDES = pytest.mark.parametrize("sides", [(PIVOT, SOURCE), (SOURCE, PIVOT)], ids=["finer", "coarser"])


def followed(bytes_: bytes, sides) -> bytes | None:
    """The string at the end of the chain of first tokens of first tokens, each of the other side."""
    ours, theirs = (vocabulary_surfaces(side) for side in sides)
    while True:
        cut = tokenize_bytes(bytes_, sides[1], theirs)
        if cut is None:
            return None
        again = tokenize_bytes(cut, sides[0], ours)
        if again == bytes_:
            return bytes_
        bytes_ = again


def tokenize_bytes(bytes_: bytes, tokenizer, surfaces) -> bytes | None:
    """The first token of a string in a text; for bytes that are no text the longest token that they begin with."""
    if bytes_ in surfaces.id_of:
        return bytes_
    try:
        return surfaces.of[tokenizer.encode(bytes_.decode(), add_special_tokens=False)[0]]
    except UnicodeDecodeError:
        return max((s for s in surfaces.id_of if bytes_.startswith(s)), key=len, default=None)


@SIDES
def test_a_group_is_what_both_tokenizers_begin_alike(sides):
    into = worlds.vocabulary_map("prefix", *sides)
    groups, surfaces = pivot_groups(into), vocabulary_surfaces(sides[0])
    assert groups[ROLES["end_of_turn"]] == ROLES["end_of_turn"]
    found = 0
    for id_ in surfaces.id_of.values():
        assert surfaces.of[groups[id_]] == followed(surfaces.of[id_], sides)
        assert groups[groups[id_]] == groups[id_]
        found += groups[id_] != id_
    assert found > 3
    assert groups[sides[0].convert_tokens_to_ids("<pad>")] == -1


@SIDES
def test_every_source_token_is_in_the_group_of_what_the_pivot_begins_it_with(sides):
    """So no listed token leaves the student nothing to answer it with, and no chain goes on."""
    into = worlds.vocabulary_map("prefix", *sides)
    groups, carried = pivot_groups(into), into.entries[0][:, 0]
    assert (groups[carried[carried >= 0]] >= 0).all()


@SIDES
def test_grouped_rows_at_links_are_the_sources_own_grouped(sides):
    """Entry by entry at every link: the mass of a group is that of the source tokens that begin with it."""
    how = Projection(worlds.vocabulary_map("prefix", *sides), "grouped", tail="keep", conditioning=False)
    carried, rows_seen = how.vocabulary_map.entries[0][:, 0], 0
    for row in worlds.conversations(8):
        tokens = worlds.read(row, sides[0])
        said = worlds.guessing(worlds.read(row, sides[1]), len(sides[1]), 6)
        given = label_rows(row, tokens, said, how)
        asked = {int(p): j for j, p in enumerate(said.tokens.label_positions)}
        for j, position in enumerate(tokens.label_positions.tolist()):
            if not given.taught[j]:
                continue
            message = int(tokens.message[position])
            (ours, start), (theirs, other) = tokens.content(message), said.tokens.content(message)
            alignment = align_tokens(row.messages[message].content, ours, theirs)
            at = int(alignment.source_at[position - 1 - start]) + other + 1
            number = asked[at]
            actual, expected, listed = int(said.tokens.ids[at]), {}, 0.0
            pairs = dict(zip(said.rows.ids[number].tolist(), np.exp(said.rows.logprobs[number]).tolist(), strict=True))
            pairs.setdefault(actual, math.exp(said.actual[number]))
            for u, p in pairs.items():
                v = int(tokens.ids[position]) if u == actual else int(carried[u])
                if v >= 0 and how.groups[v] >= 0:
                    expected[int(how.groups[v])] = expected.get(int(how.groups[v]), 0.0) + p
                    listed += p
            entries = zip(given.rows.ids[j].tolist(), np.exp(given.rows.logprobs[j]).tolist(), strict=True)
            assert {i: p for i, p in entries if i >= 0} == pytest.approx(expected, abs=1e-9)
            assert given.rows.tail[j] == pytest.approx(1 - listed, abs=1e-9)
            rows_seen += 1
    assert rows_seen > 30


@SIDES
@pytest.mark.parametrize("tail", ["back_off", "listed_share"])
def test_a_source_certain_of_the_text_is_certain_of_the_labels_group(sides, tail):
    how, taught = Projection(worlds.vocabulary_map("prefix", *sides), "grouped", tail=tail), 0
    for row in worlds.conversations(8):
        tokens = worlds.read(row, sides[0])
        given = label_rows(row, tokens, worlds.certain(worlds.read(row, sides[1])), how, worlds.certain(tokens))
        nll = how.nll(given.rows, tokens.ids[tokens.label_positions])
        assert (nll[given.taught] < 1e-9).all()
        taught += int(given.taught.sum())
    assert taught > 50


@SIDES
def test_pieces_spell_the_token_and_weigh_one(sides):
    into = worlds.vocabulary_map("em", *sides)
    pivots, sources, weights = source_pieces(into)
    for id_ in np.unique(pivots).tolist():
        at = pivots == id_
        spelled = b"".join(into.source.of[i] for i in sources[at].tolist())
        assert at.sum() <= 3
        assert weights[at].sum() == pytest.approx(1)
        if id_ in set(into.pivot.id_of.values()):
            assert into.pivot.of[id_].startswith(spelled)
            assert spelled == into.pivot.of[id_] or at.sum() == 3
    assert {*into.pivot.id_of.values(), ROLES["end_of_turn"]} <= set(pivots.tolist())


@SIDES
def test_rows_of_stretches_are_those_of_a_plain_loop(sides):
    """Means of the source's rows, and its log-likelihoods; a stretch is taught whole or not at all."""
    into = worlds.vocabulary_map("em", *sides)
    pieces, chunks = Projection(into, "pieces"), Projection(into, "chunks")
    known = set(source_pieces(into)[1].tolist())
    several = 0
    for row in worlds.conversations(8):
        tokens = worlds.read(row, sides[0])
        said = worlds.guessing(worlds.read(row, sides[1]), len(sides[1]), 6)
        means, nats = (label_rows(row, tokens, said, how) for how in (pieces, chunks))
        number = {int(p): j for j, p in enumerate(tokens.label_positions)}
        asked = {int(p): j for j, p in enumerate(said.tokens.label_positions)}
        seen: set[int] = set()
        for message in np.unique(tokens.message[tokens.labels]).tolist():
            (ours, start), (theirs, other) = tokens.content(message), said.tokens.content(message)
            for mine, its in align_tokens(row.messages[message].content, ours, theirs).groups[1:]:
                labels = [number[start + i] for i in range(mine.start, mine.stop) if start + i in number]
                rows = [asked[other + i] for i in range(its.start, its.stop) if other + i in asked]
                whole = len(labels) == mine.stop - mine.start and len(rows) == its.stop - its.start
                assert nats.taught[labels].all() if whole else not nats.taught[labels].any()
                if not whole:
                    continue
                assert len(set(nats.chunks[labels].tolist())) == 1
                assert np.exp(nats.rows.logprobs[labels, 0]) == pytest.approx(math.exp(said.actual[rows].sum()))
                expected: dict[int, float] = {}
                for i in rows:
                    for u, logprob in zip(said.rows.ids[i].tolist(), said.rows.logprobs[i].tolist(), strict=True):
                        if u in known:
                            expected[u] = expected.get(u, 0.0) + math.exp(logprob) / len(rows)
                for j in labels:
                    found = zip(means.rows.ids[j].tolist(), np.exp(means.rows.logprobs[j]).tolist(), strict=True)
                    assert {u: p for u, p in found if u >= 0} == pytest.approx(expected)
                    assert means.rows.tail[j] == pytest.approx(1 - sum(expected.values()))
                several += len(labels) > 1 or len(rows) > 1
                seen |= set(labels)
        assert set(np.flatnonzero(nats.chunks >= 0).tolist()) == seen
    assert several > 20


def test_a_batch_numbers_its_stretches_apart():
    said = worlds.by_key([worlds.guessing(worlds.read(row, SOURCE), len(SOURCE)) for row in worlds.conversations(4)])
    data = FusionDataset(
        worlds.conversations(4),
        sources={"s": said},
        projections={"s": Projection(worlds.vocabulary_map("em"), "chunks")},
        tokenizer=worlds.Reader(PIVOT),
        fusion=FusionSettings(include_pivot=False, metric="bits_per_byte"),
    )
    examples = [data[i] for i in range(4)]
    batch = FusionCollator()(examples)
    stretches = [sorted({*example["target_chunks"].tolist()} - {-1}) for example in examples]
    assert len({*batch["target_chunks"].tolist()} - {-1}) == sum(map(len, stretches))
    with pytest.raises(DistillationError, match=r"s and t .* mode pairwise"):
        FusionDataset(
            worlds.conversations(4),
            sources={"s": said, "t": said},
            projections=dict.fromkeys("st", Projection(worlds.vocabulary_map(), "grouped")),
            tokenizer=worlds.Reader(PIVOT),
            fusion=FusionSettings(include_pivot=False),
        )


def test_the_pivot_is_judged_by_the_groups_of_its_labels():
    """A label outside the list counts as what the pivot gave it, not as the most that the list leaves to it."""
    rows = worlds.conversations(6)
    own = worlds.by_key([worlds.guessing(worlds.read(row, PIVOT), len(PIVOT), 3) for row in rows])
    said = worlds.by_key([worlds.guessing(worlds.read(row, SOURCE), len(SOURCE), seed=1) for row in rows])
    how = Projection(worlds.vocabulary_map(), "grouped", conditioning=True)
    data = FusionDataset(rows, pivot=own, sources={"s": said}, projections={"s": how})
    outside = 0
    for i, row in enumerate(rows):
        mine = own[row.key]
        labels = mine.tokens.ids[mine.tokens.label_positions].tolist()
        taught = label_rows(row, mine.tokens, said[row.key], how, mine).taught
        losses = []
        for j, label in enumerate(labels):
            listed = zip(mine.rows.ids[j].tolist(), mine.rows.logprobs[j].tolist(), strict=True)
            mass = sum(math.exp(logprob) for id_, logprob in listed if how.groups[id_] == how.groups[label])
            losses.append(-math.log(max(mass, math.exp(mine.actual[j]))))
            outside += mass == 0
        assert data[i]["cross_entropies"][0] == pytest.approx(np.mean(np.array(losses)[taught]))
    assert outside > 10
