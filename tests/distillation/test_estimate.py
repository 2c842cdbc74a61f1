"""What a training will take: against what torch holds and writes, and refused before the pivot is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fusekit.distillation import estimate
from fusekit.distillation.inputs import Inputs
from fusekit.distillation.models import load_pivot
from fusekit.distillation.run import distill
from fusekit.distillation.settings import DistillSettings, TrainingSettings
from fusekit.errors import DistillationError
from fusekit.representation import read_rows
from fusekit.representation.checkpoint import ModelChoice, find_checkpoint
from fusekit.representation.load import load_tokenizer
from fusekit.representation.row_tokenizer import RowTokenizer

PIVOT = Path(__file__).parents[2] / "demo" / "models" / "pivot"


@pytest.mark.parametrize(
    "fields", [{}, {"dtype": "bfloat16"}, {"lora": {"r": 4}}, {"lora": {"r": 4}, "dtype": "bfloat16"}], ids=str
)
def test_states_are_those_of_a_step_of_adamw(fields):
    checkpoint, settings = find_checkpoint(ModelChoice(str(PIVOT))), TrainingSettings(**fields)
    model = load_pivot(checkpoint, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = estimate.states(checkpoint, settings)
    assert held.weights == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.1)
    assert held.gradients == pytest.approx(sum(p.nbytes for p in trained), rel=0.35 if settings.lora else 0.1)
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert held.optimizer == pytest.approx(moments, rel=0.35 if settings.lora else 0.1)


def test_activations_are_those_that_autograd_keeps():
    checkpoint, settings = find_checkpoint(ModelChoice(str(PIVOT))), TrainingSettings(micro_batch_size=2)
    model = load_pivot(checkpoint, settings).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(torch.zeros((2, 64), dtype=torch.int64), use_cache=False).logits.logsumexp(-1).sum()
    assert loss > 0
    assert estimate.activation_bytes(checkpoint, settings, 64) == pytest.approx(sum(kept.values()), rel=0.3)


def test_what_does_not_fit_is_refused_with_the_numbers_before_anything_is_loaded(tmp_path):
    reader = RowTokenizer(load_tokenizer(find_checkpoint(ModelChoice(str(PIVOT)))))
    record = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    inputs = Inputs(ModelChoice(str(PIVOT)), list(read_rows(tmp_path / "rows.jsonl")), row_tokenizer=reader)
    huge = {"training": {"micro_batch_size": 10**9, "batch_size": 10**9}}
    with pytest.raises(
        DistillationError, match=r"does not fit:\n.*10{9} rows of \d+ tokens\): about .* needed, .* free"
    ):
        distill(inputs, DistillSettings.of("sft", huge), tmp_path / "out")
    assert not (tmp_path / "out" / "sft").exists()
    assert not (tmp_path / "out" / "sft.training").exists()
