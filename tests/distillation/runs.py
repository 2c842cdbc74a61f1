"""Short training runs in the small world; also in processes of their own."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fusekit.distillation.arguments import OneDevice
from fusekit.distillation.dataset import FusionDataset
from fusekit.distillation.projections import Projection
from fusekit.distillation.settings import TrainingSettings
from fusekit.distillation.trainer import FusionTrainer
from tests.capture.random_models import random_model
from tests.distillation import worlds
from tests.processes import Process, free_port


@functools.cache
def data(count: int = 12, seed: int = 0) -> FusionDataset:
    """Rows with a pivot and one source of another tokenizer, both of random opinions."""
    rows = worlds.conversations(count, seed)
    return FusionDataset(
        rows,
        pivot=worlds.captured(rows, worlds.PIVOT, seed=1),
        sources={"other": worlds.captured(rows, worlds.SOURCE, seed=2, sharpness=2.0)},
        projections={"other": Projection(worlds.vocabulary_map())},
    )


def first(count: int) -> list[dict[str, Any]]:
    """The first examples of :func:`data`."""
    return [data()[number] for number in range(count)]


def trainer(
    out: Path, model: Any = None, examples: Any = None, settings: TrainingSettings | None = None, **arguments: Any
) -> FusionTrainer:
    """A trainer on the CPU with plain settings; ``arguments`` of TrainingArguments override them."""
    examples = data() if examples is None else examples
    own = {"facts", "say", "callbacks", "eval_dataset"}
    options = {name: arguments.pop(name) for name in list(arguments) if name in own}
    fields: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = OneDevice(**fields | arguments)
    args.training = settings or TrainingSettings(lm_weight=0.7)
    return FusionTrainer((random_model("llama") if model is None else model).train(), args, examples, **options)


def counts_of(data: FusionDataset, *numbers: int) -> dict[str, float]:
    """What is counted of these examples, by its name."""
    return dict(zip(data.count_names, sum(data[number]["counts"] for number in numbers), strict=True))


def lines(made: FusionTrainer) -> list[dict[str, float]]:
    """Of the log of a training, but its summary."""
    return [line for line in made.state.log_history if "loss" in line]


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of a model's tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def different(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], atol: float = 0.0) -> list[str]:
    """Names of the tensors that are not equal; with ``atol``, of those that are not close."""
    assert a.keys() == b.keys()
    rtol = 1e-5 if atol else 0.0
    return [name for name in a if not torch.allclose(a[name], b[name], atol=atol, rtol=rtol)]


def one_step(out: Path, batch: int, accumulation: int, examples: Any, **arguments: Any) -> dict[str, torch.Tensor]:
    """The weights after one optimizer step of plain gradient descent."""
    made = trainer(
        out,
        examples=examples,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        **arguments,
    )
    made.train()
    return weights(made.accelerator.unwrap_model(made.model))


class KillAfter(TrainerCallback):
    """SIGKILL, as an out-of-memory killer or a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Once the step is done and before anything of it is saved."""
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def long_run(out: Path, **arguments: Any) -> FusionTrainer:
    """Two epochs of three steps with dropout, momentum and a schedule: what a resumed run has to get back."""
    fields: dict[str, Any] = {
        "num_train_epochs": 2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    return trainer(out, random_model("llama", attention_dropout=0.3), **fields | arguments)


def killed_run(out: Path, step: int) -> None:
    """A run that is killed once a step is done. For a process of its own."""
    long_run(out, callbacks=[KillAfter(step)]).train()


def start_two(out: Path) -> None:
    """:func:`_together` in two processes that train together. Raises with their output when one fails."""
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [Process(_together, out, shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    finished = [process.wait(240) for process in both]
    if any(process.exitcode for process in finished):
        raise AssertionError("\n---\n".join(process.output for process in finished))


def _together(out: Path, environment: dict[str, str]) -> None:
    """One step over all rows and one over rows that the processes cannot share evenly; then a sharded model."""
    os.environ.update(environment)
    rank = environment["RANK"]
    torch.save(one_step(out / "even", 4, 1, first(8)), out / f"even-{rank}.pt")
    torch.save(one_step(out / "odd", 2, 2, first(7)), out / f"odd-{rank}.pt")
    _resume_together(out)
    _sharded(out)


def _resume_together(out: Path) -> None:
    """Interrupted in the second epoch, and gone on with: the order of rows must be that of the second epoch."""
    whole = long_run(out / "whole", per_device_train_batch_size=1)
    whole.train()
    again = long_run(out / "again", per_device_train_batch_size=1)
    again.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-5"))
    a, b = (weights(made.accelerator.unwrap_model(made.model)) for made in (whole, again))
    assert different(a, b) == [], "resumed in two processes, other weights"


def _sharded(out: Path) -> None:
    """Gradients and a step of the loss of a model whose parameters are sharded over both processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    model = random_model("llama").train()
    made = trainer(out / "sharded", model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.lm_head.weight.to_local().shape[0] < model.lm_head.weight.shape[0]
    rank = int(os.environ["RANK"])
    batch = made.data_collator(first(8)[rank * 4 : rank * 4 + 4])
    labels = torch.tensor(len(batch["label_ids"]))
    torch.distributed.all_reduce(labels)
    loss = made.compute_loss(model, batch, num_items_in_batch=int(labels))
    loss.backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(gradients, out / "sharded.pt")
        torch.save(whole, out / "stepped.pt")
