"""Logits and targets to test losses with: one function per situation, all from a seed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fusekit.distillation.losses import Members, SparseTargets

N, V, U = 7, 61, 23
"""Labels, and ids of the student and of a source with an own vocabulary."""
Case = tuple[Tensor, Tensor, SparseTargets]


def logits(seed: int, scale: float = 1.0, rows: int = N, size: int = V) -> Tensor:
    """float64 [rows, size]: in every row another order of one grid, exact in bfloat16 and without ties."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(size, generator=generator) for _ in range(rows)])
    return (order.double() - size // 2) / 8 * scale


def labels(seed: int, rows: int = N, size: int = V) -> Tensor:
    return torch.randint(0, size, (rows,), generator=torch.Generator().manual_seed(seed))


def top(teacher: Tensor, k: int) -> SparseTargets:
    """The k largest entries of softmax(teacher), their complement as tail."""
    logprobs, ids = teacher.double().log_softmax(1).sort(dim=1, descending=True)
    tail = logprobs[:, k:].exp().sum(1)
    return SparseTargets(ids[:, :k].clone(), logprobs[:, :k].clone(), tail, torch.ones(len(teacher), dtype=torch.bool))


def ordinary(k: int = 5) -> Case:
    return logits(1), labels(2), top(logits(3) * 0.7, k)


def without(missing: Tensor) -> Case:
    """Without some of six entries, whose mass goes to the tail. missing: bool [6] or [N, 6]."""
    x, y, full = ordinary(6)
    tail = full.tail + torch.where(missing, full.logprobs.exp(), 0.0).sum(1)
    return x, y, replace(full, ids=torch.where(missing, -1, full.ids), tail=tail)


def partly_taught() -> Case:
    x, y, targets = ordinary()
    taught = torch.tensor([True, False, True, False, False, True, False])
    logprobs, tail = targets.logprobs.clone(), targets.tail.clone()
    logprobs[1], tail[1] = torch.nan, torch.nan  # what is not taught is not read
    return x, y, replace(targets, logprobs=logprobs, tail=tail, taught=taught)


def nothing_listed() -> Case:
    x, y, targets = ordinary()
    return x, y, replace(targets, ids=torch.full_like(targets.ids, -1), tail=torch.ones(N))


def ignored() -> Case:
    x, y, targets = ordinary()
    y[torch.tensor([0, 4, 6])] = -100
    return x, y, targets


def peaked_teacher() -> Case:
    """Nearly all mass on one id, a tail of 1e-12, and of exactly 0."""
    x, y, targets = ordinary(3)
    logprobs = torch.tensor([[-1e-12, -29.0, -31.0]], dtype=torch.float64).repeat(N, 1)
    tail = torch.full((N,), 1e-12, dtype=torch.float64)
    tail[3:] = 0.0
    return x, y, replace(targets, logprobs=logprobs, tail=tail)


def peaked_student() -> Case:
    """The student has all but 1e-12 and less of its mass on the listed ids; the teacher has a third elsewhere."""
    x, y, _ = ordinary()
    x = x / 8
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(row))[:3] for row in range(N)])
    x.scatter_(1, ids, torch.tensor([[32.0, 31.0, 30.0]], dtype=torch.float64).repeat(N, 1))
    x[4:] = torch.where(x[4:] >= 30, x[4:] * 8, x[4:])  # beyond what float32 can hold as a probability
    third = torch.full((N, 3), 2 / 9, dtype=torch.float64).log()
    return x, y, SparseTargets(ids, third, torch.full((N,), 1 / 3, dtype=torch.float64), torch.ones(N).bool())


def padded_vocabulary() -> Case:
    """The last ids are padding: -inf logits, no label, no target."""
    x, y, _ = ordinary()
    teacher = logits(3) * 0.7
    x[:, -8:] = teacher[:, -8:] = -torch.inf
    return x, y % (V - 8), top(teacher, 5)


