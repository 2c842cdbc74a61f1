"""Shared by the merge benchmarks: synthetic checkpoints and whole-process measurements.

The scripts here are run as files, so that this folder is on their path and the checkout is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

sys.path.insert(1, str(Path(__file__).parents[2]))  # before packages that install a `benchmarks`

from benchmarks.measure import RESULTS, device_name, forget_peak, in_turns, parser_of, resident, write

del sys.path[1]  # what is measured in this process is the installed fusekit, as in others

__all__ = ["RESULTS", "device_name", "forget_peak", "in_turns", "parser_of", "resident", "write"]  # and what follows

VOCABULARY, HIDDEN, WIDE, HEADS, KEYS = 10_000, 2048, 5632, 32, 8


@dataclass(frozen=True)
class Run:
    """One finished process: wall and CPU seconds, peak resident memory in bytes."""

    wall: float
    cpu: float
    peak: int


def checkpoints(work: Path, layers: int, targets: int) -> list[Path]:
    """A random Llama of `layers` layers in bfloat16 and fine-tunes of it; written once, reused afterwards.

    10 layers have 492 M parameters. Fusion vectors are Gaussian with RMS between 5e-4 and 3e-3, weights have RMS 0.02.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    head = HIDDEN // HEADS
    per_layer = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (KEYS * head, HIDDEN),
        "self_attn.v_proj.weight": (KEYS * head, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (WIDE, HIDDEN),
        "mlp.up_proj.weight": (WIDE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, WIDE),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in per_layer.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}

    folders = [work / f"layers{layers}" / f"model{index}" for index in range(targets + 1)]
    for index, folder in enumerate(folders):
        if (folder / "config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rms = 0.0 if index == 0 else 1e-3 * (1, 2, 0.5, 1, 3)[(index - 1) % 5]
        tensors = {}
        for number, (name, shape) in enumerate(shapes.items()):
            base = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.02
            delta = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * index + number)) * rms
            tensors[name] = (base + delta).bfloat16()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
    return folders


def recipe(path: Path, method: str, folders: Sequence[Path], parameters: Mapping[str, Any]) -> Path:
    """Write the mergekit recipe of one contestant."""
    listed = [{"model": str(folder)} for folder in folders[1:]]
    content: dict[str, Any] = {"merge_method": method, "models": listed, "dtype": "bfloat16"}
    if method == "linear":
        # All six models: linear reads what the others read.
        content["models"] = [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders]
    else:
        content["base_model"] = str(folders[0])
        content["parameters"] = dict(parameters)
    path.write_text(yaml.safe_dump(content))
    return path


def run(command: Sequence[str], **environment: str) -> Run:
    """Run a command to its end and take the operating system's account of it. Raises RuntimeError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environment}
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode()[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def merge(
    work: Path,
    method: str,
    folders: Sequence[Path],
    parameters: Mapping[str, Any],
    command: Callable[[Path, Path], list[str]] | None = None,
) -> Run:
    """Merge into a new folder and remove the result. command: of a recipe and a folder; stock mergekit-yaml's."""
    config, out = recipe(work / "recipe.yml", method, folders, parameters), work / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what the run before left to the disk is not written in this one's time
    done = run((command or mergekit_yaml)(config, out))
    shutil.rmtree(out)
    return done


def mergekit_yaml(config: Path, out: Path) -> list[str]:
    """The command of stock mergekit-yaml in this environment."""
    return [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(out), "--quiet", "--no-copy-tokenizer"]
