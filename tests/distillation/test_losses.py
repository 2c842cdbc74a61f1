"""Every loss against a dense float64 reference, values and gradients, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusekit.distillation.losses import LOSSES, FusionLoss, Members, SparseTargets, fusion_loss
from fusekit.errors import DistillationError
from tests.distillation import reference
from tests.distillation.targets import (
    CASES,
    N,
    U,
    V,
    in_groups,
    labels,
    logits,
    made,
    members,
    ordinary,
    peaked_student,
    top,
)

CHUNKED = ("p_kl", "alm")
TOKENWISE = [loss for loss in LOSSES if loss not in CHUNKED]
COMBINATIONS = [
    (loss, truncation)
    for loss in TOKENWISE
    for truncation in ("tail", "renormalize")
    if (loss, truncation) != ("reverse_kl", "renormalize")
]
# dtype: (relative error of a sum, relative and absolute error of a gradient, whose weights are below 1)
TOLERANCES = {
    torch.float64: (1e-12, 1e-10, 1e-13),
    torch.float32: (2e-6, 2e-5, 5e-7),
    torch.bfloat16: (2e-6, 5e-3, 5e-7),  # bfloat16 rounds the gradient by up to 2^-9 for its value and its sums
    torch.float16: (2e-6, 1e-3, 2e-7),
}
HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    configured = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(configured)


def run(x: Tensor, y: Tensor, targets: SparseTargets | None, **settings) -> tuple[FusionLoss, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    loss = fusion_loss(leaf, y, targets, **settings)
    loss.total.backward()
    return loss, leaf.grad


def wrong(x: Tensor, y: Tensor, targets: SparseTargets, chunk: int | None = None, **settings) -> list[str]:
    """What of a loss and its gradient is not as in the dense form."""
    expected = reference.fusion_loss(x, y, targets, **settings)
    loss, gradient = run(x, y, targets, chunk=chunk, **settings)
    value, relative, absolute = TOLERANCES[x.dtype]
    if settings["loss"] in CHUNKED:  # float32 rounds likelihoods, whose difference from 1 is a hundredth of the nats
        slack = 1e-12 if x.dtype == torch.float64 else 2e-4 if settings["loss"] == "alm" else 1e-5
        value, relative, absolute = (max(slack, bound) for bound in (value, relative, absolute))
    assert gradient.dtype == x.dtype
    assert loss.labels == int((y != -100).sum())
    found = []
    for name, got, true in zip(("total", "lm", "fusion", "gradient"), (*loss[:3], gradient), expected, strict=True):
        bounds = (relative, absolute) if name == "gradient" else (value, value)
        if not torch.allclose(got.double(), true, *bounds):
            found.append(f"{name}: off by {float((got.double() - true).abs().max().detach())}")
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("loss", "truncation"), [*COMBINATIONS, *((loss, "tail") for loss in CHUNKED)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_and_gradients_are_the_dense_ones(monkeypatch, case, loss, truncation, dtype):
    """With a weight for each label, at other temperatures, and however many rows are done at once."""
    weight = torch.linspace(0.1, 0.7, N, dtype=torch.float64)
    settings = {"loss": loss, "truncation": truncation, "lm_weight": 1 - weight, "fusion_weight": weight}
    if loss in CHUNKED and dtype.itemsize == 2:  # each term's gradient is rounded
        settings["lm_weight"] = 0.0
    if loss in CHUNKED and case == "nothing listed":
        pytest.skip("such a stretch of text is not taught")
    for every in (1, 2, 3, 100) if loss == "gold" else (2,):
        x, y, targets = made(case, loss, every)
        for chunk in (None, 2 * V):
            monkeypatch.setattr("fusekit.distillation.distances.BLOCK", chunk or 1)
            assert wrong(x.to(dtype), y, targets, chunk, **settings) == []
    for temperature in (0.5, 3.7) if case == "ordinary" else ():
        other = replace(targets, temperature=temperature)
        assert wrong(x.to(dtype), y, other, temperature=temperature, **settings) == []


class TestTeacherIsStudent:
    """docs/losses.md: no gradient with `tail`; with `renormalize` only where the whole vocabulary is listed."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("k", [1, 5, V - 1, V])
    @pytest.mark.parametrize("loss", ["ce", "kl", "reverse_kl", "js", "grouped_kl"])
    def test_tail_gives_none(self, loss, k, dtype):
        x = logits(1) / 4
        teacher = top(x, k)
        if loss == "grouped_kl":
            p, own = x.softmax(1), members(4)
            mass = torch.stack([p[:, own.tokens[own.starts[u] : own.starts[u + 1]]].sum(1) for u in range(U)], 1)
            best = mass.topk(min(k, U), dim=1)
            taught = torch.ones(N, dtype=torch.bool)
            teacher = SparseTargets(best.indices, best.values.log(), 1 - best.values.sum(1), taught, members=own)
        found, gradient = run(x.to(dtype), labels(2), teacher, loss=loss, lm_weight=0.0)
        assert float(gradient.abs().max()) < (1e-14 if dtype == torch.float64 else 3e-7)
        assert loss == "ce" or abs(float(found.fusion)) < (1e-12 if dtype == torch.float64 else 1e-5)

    @pytest.mark.parametrize("loss", ["ce", "kl", "js"])
    def test_renormalize_gives_none_only_for_the_whole_vocabulary(self, loss):
        x = logits(1) / 4
        settings = {"loss": loss, "truncation": "renormalize", "lm_weight": 0.0}
        whole, five = (float(run(x, labels(2), top(x, k), **settings)[1].abs().max()) for k in (V, 5))
        assert whole < 1e-14
        assert five > 1e-2


