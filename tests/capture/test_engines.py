"""Captures through servers that speak vLLM's and SGLang's wire forms: the store is that of transformers."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fusekit
from fusekit.capturing.capture import Capture
from fusekit.capturing.engines import Opening, difference
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.capturing.server import Reply, captured
from fusekit.capturing.store import Store
from fusekit.cli import cli
from fusekit.errors import CaptureError, StorageError
from fusekit.settings import CaptureSettings, EngineSettings, Selection
from tests.capture.conftest import ALONE, DEMO, demo_rows, write_rows
from tests.capture.engine_server import EngineServer, load, serve
from tests.capture.random_models import random_rows
from tests.processes import Process, free_port, kill_all, wait_until

CLOSE = 1e-5
"""Nats between two float32 forwards of one model in batches of different shapes."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return demo_rows(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """What transformers says, unrounded."""
    return run(data, tmp_path_factory.mktemp("expected") / "out")


def run(data, out, *urls, how=None, **engine):
    rows, tokenizer = data
    settings = EngineSettings(url=list(urls), **({"patience": 5, "timeout": 10} if urls else {}) | engine)
    checkpoint = find_checkpoint(ModelChoice(str(DEMO / "numbers"), dtype="float32", engine=settings))
    how = how or CaptureSettings(top_k=8, rows_per_shard=6, max_error=0)
    return Capture(checkpoint, tokenizer, rows, out, how, quiet=True).run(ALONE)


def assert_same(store, expected):
    """Equal but for ids that tie, and for log-probabilities by CLOSE."""
    assert store.keys == expected.keys
    assert difference(list(expected), list(store)).largest < CLOSE
    for ours, theirs in zip(store, expected, strict=True):
        assert np.array_equal(ours.tokens.ids, theirs.tokens.ids)
        np.testing.assert_allclose(ours.actual, theirs.actual, atol=CLOSE, rtol=0)
        for j, i in np.argwhere(ours.rows.ids[:, :-1] != theirs.rows.ids[:, :-1]):
            near = theirs.rows.logprobs[j, max(i - 1, 0) : i + 2]
            assert np.diff(np.sort(near)).min() < CLOSE, "ids differ without a tie"
        np.testing.assert_allclose(ours.rows.logprobs, theirs.rows.logprobs, atol=CLOSE, rtol=0)
        np.testing.assert_allclose(ours.rows.tail, theirs.rows.tail, atol=CLOSE, rtol=0)
        assert ours.cross_entropy == pytest.approx(theirs.cross_entropy, abs=CLOSE * len(ours.actual))


@pytest.mark.parametrize(
    ("kind", "version", "head"), [("vllm", "vllm 0.32.0", None), ("sglang", "sglang 0.5.23", "float32")]
)
def test_a_server_gives_the_store_of_transformers(data, expected, tmp_path, kind, version, head):
    with EngineServer(DEMO / "numbers", kind) as server:
        store = run(data, tmp_path / "out", server.url)
        assert_same(store, expected)
        facts = [store.spec.details[name] for name in ("engine", "engine_version", "engine_head_dtype")]
        assert facts == ["server", version, head]
    # A complete store needs no server, and is that of another engine to everyone else.
    assert len(run(data, tmp_path / "out", server.url, patience=0)) == len(store)
    with pytest.raises(StorageError, match=r"details.engine: 'server', now 'transformers'"):
        run(data, tmp_path / "out")


def test_failures_are_repeated(data, expected, tmp_path):
    with EngineServer(DEMO / "numbers", "sglang") as server:
        server.faults.extend([""] * 5 + ["500", "503", "drop", "cut", "hang", "", "500", "500"])
        store = run(data, tmp_path / "out", server.url, timeout=1)
        assert not server.faults
    assert_same(store, expected)


def _capture(data, out, patience, *urls):
    run(data, out, *urls, patience=patience)


def capturing_until(shard, data, out, patience, *urls, delay=0.02):
    """A capture from servers of which the last is a process that is killed once a shard is recorded; its port."""
    port = free_port()
    server = Process(serve, str(DEMO / "numbers"), "vllm", port, delay)
    capturing = Process(_capture, data, out, patience, *urls, f"http://127.0.0.1:{port}")
    try:
        wait_until((out / shard).exists)
    finally:
        kill_all([server])
    server.wait()
    return capturing, port


def test_a_killed_server_leaves_whole_shards_and_the_same_command_resumes(data, expected, tmp_path):
    out = tmp_path / "out"
    capturing, port = capturing_until("shard-00001.json", data, out, 1)
    done = capturing.wait()
    url = f"http://127.0.0.1:{port}"
    assert done.exitcode == 1, done.output
    assert f"CaptureError: {url}" in done.output
    first = (out / "shard-00000.parquet").stat().st_ino
    assert not Store.open(out, incomplete=True).complete
    with EngineServer(DEMO / "numbers", port=port):
        assert_same(run(data, out, url), expected)
    assert (out / "shard-00000.parquet").stat().st_ino == first


def test_a_server_that_comes_back_is_waited_for(data, expected, tmp_path):
    out = tmp_path / "out"
    capturing, port = capturing_until("shard-00000.json", data, out, 60)
    with EngineServer(DEMO / "numbers", port=port):
        done = capturing.wait()
    assert done.exitcode == 0, done.output
    assert_same(Store.open(out), expected)


def test_several_servers_share_the_examples_and_one_may_die(data, expected, tmp_path):
    out = tmp_path / "out"
    with EngineServer(DEMO / "numbers") as one:
        capturing, _ = capturing_until("shard-00000.json", data, out, 60, one.url, delay=0.05)
        done = capturing.wait()
        assert done.exitcode == 0, done.output
        assert one.scored < len(expected) + 12  # the other had its share before
    assert_same(Store.open(out), expected)


def test_another_model_is_refused_at_the_start(data, tmp_path):
    with EngineServer(DEMO / "pivot") as server, pytest.raises(CaptureError, match="largest difference") as error:
        run(data, tmp_path / "out", server.url)
    assert server.url in str(error.value)
    assert not list((tmp_path / "out").glob("shard-*"))


def test_another_model_in_the_middle_is_refused_before_its_shard_is_kept(data, tmp_path):
    with EngineServer(DEMO / "numbers") as server:
        server.swap = (14, load(DEMO / "pivot"))  # the check takes 4 and 1, each shard of 6 one more
        with pytest.raises(CaptureError, match="another model answers"):
            run(data, tmp_path / "out", server.url)
    assert [path.name for path in (tmp_path / "out").glob("shard-*.parquet")] == ["shard-00000.parquet"]


def test_a_damaged_shard_is_not_written_by_another_engine(data, tmp_path):
    out = tmp_path / "out"
    with EngineServer(DEMO / "numbers") as server:
        run(data, out, server.url)
    shard = out / "shard-00001.parquet"
    shard.write_bytes(bytes(shard.stat().st_size))
    with EngineServer(DEMO / "numbers", "sglang") as server:
        for _ in range(2):
            with pytest.raises(StorageError, match=r"engine_version: 'vllm .*', now 'sglang "):
                run(data, out, server.url)


def test_servers_of_two_models_are_refused(data, tmp_path):
    both = EngineServer(DEMO / "numbers"), EngineServer(DEMO / "pivot")
    with both[0] as one, both[1] as other, pytest.raises(CaptureError, match=r"pivot.*numbers"):
        run(data, tmp_path / "out", one.url, other.url)


@pytest.mark.parametrize(
    ("engine", "how", "named"),
    [
        ({}, {"temperature": 2.0}, "temperature is 2"),
        ({}, {"top_k": 30}, "--max-logprobs"),
        ({"patience": 0}, {}, "does not answer"),
    ],
)
def test_what_a_server_cannot_do_is_refused(data, tmp_path, engine, how, named):
    with EngineServer(DEMO / "numbers") as server:
        url = server.url if "patience" not in engine else f"http://127.0.0.1:{free_port()}"
        with pytest.raises(CaptureError, match=named):
            run(data, tmp_path / "out", url, how=CaptureSettings(**how), **engine)


def test_a_probe_takes_the_place_of_transformers(data, expected, tmp_path, monkeypatch):
    rows, tokenizer = data
    probe = run((rows[:3], tokenizer), tmp_path / "probe", how=CaptureSettings(top_k=8))

    monkeypatch.setattr("fusekit.capturing.engines.load_model", None)
    with EngineServer(DEMO / "numbers") as server:
        assert_same(run(data, tmp_path / "out", server.url, probe=str(probe.path)), expected)
        with pytest.raises(CaptureError, match="top_k 8"):
            run(data, tmp_path / "more", server.url, probe=str(probe.path), how=CaptureSettings(top_k=9))
    with EngineServer(DEMO / "pivot") as server, pytest.raises(CaptureError, match="largest difference"):
        run(data, tmp_path / "other", server.url, probe=str(probe.path))
    other = tmp_path / "numbers"
    shutil.copytree(DEMO / "pivot", other)
    engine = EngineSettings(url=["http://localhost:1"], probe=str(probe.path))
    checkpoint = find_checkpoint(ModelChoice(str(other), engine=engine))
    opening = Opening(checkpoint, tokenizer, CaptureSettings(top_k=8), 768, print)
    with pytest.raises(CaptureError, match="engine transformers, top_k 8"):
        opening.start(rows, torch.device("cpu"))


def test_the_command_and_the_function_take_a_url(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    with EngineServer(DEMO / "numbers") as server:
        done = CliRunner().invoke(
            cli,
            f"capture {DEMO / 'numbers'} {rows} {tmp_path / 'one'} --engine-url {server.url} "
            "--dtype float32 --max-length 64",
        )
        assert done.exit_code == 0, done.output
        assert "largest difference" in done.output
        store = fusekit.capture(
            DEMO / "numbers", str(rows), tmp_path / "two", engine=server.url, max_length=64, quiet=True
        )
    assert store.keys == Store.open(tmp_path / "one").keys


# ---------------------------------------------------------------- replies


def slow(ids, logprobs, k, keep_mass, tokens):
    """Entries and remaining mass of one label, the obvious way."""
    listed = {i: p for i, p in zip(ids, logprobs, strict=True) if i >= 0 and i in tokens and p > -math.inf}
    kept, mass = [], 0.0
    for i, p in sorted(listed.items(), key=lambda entry: (-entry[1], entry[0]))[:k]:
        if mass >= keep_mass < 1:
            break
        kept.append((i, p))
        mass += math.exp(p)
    return kept, 0.0 if len(kept) == len(tokens) else max(0.0, 1 - mass)


@pytest.mark.parametrize("seed", range(10))
def test_replies_become_rows(seed):
    """Random replies in any order, with repeated ids, ties, gaps and probabilities of 0."""
    rng, V = np.random.default_rng(seed), 50
    (row,) = random_rows([12], seed, V)
    n, m, k = int(row.labels.sum()), int(rng.integers(1, 12)), int(rng.integers(1, 12))
    logits = np.round(rng.normal(0, 3, (n, V)), int(rng.integers(0, 3)))
    logits[:, 49] = -np.inf  # a padding id
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.stack([rng.permutation(V)[:m] for _ in range(n)])
    if m > 2:
        ids[:, 1] = ids[:, 0]
        ids[rng.random(n) < 0.3, 2] = -1
    entries = np.take_along_axis(logprobs, np.maximum(ids, 0), 1)
    tokens = np.arange(V) < 49
    actual = logprobs[np.arange(n), row.ids[row.labels] % 49]
    keep_mass = float(rng.choice([1.0, 0.7]))
    found = captured(row, "d", Reply(ids, entries, actual), Selection(k, keep_mass), tokens)
    for at in range(n):
        kept, tail = slow(ids[at].tolist(), entries[at].tolist(), k, keep_mass, set(range(49)))
        here = found.rows.ids[at] >= 0
        assert list(zip(found.rows.ids[at][here].tolist(), found.rows.logprobs[at][here].tolist(), strict=True)) == kept
        assert found.rows.ids[at].shape == (k,)
        assert found.rows.tail[at] == pytest.approx(tail, abs=1e-12)
    assert found.cross_entropy == pytest.approx(-actual.sum())


def of_one(ids, p, actual=-1.0):
    """What becomes of a reply that says the same about every label; 49 of 50 ids are tokens, 2 are kept."""
    (row,) = random_rows([12], vocabulary=50)
    n = int(row.labels.sum())
    reply = Reply(np.tile(ids, (n, 1)), np.log(np.tile(p, (n, 1))), np.full(n, actual))
    return captured(row, "", reply, Selection(2), np.arange(50) < 49)


@pytest.mark.parametrize(
    ("ids", "p", "ratio"), [([1, 3], [0.5, 0.2], 1), ([1, 3], [0.5, 0.1], 2), ([1, 2], [0.25, 0.2], 2)]
)
def test_a_missing_entry_counts_with_its_distance_to_the_last(ids, p, ratio):
    assert difference([of_one([1, 2], [0.5, 0.2])], [of_one(ids, p)]).largest == pytest.approx(math.log(ratio))


def test_no_distribution_is_quarantined_and_padding_with_mass_refused():
    assert "1.1" in of_one([1, 2], [0.9, 0.2])
    assert isinstance(of_one([1, 2], [0.9, np.nan]), str)
    assert isinstance(of_one([1, 2], [0.9, 0.05], -np.inf), str)
    for outside in (49, 60):  # a row of the head without a token; an id that this model does not have
        with pytest.raises(CaptureError, match=f"id {outside}"):
            of_one([1, outside], [0.9, 0.05])
    kept = of_one([1, 49], [0.9, 0.0005])
    assert (kept.rows.ids == [1, -1]).all()
    assert kept.rows.tail == pytest.approx(0.1)
