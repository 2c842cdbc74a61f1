"""SCE against the loops of reference.py, in every variant and dtype, and the invariances that the maths promises."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.errors import MergeError
from fusekit.merge_methods import fusion_vectors, sce, select, varm, varm_elementwise, widen
from fusekit.merge_methods.sce import kth_largest, select_top_variance
from tests import reference
from tests.helpers import refused
from tests.merge_methods.cases import DTYPES, assert_close, cast, nasty_cases, random_case, tied_case

VARIANTS = ("paper", "renormalized", "fuseai")
NASTY = nasty_cases()
SCE = sys.modules["fusekit.merge_methods.sce"]  # the package has a function of this name


def assert_equals_reference(base, targets, tau, variant, weights=None):
    expected, eta = reference.sce(base, targets, tau, variant, weights)
    copies = [t.clone() for t in (base, *targets)]
    merged = sce(base, targets, select_topk=tau, variant=variant, weights=weights)
    assert all(torch.equal(a, b) for a, b in zip((base, *targets), copies, strict=True))
    np.testing.assert_allclose(merged.coefficients, eta, rtol=1e-5, atol=0)
    assert_close(merged.tensor, expected, base, targets)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_random_tensors_equal_the_reference(k, dtype, variant):
    for tau in (0.1, 0.5, 1.0):
        if k > 1 or tau == 1:
            assert_equals_reference(*cast(random_case((23, 17), k, seed=k), dtype), tau, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NASTY)
def test_nasty_tensors_equal_the_reference(name, variant):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for tau in (0.1, 0.3, 1.0):
            assert_equals_reference(*cast(NASTY[name], dtype), tau, variant)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=12, max_size=12), min_size=2, max_size=5),
    st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 0.99]),
    st.sampled_from(VARIANTS),
)
def test_small_integers_equal_the_exact_reference(rows, tau, variant):
    """Fusion vectors from a few numbers: ties everywhere, all of them exact."""
    deltas = [torch.tensor(row, dtype=torch.float32) / 16 for row in rows]
    expected, eta = reference.sce_deltas([reference.flat(d) for d in deltas], tau, variant)
    merged = sce(None, deltas, select_topk=tau, variant=variant)
    np.testing.assert_allclose(merged.tensor.numpy(), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(merged.coefficients, eta, rtol=1e-12)
    assert select(deltas, tau).tolist() == reference.select([reference.flat(d) for d in deltas], tau)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.5), (1.0, 0.3, 2.0), (1.0, 0.0, 1.0), (1.0, -0.5, 1.0)], ids=str)
def test_weights_equal_the_reference(weights, variant):
    for case in (random_case((13, 11), 3), tied_case((13, 11), 3)):
        for dtype in DTYPES:
            for tau in (0.3, 1.0):
                base, targets = cast(case, dtype)
                assert_equals_reference(base, targets, tau, variant, weights)
    for case in NASTY.values():
        base, targets = cast(case, torch.float32)
        assert_equals_reference(base, targets, 1.0, variant, (weights * 2)[: len(targets)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_one_change_no_bit_and_those_of_zero_leave_a_model_out(variant):
    base, targets = cast(random_case((50, 40), 3), torch.float32)
    for tau in (0.2, 1.0):
        plain = sce(base, targets, select_topk=tau, variant=variant, count_erased=True)
        ones = sce(base, targets, select_topk=tau, variant=variant, count_erased=True, weights=[1, 1, 1])
        assert torch.equal(ones.tensor, plain.tensor)
        assert ones.erased.tobytes() == plain.erased.tobytes()
        halves = sce(base, targets, select_topk=tau, variant=variant, weights=[0.5, 0.5, 0.5])
        torch.testing.assert_close(halves.tensor - base, (plain.tensor - base) / 2, rtol=1e-5, atol=1e-7)
        assert halves.coefficients.tobytes() == plain.coefficients.tobytes()
        assert torch.equal(sce(base, targets, select_topk=tau, variant=variant, weights=[0, 0, 0]).tensor, base)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_ties_go_to_the_lower_index(k):
    base, targets = cast(tied_case((40, 30), k, seed=k), torch.bfloat16)
    for tau in (0.05, 0.37, 0.8):
        expected = reference.select(reference.fusion_vectors(base, targets), tau)
        assert select(targets, tau).reshape(-1).tolist() == expected


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(merged):
    """Every field of a result."""
    fields = vars(merged) | {"tensor": merged.tensor.view(torch.int16)}
    return {name: np.asarray(value).tobytes() for name, value in fields.items()}


@pytest.mark.parametrize(("chunk", "threads"), [(4096, 2), (5 * 4096, 3), (64 * 4096, 1), (1024 * 4096, 3)])
@pytest.mark.parametrize("method", [*VARIANTS, varm, varm_elementwise])
def test_result_is_the_same_to_the_bit_for_every_chunking(method, chunk, threads, set_threads, monkeypatch):
    if method in VARIANTS:
        method = partial(sce, select_topk=0.2, variant=method, count_erased=True)
    base, targets = cast(random_case((811, 379), 3), torch.bfloat16)
    expected = bits(method(base, targets))
    monkeypatch.setattr(fusion_vectors, "CPU_CHUNK", chunk)
    set_threads(threads)
    assert bits(method(base, targets)) == expected


@pytest.mark.parametrize("exponent", [-90, -60, -20, -7, 3, 10, 80])
def test_scaling_by_a_power_of_two_changes_nothing_else(exponent):
    """What 1e-6 in a denominator would break: ordinary fine-tunes have mean squares far below it.

    At 2**-90 squares underflow float32, at 2**80 they overflow.
    """
    base, targets = cast(random_case((64, 64), 3), torch.float32)
    deltas = [target - base for target in targets]
    scaled = [delta * 2.0**exponent for delta in deltas]
    for tau in (0.1, 1.0):
        one, other = (sce(None, d, select_topk=tau, variant="renormalized") for d in (deltas, scaled))
        assert one.coefficients.tobytes() == other.coefficients.tobytes()
        assert torch.equal(one.tensor * 2.0**exponent, other.tensor)
        assert torch.equal(select(deltas, 0.1), select(scaled, 0.1))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float64, factor) for factor in (1e-140, 1e-25, 1e-6, 1e-3, 1e3, 1e140)]
    + [(torch.float32, factor) for factor in (1e-34, 1e-25, 1e36)]
    + [(torch.bfloat16, factor) for factor in (1e-30, 1e30)],
    ids=str,
)
def test_all_methods_hold_at_every_scale(dtype, factor):
    """On a base of the same scale; the loops of the reference take scaled copies in float64."""
    base, targets = random_case((64, 64), 3, scale=0.05)
    scaled = [(tensor * factor).to(dtype) for tensor in (base, *targets)]
    near = [tensor.double() / factor for tensor in scaled]
    deltas = [target - near[0] for target in near[1:]]
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5}
    merged = sce(scaled[0], scaled[1:], select_topk=0.1)
    mask = select(scaled[1:], 0.1)
    expected = [float(delta[mask].square().sum()) for delta in deltas]
    np.testing.assert_allclose(merged.coefficients, np.array(expected) / sum(expected), **tolerance)
    if dtype != torch.bfloat16:  # whose steps differ between scales
        assert torch.equal(mask, select(deltas, 0.1))
    assert merged.selected == mask.double().mean().item()
    for method in (varm, widen):
        found, wanted = method(scaled[0], scaled[1:]), method(near[0], near[1:])
        weights = (found.coefficients, wanted.coefficients) if method is varm else (found.scores, wanted.scores)
        np.testing.assert_allclose(*weights, **tolerance)
        again = found.tensor.double() / factor
        torch.testing.assert_close(again, wanted.tensor, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_bits_of_the_base_stay_where_nothing_survives():
    base = torch.tensor([-0.0, 0.0, 1.0, -0.0, 5e-324, -1e-310], dtype=torch.float64)
    moved = base.clone()
    moved[2] = 2
    for variant in VARIANTS:
        for tau in (0.5, 1.0):
            merged = sce(base, [moved, moved * 1.5], select_topk=tau, variant=variant).tensor
            keep = [0, 1, 3]
            assert torch.equal(merged[keep].view(torch.int64), base[keep].view(torch.int64))


def test_coefficients_of_small_deltas_are_right():
    """Deltas of RMS 2e-4 and 6e-4: the energies are 1 : 9."""
    delta = torch.ones(32, 32)
    merged = sce(torch.zeros(32, 32), [2e-4 * delta, 6e-4 * delta])
    np.testing.assert_allclose(merged.coefficients, [0.1, 0.9], rtol=1e-6)


def test_a_conflict_down_to_the_last_digit_is_voted_with_that_digit():
    """φ_2 = 2θ - φ_1 up to the rounding of float32: the sign of the sum is in that rounding."""
    base, _ = cast(random_case((50, 50), 1), torch.float32)
    conflict = base + 1 / 64
    assert_equals_reference(base, [conflict, 2 * base - conflict], 1.0, "paper")


def test_shares_that_are_reported():
    base = torch.zeros(8)
    targets = [torch.tensor([2.0, 2, 2, 2, 0, 0, 0, 0]), torch.tensor([-1.0, -1, 1, 1, 0, 0, 0, 0])]
    merged = sce(base, targets, select_topk=0.5, count_erased=True)
    # Four elements vary; the two of highest variance (9/4) are selected, and there the second target is outvoted.
    assert merged.selected == 2 / 8
    assert merged.erased.tolist() == [0.0, 1.0]
    assert merged.tensor.tolist() == pytest.approx([2 * 0.8, 2 * 0.8, 0, 0, 0, 0, 0, 0])


BASE, TARGETS = random_case((4, 4), 2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"select_topk": 0.0}, ["select_topk is 0.0", "(0, 1]"]),
        ({"select_topk": 1.5}, ["select_topk is 1.5"]),
        ({"select_topk": 0.5, "targets": TARGETS[:1]}, ["select_topk is 0.5", "one target"]),
        ({"variant": "fusai"}, ["'fusai'", "paper, renormalized, fuseai"]),
        ({"base": BASE.long(), "targets": [t.long() for t in TARGETS]}, ["torch.int64"]),
        ({"targets": []}, ["no targets"]),
        ({"targets": [TARGETS[0], TARGETS[1][:, :3]]}, ["target 1", "[4, 3]", "base", "[4, 4]"]),
        ({"targets": TARGETS[0]}, ["target 0", "[4]", "base", "[4, 4]"]),
        ({"targets": [TARGETS[0].float(), TARGETS[1]]}, ["target 0", "torch.float32", "torch.float64"]),
        ({"weights": [1.0]}, ["1 weights", "2 targets"]),
        ({"weights": [1.0, math.nan]}, ["nan"]),
        ({"weights": [1, math.inf]}, ["inf"]),
    ],
)
def test_bad_inputs_are_named(arguments, named):
    arguments = {"base": BASE, "targets": TARGETS} | arguments
    for method in (sce,) if arguments.keys() & {"select_topk", "variant"} else (sce, varm):
        with refused(MergeError, *named):
            method(**arguments)


@pytest.mark.parametrize("method", [partial(sce, select_topk=0.5), sce, varm, varm_elementwise, widen])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_errors_that_name_the_target(value, method):
    base, targets = random_case((6, 6), 3)
    targets[1][2, 3] = value
    with pytest.raises(MergeError, match=r"target\(s\) \[1\].*NaN or Inf"):
        method(base, targets)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_the_base_is_an_error_where_nothing_is_selected_too(dtype, variant):
    base, targets = cast(random_case((40, 40), 2), dtype)
    place = (select(targets, 0.1) == 0).nonzero()[0]
    base[tuple(place)] = math.nan
    with pytest.raises(MergeError, match="NaN or Inf"):
        sce(base, targets, select_topk=0.1, variant=variant)


def test_differences_beyond_float32_are_an_error():
    base = torch.zeros(4)
    with pytest.raises(MergeError, match=r"overflow torch\.float32.*float64"):
        sce(base, [torch.full((4,), 3e38), torch.full((4,), -3e38)], select_topk=0.5)


def test_small_differences_count_beside_large_ones():
    base = torch.zeros(64)
    first = torch.full((64,), 1e-38) * torch.logspace(0, -9, 64)  # down to the smallest subnormal numbers, and to zero
    assert sce(base, [first, base], select_topk=1.0).coefficients.tolist() == [1, 0]
    count = int((first > 0).sum()) // 2
    assert select([first, base], 0.5).tolist() == [True] * count + [False] * (64 - count)


def _order_oracle(targets, tau):
    """Top variances of a large tensor in float64, ties to the lower index."""
    stack = torch.stack([t.double() for t in targets])
    shifted = stack - stack[0]
    scores = (len(targets) * shifted.square().sum(0) - shifted.sum(0).square()).numpy().reshape(-1)
    count = math.floor(tau * np.count_nonzero(scores > 0))
    order = np.lexsort((np.arange(scores.size), -scores))[:count]
    mask = np.zeros(scores.size, dtype=bool)
    mask[order] = True
    return mask


@pytest.mark.parametrize("tau", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["continuous", "bf16 steps", "two values", "mostly unchanged"])
def test_large_tensors_select_what_a_sort_selects(kind, tau):
    """Large enough for the sampled bracket; kinds where it is tight, where it meets atoms, and where it misleads."""
    generator = torch.Generator().manual_seed(1)
    size = 300_000
    base = torch.randn(size, generator=generator) * 0.02
    targets = [base + torch.randn(size, generator=generator) * 1e-3 for _ in range(3)]
    if kind == "bf16 steps":
        base, targets = base.bfloat16(), [t.bfloat16() for t in targets]
    elif kind == "two values":
        base = torch.zeros(size)
        targets = [torch.randint(0, 2, (size,), generator=generator).float() for _ in range(2)]
    elif kind == "mostly unchanged":
        changed = torch.rand(size, generator=generator) < 1e-4
        targets = [torch.where(changed, t, base) for t in targets]
    dtype = torch.float64 if kind == "continuous" else base.dtype
    selected = select([t.to(dtype) for t in targets], tau)
    assert np.array_equal(selected.numpy(), _order_oracle([t.to(dtype) for t in targets], tau))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kth_largest_equals_a_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    lists = [
        torch.rand(1000, generator=generator),
        torch.zeros(10),
        torch.tensor([0.0, 1e-45, 1e-40, 1.0, 3e38]),
        torch.randint(0, 3, (500,), generator=generator).float(),
        torch.full((70_000,), 0.25),
    ]
    for values in (each.to(dtype) for each in lists):
        ordered = values.sort(descending=True).values
        for k in {1, 2, values.numel() // 2 + 1, values.numel()}:
            if k <= values.numel():
                parts = [values[: values.numel() // 3], values[values.numel() // 3 :]]
                assert kth_largest(parts, k) == ordered[k - 1].item()


def test_a_misleading_sample_still_gives_the_true_threshold(monkeypatch):
    monkeypatch.setattr(SCE, "_sampled_bound", lambda *_: 1e9)
    base, targets = random_case((50, 50), 3)
    expected = reference.select(reference.fusion_vectors(base, targets), 0.2)
    assert select(targets, 0.2).reshape(-1).tolist() == expected
    assert select_top_variance([t.reshape(-1) for t in targets], 0.2).count == sum(expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operations_that_run_on_other_devices_give_the_same(variant, monkeypatch):
    """Off the CPU numpy is replaced by torch; here torch's operations run on the CPU's tensors."""
    cases = [(cast(case, torch.float32), 0.3) for case in NASTY.values()]
    large = cast(random_case((400, 300), 3), torch.bfloat16)
    cases += [(large, 0.1), (large, 1.0), (cast(tied_case((400, 300), 3), torch.bfloat16), 0.2)]
    expected = [sce(*case, select_topk=tau, variant=variant, count_erased=True) for case, tau in cases]
    for module in (fusion_vectors, SCE):
        monkeypatch.setattr(module, "on_cpu", lambda _: False)
    for (case, tau), numpy_result in zip(cases, expected, strict=True):
        merged = sce(*case, select_topk=tau, variant=variant, count_erased=True)
        assert torch.equal(merged.tensor, numpy_result.tensor)
        np.testing.assert_allclose(merged.coefficients, numpy_result.coefficients, rtol=1e-14)
        assert merged.erased.tolist() == numpy_result.erased.tolist()
        assert merged.selected == numpy_result.selected
