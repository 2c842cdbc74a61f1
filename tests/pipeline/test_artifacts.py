"""The comparison of outputs that tests of interrupted runs rely on: it has to notice what it is there for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusekit import artifacts as artifact
from tests.pipeline.artifacts import differences


def output(folder: Path, weights: bytes = b"weights", seconds: float = 1.0, **inputs: object) -> Path:
    def write(into: Path) -> None:
        (into / "model.safetensors").write_bytes(weights)
        (into / "where.json").write_text(json.dumps({"out": str(folder)}))

    artifact.publish(folder / "targets" / "one", "distill", dict(inputs), write, {"seconds": seconds})
    (folder / "logs").mkdir()
    (folder / "logs" / "run.log").write_text(str(seconds))
    (folder / ".targets.fusekit.lock").touch()
    return folder


def test_times_places_logs_and_locks_do_not_count(tmp_path: Path) -> None:
    assert differences(output(tmp_path / "a"), output(tmp_path / "b", seconds=2.0)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: (out / "targets/one/model.safetensors").write_bytes(b"Weights"), "one/model.safetensors: its con"),
        (lambda out: (out / "targets/one/where.json").write_text('{"out": "x"}'), "where.json: out: 'OUT' and 'x'"),
        (lambda out: (out / "targets/one/where.json").unlink(), "targets/one/where.json: only in "),
        (lambda out: (out / "targets/.two.staging-1").mkdir(), "targets/.two.staging-1/: only in "),
        (lambda out: (out / "targets/.x.0.tmp").touch(), "targets/.x.0.tmp: only in "),
    ],
)
def test_what_differs_is_named(tmp_path: Path, change, said: str) -> None:
    a, b = output(tmp_path / "a"), output(tmp_path / "b")
    change(b)
    (line,) = differences(a, b)
    assert said in line


def test_manifests_are_compared_by_what_they_record(tmp_path: Path) -> None:
    a, b = output(tmp_path / "a", learning_rate=1), output(tmp_path / "b", b"others", learning_rate=2)
    said = differences(a, b)
    assert "targets/one/manifest.json: inputs.learning_rate: 1 and 2" in said
    assert any(line.startswith("targets/one/manifest.json: files.model.safetensors.xxh3") for line in said)
