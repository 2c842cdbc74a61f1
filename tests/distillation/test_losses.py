"""Every loss against a dense float64 reference, values and gradients, and what must not change them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusekit.distillation.losses import LOSSES, FusionLoss, SparseTargets, fusion_loss
from fusekit.distillation.passes import for_each_chunk
from fusekit.errors import DistillationError
from tests.distillation import reference
from tests.distillation.targets import CASES, N, V, labels, logits, ordinary, peaked_student, top

TOKENWISE = [loss for loss in LOSSES if loss not in ("grouped_kl", "p_kl", "alm")]  # for those see test_groups.py
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


def run(x: Tensor, y: Tensor, targets: SparseTargets | None, **settings) -> tuple[FusionLoss, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    loss = fusion_loss(leaf, y, targets, **settings)
    loss.total.backward()
    return loss, leaf.grad


def compare(result: tuple[FusionLoss, Tensor], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    value, relative, absolute = TOLERANCES[dtype]
    loss, gradient = result
    assert gradient.dtype == dtype
    for got, true in zip((loss.total, loss.lm, loss.fusion), expected, strict=False):
        torch.testing.assert_close(got.double(), true, rtol=value, atol=value)
    torch.testing.assert_close(gradient.double(), expected[3], rtol=relative, atol=absolute)


def some_without_ids(targets: SparseTargets, loss: str = "gold", every: int = 2) -> SparseTargets:
    """The targets; for ``gold`` every second entry is of a token that the student does not have."""
    if loss != "gold":
        return targets
    n, k = targets.ids.shape
    chosen = (torch.arange(n)[:, None] + torch.arange(k)) % every == 0
    return replace(targets, ids=torch.where(chosen & (targets.ids >= 0), -2, targets.ids))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("loss", "truncation"), COMBINATIONS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_and_gradients_are_the_dense_ones(case, loss, truncation, dtype):
    x, y, targets = CASES[case]()
    x, targets = x.to(dtype), some_without_ids(targets, loss)
    settings = {"loss": loss, "truncation": truncation, "lm_weight": 0.9, "fusion_weight": 0.1}
    compare(run(x, y, targets, **settings), reference.fusion_loss(x, y, targets, **settings), dtype)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.7])
@pytest.mark.parametrize(("loss", "truncation"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_temperature(loss, truncation, temperature, dtype):
    x, y, _ = ordinary()
    targets = some_without_ids(replace(top(logits(3) * 0.7 / temperature, 5), temperature=temperature), loss)
    x = x.to(dtype)
    settings = {"loss": loss, "truncation": truncation, "temperature": temperature, "fusion_weight": 0.25}
    compare(run(x, y, targets, **settings), reference.fusion_loss(x, y, targets, **settings), dtype)


@pytest.mark.parametrize(("loss", "truncation"), COMBINATIONS)
def test_gradcheck(loss, truncation):
    x, y = logits(1, rows=4, size=11), labels(2, 4, 11)
    targets = some_without_ids(top(logits(3, rows=4, size=11) * 0.7, 4), loss)

    def total(leaf: Tensor) -> Tensor:
        return fusion_loss(leaf, y, targets, loss=loss, truncation=truncation, lm_weight=0.9).total

    assert torch.autograd.gradcheck(total, (x.requires_grad_(),))


def test_the_references_differ_from_each_other():
    x, y, targets = ordinary()
    values = {c: float(reference.fusion_loss(x, y, some_without_ids(targets, c[0]), *c)[2]) for c in COMBINATIONS}
    assert len({round(value, 6) for value in values.values()}) == len(COMBINATIONS)


class TestTeacherIsStudent:
    """docs/losses.md: no gradient with `tail`; with `renormalize` only where the whole vocabulary is listed."""

    @staticmethod
    def gradient(loss: str, truncation: str, k: int, dtype: torch.dtype = torch.float64) -> float:
        x = (logits(1) / 4).to(dtype)
        settings = {"loss": loss, "truncation": truncation, "lm_weight": 0.0}
        return float(run(x, labels(2), top(x, k), **settings)[1].abs().max())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("k", [1, 5, V - 1, V])
    @pytest.mark.parametrize("loss", ["ce", "kl", "reverse_kl", "js"])
    def test_tail_gives_none(self, loss, k, dtype):
        assert self.gradient(loss, "tail", k, dtype) < (1e-14 if dtype == torch.float64 else 3e-7)

    @pytest.mark.parametrize("loss", ["ce", "kl", "js"])
    def test_renormalize_gives_none_only_for_the_whole_vocabulary(self, loss):
        assert self.gradient(loss, "renormalize", V) < 1e-14
        assert self.gradient(loss, "renormalize", 5) > 1e-2

    @pytest.mark.parametrize("loss", ["kl", "reverse_kl", "js", "uld_topk"])
    def test_distances_are_zero(self, loss):
        x = logits(1) / 4
        assert abs(float(fusion_loss(x, labels(2), top(x, 5), loss=loss).fusion)) < 1e-12


class TestTheSameSums:
    """How rows are spread over calls, chunks and positions changes nothing."""

    @pytest.mark.parametrize(("loss", "truncation"), COMBINATIONS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_split_batches(self, loss, truncation, dtype):
        x, y, targets = CASES["ragged"]()
        x = x.to(dtype)
        settings = {"loss": loss, "truncation": truncation, "lm_weight": 0.9 / 7, "fusion_weight": 0.1 / 7}
        whole, gradient = run(x, y, targets, **settings)
        parts = [
            run(x[part], y[part], targets.select(torch.arange(N)[part]), **settings)
            for part in (slice(0, 3), slice(3, 4), slice(4, 7))
        ]
        for field in ("total", "lm", "fusion"):
            summed = sum(getattr(part, field) for part, _ in parts)
            torch.testing.assert_close(summed, getattr(whole, field), rtol=1e-6, atol=0)
        assert sum(part.labels for part, _ in parts) == whole.labels == N
        assert sum(part.taught for part, _ in parts) == whole.taught == N
        torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("chunk", [1, 2 * V, 3 * V + 5, 10**6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_chunks(self, chunk, dtype):
        x, y, targets = ordinary()
        expected, gradient = run(x.to(dtype), y, targets, chunk=V)
        loss, got = run(x.to(dtype), y, targets, chunk=chunk)
        torch.testing.assert_close(tuple(loss), tuple(expected), rtol=1e-6, atol=0)
        torch.testing.assert_close(got, gradient, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=1e-8)

    @pytest.mark.parametrize("threads", [1, 3])
    def test_threads(self, threads):
        x, y, targets = ordinary()
        expected, gradient = run(x, y, targets)
        configured = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            loss, got = run(x, y, targets, chunk=2 * V)
            with pytest.raises(RuntimeError, match="index"):  # what a worker meets comes back, and the setting with it
                for_each_chunk(lambda: lambda start, stop: x.gather(1, y[:, None] + V), N, x, V)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(configured)
        torch.testing.assert_close(tuple(loss), tuple(expected))
        torch.testing.assert_close(got, gradient)

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_positions_in_a_batch(self, overwrite, dtype):
        x, y, targets = ordinary()
        x = x.to(dtype)
        positions = torch.tensor([1, 2, 3, 9, 11, 12, 13])
        batch = torch.full((2, 8, V), 3.0, dtype=dtype)
        batch.view(16, V)[positions] = x
        expected, gradient = run(x, y, targets)
        leaf = batch.requires_grad_()
        loss = fusion_loss(leaf * 1, y, targets, positions=positions, overwrite_logits=overwrite, chunk=2 * V)
        loss.total.backward()
        torch.testing.assert_close(loss.total, expected.total)
        torch.testing.assert_close(leaf.grad.view(16, V)[positions], gradient)
        assert int(leaf.grad.view(16, V).abs().sum(1).count_nonzero()) == N

    def test_ignored_labels_need_no_selection(self):
        x, y, targets = CASES["ignored"]()
        kept = y != -100
        loss, gradient = run(x, y, targets)
        expected, rows = run(x[kept], y[kept], targets.select(kept))
        torch.testing.assert_close(tuple(loss), tuple(expected))
        assert loss.labels == 4
        torch.testing.assert_close(gradient[kept], rows)
        assert not gradient[~kept].any()

    def test_weights_per_label(self):
        x, y, targets = ordinary()
        lam = torch.linspace(0, 1, N, dtype=torch.float64)
        _, gradient = run(x, y, targets, lm_weight=lam, fusion_weight=1 - lam)
        for row in range(N):
            one, weight = slice(row, row + 1), float(lam[row])
            only = targets.select(torch.tensor([row]))
            _, alone = run(x[one], y[one], only, lm_weight=weight, fusion_weight=1 - weight)
            torch.testing.assert_close(gradient[one], alone)


class TestBackward:
    def test_scales_with_the_incoming_gradient(self):
        x, y, targets = ordinary()
        _, gradient = run(x, y, targets)
        leaf = x.clone().requires_grad_()
        (fusion_loss(leaf, y, targets).total * -2.5).backward()
        torch.testing.assert_close(leaf.grad, -2.5 * gradient)

    def test_float16_keeps_small_weights(self):
        x, y, targets = ordinary()
        leaf = x.half().requires_grad_()
        weight = 2.0**-20  # of a step of a million labels; the loss scaling of float16 training brings it back
        (fusion_loss(leaf, y, targets, lm_weight=weight, fusion_weight=weight).total * 2.0**20).backward()
        _, gradient = run(x.half(), y, targets)
        torch.testing.assert_close(leaf.grad, gradient, rtol=2e-3, atol=1e-7)

    def test_overwriting_takes_the_logits_memory(self):
        x, y, targets = ordinary()
        _, gradient = run(x, y, targets)
        leaf = x.clone().requires_grad_()
        made = leaf * 1
        fusion_loss(made, y, targets, overwrite_logits=True).total.backward()
        assert torch.equal(leaf.grad, gradient)
        assert torch.equal(made.detach(), gradient)

    def test_overwriting_logits_that_autograd_needs_is_noticed(self):
        x, y, targets = ordinary()
        leaf = x.clone().requires_grad_()
        loss = fusion_loss(leaf.tanh(), y, targets, overwrite_logits=True)  # tanh keeps its result
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

    def test_the_sums_carry_no_gradient(self):
        x, y, targets = ordinary()
        loss = fusion_loss(x.requires_grad_(), y, targets)
        assert loss.total.requires_grad
        assert not loss.lm.requires_grad
        assert not loss.fusion.requires_grad

    def test_double_backward_is_refused(self):
        x, y, targets = ordinary()
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            fusion_loss(leaf, y, targets).total * (leaf.sum() + 1), leaf, create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


class TestNothingToLearn:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_no_label_is_zero_and_not_nan(self, overwrite):
        x, y, targets = ordinary()
        leaf = x.clone().requires_grad_()
        loss = fusion_loss(leaf * 1, torch.full_like(y, -100), targets, overwrite_logits=overwrite)
        loss.total.backward()
        assert [float(value) for value in (loss.total.detach(), *loss[1:])] == [0] * 5
        assert torch.equal(leaf.grad, torch.zeros_like(x))

    def test_no_position(self):
        nothing = torch.zeros(0, dtype=torch.int64)
        leaf = torch.randn(2, 3, V, requires_grad=True)
        loss = fusion_loss(leaf, nothing, positions=nothing)
        loss.total.backward()
        assert float(loss.total.detach()) == 0
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))

    @pytest.mark.parametrize("k", [0, 5])
    def test_no_targets_is_the_likelihood(self, k):
        x, y, targets = ordinary(k)
        untaught = replace(targets, taught=torch.zeros(N, dtype=torch.bool))
        expected = torch.nn.functional.cross_entropy(x, y, reduction="sum")
        for given in (None, untaught):
            loss, gradient = run(x, y, given)
            torch.testing.assert_close(loss.total, expected)
            assert float(loss.fusion) == loss.taught == 0
            torch.testing.assert_close(gradient, reference.fusion_loss(x, y, None)[3])


class TestInfinities:
    def test_target_on_a_padded_id_is_infinite(self):
        x, y, targets = ordinary()
        x[2, int(targets.ids[2, 0])] = -math.inf
        y[2] = int(targets.ids[2, 1])
        loss, gradient = run(x, y, targets)
        assert float(loss.fusion) == math.inf
        assert math.isfinite(float(loss.lm))
        assert bool(gradient.isfinite().all())

    def test_a_weight_of_zero_silences_it(self):
        x, y, targets = ordinary()
        x[2, int(targets.ids[2, 0])] = -math.inf
        y[2] = int(targets.ids[2, 1])
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
        torch.testing.assert_close(
            torch.where(unlisted, gradient, 0).sum(1), torch.full((N,), -1 / 3), rtol=1e-5, atol=0
        )

    def test_dust_on_an_empty_rest_is_dropped(self):
        x, y, full = ordinary(V)
        dusty = replace(full, tail=full.tail + 1e-7)
        for loss in TOKENWISE:
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss", "truncation"), COMBINATIONS)
def test_nothing_but_the_gradient_is_as_large_as_the_logits(loss, truncation, dtype, overwrite):
    size = 5000
    made = logits(1, 1 / 64, size=size).to(dtype).requires_grad_() * 1
    y, targets = labels(2, size=size), top(logits(3, 1 / 64, size=size), 5)
    configured = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # a dispatch mode sees its own thread
        with Storages() as storages:
            value = fusion_loss(
                made, y, targets, loss=loss, truncation=truncation, overwrite_logits=overwrite, chunk=size
            )
    finally:
        torch.set_num_threads(configured)
    assert value.total.requires_grad
    assert len(storages.kept) > 20
    del storages.kept[made.untyped_storage().data_ptr()]
    sizes = [tensor.untyped_storage().nbytes() for tensor in storages.kept.values()]
    assert [size_ for size_ in sizes if size_ > 2 * size * 4] == ([] if overwrite else [N * size * dtype.itemsize])


def test_under_autocast():
    x, y, targets = ordinary()
    x = x.bfloat16()
    expected, gradient = run(x, y, targets)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fusion_loss(leaf, y, targets)
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(tuple(loss), tuple(expected))
    torch.testing.assert_close(leaf.grad, gradient)


def test_uld_takes_any_vocabulary():
    x, y = logits(1, size=5), labels(2, size=5)
    teacher = top(logits(3, 0.5), 8)  # more entries than the student has ids
    foreign = replace(teacher, ids=teacher.ids + 10**6)
    compare(run(x, y, foreign, loss="uld_topk"), reference.fusion_loss(x, y, foreign, "uld_topk"), torch.float64)


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
        assert kl + 0.77 == pytest.approx(2.7233, abs=5e-5)

    @pytest.mark.parametrize("every", [1, 3, 100])
    @pytest.mark.parametrize("truncation", ["tail", "renormalize"])
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    def test_values_and_gradients_are_the_dense_ones(self, every, truncation, dtype):
        for make in CASES.values():
            x, y, targets = make()
            targets, x = some_without_ids(targets, every=every), x.to(dtype)
            settings = {"loss": "gold", "truncation": truncation, "lm_weight": 0.9, "fusion_weight": 0.1}
            compare(run(x, y, targets, **settings), reference.fusion_loss(x, y, targets, **settings), dtype)

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
        expected = reference.fusion_loss(x, y, targets, "gold")
        compare(run(x, y, targets, loss="gold", chunk=chunk), expected, dtype)

    def test_all_matched_is_the_kl_divergence_and_none_sorts(self):
        x, y, targets = ordinary()
        torch.testing.assert_close(run(x, y, targets, loss="gold"), run(x, y, targets, loss="kl"))
        whole = top(logits(3) * 0.7, V)
        nameless = replace(whole, ids=torch.full_like(whole.ids, -2))
        torch.testing.assert_close(run(x, y, nameless, loss="gold"), run(x, y, whole, loss="uld_topk"))

    @pytest.mark.parametrize("loss", [loss for loss in TOKENWISE if loss not in ("gold", "uld_topk")])
    def test_other_losses_refuse_entries_without_an_id(self, loss):
        x, y, targets = ordinary()
        with pytest.raises(DistillationError, match=r"token id -2.* without an id.* gold"):
            fusion_loss(x, y, some_without_ids(targets), loss=loss)

    def test_an_entry_without_an_id_is_a_probability_too(self):
        x, y, targets = ordinary()
        with pytest.raises(DistillationError, match="no distribution"):
            fusion_loss(x, y, replace(some_without_ids(targets), logprobs=targets.logprobs + 9), loss="gold")
        with pytest.raises(DistillationError, match="token id -3"):
            fusion_loss(x, y, replace(targets, ids=targets.ids * 0 - 3), loss="gold")


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (lambda t: {"ids": t.ids + V}, "lists token id .* the logits have 61 columns"),
            (lambda t: {"ids": t.ids * 0 - 2}, "lists token id -2"),
            (lambda t: {"ids": t.ids[:, [0, 1, 2, 3, 1]]}, "twice"),
            (lambda t: {"logprobs": t.logprobs + 9}, "no distribution"),
            (lambda t: {"logprobs": t.logprobs * math.nan}, "no distribution"),
            (lambda t: {"tail": -t.tail}, "no distribution"),
            (lambda t: {"tail": t.tail * math.nan}, "no distribution"),
            (lambda t: {"ids": t.ids.int()}, "int32"),
            (lambda t: {"tail": t.tail[:3]}, r"\(3,\)"),
            (lambda t: {"temperature": 2.0}, "captured at temperature 2 .* asked for at 1"),
        ],
    )
    def test_targets(self, fields, message):
        x, y, targets = ordinary()
        with pytest.raises(DistillationError, match=message):
            fusion_loss(x, y, replace(targets, **fields(targets)))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss": "mse"}, "no loss 'mse': it is one of ce, kl"),
            ({"truncation": "none"}, "no truncation 'none'"),
            ({"loss": "reverse_kl", "truncation": "renormalize"}, "infinite"),
            ({"temperature": 0.0}, "temperature is 0.0"),
            ({"lm_weight": torch.ones(3)}, r"lm_weight has shape \(3,\)"),
            ({"positions": torch.tensor([0, 1, 2, 2, 3, 4, 5])}, "position 3 is 2"),
            ({"positions": torch.tensor([0, 1, 2, 3, 4, 5, 7])}, "stay below 7"),
            ({"positions": torch.arange(6)}, "one for each of 7 labels"),
        ],
    )
    def test_settings(self, settings, message):
        x, y, targets = ordinary()
        with pytest.raises(DistillationError, match=message):
            fusion_loss(x, y, targets, **settings)

    def test_labels_and_logits(self):
        x, y, targets = ordinary()
        with pytest.raises(DistillationError, match="label 0 is token id"):
            fusion_loss(x, y + V, targets)
        with pytest.raises(DistillationError, match="6 labels for 7 rows"):
            fusion_loss(x, y[:6], targets)
        with pytest.raises(DistillationError, match="5 rows of targets for 7 labels"):
            fusion_loss(x, y, targets.select(torch.arange(5)))
        with pytest.raises(DistillationError, match="int32"):
            fusion_loss(x, y.int(), targets)
        with pytest.raises(DistillationError, match="must be floating"):
            fusion_loss(x.long(), y, targets)

    def test_a_duplicate_in_a_row_that_is_not_taught_is_nobodys_business(self):
        x, y, targets = ordinary()
        untaught = replace(targets, ids=torch.zeros_like(targets.ids), taught=torch.zeros(N, dtype=torch.bool))
        assert math.isfinite(float(fusion_loss(x, y, untaught).total))
