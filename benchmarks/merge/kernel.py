"""The merge functions alone on one 5632 x 2048 bfloat16 tensor and five targets: time, and memory beyond the inputs.

    python benchmarks/merge/kernel.py --runs 7

Scratch is the rise of a fresh process's peak resident memory over its level before the call, less the output.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import RESULTS, device_name, forget_peak, in_turns, parser_of, resident, write
from mergekit.merge_methods import merge_tensors

from fusekit.merge_methods import sce, varm

SHAPE = (5632, 2048)


def contestants(shape: tuple[int, int], device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """What is compared, on one base and its targets of this shape."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator) * 0.02
    deltas = [torch.randn(shape, generator=generator) * rms for rms in (1e-3, 2e-3, 5e-4, 1e-3, 3e-3)]
    tensors = [t.bfloat16().to(device) for t in (base, *(base + delta for delta in deltas))]
    base, targets = tensors[0], tensors[1:]

    def mergekit(method: str, **parameters: float) -> torch.Tensor:
        return merge_tensors(tensors, method, base_index=None if method == "linear" else 0, parameters=parameters)

    return {
        "mergekit sce 0.1": lambda: mergekit("sce", select_topk=0.1),
        "mergekit sce 1.0": lambda: mergekit("sce", select_topk=1.0),
        "mergekit linear": lambda: mergekit("linear", weight=1.0),
        "sce paper 0.1": lambda: sce(base, targets, select_topk=0.1).tensor,
        "sce paper 0.5": lambda: sce(base, targets, select_topk=0.5).tensor,
        "sce paper 1.0": lambda: sce(base, targets).tensor,
        "sce renormalized 0.1": lambda: sce(base, targets, select_topk=0.1, variant="renormalized").tensor,
        "sce fuseai 0.1": lambda: sce(base, targets, select_topk=0.1, variant="fuseai").tensor,
        "varm": lambda: varm(base, targets).tensor,
    }


def print_scratch(name: str) -> None:
    """Print the bytes of scratch of one contestant; to be run in a process of its own."""
    with torch.no_grad():
        contestants((700, 700), "cpu")[name]()  # loads code and libraries
        call = contestants(SHAPE, "cpu")[name]
        before = forget_peak()
        result = call()
        print(resident("VmHWM") - before - result.nbytes)


def scratch_of(name: str) -> int:
    command = [sys.executable, __file__, "--scratch", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path, default=RESULTS / "merge-kernel.csv")
    arguments = parser.parse_args()
    if arguments.scratch:
        print_scratch(arguments.scratch)
        return
    calls = contestants(SHAPE, arguments.device)

    on_cpu = arguments.device == "cpu"

    def whole(call: Callable[[], torch.Tensor]) -> None:
        call()
        if not on_cpu:
            torch.cuda.synchronize()

    with torch.no_grad():
        timed = in_turns({name: partial(whole, call) for name, call in calls.items()}, arguments.runs)
    times = {name: seconds.wall for name, seconds in timed.items()}
    scratch = {name: scratch_of(name) if on_cpu else 0 for name in calls}
    peer = statistics.median(times["mergekit sce 0.1"])
    one_float32 = 4 * SHAPE[0] * SHAPE[1]
    rows = []
    for name, values in times.items():
        rows.append(
            {
                "contestant": name,
                "device": device_name(arguments.device),
                "runs": arguments.runs,
                "median_s": round(statistics.median(values), 4),
                "min_s": round(min(values), 4),
                "max_s": round(max(values), 4),
                "faster_than_mergekit_sce_0.1": round(peer / statistics.median(values), 2),
                "scratch_in_float32_tensors": round(scratch[name] / one_float32, 2) if on_cpu else "",
            }
        )
        print(rows[-1])
    write(arguments.csv, rows)


if __name__ == "__main__":
    main()
