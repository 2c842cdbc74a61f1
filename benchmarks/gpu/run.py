"""Run on GPUs what the tests run on CPUs only, and write one results file.

    python -m benchmarks.gpu.run [--work DIR] [--out FILE] [--only NAME ...]

Each check is a process of its own: one that fails or hangs leaves the others alone. Without a GPU, or without a package
or a second device that a check needs, the file says what is lacking. Models and examples are the demo's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import parser_of

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
PACKAGES = ("torch", "transformers", "accelerate", "vllm", "bitsandbytes", "deepspeed", "gguf")
TIMEOUT = 1800.0
"""Seconds of one check."""

Figures = dict[str, Any]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/fusekit-gpu"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--only", nargs="*", choices=sorted(CHECKS), help="checks to run; by default all")
    parser.add_argument("--check", choices=sorted(CHECKS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.check:
        figures = CHECKS[options.check].run(options.work / options.check)
        (options.work / f"{options.check}.json").write_text(json.dumps(figures))
        return
    results: Figures = {"machine": machine(), "command": " ".join(sys.orig_argv[1:]), "checks": {}}
    for name in options.only or CHECKS:
        results["checks"][name] = result = run(name, options.work)
        print(f"{name}: {json.dumps(result)}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if any(result["status"] == "failed" for result in results["checks"].values()):
        raise SystemExit(1)


def machine() -> Figures:
    """Devices and versions."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {"devices": names, "cuda": torch.version.cuda, "python": platform.python_version(), **versions}


def run(name: str, work: Path) -> Figures:
    """A check in a process of its own, or what it lacks."""
    if lacks := CHECKS[name].lacks():
        return {"status": "not run", "lacks": lacks}
    started, log, figures = time.monotonic(), work / f"{name}.log", work / f"{name}.json"
    figures.unlink(missing_ok=True)
    with log.open("w") as file:
        command = [sys.executable, "-m", "benchmarks.gpu.run", "--work", str(work), "--check", name]
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=file, timeout=TIMEOUT, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    result: Figures = {"status": "passed" if status == 0 else "failed", "seconds": round(time.monotonic() - started, 1)}
    if status:
        return result | {"exit": status, "log": log.read_text()[-2000:]}
    return result | json.loads(figures.read_text())


