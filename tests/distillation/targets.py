"""Logits and targets to test losses with: one function per situation, all from a seed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fusekit.distillation.losses import SparseTargets

N, V = 7, 61
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


def ragged() -> Case:
    x, y, full = ordinary(6)
    sizes = torch.tensor([6, 1, 3, 0, 5, 2, 6])
    used = torch.arange(6) < sizes[:, None]
    mass = torch.where(used, full.logprobs.exp(), 0.0)
    return x, y, replace(full, ids=torch.where(used, full.ids, -1), tail=1 - mass.sum(1))


def gaps() -> Case:
    """Entries that are missing in the middle of a row."""
    x, y, full = ordinary(6)
    ids, tail = full.ids.clone(), full.tail.clone()
    for entry in (0, 2, 5):
        ids[:, entry] = -1
        tail += full.logprobs[:, entry].exp()
    return x, y, replace(full, ids=ids, tail=tail)


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
    y[torch.tensor([0, 3, 6])] = -100
    return x, y, targets


def large_logits() -> Case:
    return logits(1, 64.0) + 1024, labels(2), top(logits(3, 2.0), 5)


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
    "ragged": ragged,
    "gaps": gaps,
    "partly taught": partly_taught,
    "nothing listed": nothing_listed,
    "ignored": ignored,
    "large logits": large_logits,
    "peaked teacher": peaked_teacher,
    "peaked student": peaked_student,
    "padded vocabulary": padded_vocabulary,
}
