"""Stores: what is written is read, by number and key, in other processes; damage and changed inputs are named."""

import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusekit.artifacts import publish
from fusekit.capturing import store as reading
from fusekit.capturing.shards import Codec
from fusekit.capturing.store import Store
from fusekit.capturing.writer import StoreWriter, combine_stores, remove_store
from fusekit.errors import FusekitError, StorageError
from tests.capture import reference
from tests.capture.rows import captured, key
from tests.capture.store_processes import BAD, KEYS, ROWS, SPEC, listing, rows, write
from tests.helpers import edit_manifest
from tests.processes import CONTEXT


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "out"
    write(folder)
    return folder


@pytest.fixture
def damaged(path, tmp_path):
    """A copy to damage."""
    for name, data in listing(path).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def refused(*named):
    """That a StorageError names all of these."""
    return pytest.raises(StorageError, match="(?s)" + ".*".join(re.escape(str(name)) for name in named))


def same(one, other):
    assert one.tokens.key == other.tokens.key
    for name in ("ids", "message", "part", "ends", "lows", "labels"):
        assert np.array_equal(getattr(one.tokens, name), getattr(other.tokens, name))
    for array, expected in zip((*one.rows, one.actual), (*other.rows, other.actual), strict=True):
        assert np.array_equal(array, expected)
    assert (one.dataset, one.cross_entropy) == (other.dataset, other.cross_entropy)


def test_rows_by_number_and_key(path):
    codec = Codec(SPEC.vocabulary, SPEC.top_k, SPEC.max_error)
    expected = [codec.decode(codec.encode(row)) for row in rows()]
    store = Store.open(path, verify=True)
    assert len(store) == len(expected) == ROWS - 1
    assert store.keys == [row.tokens.key for row in expected]
    for at, row in enumerate(expected):
        for found in (store[at], store[at - len(store)], store.get(row.tokens.key)):
            same(found, row)
        assert store.position(row.tokens.key) == at
    for found, row in zip(store, expected, strict=True):
        same(found, row)
    with pytest.raises(IndexError):
        store[len(store)]


def test_rows_at_random_while_groups_leave_the_memory(tmp_path, monkeypatch):
    """Several row groups per shard, of which one fits the cache and one shard may be open."""
    monkeypatch.setattr("fusekit.capturing.shards.GROUP_VALUES", 30)
    monkeypatch.setattr(reading, "CACHE_BYTES", 1)
    monkeypatch.setattr(reading, "_OPEN_SHARDS", 1)
    spec = SPEC.model_copy(update={"rows_per_shard": 8})
    write(tmp_path, spec=spec)
    store, codec = Store.open(tmp_path, verify=True), Codec(SPEC.vocabulary, SPEC.top_k, SPEC.max_error)
    assert len(store._shard(0).starts) > 3
    expected = [codec.decode(codec.encode(row)) for row in rows()]
    for at in np.random.default_rng(0).integers(0, len(expected), 60).tolist():
        same(store[at], expected[at])
    assert len(store._groups) == len(store._shards) == 1


COLUMNS = ("key", "token_ids", "entries")


@pytest.mark.parametrize("max_error", [0.2, 0.0])
def test_other_readers_open_a_shard(tmp_path, max_error):
    import datasets
    import duckdb
    import pandas

    write(tmp_path / "out", spec=SPEC.model_copy(update={"max_error": max_error}))
    file = tmp_path / "out" / "shard-00000.parquet"
    hub = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    slow_rows = reference.read(file, max_error)
    table = duckdb.sql(f"select key, token_ids, entries from '{file}'").fetchall()
    for at, (row, slow) in enumerate(zip(pandas.read_parquet(file).itertuples(), slow_rows, strict=True)):
        found = Store.open(tmp_path / "out")[at]
        expected = [found.tokens.key, found.tokens.ids.tolist(), slow["entries"]]
        assert list(table[at]) == expected
        assert [hub[at][name] for name in COLUMNS] == expected
        assert [row.key, list(row.token_ids), list(row.entries)] == expected
        for ids, values in zip(found.rows.ids, slow["rows"], strict=True):
            assert ids[ids >= 0].tolist() == [id_ for id_, _ in values]


def test_summary_is_what_the_rows_say(path):
    summary = Store.open(path).summary
    for at, row in enumerate(rows()):
        assert summary.tokens[at] == len(row.tokens)
        assert summary.labels[at] == len(row.actual)
        assert summary.bytes[at] == row.tokens.label_bytes
        assert summary.cross_entropy[at] == row.cross_entropy
        assert summary.datasets[summary.dataset[at]] == row.dataset


def test_quarantined_rows_are_listed_and_not_there(path):
    store = Store.open(path)
    assert [(row.row, row.key, row.reason) for row in store.quarantined] == [(4, KEYS[4], BAD[KEYS[4]])]
    assert KEYS[4] not in store
    assert KEYS[5] in store
    with refused(KEYS[4], "NaN at label 2"):
        store.get(KEYS[4])
    with refused(key(999)):
        store.get(key(999))


def _read(store, at):
    return store[at].actual


