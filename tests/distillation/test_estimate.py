"""What a training will take: against what torch holds and writes, and refused before the pivot is loaded."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fusekit import FusionConfig, FusionTrainer
from fusekit.capturing.engine import CHUNK_BYTES, working_bytes
from fusekit.capturing.forward import GROUP, group_bytes
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer, shape_of
from fusekit.data.reading import rows_of
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import Processes, memory_limits, taken_bytes
from fusekit.distillation import arguments as estimate
from fusekit.distillation.inputs import Inputs
from fusekit.distillation.live import Loaded
from fusekit.distillation.outputs import load_pivot
from fusekit.distillation.run import distill
from fusekit.distillation.settings import DistillSettings, TrainingSettings
from fusekit.distillation.trainer import _refuse_what_does_not_fit
from fusekit.errors import DistillationError

PIVOT = find_checkpoint(ModelChoice("demo/models/pivot"))


@pytest.mark.parametrize(
    "fields", [{}, {"dtype": "bfloat16"}, {"lora": {"r": 4}}, {"lora": {"r": 4}, "dtype": "bfloat16"}], ids=str
)
def test_states_are_those_of_a_step_of_adamw(fields):
    settings = TrainingSettings(**fields)
    model = load_pivot(PIVOT, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = estimate.states(PIVOT, settings)
    assert held.weights == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.1)
    assert held.gradients == pytest.approx(sum(p.nbytes for p in trained), rel=0.35 if settings.lora else 0.1)
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert held.optimizer == pytest.approx(moments, rel=0.35 if settings.lora else 0.1)


@pytest.mark.parametrize("fields", [{}, {"dtype": "bfloat16"}, {"bf16": True}], ids=str)
def test_activations_are_those_that_autograd_keeps(fields):
    settings = TrainingSettings(per_device_train_batch_size=2, **fields)
    model = load_pivot(PIVOT, settings).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or an address is used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Under autocast weights are kept as they are computed with: estimated with the weights.
        if storage.data_ptr() not in own and tuple(tensor.shape) not in copies:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16),
    ):
        logits = model(torch.zeros((2, 65), dtype=torch.int64), use_cache=False).logits
    expected = sum(kept.values()) + 2 * logits.numel() * (4 if settings.bf16 else logits.itemsize)
    assert estimate.activation_bytes(PIVOT, settings, 65) == pytest.approx(expected, rel=0.15)


def test_the_gradients_of_a_tied_head_are_there_twice_and_summed():
    one = PIVOT.config["vocab_size"] * PIVOT.config["hidden_size"] * 4
    own, tied = (
        dataclasses.replace(PIVOT, config=PIVOT.config | {"tie_word_embeddings": tie}) for tie in (False, True)
    )
    assert estimate.head_gradient_bytes(own, TrainingSettings()) == one
    assert estimate.head_gradient_bytes(tied, TrainingSettings()) == 3 * one
    assert estimate.head_gradient_bytes(tied, TrainingSettings(dtype="bfloat16")) == 3 * one // 2
    assert estimate.head_gradient_bytes(tied, TrainingSettings(lora={"r": 2})) == 0


def test_memory_is_that_of_the_whole_process():
    settings = TrainingSettings()
    alone, three = (Processes(0, n, n, torch.device("cpu")) for n in (1, 3))
    (need,) = estimate.memory_needs(PIVOT, settings, 64, alone)
    besides = sum(estimate.states(PIVOT, settings)[:3]) + estimate.activation_bytes(PIVOT, settings, 64)
    besides += estimate.head_gradient_bytes(PIVOT, settings)
    taken = taken_bytes()
    assert need.needed == pytest.approx(taken + 1.05 * besides, rel=0.05)
    assert need.free == pytest.approx(min(limit.available for limit in memory_limits()) + taken, rel=0.2)
    (together,) = estimate.memory_needs(PIVOT, settings, 64, three)
    assert together.needed == pytest.approx(3 * need.needed, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_capture_needs_no_more_logits_than_a_batch_has(device):
    checkpoint = find_checkpoint(ModelChoice("demo/models/pivot", dtype="bfloat16"))
    shape, tokens = shape_of(checkpoint.config), 100
    groups = group_bytes(shape.vocabulary, 10) + 28 * shape.vocabulary // GROUP
    found = working_bytes(checkpoint, tokens, device, 10)
    assert found == tokens * (8 * shape.hidden + 3 * 4 * shape.vocabulary + groups)
    most = working_bytes(checkpoint, 10**6, device, 10)
    assert 10**6 * 8 * shape.hidden < most < 10**6 * (8 * shape.hidden + 2 * shape.wide * 2) + 5 * CHUNK_BYTES


def test_what_does_not_fit_is_refused_with_the_numbers_before_anything_is_loaded(tmp_path):
    rows = list(rows_of([{"prompt": "1+1=", "response": "2"}]))
    inputs = Inputs(PIVOT.choice, rows, row_tokenizer=RowTokenizer(load_tokenizer(PIVOT)))
    huge = {"training": {"per_device_train_batch_size": 10**9, "batch_size": 10**9}}
    says = r"does not fit:\n.*10{9} rows of \d+ tokens\): about .* needed, .* free"
    with pytest.raises(DistillationError, match=says):
        distill(inputs, DistillSettings.of("sft", huge), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_trainer_estimates_its_own_training_with_its_teachers(tmp_path):
    rows = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(4)]
    huge = FusionConfig(str(tmp_path), per_device_train_batch_size=10**9)
    how = {"teachers": {"numbers": "demo/models/numbers"}}
    with pytest.raises(DistillationError, match=r"does not fit:\n.*10{9} rows of \d+ tokens; .* for teachers"):
        FusionTrainer(PIVOT.choice.model, huge, rows, **how)
    assert not list(tmp_path.iterdir())  # before anything is captured
    FusionTrainer(PIVOT.choice.model, huge, rows, **how, ignore_estimates=True)


def test_weights_that_are_loaded_already_are_not_counted_again():
    here = Processes(0, 1, 1, torch.device("cpu"))
    (before,), (after,) = (
        estimate.memory_needs(PIVOT, TrainingSettings(), 64, here, loaded=loaded) for loaded in (None, "cpu")
    )
    weights = estimate.states(PIVOT, TrainingSettings()).weights
    assert before.needed - after.needed == pytest.approx(weights, rel=0.2)


def test_weights_that_are_on_a_gpu_already_are_not_counted_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 10**9))
    gpu, settings = Processes(0, 1, 1, torch.device("cuda", 0)), TrainingSettings()
    found = {at: estimate.memory_needs(PIVOT, settings, 64, gpu, loaded=at) for at in (None, "cpu", "cuda")}
    assert {at: len(needs) for at, needs in found.items()} == {None: 2, "cpu": 1, "cuda": 1}
    assert found[None][0] == found["cpu"][0]
    assert found["cpu"][0].needed - found["cuda"][0].needed == estimate.states(PIVOT, settings).weights


def test_a_checkpoint_of_quantised_weights_is_not_estimated(tmp_path):
    """Its files say neither how many weights it has nor what each takes while it trains."""
    own = dataclasses.replace(PIVOT, config={**PIVOT.config, "quantization_config": {"quant_method": "bitsandbytes"}})
    model = SimpleNamespace(device=torch.device("cpu"))
    huge = FusionConfig(str(tmp_path), per_device_train_batch_size=10**9)
    with pytest.raises(DistillationError, match="does not fit"):
        _refuse_what_does_not_fit(Loaded(model, None, PIVOT), huge, None, 64, (), ignored=False)
    _refuse_what_does_not_fit(Loaded(model, None, own), huge, None, 64, (), ignored=False)
    bad = "lora"  # refused where the adapter is made
    _refuse_what_does_not_fit(Loaded(model, None, PIVOT), FusionConfig(str(tmp_path)), bad, 64, (), ignored=False)
