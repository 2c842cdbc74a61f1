"""Files of a run that were changed by something else: whatever they hold, only our own errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusekit import artifacts as artifact
from fusekit.artifacts import weights_hash
from fusekit.distillation.outputs import Target
from fusekit.distillation.run import _begin, _start
from fusekit.errors import FusekitError
from fusekit.pipeline.context import read_rows_file, write_rows
from fusekit.types import Message, Row

FACTS = {"rows": {"count": 2}, "settings": {"num_train_epochs": 1.0}}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """Prepared rows, a published model, and the beginning of a training."""
    out = tmp_path_factory.mktemp("out")
    rows = [Row((Message("user", "a"), Message("assistant", "b")), dataset="d"), Row((Message("text", "c"),))]
    artifact.publish(out / "data", "data", {"limit": 3, "files": {"x": None}}, lambda into: write_rows(into, rows))
    artifact.publish(out / "one", "distill", FACTS, lambda into: (into / "model.safetensors").write_bytes(b"weights"))
    found = Target("two", out / "two", ("two",))
    _begin(found, FACTS)
    return found


def resumed(target: Target) -> None:
    _start(target, FACTS, lambda _: None)


READERS: dict[str, Callable[[Target], object]] = {
    "data/manifest.json": lambda target: artifact.problems(target.folder.parent / "data"),
    "data/rows.jsonl": lambda target: read_rows_file(target.folder.parent / "data"),
    "one/manifest.json": lambda target: (
        artifact.require_whole(target.folder.parent / "one"),
        weights_hash(target.folder.parent / "one"),
    ),
    "two.training/made_from.json": resumed,
}

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=8), child, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(data=st.data())
@pytest.mark.parametrize("name", sorted(READERS))
def test_fuzzed_files_of_a_run_raise_only_our_errors(name: str, target: Target, data: st.DataObject) -> None:
    path: Path = target.folder.parent / name
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, min(start + 40, len(whole))))
        path.write_bytes(whole[:start] + data.draw(st.binary(max_size=40)) + whole[stop:])
    else:
        value = data.draw(VALUES)
        found = json.loads(whole.splitlines()[0] if name.endswith(".jsonl") else whole)
        key = data.draw(st.sampled_from([None, *found]))
        path.write_text(json.dumps(value if key is None else {**found, key: value}), encoding="utf-8")
    try:
        with suppress(FusekitError):
            READERS[name](target)
    finally:
        path.write_bytes(whole)
    READERS[name](target)


@pytest.mark.parametrize("found", ["5", "[]", '"x"', "null", "{"])
def test_a_training_whose_facts_are_damaged_says_so(found: str, target: Target) -> None:
    path = target.work / "made_from.json"
    whole = path.read_bytes()
    path.write_text(found)
    try:
        with pytest.raises(
            FusekitError, match=r"made_from\.json cannot be read.*; remove .*two\.training to start over"
        ):
            resumed(target)
    finally:
        path.write_bytes(whole)