def test_a_store_goes_to_other_processes(path):
    store = Store.open(path)
    first = store[0].actual  # the file is mapped here
    assert len(pickle.dumps(store)) < 20_000
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        found = list(pool.map(_read, [store] * 2, [0, 8]))
    assert np.array_equal(found[0], first)
    assert np.array_equal(found[1], store[8].actual)


def test_the_same_rows_make_the_same_files_and_a_complete_store_is_left_alone(path, tmp_path):
    write(tmp_path / "again")
    assert listing(tmp_path / "again") == listing(path)
    assert write(tmp_path / "again") == []
    assert listing(tmp_path / "again") == listing(path)


@pytest.mark.parametrize(
    ("spec", "keys", "named"),
    [
        (SPEC, KEYS[: ROWS - 1], ["examples: 10, now 9"]),
        (SPEC, [*KEYS[:ROWS], key(77)], ["examples: 10, now 11"]),
        (SPEC, KEYS[ROWS - 1 :: -1], ["examples: others"]),
        (
            SPEC.model_copy(update={"top_k": 5, "tokenizer": "other", "details": {"dtype": "bfloat16"}}),
            KEYS,
            ["tokenizer: '', now 'other'", "top_k: 4, now 5", "details.dtype", "'bfloat16'"],
        ),
    ],
)
def test_other_inputs_are_refused_with_every_difference(path, spec, keys, named):
    before = listing(path)
    with refused(*named):
        StoreWriter(path, spec, keys)
    assert listing(path) == before


@pytest.mark.parametrize(
    ("pick", "bad", "named"),
    [
        ([0, 1], {}, KEYS[2]),
        ([0, 2, 1], {}, KEYS[0]),
        ([0, 1, 2, 2], {}, KEYS[0]),
        ([0, 1, 2, 3], {}, KEYS[3]),
        ([0, 1, 2], {KEYS[1]: "NaN"}, KEYS[1]),
    ],
)
def test_rows_missing_reordered_or_repeated(tmp_path, pick, bad, named):
    writer = StoreWriter(tmp_path / "out", SPEC, KEYS[:ROWS])
    with refused(named):
        writer.write_shard(writer.missing_shards()[0], [rows(at, at + 1)[0] for at in pick], bad)
    assert len(writer.missing_shards()) == 4


def test_an_unfinished_store_says_so_and_shows_what_is_there(tmp_path):
    writer = StoreWriter(tmp_path, SPEC, KEYS[:ROWS])
    writer.write_shard(writer.missing_shards()[0], rows(0, 3))
    with refused(tmp_path, "3 of 4", "shard-00001"):
        writer.finish()
    with refused(tmp_path, "1 of 4"):
        Store.open(tmp_path)
    store = Store.open(tmp_path, incomplete=True)
    assert not store.complete
    assert store.keys == KEYS[:3]
    assert store.verify() == []


def test_what_is_no_store_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("two years")
    for act in (lambda: StoreWriter(tmp_path / "thesis.txt", SPEC, KEYS), lambda: Store.open(tmp_path / "thesis.txt")):
        with refused(tmp_path / "thesis.txt"):
            act()
    for act in (lambda: StoreWriter(tmp_path, SPEC, KEYS), lambda: remove_store(tmp_path)):
        with refused(tmp_path, "thesis.txt"):
            act()
    with refused(tmp_path, "manifest.json"):
        Store.open(tmp_path)
    assert listing(tmp_path) == {"thesis.txt": b"two years"}
    publish(tmp_path / "model", "distill", {}, lambda into: (into / "model.safetensors").write_bytes(b"weights"))
    with refused(tmp_path / "model", "distill"):
        Store.open(tmp_path / "model")
    with refused(tmp_path / "model", "model.safetensors"):
        remove_store(tmp_path / "model")
    write(tmp_path / "store")
    whole = listing(tmp_path / "store")
    with refused(tmp_path / "store", "capture", "distill"):
        publish(tmp_path / "store", "distill", {}, lambda into: (into / "model.safetensors").write_bytes(b"weights"))
    assert listing(tmp_path / "store") == whole


def test_only_a_store_is_removed(damaged, tmp_path_factory):
    (damaged / "notes.md").write_text("mine")
    with refused("notes.md"):
        remove_store(damaged)
    (damaged / "notes.md").unlink()
    remove_store(damaged)
    assert listing(damaged) == {}
    theirs = tmp_path_factory.mktemp("theirs") / "manifest.json"
    theirs.write_text('{"short_name": "a page"}')
    with refused(theirs):
        remove_store(theirs.parent)
    assert theirs.exists()


@pytest.mark.parametrize("how", ["missing", "cut", "longer", "flipped"])
def test_a_damaged_shard_is_named_and_only_it_is_written_again(damaged, path, how):
    file = damaged / "shard-00002.parquet"
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    else:
        data[-7] ^= 16 if how == "flipped" else 0
        file.write_bytes({"cut": data[:-1], "longer": data + b"x", "flipped": data}[how])
    with refused("shard-00002.parquet"):
        Store.open(damaged, verify=True)
    assert write(damaged) == [2]
    assert listing(damaged) == listing(path)


