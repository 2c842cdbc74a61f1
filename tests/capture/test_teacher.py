"""The teacher's forward against one plain forward per row and a full softmax."""

import dataclasses
import resource

import numpy as np
import psutil
import pytest
import torch
from transformers import CpmAntConfig, CpmAntForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from fusekit.capturing.forward import SplitForward
from fusekit.capturing.teacher import Teacher, plan_batches, rows_per_shard
from fusekit.errors import CaptureError
from fusekit.settings import Selection
from tests import reference
from tests.capture.random_models import ARCHITECTURES, VOCABULARY, random_model, random_rows, row_of
from tests.processes import run

LENGTHS = [5, 17, 2, 30, 17, 9, 30, 3]

FLOAT32_BOUND = 2e-4
"""Nats between the batched and the plain float32 forward of a model of two layers: rounding, in another order."""

BFLOAT16_BOUND = 0.15
"""The same in bfloat16, whose logits of about 10 have steps of 0.06."""


def assert_equal(model, rows, scored, selection, valid=None):
    """ids exactly, everything else within FLOAT32_BOUND of what one plain forward per row says."""
    assert [row.tokens for row in scored.rows] == list(rows)
    for found in scored.rows:
        total = 0.0
        assert [array.dtype for array in (*found.rows, found.actual)] == [np.int64] + [np.float64] * 3
        assert len(found.actual) == len(found.tokens.label_positions)
        for j, label in enumerate(found.tokens.label_positions.tolist()):
            row = reference.teacher_row(model, found.tokens.ids.tolist(), label, selection, valid)
            ids, logprobs, tail, actual, at_one = row
            assert found.rows.ids[j].tolist() == ids + [-1] * (selection.k - len(ids))
            np.testing.assert_allclose(found.rows.logprobs[j, : len(ids)], logprobs, atol=FLOAT32_BOUND, rtol=0)
            assert found.rows.tail[j] == pytest.approx(tail, rel=FLOAT32_BOUND, abs=1e-12)
            assert found.actual[j] == pytest.approx(actual, abs=FLOAT32_BOUND)
            total -= at_one
        assert found.cross_entropy == pytest.approx(total, abs=FLOAT32_BOUND * len(found.actual))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_scored_as_by_one_plain_forward_per_row(architecture):
    model, rows, said = random_model(architecture), random_rows(LENGTHS), []
    selection = Selection(7)
    # Chunks of 20 positions, fewer than a batch has.
    teacher = Teacher(model, selection=selection, batch_tokens=64, notify=said.append, chunk_bytes=20 * 4 * VOCABULARY)
    assert_equal(model, rows, teacher.score(rows), selection)
    assert said == []  # the head ran on the positions of labels alone
    assert "forward" not in model.get_decoder().__dict__  # the model is as it was


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_bfloat16_is_scored_as_by_its_own_plain_forward(architecture):
    model, every = random_model(architecture, dtype=torch.bfloat16), Selection(VOCABULARY)
    for found in Teacher(model, selection=every, batch_tokens=64).score(random_rows(LENGTHS)).rows:
        for j, label in enumerate(found.tokens.label_positions.tolist()):
            ids, logprobs, _, actual, _ = reference.teacher_row(model, found.tokens.ids.tolist(), label, every)
            logprobs_by_id = np.array(logprobs)[np.argsort(ids)]
            np.testing.assert_allclose(found.rows.logprobs[j], logprobs_by_id[found.rows.ids[j]], atol=BFLOAT16_BOUND)
            assert found.actual[j] == pytest.approx(actual, abs=BFLOAT16_BOUND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "cohere", "phi"])
