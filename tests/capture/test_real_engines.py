"""The real vLLM on the CPU, in process and as a server: ``pytest --engines`` in an environment that has it.

``docs/how-to/engines.md`` says how to make one. Each engine takes a minute to start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from fusekit.capturing.engines import difference
from fusekit.capturing.store import Store
from tests.capture.conftest import DEMO, write_rows
from tests.processes import ENVIRONMENT, free_port, wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1200)]

REAL = os.environ.get("FUSEKIT_REAL_MODEL")
"""Folder of a real model (SmolLM2-135M-Instruct), to be captured too."""

OPTIONS = ("--dtype", "float32", "--max-length", "256", "--max-error", "0", "--rows-per-shard", "6")

BOUND = 1e-3
"""Nats between vLLM and transformers, both in float32."""

MODELS = [pytest.param(DEMO / "pivot", id="pivot")]
if REAL:
    MODELS.append(pytest.param(Path(REAL), id=Path(REAL).name))

OWN = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def start(*args, log):
    """``python ARGS`` in a session of its own, so that it can be killed with its children."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        env=ENVIRONMENT | OWN,
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def capture(folder, out, *options, model=DEMO / "pivot"):
    arguments = ["-m", "fusekit.cli", "capture", model, folder / "rows.jsonl", folder / out, *OPTIONS, *options]
    return start(*arguments, log=folder / "log")


def finish(process, folder):
    assert process.wait(600) == 0, (folder / "log").read_text()[-3000:]


@contextmanager
def served(model, folder, port):
    """vLLM's own server, until it is ready and as long as the body runs; killed with its engine then."""
    options = f"--model {model} --port {port} --host 127.0.0.1 --dtype float32 --enforce-eager --max-model-len 512"
    server = start("-m", "vllm.entrypoints.openai.api_server", *options.split(), log=folder / "server.log")

    def answers():
        assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
        with suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)

    try:
        wait_until(answers, 300)
        yield server
    finally:
        kill(server)


def kill(process):
    """SIGKILL a process and its children, which are in its session."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    for one in [process, *children]:
        with suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    process.wait()


def wait_for(path, process):
    def ended_or_there():
        return path.exists() or process.poll() is not None

    wait_until(ended_or_there, 600)
    assert path.exists(), f"ended with {process.returncode} before {path} was there"


def assert_agrees(folder, store, what, record_property):
    """Ids agree but for ties, log-probabilities within BOUND; the figures are kept with the result."""
    found, expected = Store.open(folder / store, verify=True), Store.open(folder / "transformers")
    assert found.keys == expected.keys
    apart = difference(list(expected), list(found))
    assert apart.largest < BOUND
    labels = sum(len(row.actual) for row in expected)
    same = sum(int((a.rows.ids == b.rows.ids).all(1).sum()) for a, b in zip(found, expected, strict=True))
    figures = {"what": what, "engine": found.spec.details["engine_version"], "labels": labels, "same_ids": same}
    figures |= {"largest": apart.largest, "mean": apart.mean}
    print(json.dumps(figures))
    record_property("figures", json.dumps(figures))


@pytest.fixture(params=MODELS)
def reference(request, tmp_path):
    """Examples, and what transformers says about them."""
    write_rows(tmp_path / "rows.jsonl", 24)
    finish(capture(tmp_path, "transformers", model=request.param), tmp_path)
    return request.param


def test_vllm_in_process_agrees_and_survives_its_engine(reference, tmp_path, record_property):
    """The engine is killed in the middle: a new one goes on; then the whole capture is, and resumed."""
    process = capture(tmp_path, "out", "--engine", "vllm", model=reference)
    wait_for(tmp_path / "out" / "shard-00000.parquet", process)
    engines = [child for child in psutil.Process(process.pid).children(recursive=True) if "ngine" in child.name()]
    assert engines
    engines[0].kill()
    wait_for(tmp_path / "out" / "shard-00002.parquet", process)
    kill(process)
    assert not Store.open(tmp_path / "out", incomplete=True).complete
    finish(capture(tmp_path, "out", "--engine", "vllm", model=reference), tmp_path)
    assert "engine died" in (tmp_path / "log").read_text()
    assert_agrees(tmp_path, "out", f"{reference.name} in process", record_property)


def test_vllm_as_a_server_agrees_and_is_resumed_after_it_was_killed(reference, tmp_path, record_property):
    port = free_port()
    options = ("--engine-url", f"http://127.0.0.1:{port}", "--engine-patience", "2")
    with served(reference, tmp_path, port) as server:
        process = capture(tmp_path, "out", *options, model=reference)
        wait_for(tmp_path / "out" / "shard-00000.parquet", process)
        kill(server)
        assert process.wait(120) == 1
    assert not Store.open(tmp_path / "out", incomplete=True).complete
    with served(reference, tmp_path, port):
        finish(capture(tmp_path, "out", *options, model=reference), tmp_path)
        refused = capture(tmp_path, "other", *options, model=DEMO / "numbers")
        assert refused.wait(120) == 1  # another model is behind the URL
        more = capture(tmp_path, "more", *options, "--top-k", "30", model=reference)
        assert more.wait(120) == 1
    assert "--max-logprobs" in (tmp_path / "log").read_text()
    assert_agrees(tmp_path, "out", f"{reference.name} as a server", record_property)