def cli(*arguments: object, launcher: Sequence[str] = (), cwd: Path = ROOT) -> float:
    """Seconds of a `fusekit` command, which has to succeed."""
    started = time.monotonic()
    command = [sys.executable, *launcher, "-m", "fusekit.cli", *map(str, arguments)]
    subprocess.run(command, cwd=cwd, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return round(time.monotonic() - started, 1)


# ---------------------------------------------------------------- captures

CAPTURE = (DEMO / "rows" / "train.jsonl",)
NCCL = "-m torch.distributed.run --standalone --nproc-per-node 2"
OPTIONS = ("--limit", 400, "--max-length", 128, "--rows-per-shard", 50, "--max-error", 0, "--quiet", "--overwrite")


def captured(work: Path, name: str, *options: object, launcher: Sequence[str] = (), on_cpu: bool = False) -> Any:
    """A store of the demo's pivot."""
    from fusekit.capturing.store import Store

    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    cli("capture", DEMO / "models" / "pivot", *CAPTURE, work / name, *OPTIONS, *options, launcher=launcher)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    return Store.open(work / name, verify=True)


def apart(options: str, bound: float, launcher: str = "") -> Callable[[Path], Figures]:
    """A check of how far a capture on the device is from one on the CPU, in nats: at most ``bound``."""

    def check(work: Path) -> Figures:
        from fusekit.capturing.engines import difference

        expected = captured(work, "cpu", "--dtype", "float32", on_cpu=True)
        found = difference(list(expected), list(captured(work, "gpu", *options.split(), launcher=launcher.split())))
        assert found.largest <= bound, f"{found}, more than {bound}"
        return found._asdict()

    return check


def capture_gguf(work: Path) -> Figures:
    """A GGUF file that is named in the environment, on the device and on the CPU."""
    from fusekit.capturing.engines import difference
    from fusekit.capturing.store import Store

    for name, variables in (("cpu", {"ACCELERATE_USE_CPU": "true"}), ("gpu", {})):
        os.environ.update(variables)
        cli("capture", os.environ["FUSEKIT_GGUF"], *CAPTURE, work / name, *OPTIONS)
        os.environ.pop("ACCELERATE_USE_CPU", None)
    found = difference(list(Store.open(work / "cpu")), list(Store.open(work / "gpu")))
    assert found.largest <= 1e-1, str(found)
    return found._asdict()


# ---------------------------------------------------------------- loss, training, merge


def loss(_work: Path) -> Figures:
    """Value and gradient of each loss with each tail against the CPU's in float64."""
    import torch

    from fusekit.distillation.losses import SparseTargets, fusion_loss

    generator, figures = torch.Generator().manual_seed(0), {}
    n, V, k = 512, 32000, 20
    student, teacher = (torch.randn(n, V, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (n,), generator=generator)
    logprobs, ids = (2 * teacher).log_softmax(1).topk(k, dim=1)
    tail = 1 - logprobs.exp().sum(1)

    def value(device: str, dtype: torch.dtype, name: str, truncation: str) -> tuple[float, torch.Tensor]:
        logits = student.to(device, dtype).clone().requires_grad_()
        targets = SparseTargets(
            ids.to(device), logprobs.to(device), tail.to(device), torch.ones(n, dtype=torch.bool, device=device)
        )
        total = fusion_loss(logits, labels.to(device), targets, loss=name, truncation=truncation, lm_weight=0.5).total
        total.backward()
        assert logits.grad is not None
        return float(total), logits.grad.double().cpu()

    for name in ("ce", "kl", "reverse_kl", "js", "uld_topk"):
        for truncation in ("tail", "renormalize"):
            if (name, truncation) == ("reverse_kl", "renormalize"):
                continue  # infinite, and refused
            expected, gradient = value("cpu", torch.float64, name, truncation)
            for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
                found, of_device = value("cuda" if torch.cuda.is_available() else "cpu", dtype, name, truncation)
                error = abs(found - expected) / abs(expected)
                slope = float((of_device - gradient).norm() / gradient.norm())
                assert max(error, slope) < bound, (name, truncation, dtype, error, slope)
                figures[f"{name} {truncation} {str(dtype)[6:]}"] = {"value": error, "gradient": slope}
    return figures


def train(work: Path) -> Figures:
    """The demo from sources to a merged and evaluated model on one GPU."""
    return {"seconds_of_run": cli("run", ROOT / "recipes" / "demo.yml", work / "out", "--quiet")}


def sharded(work: Path, config: str) -> Figures:
    """The demo's student over two devices, by an accelerate configuration, against one device."""
    import torch
    from safetensors.torch import load_file

    recipe = ROOT / "recipes" / "demo.yml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / config))
    seconds = {}
    for name, started_by in (("one", ()), ("sharded", (*launcher, "--num_processes", "2", "--mixed_precision", "no"))):
        cli("run", recipe, work / name, "--until", "align", "--quiet")
        seconds[name] = cli("run", recipe, work / name, "--only", "distill", "--quiet", launcher=started_by)
    (one,), (other,) = (sorted((work / name / "targets").glob("*/model.safetensors")) for name in ("one", "sharded"))
    weights, same = load_file(one), load_file(other)
    distance = max(float((weights[name] - same[name]).abs().max()) for name in weights)
    assert all(torch.isfinite(same[name]).all() for name in weights)
    assert distance < 1e-2, distance
    return {"seconds": seconds, "largest_weight_difference": distance}


def fsdp2(work: Path) -> Figures:
    return sharded(work, "fsdp2.yml")


def deepspeed(work: Path) -> Figures:
    return sharded(work, "deepspeed-zero3.yml")


def merge(work: Path) -> Figures:
    """Each merge recipe of the demo with the arithmetic on the GPU against the CPU's."""
    from safetensors.torch import load_file

    figures = {}
    for name in ("demo-sce", "demo-varm"):
        recipe = ROOT / "recipes" / f"{name}.yml"
        for place, options in (("cpu", ()), ("gpu", ("--cuda",))):
            figures[f"{name} {place}"] = cli("merge", recipe, work / f"{name}-{place}", "--quiet", *options)
        one, other = (load_file(work / f"{name}-{place}" / "model.safetensors") for place in ("cpu", "gpu"))
        figures[name] = max(float((one[key].float() - other[key].float()).abs().max()) for key in one)
        assert figures[name] < 1e-2, figures
    return figures


def generate(work: Path) -> Figures:
    """Several models write one text on the GPU; greedily, the text of the CPU."""
    models = [DEMO / "models" / name for name in ("pivot", "numbers")]
    texts = []
    for variables in ({"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}, {}):
        command = [sys.executable, "-m", "fusekit.cli", "generate", *map(str, models), "--prompt", "12+30="]
        done = subprocess.run(command, cwd=work.parent, env=os.environ | variables, capture_output=True, check=True)
        texts.append(done.stdout.decode())
    assert texts[0] == texts[1], texts
    return {"text": texts[0][:200]}


# ---------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Check:
    """A check and what it needs: devices, packages, variables of the environment."""

    run: Callable[[Path], Figures]
    devices: int = 1
    packages: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()

    def lacks(self) -> list[str]:
        """What is not here."""
        import torch

        count = torch.cuda.device_count()
        found = [] if count >= self.devices else [f"{self.devices} CUDA devices ({count} are here)"]
        found += [f"the package {name}" for name in self.packages if not importlib.util.find_spec(name)]
        return found + [f"{name} in the environment" for name in self.variables if name not in os.environ]


CHECKS = {
    "capture_float32": Check(apart("--dtype float32", 1e-2)),
    "capture_bfloat16": Check(apart("--dtype bfloat16", 1.0)),
    "capture_device_map": Check(apart("--dtype float32 --device-map auto", 1e-2), devices=2),
    "capture_4bit": Check(apart("--quantization 4bit", 10.0), packages=("bitsandbytes",)),
    "capture_nccl": Check(apart("--dtype float32", 1e-2, NCCL), devices=2),
    "capture_vllm": Check(apart("--dtype float32 --engine vllm", 1e-2), packages=("vllm",)),
    "capture_gguf": Check(capture_gguf, packages=("gguf",), variables=("FUSEKIT_GGUF",)),
    "loss": Check(loss),
    "train": Check(train),
    "fsdp2": Check(fsdp2, devices=2),
    "deepspeed": Check(deepspeed, devices=2, packages=("deepspeed",)),
    "merge": Check(merge),
    "generate": Check(generate),
}

if __name__ == "__main__":
    main()