def test_a_float32_head_adds_no_rounding_to_that_of_the_hidden_states(architecture, dtype):
    """Against the hidden states of the model, and its head in float32: its scale, cap and bias included."""
    model, rows = random_model(architecture, dtype=dtype), [*random_rows([30], seed=1), *random_rows([30], seed=2)]
    exact, rounded = (Teacher(model, selection=Selection(5), float32_head=wide).score(rows) for wide in (True, False))
    head = random_model(architecture, dtype=dtype).float()
    worst = 0.0
    for row, found, other in zip(rows, exact.rows, rounded.rows, strict=True):
        with torch.inference_mode():
            hidden = model.get_decoder()(input_ids=torch.from_numpy(row.ids)[None], use_cache=False)[0].float()
            decoder = head.get_decoder()
            decoder.forward = lambda hidden=hidden, **_: BaseModelOutputWithPast(last_hidden_state=hidden)
            logprobs = head(input_ids=torch.from_numpy(row.ids)[None]).logits[0].double().log_softmax(1)
        at = row.label_positions
        expected = logprobs[at - 1, row.ids[at]]
        np.testing.assert_allclose(found.actual, expected, atol=1e-4, rtol=0)
        worst = max(worst, float(np.abs(other.actual - expected.numpy()).max()))
    assert worst > 2e-4  # what the float32 head saves


def test_a_model_that_reads_its_padding_gets_batches_of_one_length():
    """CPM-Ant ignores the attention mask and is not causal within its context: padding changes what it says."""
    config = CpmAntConfig(
        vocab_size=300, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2
    )
    torch.manual_seed(0)
    model, said = CpmAntForCausalLM(config).eval(), []
    rows = random_rows(LENGTHS, vocabulary=300)
    found = Teacher(model, selection=Selection(4), batch_tokens=64, name="ant", notify=said.append).score(rows)
    assert any("ant: padding" in line for line in said)
    alone = Teacher(model, selection=Selection(4), batch_tokens=1).score(rows)
    for one, other in zip(found.rows, alone.rows, strict=True):
        np.testing.assert_allclose(one.actual, other.actual, atol=FLOAT32_BOUND)
    assert plan_batches([5, 3, 5, 3, 2], 100, padding=False) == [[0, 2], [1, 3], [4]]


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_is_of_the_rows_and_never_of_the_cross_entropy(temperature):
    model, rows = random_model("llama"), random_rows(LENGTHS)
    selection = Selection(5, temperature=temperature)
    assert_equal(model, rows, Teacher(model, selection=selection).score(rows), selection)


def test_padding_rows_of_the_matrix_and_holes_get_no_mass():
    model, rows = random_model("llama"), random_rows(LENGTHS, vocabulary=500)
    valid = np.setdiff1d(np.arange(506), [501, 503])
    with torch.no_grad():  # without the mask these would win everywhere
        model.lm_head.weight[[501, 503, *range(506, VOCABULARY)]] *= 20
    selection = Selection(VOCABULARY)
    scored = Teacher(model, valid, selection).score(rows)
    assert_equal(model, rows, scored, selection, set(valid.tolist()))
    for found in scored.rows:
        assert (found.rows.tail == 0).all()
        assert ((found.rows.ids >= 0).sum(axis=1) == len(valid)).all()


def test_batches_hold_rows_of_similar_length_within_the_budget():
    lengths = [3, 0, 9, 4, 4, 20, 3]
    batches = plan_batches(lengths, 12)
    assert batches == [[5], [2], [3, 4, 0], [6]]  # 20 is over the budget, alone; 9 + 9 too; 4, 4, 3 padded to 4
    for size in range(1, 200):
        planned = plan_batches(lengths, size)
        assert sorted(i for batch in planned for i in batch) == [0, 2, 3, 4, 5, 6]
        assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= size for batch in planned)


def test_the_datasets_stay_with_their_rows_and_rows_without_labels_are_kept():
    model, rows = random_model("llama"), random_rows([5, 9, 3])
    bare = dataclasses.replace(row_of([4, 5, 6], []), key="f" * 32)
    scored = Teacher(model).score([rows[0], bare, *rows[1:]], ["a", "b", "c", "d"])
    assert [row.dataset for row in scored.rows] == ["a", "b", "c", "d"]
    assert scored.rows[1].cross_entropy == 0
    assert scored.rows[1].rows.ids.shape == (0, 10)