def test_a_damaged_record_of_an_unfinished_shard_counts_for_nothing(tmp_path, path):
    folder = tmp_path / "out"
    write(folder, 0, 1, SPEC, False)
    (folder / "shard-00001.json").write_text('{"format": 1')
    (folder / "shard-00003.json").unlink()
    assert list(Store.open(folder, incomplete=True).records) == ["shard-00000.parquet", "shard-00002.parquet"]
    assert write(folder) == [1, 3]
    assert listing(folder) == listing(path)


def test_a_flipped_bit_is_noticed_before_its_row_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr("fusekit.capturing.shards.GROUP_VALUES", 1)  # a row group for each row
    write(tmp_path)
    file = tmp_path / "shard-00000.parquet"
    ends = Store.open(tmp_path)._shard(0)._ends
    data = bytearray(file.read_bytes())
    data[(ends[1] + ends[2]) // 2] ^= 1
    file.write_bytes(data)
    store = Store.open(tmp_path)
    assert store[0].tokens.key == KEYS[0]
    with refused(file, "row group 1"):
        store[1]
    assert [file.name in problem for problem in store.verify()] == [True]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_a_shard_is_detected(damaged, path, data):
    name = data.draw(st.sampled_from([f"shard-0000{number}.parquet" for number in range(4)]))
    whole = (path / name).read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    (damaged / name).write_bytes(changed)
    with refused(name):
        Store.open(damaged, verify=True)
    with refused(name):
        list(Store.open(damaged))
    (damaged / name).write_bytes(whole)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_manifests_and_shards_raise_fusekit_errors_only(damaged, path, data):
    name = data.draw(st.sampled_from(["manifest.json", "shard-00000.parquet", "shard-00003.parquet"]))
    whole = (path / name).read_bytes()
    start = data.draw(st.integers(0, min(len(whole), 900)))
    stop = data.draw(st.integers(start, min(start + 40, len(whole))))
    (damaged / name).write_bytes(whole[:start] + data.draw(st.binary(max_size=40)) + whole[stop:])
    with suppress(FusekitError):
        store = Store.open(damaged)
        store.verify()
        for row in store:
            assert row.tokens.key in store
    (damaged / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(format=2), ["manifest.json", "format"]),
        (lambda m: m["inputs"].update(surprise=1), ["surprise"]),
        (lambda m: m["files"].pop("shard-00003.parquet"), ["3 of 4"]),
        (lambda m: m["files"]["shard-00000.parquet"].update(size=5), ["shard-00000.parquet", " 5 "]),
        (lambda m: m["files"].update({"../../secret": m["files"]["shard-00000.parquet"]}), ["files", "../../secret"]),
        (lambda m: m["files"]["shard-00001.parquet"].update(quarantined=[]), ["manifest.json", "keys"]),
        (lambda m: m["files"]["shard-00001.parquet"].update(xxh3="0" * 32), ["shard-00001.parquet", "content"]),
        (lambda m: m.update(keys_xxh3="0" * 32), ["manifest.json", "keys"]),
    ],
)
def test_a_manifest_that_was_changed_is_noticed(damaged, change, named):
    edit_manifest(damaged, change)
    with refused(*named):
        Store.open(damaged, verify=True)


@pytest.mark.parametrize("keys", [[], KEYS[:2]])
def test_a_store_of_nothing_or_of_quarantined_rows_alone(tmp_path, keys):
    writer = StoreWriter(tmp_path, SPEC, keys)
    for plan in writer.missing_shards():
        writer.write_shard(plan, [], dict.fromkeys(keys, "NaN"))
    writer.finish()
    store = Store.open(tmp_path, verify=True)
    assert (len(store), store.keys, store.summary.labels.shape) == (0, [], (0,))
    assert [row.key for row in store.quarantined] == keys


def test_stores_are_combined_without_rounding_again(tmp_path):
    """The second has all rows but one, in another order, and one that the first quarantines."""
    write(tmp_path / "a")
    held = {row.tokens.key: row for row in rows()} | {KEYS[4]: captured(np.random.default_rng(4), 60, 4, 12, number=4)}
    keys = KEYS[:0:-1]
    other = StoreWriter(tmp_path / "b", SPEC.model_copy(update={"data": "more"}), keys)
    for plan in other.missing_shards():
        other.write_shard(plan, [held[name] for name in keys[plan.start : plan.stop]])
    other.finish()
    store = combine_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert sorted(store.keys) == sorted(KEYS)
    assert store.quarantined == store.verify() == []
    for name in KEYS:
        same(store.get(name), Store.open(tmp_path / ("b" if name == KEYS[4] else "a")).get(name))
    before = listing(tmp_path / "c")
    combine_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert listing(tmp_path / "c") == before
    assert [row.key for row in combine_stores([tmp_path / "a"], tmp_path / "d").quarantined] == [KEYS[4]]
    write(tmp_path / "e", spec=SPEC.model_copy(update={"model": "other"}))
    with refused(tmp_path / "e", "model: 'model', now 'other'"):
        combine_stores([tmp_path / "a", tmp_path / "e"], tmp_path / "f")