CASES = {
    "ordinary": ordinary,
    "k = 1": lambda: ordinary(1),
    "k = V": lambda: ordinary(V),
    "ragged": lambda: without(torch.arange(6) >= torch.tensor([6, 1, 3, 0, 5, 2, 6])[:, None]),
    "gaps": lambda: without(torch.tensor([True, False, True, False, False, True])),
    "partly taught": partly_taught,
    "nothing listed": nothing_listed,
    "ignored": ignored,
    "large logits": lambda: (logits(1, 64.0) + 1024, labels(2), top(logits(3, 2.0), 5)),
    "peaked teacher": peaked_teacher,
    "peaked student": peaked_student,
    "padded vocabulary": padded_vocabulary,
}


def without_ids(targets: SparseTargets, every: int = 2) -> SparseTargets:
    """Every second entry is of a token that the student does not have."""
    n, k = targets.ids.shape
    chosen = (torch.arange(n)[:, None] + torch.arange(k)) % every == 0
    return replace(targets, ids=torch.where(chosen & (targets.ids >= 0), -2, targets.ids))


def members(seed: int, shares: bool = False) -> Members:
    """Every id stands for a token at least that is no padding; with ``shares`` they overlap, else some are free."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(V - 8, generator=generator).tolist()
    of = [[order[u]] for u in range(U)]
    for token in [*order[U:], *range(V - 8, V - 2)]:
        of[int(torch.randint(0, U, (1,), generator=generator))].append(token)
    if shares:
        for u in range(U):
            of[u] = sorted({*of[u], *torch.randperm(V, generator=generator)[:5].tolist()})
    sizes = torch.tensor([0, *map(len, of)])
    tokens = torch.tensor([token for tokens in of for token in tokens])
    weights = torch.rand(len(tokens), generator=generator) if shares else None
    return Members(torch.cumsum(sizes, 0), tokens, weights)


def in_groups(targets: SparseTargets, shares: bool = False) -> SparseTargets:
    """The same probabilities of ids of a source, each of which several tokens stand for."""
    k = min(targets.ids.shape[1], U)
    ids = torch.stack([torch.randperm(U, generator=torch.Generator().manual_seed(row))[:k] for row in range(N)])
    used = targets.ids[:, :k] >= 0
    used[:, 0] |= shares  # a stretch of text with nothing listed is not taught
    lost = torch.where(targets.ids[:, k:] >= 0, targets.logprobs[:, k:].exp(), 0.0).sum(1)
    return replace(
        targets,
        ids=torch.where(used, ids, -1),
        logprobs=targets.logprobs[:, :k],
        tail=targets.tail + lost,
        members=members(4, shares),
    )


def in_chunks(targets: SparseTargets, loss: str, numbers: tuple[int, ...] = (5, 5, 5, 2, -1, 8, 8)) -> SparseTargets:
    """Stretches of text, whose labels have the row of the first; for ``alm`` with one likelihood each."""
    if loss == "alm":
        nats = torch.tensor([-3.0, -0.5, -7.0, -1e-9, -2.0, -20.0, 0.0]).double()[:, None]
        targets = replace(targets, ids=torch.zeros(N, 1).long(), logprobs=nats)
    else:
        targets = in_groups(targets, shares=True)
    first = torch.tensor([numbers.index(number) if number >= 0 else row for row, number in enumerate(numbers)])
    return replace(targets.select(first), chunks=torch.tensor(numbers))


def made(case: str, loss: str, every: int = 2) -> Case:
    """A case with targets that a loss takes. every: of ``gold``, see :func:`without_ids`."""
    x, y, targets = CASES[case]()
    if loss == "gold":
        targets = without_ids(targets, every)
    elif loss == "grouped_kl":
        targets = in_groups(targets)
    elif loss in ("p_kl", "alm"):
        targets = in_chunks(targets, loss)
    return x, y, targets
