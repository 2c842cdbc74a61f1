"""Step time and extra memory of the distillation loss, forward and backward to the logits, at a vocabulary of 151,936.

    python -m benchmarks.distillation.loss [--fuseai CHECKOUT] [--trl CHECKOUT] [--distillkit CHECKOUT]

Every contestant runs in a process of its own. Extra memory is the rise of that process's peak resident memory (on CUDA
of the allocator's peak) over its level with logits and targets in place, in a first run that is not timed; it includes
the gradient, which is handed on and dropped as a model's last layer does. Random logits and targets, never zeros.

Likelihood and distance: fusekit, fusekit with the gradient in the logits' memory, FuseChat's collator and loss
(unmodified from its checkout, targets of one source, `fuse_with_ref_model` off), and the dense form of the papers
written with one vectorised scatter. The distance alone: DistillKit's sparse KL; TRL's ULD, which gets dense teacher
logits for free, beside fusekit's uld_topk. TRL's is measured up to T 512 and for one k, which it does not depend on.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.alignment.peers import functions_of
from benchmarks.measure import RESULTS, forget_peak, parser_of, resident, write
from fusekit.distillation.losses import Members, SparseTargets, fusion_loss

V = 151_936
LAMBDA = 0.9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Head(torch.autograd.Function):
    """Stands for the model: its output is the logits, and it takes their gradient and keeps nothing."""

    @staticmethod
    def forward(_: Any, __: Tensor, logits: Tensor) -> Tensor:
        return logits

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.reshape(-1)[:1].float(), None


class Inputs:
    """T labels, their logits, and targets with k entries that hold 0.95."""

    def __init__(self, T: int, k: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.T, self.k, self.V = T, k, vocabulary
        self.logits = torch.empty(T, vocabulary, dtype=dtype)
        for row in self.logits:
            row.copy_(torch.randn(vocabulary, generator=generator) * 2)
        self.logits = self.logits.to(device)
        ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(T)])
        scores = (torch.randn(T, k, generator=generator) * 2).sort(dim=1, descending=True).values
        logprobs = scores.log_softmax(1) + torch.tensor(0.95).log()
        self.labels = torch.randint(0, vocabulary, (T,), generator=generator).to(device)
        taught = torch.ones(T, dtype=torch.bool)
        self.targets = SparseTargets(ids, logprobs, torch.full((T,), 0.05), taught).to(device)
        self.anchor = torch.ones(1, device=device, requires_grad=True)

    def made(self) -> Tensor:
        return Head.apply(self.anchor, self.logits)


Step = Callable[[], Tensor]


def fusekit(inputs: Inputs, loss: str, overwrite: bool, lm: float = LAMBDA) -> Step:
    weights = {"lm_weight": lm / inputs.T, "fusion_weight": (1 - lm) / inputs.T}
    return lambda: (
        fusion_loss(
            inputs.made(), inputs.labels, inputs.targets, loss=loss, overwrite_logits=overwrite, **weights
        ).total
    )


def grouped(inputs: Inputs) -> Step:
    """`grouped_kl` where each listed id stands for four tokens, far more than two tokenizers differ by."""
    number = inputs.V // 4
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randperm(inputs.V, generator=generator)[: 4 * number]
    members = Members(torch.arange(number + 1) * 4, tokens).to(inputs.logits.device)
    ids = torch.stack([torch.randperm(number, generator=generator)[: inputs.k] for _ in range(inputs.T)])
    inputs.targets = replace(inputs.targets, ids=ids.to(inputs.logits.device), members=members)
    return fusekit(inputs, "grouped_kl", False, 0.0)


def dense_form(inputs: Inputs) -> Step:
    """λ CE(labels) + (1 - λ) CE(dense target), the target scattered at once, in the logits' dtype."""

    def step() -> Tensor:
        logits = inputs.made()
        target = torch.zeros_like(inputs.logits)
        target.scatter_(1, inputs.targets.ids, inputs.targets.logprobs.softmax(1).to(target.dtype))
        likelihood = functional.cross_entropy(logits.float(), inputs.labels)
        return LAMBDA * likelihood + (1 - LAMBDA) * functional.cross_entropy(logits, target)

    return step