@pytest.mark.parametrize("poison", ["embedding", "head"])
def test_rows_with_nan_are_quarantined_and_no_other(poison):
    model, rows = random_model("llama", tie_word_embeddings=False), random_rows(LENGTHS, vocabulary=500)
    rows.append(row_of([3, 509, 7, 8], [2, 3]))
    sound = Teacher(model, batch_tokens=64).score(rows).rows
    with torch.no_grad():
        if poison == "embedding":
            model.model.embed_tokens.weight[509] = torch.nan
        else:
            model.lm_head.weight[511] = torch.inf
    scored = Teacher(model, batch_tokens=64).score(rows)
    if poison == "head":  # every distribution has that id
        assert set(scored.quarantined) == {row.key for row in rows}
        return
    assert scored.quarantined == {rows[-1].key: "NaN or infinite logits at label 0 of 2 (token 2)"}
    for found, expected in zip(scored.rows, sound, strict=False):
        assert np.array_equal(found.rows.ids, expected.rows.ids)
        np.testing.assert_allclose(found.rows.logprobs, expected.rows.logprobs, atol=FLOAT32_BOUND)


def test_a_model_that_cannot_be_split_is_run_whole_and_that_is_said():
    model, said = random_model("llama"), []
    forward = model.forward

    def of_all_positions(**inputs):
        output = forward(**inputs)
        return dataclasses.replace(output, logits=output.logits - output.logits.mean(dim=1, keepdim=True))

    model.forward = of_all_positions
    rows = [row_of(list(range(3, 9)), [5])]
    teacher = Teacher(model, selection=Selection(4), notify=said.append, name="odd", chunk_bytes=1)
    assert "odd: LlamaForCausalLM computes other logits" in said[0]
    found = teacher.score(rows).rows[0]
    with torch.inference_mode():
        plain = model(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).logits[0, -1].log_softmax(-1)
    assert found.rows.ids[0].tolist() == plain.topk(4).indices.tolist()
    np.testing.assert_allclose(found.rows.logprobs[0], plain.topk(4).values, atol=FLOAT32_BOUND)


def test_a_head_that_is_no_plain_linear_layer_is_run_by_the_model():
    model, rows, selection, said, runs = random_model("llama"), random_rows(LENGTHS), Selection(7), [], []
    counting = {"forward": lambda self, x: runs.append(x.shape[:-1].numel()) or torch.nn.Linear.forward(self, x)}
    model.lm_head.__class__ = type("Quantised", (torch.nn.Linear,), counting)
    teacher = Teacher(model, selection=selection, batch_tokens=64, notify=said.append)
    runs.clear()
    scored = teacher.score(rows)
    assert sum(runs) == sum(int(row.labels.sum()) for row in rows)
    assert_equal(model, rows, scored, selection)
    assert said == []


def test_the_head_runs_on_the_positions_of_labels_only():
    model, rows, seen = random_model("llama"), random_rows(LENGTHS), []
    teacher = Teacher(model, batch_tokens=64, chunk_bytes=8 * 4 * VOCABULARY)
    model.lm_head.register_forward_hook(lambda _module, _args, output: seen.append(output.shape[:-1].numel()))
    teacher.score(rows)
    labels = sum(int(row.labels.sum()) for row in rows)
    assert sum(seen) % labels == 0  # each label once in every block of the vocabulary
    assert max(seen) <= 8


def test_rows_that_the_model_was_not_made_for_are_refused():
    with pytest.raises(CaptureError, match="has 4 tokens, but small was made for 3"):
        Teacher(random_model("llama"), name="small", longest=3).score([row_of([1, 2, 3, 4], [2])])
    with pytest.raises(CaptureError, match=f"token id {VOCABULARY}, but small has {VOCABULARY} embeddings"):
        Teacher(random_model("llama"), name="small").score([row_of([1, VOCABULARY, 2], [2])])


