"""The real vLLM, in process and as a server, against transformers: how far the stores of one model are apart.

    VLLM_CPU_KVCACHE_SPACE=1 python -m benchmarks.engines MODEL [--how process server] [--examples 24]

in an environment with vLLM (docs/how-to/engines.md), in float32. Each result goes to `results/engines.json` at once.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.measure import parser_of
from fusekit.capturing.engines import difference
from fusekit.capturing.store import Store

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
OPTIONS = "--dtype float32 --max-length 256 --max-error 0 --top-k 10 --rows-per-shard 6 --quiet"
PORT = 8391


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--how", nargs="*", choices=["process", "server"], default=["process", "server"])
    parser.add_argument("--examples", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        lines = random.Random(0).sample((ROOT / "demo/rows/train.jsonl").read_text().splitlines(), options.examples)
        (work / "rows.jsonl").write_text("\n".join(lines) + "\n")
        expected = capture(options.model, work, "transformers")
        for how in options.how:
            if how == "process":
                started = time.monotonic()
                found = capture(options.model, work, how, "--engine", "vllm")
            else:
                server = serve(options.model)
                try:
                    started = time.monotonic()
                    found = capture(options.model, work, how, "--engine-url", f"http://127.0.0.1:{PORT}")
                finally:
                    server.terminate()
                    server.wait()
            add(compare(expected, found) | {"how": how, "seconds": round(time.monotonic() - started, 1)})


def capture(model: str, work: Path, out: str, *options: str) -> Store:
    command = [sys.executable, "-m", "fusekit.cli", "capture", model, str(work / "rows.jsonl"), str(work / out)]
    subprocess.run([*command, *OPTIONS.split(), *options], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return Store.open(work / out, verify=True)


def serve(model: str) -> subprocess.Popen[bytes]:
    """vLLM's server, ready."""
    options = f"--model {model} --port {PORT} --host 127.0.0.1 --dtype float32 --enforce-eager --max-model-len 512"
    server = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split()])
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=5)
            return server
        except OSError:
            if server.poll() is not None:
                raise SystemExit("the server did not start") from None
            time.sleep(1)


def compare(expected: Store, found: Store) -> dict[str, Any]:
    """Distances over all labels and entries in nats, and the labels whose ids are the same in the same order."""
    apart = difference(list(expected), list(found))
    pairs = list(zip(expected, found, strict=True))
    return {
        "model": Path(expected.spec.model).name,
        "fingerprint": expected.spec.model_fingerprint,
        "engine": found.spec.details["engine_version"],
        "examples": len(pairs),
        "labels": sum(len(row.actual) for row, _ in pairs),
        "labels_with_the_same_ids": sum(int((a.rows.ids == b.rows.ids).all(1).sum()) for a, b in pairs),
        "largest_difference": apart.largest,
        "mean_difference": apart.mean,
        "log_probabilities": apart.values,
    }


def add(result: dict[str, Any]) -> None:
    """To the results file, with the versions, the machine and the command."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    result |= {"versions": versions, "machine": f"{platform.machine()}, {os.cpu_count()} cores", "options": OPTIONS}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    same = [one for one in known if (one["model"], one["how"]) != (result["model"], result["how"])]
    RESULTS.write_text(json.dumps([*same, result], indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