def fusechat(inputs: Inputs, checkout: Path) -> Step:
    """DataCollatorForFuse and FuseTrainer.compute_loss; the model's own loss is transformers' (in float32)."""
    folder = checkout / ("FuseChat/train" if (checkout / "FuseChat").exists() else "train")
    names: dict[str, Any] = {"torch": torch, "softmax": torch.softmax, "np": None}
    collate = functions_of(folder / "data_collator.py", {"__call__"}, names).__dict__["__call__"]
    environment: dict[str, Any] = {
        name: getattr(functional, name) for name in ("kl_div", "log_softmax", "cross_entropy")
    }
    environment |= {"torch": torch, "IGNORE_TOKEN_ID": -100}
    compute_loss = functions_of(folder / "trainer.py", {"compute_loss"}, environment).compute_loss

    T, device = inputs.T, inputs.logits.device
    arguments = SimpleNamespace(
        fuse_temperature=1.0, fuse_with_ref_model=False, fuse_loss_type="ce", lm_loss_weight=LAMBDA
    )

    def pad(features: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        return {name: torch.tensor([feature[name] for feature in features]) for name in features[0]}

    tokenizer = SimpleNamespace(padding_side="right", pad=pad)
    collator = SimpleNamespace(
        tokenizer=tokenizer, model=None, padding="max_length", max_length=T, pad_to_multiple_of=None,
        label_pad_token_id=-100, training_args=arguments, vocab=range(inputs.V), pad_id=0,
    )  # fmt: skip
    trainer = SimpleNamespace(label_smoother=None, args=SimpleNamespace(past_index=-1, **vars(arguments)))
    ids, scores = inputs.targets.ids.tolist(), inputs.targets.logprobs.tolist()
    labels = inputs.labels.tolist()

    def model(**given: Any) -> dict[str, Tensor]:
        logits = inputs.made()[None]
        shifted = logits[:, :-1].reshape(-1, inputs.V).float()
        return {"loss": functional.cross_entropy(shifted, given["labels"][:, 1:].reshape(-1)), "logits": logits}

    def step() -> Tensor:
        feature = {
            "input_ids": labels, "attention_mask": [1] * T, "labels": list(labels),
            "metric_ce": 1.0, "per_step_logits": scores, "per_step_indices": ids,
            "fused_metric_ce": 1.0, "fused_per_step_logits": scores, "fused_per_step_indices": ids,
        }  # fmt: skip
        batch = collate(collator, [feature], return_tensors="pt")
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        # Its training runs under autocast, which is what brings bfloat16 targets and float32 logits together.
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return compute_loss(trainer, model, batch)

    return step


def trl_uld(inputs: Inputs, checkout: Path) -> Step:
    """ULDLoss._compute_distillation_loss, positional, on the teacher's dense logits."""
    file = checkout / "trl" / "experimental" / "gold" / "gold_trainer.py"
    names = {"_compute_distillation_loss", "_get_start_and_size_answers"}
    found = functions_of(file, names, {"torch": torch, "F": functional})
    uld = SimpleNamespace(
        skip_student_eos=False, skip_teacher_eos=False, token_merge_strategy="observed", use_extended_uld=False,
        student_temperature=1.0, teacher_temperature=1.0, use_hybrid_loss=False, distillation_weight=1.0,
        ignore_index=-100,
    )  # fmt: skip
    uld._get_start_and_size_answers = lambda tensor: found._get_start_and_size_answers(uld, tensor)
    teacher, labels = inputs.logits.flip(0)[None], inputs.labels[None]
    return lambda: found._compute_distillation_loss(
        uld, inputs.made()[None], teacher, labels, labels, labels, labels
    ).sum()


def distillkit_kl(inputs: Inputs, checkout: Path) -> Step:
    """sparse_kl_div with the missing mass spread over what is not listed, its defaults otherwise."""
    sys.path.insert(0, str(checkout))
    from distillkit.lossfuncs.kl import sparse_kl_div
    from distillkit.missing_probability import MissingProbabilityHandling

    missing = MissingProbabilityHandling.SYMMETRIC_UNIFORM
    targets = inputs.targets
    return lambda: (
        sparse_kl_div(inputs.made()[None], targets.ids[None], targets.logprobs[None], missing=missing) / inputs.T
    )


def contestants(peers: argparse.Namespace) -> dict[str, tuple[str, Callable[[Inputs], Step]]]:
    """Name -> (which fusekit contestant it is compared with, how to make its step)."""
    found: dict[str, tuple[str, Callable[[Inputs], Step]]] = {
        "fusekit ce": ("fusekit ce", lambda i: fusekit(i, "ce", False)),
        "fusekit ce, overwriting": ("fusekit ce", lambda i: fusekit(i, "ce", True)),
        "fusekit kl": ("fusekit kl", lambda i: fusekit(i, "kl", False, 0.0)),
        "fusekit kl, overwriting": ("fusekit kl", lambda i: fusekit(i, "kl", True, 0.0)),
        "fusekit grouped_kl": ("fusekit kl", grouped),
        "fusekit uld_topk": ("fusekit uld_topk", lambda i: fusekit(i, "uld_topk", False, 0.0)),
        "dense form": ("fusekit ce", dense_form),
    }
    if peers.fuseai:
        found["FuseChat collator and loss"] = ("fusekit ce", lambda i: fusechat(i, peers.fuseai))
    if peers.distillkit:
        found["DistillKit sparse KL"] = ("fusekit kl", lambda i: distillkit_kl(i, peers.distillkit))
    if peers.trl:
        found["TRL ULD"] = ("fusekit uld_topk", lambda i: trl_uld(i, peers.trl))
    return found


def measure(make: Callable[[Inputs], Step], arguments: argparse.Namespace) -> dict[str, Any]:
    """Extra memory of one step, then the seconds of several; in this process."""
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    make(Inputs(8, arguments.k, 1000, dtype, device))().backward()  # loads code and libraries
    inputs = Inputs(arguments.T, arguments.k, V, dtype, device)
    step = make(inputs)
    gc.collect()
    on_cpu = device == "cpu"
    if on_cpu:
        before = forget_peak()
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step().backward()
    extra = (resident("VmHWM") if on_cpu else torch.cuda.max_memory_allocated()) - before
    kept = Inputs(arguments.T, arguments.k, V, dtype, device).logits
    times = []
    for _ in range(arguments.runs):
        inputs.logits.copy_(kept)  # where they were overwritten
        if not on_cpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step().backward()
        if not on_cpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"times": times, "extra": extra}