def test_a_redone_shard_has_the_same_bits():
    model, rows = random_model("mixtral"), random_rows(LENGTHS)
    one, two = (Teacher(model, batch_tokens=64).score(rows) for _ in range(2))
    for first, second in zip(one.rows, two.rows, strict=True):
        assert all(map(np.array_equal, (*first.rows, first.actual), (*second.rows, second.actual)))
        assert first.cross_entropy == second.cross_entropy


def test_batches_are_halved_once_and_later_ones_start_at_what_fitted(monkeypatch):
    model, rows, said, tried = random_model("llama"), random_rows([20] * 16), [], []
    teacher = Teacher(model, batch_tokens=8 * 20, notify=said.append)
    expected, hidden = teacher.score(rows), SplitForward.hidden

    def limited(split, ids, mask):
        tried.append(len(ids))
        if ids.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return hidden(split, ids, mask)

    monkeypatch.setattr(SplitForward, "hidden", limited)
    found = teacher.score(rows)
    # 8 and 4 rows do not fit. The second half of those 4 is tried as it is; the 8 rows after them start at 2.
    assert tried == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2]
    for one, other in zip(found.rows, expected.rows, strict=True):
        np.testing.assert_allclose(one.rows.logprobs, other.rows.logprobs, atol=FLOAT32_BOUND)
    assert "memory ran out at 8 examples of 19 tokens, 4 are tried" in said[0]


def _score_with_little_memory(extra_megabytes, wide, count):
    """For a child: score rows twice, the second time with an address space that is nearly used up."""
    model = random_model("llama", intermediate_size=wide, max_position_embeddings=512)
    rows, said = random_rows([200] * count), []
    teacher = Teacher(model, selection=Selection(5), batch_tokens=count * 200, notify=said.append)
    free = teacher.score(rows)
    limit = psutil.Process().memory_info().vms + (extra_megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        tight = teacher.score(rows)
    except CaptureError as error:
        print(f"refused {error}")
        return
    print(said)
    for one, other in zip(free.rows, tight.rows, strict=True):
        assert np.array_equal(one.rows.ids, other.rows.ids)
        np.testing.assert_allclose(one.rows.logprobs, other.rows.logprobs, atol=FLOAT32_BOUND, rtol=0)


def test_memory_that_really_runs_out_halves_the_batch():
    # One tensor of the feed-forward takes 8 x 199 x 16384 x 4 = 104 MB, and there are two of them at a time.
    done = run(_score_with_little_memory, 100, 16384, 8)
    assert done.exitcode == 0, done.output
    assert "memory ran out at 8 examples of 19" in done.output


def test_a_row_that_does_not_fit_alone_is_an_error_with_the_numbers():
    # 104 MB for a row alone: more than what the process has freed and not given back.
    done = run(_score_with_little_memory, 4, 131072, 2)
    assert done.exitcode == 0
    assert "refused example " in done.output
    assert "of 200 tokens does not fit into memory even alone" in done.output
    assert "tried to allocate" in done.output.lower()
    assert "--max-length" in done.output
    assert "fusekit.capturing" not in done.output


@pytest.mark.parametrize(
    ("parameters", "row_tokens", "device", "rows"),
    [
        (135_000_000, 512, "cpu", 32),  # 120 s at 5e10 operations a second: 43 rows
        (7_000_000_000, 512, "cpu", 4),  # a batch of 2048 tokens takes longer than that
        (7_000_000_000, 4096, "cpu", 1),
        (7_000_000_000, 512, "cuda", 1024),
        (0, 0, "cpu", 1024),
    ],
)
def test_a_shard_is_minutes_of_work(parameters, row_tokens, device, rows):
    assert rows_per_shard(parameters, row_tokens, device) == rows
