"""Rows added later, stores of several machines made one, and export."""

import dataclasses

import numpy as np
import pytest

from fusekit.capture.combine import combine_stores
from fusekit.capture.export import export_parquet
from fusekit.capture.store import Store
from fusekit.capture.writer import StoreWriter
from fusekit.errors import StorageError
from tests.capture.rows import captured, key
from tests.capture.store_processes import KEYS, SPEC, listing, rows, write

MORE = [key(number) for number in range(20, 25)]


def more_rows(chosen):
    return [captured(np.random.default_rng(int(k, 16)), 60, 4, 12, number=int(k, 16), dataset="new") for k in chosen]


def fill(path, keys, spec=SPEC, make=more_rows, extend=False, shards=None):
    writer = StoreWriter(path, spec, keys, extend=extend)
    for plan in writer.missing_shards()[:shards]:
        writer.write_shard(plan, make(keys[plan.start : plan.stop]))
    if shards is None:
        writer.finish()


def test_rows_added_later(tmp_path):
    write(tmp_path)
    old = listing(tmp_path)
    spec = SPEC.model_copy(update={"data": "data and more"})
    keys = [*KEYS, *MORE]
    fill(tmp_path, keys, spec, extend=True, shards=1)
    assert len(Store.open(tmp_path, verify=True)) == 9, "until it is finished the store is what it was"
    assert listing(tmp_path)["manifest.json"] == old["manifest.json"]
    fill(tmp_path, keys, spec, extend=True)
    store = Store.open(tmp_path, verify=True)
    assert store.keys == [k for k in keys if k != KEYS[4]]
    assert store.spec == spec
    new = listing(tmp_path)
    assert {name: new[name] for name in old if name.startswith("shard")} == {
        name: data for name, data in old.items() if name.startswith("shard")
    }
    assert sorted(new) == ["manifest.json", *(f"shard-0000{number}.safetensors" for number in range(6))]
    assert StoreWriter(tmp_path, spec, keys).missing_shards() == []
    (tmp_path / "shard-00003.safetensors").unlink()
    assert [(plan.index, plan.start, plan.stop) for plan in StoreWriter(tmp_path, spec, keys).missing_shards()] == [
        (3, 9, 10)
    ]


def test_an_addition_that_was_given_up(tmp_path):
    write(tmp_path)
    old = listing(tmp_path)
    fill(tmp_path, [*KEYS, *MORE], extend=True, shards=1)
    assert write(tmp_path) == []
    assert listing(tmp_path) == old


@pytest.mark.parametrize(
    ("spec", "keys", "message"),
    [
        (SPEC.model_copy(update={"top_k": 3}), [*KEYS, *MORE], "top_k: 4, now 3"),
        (SPEC, [*MORE, *KEYS], "the first 10 rows: others, or in another order"),
        (SPEC, KEYS[:5], "rows: 10, now 5"),
    ],
)
def test_additions_that_do_not_fit(tmp_path, spec, keys, message):
    write(tmp_path)
    with pytest.raises(StorageError, match=message):
        StoreWriter(tmp_path, spec, keys, extend=True)


def test_only_complete_stores_are_extended(tmp_path):
    write(tmp_path, 0, 2, SPEC, False)
    with pytest.raises(StorageError, match="rows: 10, now 15"):
        StoreWriter(tmp_path, SPEC, [*KEYS, *MORE], extend=True)


def test_stores_of_several_machines(tmp_path):
    write(tmp_path / "a")
    spec = SPEC.model_copy(update={"data": "other"})
    fill(
        tmp_path / "b",
        [*MORE, KEYS[0], KEYS[4]],
        spec,
        lambda keys: [*more_rows([k for k in keys if k in MORE]), *_rows(keys)],
    )
    store = combine_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert Store.open(tmp_path / "c", verify=True).keys == store.keys
    assert set(store.keys) == {*KEYS, *MORE}, "what one store quarantined and another holds is there"
    assert store.quarantined == []
    one, other = Store.open(tmp_path / "a"), Store.open(tmp_path / "b")
    for k in store.keys:
        assert store.blob(store.position(k)) == (one if k in one else other).blob(
            (one if k in one else other).position(k)
        )
    assert store.summary.cross_entropy.sum() == pytest.approx(sum(store[at].cross_entropy for at in range(len(store))))
    before = listing(tmp_path / "c")
    combine_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert listing(tmp_path / "c") == before


def _rows(keys):
    from tests.capture.store_processes import ROWS

    return [
        captured(
            np.random.default_rng(int(k, 16)), 60, 4, 12, number=int(k, 16), dataset="ab"[int(k, 16) % 2], ragged=True
        )
        for k in keys
        if int(k, 16) < ROWS
    ]


def test_quarantined_rows_stay_quarantined(tmp_path):
    write(tmp_path / "a")
    fill(tmp_path / "b", MORE)
    store = combine_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert [row.key for row in store.quarantined] == [KEYS[4]]
    assert store.verify() == []


def test_stores_that_disagree(tmp_path):
    write(tmp_path / "a")
    fill(tmp_path / "b", MORE)

    def changed(keys):
        return [dataclasses.replace(row, dataset="renamed") for row in more_rows(keys)]

    fill(tmp_path / "c", [MORE[1]], make=changed)
    fill(tmp_path / "d", MORE, SPEC.model_copy(update={"model": "other"}))
    with pytest.raises(StorageError, match=f"row {MORE[1]} is in .*b and in .*c, and they differ"):
        combine_stores([tmp_path / "a", tmp_path / "b", tmp_path / "c"], tmp_path / "out")
    with pytest.raises(StorageError, match="not made the same way:\n  model: 'model', now 'other'"):
        combine_stores([tmp_path / "a", tmp_path / "d"], tmp_path / "out")
    with pytest.raises(StorageError, match="no stores to combine"):
        combine_stores([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export(tmp_path):
    import pyarrow.parquet as pq

    write(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    file = tmp_path / "rows.parquet"
    assert export_parquet(store, file) == store.summary.labels.sum()
    records = pq.read_table(file).to_pylist()
    at = 0
    for row in store:
        for label, position in enumerate(row.tokens.label_positions):
            record = records[at]
            used = row.rows.ids[label] >= 0
            assert (record["key"], record["dataset"]) == (row.tokens.key, row.dataset)
            assert record["position"] == position
            assert record["message"] == row.tokens.message[position]
            assert record["end"] == row.tokens.ends[position]
            assert record["label"] == row.tokens.ids[position]
            assert record["logprob"] == np.float32(row.actual[label])
            assert record["ids"] == row.rows.ids[label][used].tolist()
            assert record["logprobs"] == row.rows.logprobs[label][used].astype(np.float32).tolist()
            assert record["tail"] == np.float32(row.rows.tail[label])
            at += 1
    assert at == len(records)
    with pytest.raises(StorageError, match="is there already"):
        export_parquet(store, file)
    with pytest.raises(StorageError, match="is no folder"):
        export_parquet(store, tmp_path / "none/rows.parquet")
    damage = tmp_path / "store/shard-00003.safetensors"
    data = bytearray(damage.read_bytes())
    data[-1] ^= 1
    damage.write_bytes(data)
    with pytest.raises(StorageError, match="shard-00003"):
        export_parquet(Store.open(tmp_path / "store"), tmp_path / "other.parquet")
    assert not (tmp_path / "other.parquet").exists()


def test_rows_of_the_tests_are_those_of_the_writers():
    assert _rows(KEYS[:1])[0].cross_entropy == rows(0, 1)[0].cross_entropy