def in_a_process(name: str, T: int, k: int, dtype: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.distillation.loss", *sys.argv[1:], "--one", name]
    command += ["--T", str(T), "--k", str(k), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--fuseai", type=Path)
    parser.add_argument("--trl", type=Path)
    parser.add_argument("--distillkit", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--top", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--only", help="contestants whose name contains this, and what they are compared with")
    parser.add_argument("--csv", default="loss", help="name of the file in benchmarks/results")
    for hidden, kind in (("--one", str), ("--T", int), ("--k", int), ("--dtype", str)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    every = contestants(arguments)
    if arguments.one:
        print(json.dumps(measure(every[arguments.one][1], arguments)))
        return
    device = torch.cuda.get_device_name() if arguments.device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    rows = []
    for dtype in arguments.dtypes:
        for T in arguments.lengths:
            for k in arguments.top:
                own: dict[str, tuple[float, float]] = {}
                for name, (against, _) in every.items():
                    wanted = not arguments.only or arguments.only in name or name.startswith("fusekit")
                    if not wanted or (name == "TRL ULD" and (T > 512 or k != arguments.top[0])):
                        continue
                    result = in_a_process(name, T, k, dtype)
                    seconds, extra = statistics.median(result["times"]), result["extra"] / 2**20
                    own.setdefault(name, (seconds, extra))
                    other = own.get(f"{against}, overwriting", own[against])
                    row = {
                        "contestant": name, "T": T, "V": V, "k": k, "dtype": dtype, "device": device,
                        "runs": arguments.runs, "median_s": round(seconds, 4), "min_s": round(min(result["times"]), 4),
                        "max_s": round(max(result["times"]), 4), "extra_MiB": round(extra, 1), "against": against,
                        "times_slower": round(seconds / own[against][0], 2),
                        "times_memory": round(extra / own[against][1], 2),
                        "times_slower_than_overwriting": round(seconds / other[0], 2),
                        "times_memory_of_overwriting": round(extra / max(other[1], 0.1), 2),
                    }  # fmt: skip
                    rows.append(row)
                    print(row, flush=True)
    write(RESULTS / f"{arguments.csv}.csv", rows)


if __name__ == "__main__":
    main()