class TestTheSameSums:
    """How rows are spread over calls, chunks and positions changes nothing."""

    @pytest.mark.parametrize(("loss", "truncation"), COMBINATIONS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_split_batches(self, loss, truncation, dtype):
        x, y, targets = made("ragged", loss)
        x = x.to(dtype)
        settings = {"loss": loss, "truncation": truncation, "lm_weight": 0.9 / 7, "fusion_weight": 0.1 / 7}
        whole, gradient = run(x, y, targets, **settings)
        slices = (slice(0, 3), slice(3, 4), slice(4, 7))
        parts = [run(x[part], y[part], targets.select(part), **settings) for part in slices]
        for field in ("total", "lm", "fusion"):
            summed = sum(getattr(part, field) for part, _ in parts)
            torch.testing.assert_close(summed, getattr(whole, field), rtol=1e-6, atol=0)
        assert sum(part.labels for part, _ in parts) == whole.labels == N
        assert sum(part.taught for part, _ in parts) == whole.taught == N
        torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("threads", [1, 3])
    @HALVES
    def test_chunks_and_threads(self, threads, dtype):
        x, y, targets = ordinary()
        expected, gradient = run(x.to(dtype), y, targets, chunk=V)
        with on_threads(threads):
            for chunk in (1, 2 * V, 3 * V + 5, 10**6):
                loss, got = run(x.to(dtype), y, targets, chunk=chunk)
                torch.testing.assert_close(tuple(loss), tuple(expected), rtol=1e-6, atol=0)
                torch.testing.assert_close(got, gradient, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=1e-8)
            assert torch.get_num_threads() == threads

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("loss", ["ce", "p_kl", "alm"])
    @HALVES
    def test_positions_in_a_batch(self, overwrite, loss, dtype):
        x, y, targets = made("ordinary", loss)
        x, settings = x.to(dtype), {"loss": loss, "lm_weight": 0.3}
        positions = torch.tensor([1, 2, 3, 9, 11, 12, 13])
        batch = torch.full((2, 8, V), 3.0, dtype=dtype)
        batch.view(16, V)[positions] = x
        expected, gradient = run(x, y, targets, **settings)
        leaf = batch.requires_grad_()
        how = {"positions": positions, "overwrite_logits": overwrite, "chunk": 2 * V}
        loss_ = fusion_loss(leaf * 1, y, targets, **settings, **how)
        loss_.total.backward()
        torch.testing.assert_close(loss_.total, expected.total)
        torch.testing.assert_close(leaf.grad.view(16, V)[positions], gradient)
        assert int(leaf.grad.view(16, V).abs().sum(1).count_nonzero()) == N


class TestBackward:
    def test_float16_keeps_small_weights_and_scales_with_the_incoming_gradient(self):
        x, y, targets = ordinary()
        leaf = x.half().requires_grad_()
        weight = 2.0**-20  # of a step of a million labels; the loss scaling of float16 training brings it back
        (fusion_loss(leaf, y, targets, lm_weight=weight, fusion_weight=weight).total * -(2.0**20)).backward()
        _, gradient = run(x.half(), y, targets)
        torch.testing.assert_close(leaf.grad, -gradient, rtol=2e-3, atol=1e-7)

    def test_overwriting_logits_that_autograd_needs_is_noticed(self):
        x, y, targets = ordinary()
        loss = fusion_loss(x.requires_grad_().tanh(), y, targets, overwrite_logits=True)  # tanh keeps its result
        with pytest.raises(RuntimeError, match="inplace"):
            loss.total.backward()

    def test_nothing_is_overwritten_without_gradient(self):
        x, y, targets = ordinary()
        before = x.clone()
        x.requires_grad_()
        with torch.no_grad():
            loss = fusion_loss(x, y, targets, overwrite_logits=True)
        assert torch.equal(x, before)
        assert not loss.total.requires_grad
        torch.testing.assert_close(loss.total, run(x, y, targets)[0].total.detach())

    def test_only_the_total_carries_a_gradient_and_only_once(self):
        x, y, targets = ordinary()
        leaf = x.clone().requires_grad_()
        loss = fusion_loss(leaf, y, targets)
        assert [value.requires_grad for value in loss[:3]] == [True, False, False]
        (gradient,) = torch.autograd.grad(loss.total * (leaf.sum() + 1), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


class TestNothingToLearn:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_no_label_is_zero_and_not_nan(self, overwrite):
        x, y, targets = ordinary()
        nothing = torch.zeros(0, dtype=torch.int64)
        for given in ((torch.full_like(y, -100), targets, None), (nothing, None, nothing)):
            leaf = x.clone().requires_grad_()
            loss = fusion_loss(leaf * 1, *given[:2], positions=given[2], overwrite_logits=overwrite)
            loss.total.backward()
            assert [float(value) for value in (loss.total.detach(), *loss[1:])] == [0] * 5
            assert torch.equal(leaf.grad, torch.zeros_like(x))

    @pytest.mark.parametrize("k", [0, 5])
    def test_no_targets_is_the_likelihood(self, k):
        x, y, targets = ordinary(k)
        untaught = replace(targets, taught=torch.zeros(N, dtype=torch.bool), ids=targets.ids * 0)  # duplicates too
        expected = torch.nn.functional.cross_entropy(x, y, reduction="sum")
        for given in (None, untaught):
            loss, gradient = run(x, y, given)
            torch.testing.assert_close(loss.total, expected)
            assert float(loss.fusion) == loss.taught == 0
            torch.testing.assert_close(gradient, reference.fusion_loss(x, y, None)[3])


class TestInfinities:
    def test_target_on_a_padded_id_is_infinite_and_a_weight_of_zero_silences_it(self):
        x, y, targets = ordinary()
        x[2, int(targets.ids[2, 0])] = -math.inf
        y[2] = int(targets.ids[2, 1])
        loss, gradient = run(x, y, targets)
        assert float(loss.fusion) == math.inf
        assert math.isfinite(float(loss.lm))
        assert bool(gradient.isfinite().all())
        loss, gradient = run(x, y, targets, fusion_weight=0.0)
        torch.testing.assert_close(loss.total.double(), loss.lm)
        assert bool(gradient.isfinite().all())

    def test_nan_logits_give_nan(self):
        x, y, targets = ordinary()
        x[2, 7] = math.nan
        assert math.isnan(float(run(x, y, targets)[0].total.detach()))

    def test_a_tail_that_float32_cannot_hold_still_teaches(self):
        x, y, targets = peaked_student()
        _, gradient = run(x.float(), y, targets, lm_weight=0.0)
        unlisted = torch.ones(N, V, dtype=torch.bool).scatter_(1, targets.ids, False)
        found, expected = torch.where(unlisted, gradient, 0).sum(1), torch.full((N,), -1 / 3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)

    def test_dust_on_an_empty_rest_is_dropped(self):
        x, y, full = ordinary(V)
        dusty = replace(full, tail=full.tail + 1e-7)
        for loss in ("ce", "kl", "reverse_kl", "js", "uld_topk", "gold"):
            assert math.isfinite(float(run(x, y, dusty, loss=loss)[0].total.detach()))


class Storages(TorchDispatchMode):
    """Every storage that an operation returned, by address; kept, so that no address is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.kept[tensor.untyped_storage().data_ptr()] = tensor
        return result


@pytest.mark.parametrize("overwrite", [False, True])
@HALVES
@pytest.mark.parametrize(("loss", "truncation"), [(loss, how) for loss, how in COMBINATIONS if loss != "grouped_kl"])
def test_nothing_but_the_gradient_is_as_large_as_the_logits(loss, truncation, dtype, overwrite):
    size = 5000
    x = logits(1, 1 / 64, size=size).to(dtype).requires_grad_() * 1
    y, targets = labels(2, size=size), top(logits(3, 1 / 64, size=size), 5)
    how = {"loss": loss, "truncation": truncation, "overwrite_logits": overwrite, "chunk": size}
    with on_threads(1), Storages() as storages:  # a dispatch mode sees its own thread
        value = fusion_loss(x, y, targets, **how)
    assert value.total.requires_grad
    assert len(storages.kept) > 20
    del storages.kept[x.untyped_storage().data_ptr()]
    sizes = [tensor.untyped_storage().nbytes() for tensor in storages.kept.values()]
    assert [size_ for size_ in sizes if size_ > 2 * size * 4] == ([] if overwrite else [N * size * dtype.itemsize])


def test_under_autocast():
    x, y, targets = ordinary()
    x = x.bfloat16()
    expected, gradient = run(x, y, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = run(x, y, targets)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(tuple(loss), tuple(expected))
    torch.testing.assert_close(found, gradient)


def test_uld_takes_any_vocabulary():
    x, y = logits(1, size=5), labels(2, size=5)
    teacher = top(logits(3, 0.5), 8)  # more entries than the student has ids
    assert wrong(x, y, replace(teacher, ids=teacher.ids + 10**6), loss="uld_topk") == []


def test_uld_on_whole_rows_is_the_published_loss():
    x, y = logits(1), labels(2)
    teacher = logits(3) * 0.7
    published = (x.softmax(1).sort(1).values - teacher.softmax(1).sort(1).values).abs().sum()
    torch.testing.assert_close(run(x, y, top(teacher, V), loss="uld_topk")[0].fusion, published)
    assert float(run(x, y, top(teacher, 5), loss="uld_topk")[0].fusion) < float(published)


class TestGold:
    """Entries without an id against the student's largest others, those with one by their logarithms."""

    def test_worked_example(self):
        # Pivot tokens 2, 0, 1, 201; the teacher's 2, 0, 1 and one that the pivot lacks.
        x = torch.tensor([[0.10, 0.05, 0.05, 0.80]], dtype=torch.float64).log()
        q = torch.tensor([[0.90, 0.04, 0.03, 0.03]], dtype=torch.float64)
        targets = SparseTargets(torch.tensor([[0, 1, 2, -2]]), q.log(), torch.zeros(1), torch.ones(1).bool())
        kl = float((q[0, :3] * (q[0, :3].log() - x[0, :3])).sum())
        assert kl == pytest.approx(1.9533, abs=5e-5)
        assert float(fusion_loss(x, torch.tensor([3]), targets, loss="gold").fusion) == pytest.approx(kl + 0.77)

    @pytest.mark.parametrize("chunk", [None, 5])
    @pytest.mark.parametrize("size", [1, 2, 4, 5, 9])
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    def test_fewer_tokens_than_entries(self, size, dtype, chunk):
        """One id is listed; the student has none to some tokens left for seven others, and of them one is padding."""
        x, y, teacher = logits(1, size=size).to(dtype), labels(2, size=size), top(logits(3, 0.5), 8)
        ids = torch.full_like(teacher.ids, -2)
        ids[:, 3] = y
        x[(torch.arange(size) == size - 1) & (y != size - 1)[:, None]] = -math.inf
        targets = replace(teacher, ids=ids)
        assert wrong(x, y, targets, chunk, loss="gold") == []


def test_the_worked_example_of_groups_and_pieces():
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


def test_alm_of_large_tau_is_the_divergence_of_two_poisson_rates():
    """A log(A / S) + S - A, with A and S the nats of the teacher and of the student."""
    x, y, targets = ordinary(1)
    nats, own = 1.5, -x[0].log_softmax(0)[y[0]]
    row = replace(targets, chunks=torch.tensor([0, -1, -1, -1, -1, -1, -1]), ids=targets.ids * 0)
    row = replace(row, logprobs=torch.full((N, 1), -nats, dtype=torch.float64))
    found = float(fusion_loss(x, y, row, loss="alm").fusion)
    assert found == pytest.approx(nats * math.log(nats / float(own)) + float(own) - nats, rel=0.05)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "loss", "message"),
        [
            (lambda t: {"ids": t.ids + V}, "ce", "lists token id .* the logits have 61 columns"),
            (lambda t: {"ids": t.ids * 0 - 2}, "ce", r"token id -2.* gold"),
            (lambda t: {"ids": t.ids[:, [0, 1, 2, 3, 1]]}, "ce", "twice"),
            (lambda t: {"logprobs": t.logprobs + 9}, "ce", "not a distribution"),
            (lambda t: {"tail": t.tail * math.nan}, "ce", "not a distribution"),
            (lambda _: {"temperature": 2.0}, "ce", "captured at temperature 2 .* asked for at 1"),
            (lambda t: vars(t.select(torch.arange(5))), "ce", "targets of 7 labels"),
            (lambda t: {"ids": t.ids[:, 0], "logprobs": t.logprobs[:, 0]}, "ce", "targets of 7 labels"),
            (lambda t: {"ids": t.ids * 0 - 3}, "gold", "token id -3"),
            (lambda _: {}, "grouped_kl", "grouped_kl needs members"),
            (lambda t: vars(in_groups(t)), "kl", "kl takes no members"),
            (lambda t: vars(in_groups(t)), "p_kl", "targets have none"),
            (lambda t: {**vars(in_groups(t)), "chunks": torch.zeros(N).long()}, "p_kl", "needs the shares"),
            (lambda t: {**vars(in_groups(t)), "ids": torch.full((N, 5), U)}, "grouped_kl", f"token id {U}"),
        ],
    )
    def test_targets(self, fields, loss, message):
        x, y, targets = ordinary()
        with pytest.raises(DistillationError, match=message):
            fusion_loss(x, y, replace(targets, **fields(targets)), loss=loss)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss": "mse"}, "no loss 'mse': it is one of ce, kl"),
            ({"loss": "reverse_kl", "truncation": "renormalize"}, "infinite"),
            ({"lm_weight": torch.ones(3)}, r"lm_weight has shape \(3,\)"),
            ({"positions": torch.tensor([0, 1, 2, 2, 3, 4, 5])}, "position 3 is 2"),
            ({"positions": torch.tensor([0, 1, 2, 3, 4, 5, 7])}, "stay below 7"),
            ({"labels": labels(2) + V}, "label 0 is token id"),
            ({"labels": labels(2)[:6]}, "6 labels for 7 rows"),
        ],
    )
    def test_settings(self, settings, message):
        x, y, targets = ordinary()
        with pytest.raises(DistillationError, match=message):
            fusion_loss(**{"logits": x, "labels": y, "targets": targets, **settings})
