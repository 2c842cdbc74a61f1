"""Stores: what is written is read, by number and key, in other processes; damage and changed inputs are named."""

import dataclasses
import json
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fusekit.artifacts import output_lock
from fusekit.capture.codec import Codec
from fusekit.capture.manifest import StoreSpec
from fusekit.capture.store import Store
from fusekit.capture.writer import StoreWriter, remove_store
from fusekit.errors import FusekitError, StorageError
from tests.capture.rows import key
from tests.capture.store_processes import BAD, KEYS, ROWS, SPEC, listing, rows, write
from tests.merging.processes import ENVIRONMENT


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


def same(one, other):
    assert one.tokens.key == other.tokens.key
    for name in ("ids", "message", "part", "ends", "lows", "labels"):
        assert np.array_equal(getattr(one.tokens, name), getattr(other.tokens, name))
    for array, expected in zip((*one.rows, one.actual), (*other.rows, other.actual), strict=True):
        assert np.array_equal(array, expected)
    assert (one.dataset, one.cross_entropy) == (other.dataset, other.cross_entropy)


def test_rows_by_number_key_and_shard(path):
    codec = Codec(SPEC.vocabulary, SPEC.top_k, SPEC.max_error)
    expected = [codec.decode(codec.encode(row)) for row in rows()]
    store = Store.open(path, verify=True)
    assert len(store) == len(expected) == ROWS - 1
    assert store.keys == [row.tokens.key for row in expected]
    for at, row in enumerate(expected):
        same(store[at], row)
        same(store[at - len(store)], row)
        same(store.get(row.tokens.key), row)
        assert store.position(row.tokens.key) == at
    assert [len(list(shard)) for shard in store.iter_shards()] == [3, 2, 3, 1]
    for found, row in zip(store, expected, strict=True):
        same(found, row)
    with pytest.raises(IndexError):
        store[len(store)]


def test_summary_is_what_the_rows_say(path):
    store = Store.open(path)
    summary = store.summary
    for at, row in enumerate(rows()):
        assert summary.tokens[at] == len(row.tokens)
        assert summary.labels[at] == len(row.actual)
        assert summary.bytes[at] == row.tokens.label_bytes
        assert summary.cross_entropy[at] == row.cross_entropy
        assert summary.datasets[summary.dataset[at]] == row.dataset
        assert summary.size[at] == len(store.blob(at))


def test_quarantined_rows_are_listed_and_not_there(path):
    store = Store.open(path)
    assert [(row.row, row.key, row.reason) for row in store.quarantined] == [(4, KEYS[4], BAD[KEYS[4]])]
    assert KEYS[4] not in store
    assert KEYS[5] in store
    with pytest.raises(StorageError, match=f"no row {KEYS[4]}: quarantined, NaN at label 2"):
        store.get(KEYS[4])
    with pytest.raises(StorageError, match=f"no row {key(999)}$"):
        store.get(key(999))


def test_shards_are_safetensors_files(path):
    tensors = load_file(path / "shard-00001.safetensors")
    assert tensors["keys"].tobytes().hex() == KEYS[3] + KEYS[5]
    assert tensors["offsets"].tolist()[-1] == len(tensors["data"])
    assert tensors["cross_entropy"].dtype == np.float64


def _read(store, at):
    return store[at].actual


def test_a_store_goes_to_other_processes(path):
    store = Store.open(path)
    first = store[0].actual  # the file is mapped here
    assert len(pickle.dumps(store)) < 20_000
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_read, [store] * 3, [0, 4, 8]))
    assert np.array_equal(found[0], first)
    assert np.array_equal(found[2], store[8].actual)


def test_the_same_rows_make_the_same_files(path, tmp_path):
    write(tmp_path / "again")
    assert listing(tmp_path / "again") == listing(path)


def test_writing_a_complete_store_again_changes_nothing(path):
    before = listing(path)
    assert write(path) == []
    assert listing(path) == before


def test_other_inputs_are_refused_with_every_difference(path):
    spec = SPEC.model_copy(update={"top_k": 5, "tokenizer": "other", "details": {"dtype": "bfloat16"}})
    before = listing(path)
    with pytest.raises(StorageError) as caught:
        StoreWriter(path, spec, KEYS[:ROWS])
    assert str(caught.value).splitlines()[1:] == [
        "  tokenizer: '', now 'other'",
        "  top_k: 4, now 5",
        "  details.dtype: not given, now 'bfloat16'",
        f"Use another folder, or remove {path} to start anew",
    ]
    assert listing(path) == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (KEYS[: ROWS - 1], "rows: 10, now 9"),
        ([*KEYS[:ROWS], key(77)], "rows: 10, now 11"),
        (KEYS[ROWS - 1 :: -1], "the first 10 rows: others, or in another order"),
        ([*KEYS[:5], KEYS[0]], f"row 5 has the key {KEYS[0]} of a row before"),
        (["x"], "keys are 32 hexadecimal digits"),
    ],
)
def test_other_rows_are_refused(path, keys, message):
    with pytest.raises(StorageError, match=message):
        StoreWriter(path, SPEC, keys)


@pytest.mark.parametrize(
    ("pick", "bad", "message"),
    [
        ([0, 1], {}, f"row {KEYS[2]} is missing"),
        ([0, 2, 1], {}, "repeated or not in the order of the data"),
        ([0, 1, 2, 2], {}, "repeated or not in the order of the data"),
        ([0, 1, 2, 3], {}, f"row {KEYS[3]} is not one of this shard's rows"),
        ([0, 1, 2], {KEYS[7]: "far away"}, f"quarantined row {KEYS[7]} is not among the rows of shard 0"),
    ],
)
def test_rows_missing_reordered_or_repeated(tmp_path, pick, bad, message):
    writer = StoreWriter(tmp_path / "out", SPEC, KEYS[:ROWS])
    plan = writer.missing_shards()[0]
    with pytest.raises(StorageError, match=message):
        writer.write_shard(plan, [rows(at, at + 1)[0] for at in pick], bad)
    assert len(writer.missing_shards()) == 4


def test_an_unfinished_store_says_so_and_shows_what_is_there(tmp_path):
    folder = tmp_path / "out"
    writer = StoreWriter(folder, SPEC, KEYS[:ROWS])
    plan = writer.missing_shards()[0]
    writer.write_shard(plan, rows(0, 3))
    with pytest.raises(StorageError, match=r"3 of 4 shards are not written yet: shard-00001"):
        writer.finish()
    with pytest.raises(StorageError, match="is not finished: 1 of 4 shards are there"):
        Store.open(folder)
    store = Store.open(folder, incomplete=True)
    assert not store.complete
    assert store.keys == KEYS[:3]
    assert store.verify() == []


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("two years")
    for act in (lambda: StoreWriter(tmp_path, SPEC, KEYS), lambda: remove_store(tmp_path)):
        with pytest.raises(StorageError, match=r"is no store, but holds thesis\.txt"):
            act()
    with pytest.raises(StorageError, match=r"is no store of captured rows: it has no manifest.json"):
        Store.open(tmp_path)
    assert listing(tmp_path) == {"thesis.txt": b"two years"}


def test_removing_a_store_leaves_what_is_not_its(damaged):
    (damaged / "notes.md").write_text("mine")
    remove_store(damaged)
    assert listing(damaged) == {"notes.md": b"mine"}
    remove_store(damaged / "nothing")


def test_the_manifest_of_something_else_is_not_removed(tmp_path):
    theirs = tmp_path / "manifest.json"
    theirs.write_text('{"short_name": "a page"}')
    with pytest.raises(StorageError, match=r"manifest\.json is not of a store of captured rows: nothing was removed"):
        remove_store(tmp_path)
    assert theirs.exists()


def test_a_folder_that_takes_no_files_is_not_called_busy():
    with (
        pytest.raises(StorageError, match=r"/proc/out: cannot be locked: no file can be made in /proc"),
        output_lock(Path("/proc/out")),
    ):
        pass


def test_two_runs_on_one_store(tmp_path):
    with output_lock(tmp_path / "out"):
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from pathlib import Path; from fusekit.artifacts import output_lock\n"
             "with output_lock(Path(sys.argv[1])): pass", str(tmp_path / "out")],
            capture_output=True, text=True, check=False, env=ENVIRONMENT,
        )  # fmt: skip
    assert done.returncode != 0
    assert "already being written by process" in done.stderr


@pytest.mark.parametrize("how", ["missing", "cut", "longer", "flipped", "empty"])
def test_a_damaged_shard_is_named_and_only_it_is_written_again(damaged, path, how):
    file = damaged / "shard-00002.safetensors"
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    else:
        data[-7] ^= 16 if how == "flipped" else 0
        file.write_bytes({"cut": data[:-1], "longer": data + b"x", "flipped": data, "empty": b""}[how])
    with pytest.raises(StorageError, match=r"shard-00002\.safetensors"):
        Store.open(damaged, verify=True)
    assert write(damaged) == [2]
    assert listing(damaged) == listing(path)


def test_a_damaged_record_of_an_unfinished_shard_vouches_for_nothing(tmp_path, path):
    folder = tmp_path / "out"
    write(folder, 0, 1, SPEC, False)
    (folder / "shard-00001.json").write_text('{"format": 1')
    (folder / "shard-00003.json").unlink()
    assert write(folder) == [1, 3]
    assert listing(folder) == listing(path)


def test_a_flipped_bit_is_noticed_before_its_row_is_used(damaged):
    file = damaged / "shard-00000.safetensors"
    store = Store.open(damaged)
    data = bytearray(file.read_bytes())
    at = len(data) - len(store.blob(2)) - len(store.blob(1)) // 2
    data[at] ^= 1
    file.write_bytes(data)
    store = Store.open(damaged)
    assert store[0].tokens.key == KEYS[0]
    with pytest.raises(StorageError, match=rf"shard-00000\.safetensors: row {KEYS[1]}: .*checksum"):
        store[1]
    problems = store.verify()
    assert {problem.file for problem in problems} == {"shard-00000.safetensors"}
    assert any(KEYS[1] in problem.what for problem in problems)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_a_shard_is_detected(damaged, path, data):
    name = data.draw(st.sampled_from([f"shard-0000{number}.safetensors" for number in range(4)]))
    whole = (path / name).read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    (damaged / name).write_bytes(changed)
    with pytest.raises(StorageError, match=name):
        Store.open(damaged, verify=True)
    with pytest.raises(StorageError, match=name):
        list(Store.open(damaged))
    (damaged / name).write_bytes(whole)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_manifests_and_shards_raise_fusekit_errors_only(damaged, path, data):
    name = data.draw(st.sampled_from(["manifest.json", "shard-00000.safetensors", "shard-00003.safetensors"]))
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


def edited(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "has format 2, but this version of fusekit reads format 1: update fusekit"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda m: m["shards"].pop(), "complete, but with 3 of 4 shards"),
        (lambda m: m["shards"][0].update(file="../../etc/passwd"), r"shards.0.file: String should match"),
        (lambda m: m["shards"][0].update(stop=4), "is for rows 0 to 4, not 0 to 3"),
        (lambda m: m["shards"][0].update(size=5), r"shard-00000.safetensors has \d+ bytes, but 5 were committed"),
        (lambda m: m["spec"].update(top_k=0), "spec.top_k"),
        (lambda m: m["spec"].update(top_k=61), "top_k is 61 and the vocabulary 60"),
        (lambda m: m.update(bounds=[0]), "is no part of its plan"),
        (lambda m: m.pop("spec"), "spec: Field required"),
    ],
)
def test_wrong_manifests_are_explained(damaged, change, message):
    edited(damaged, change)
    with pytest.raises(StorageError, match=message):
        Store.open(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][1].update(labels=7), "labels, the manifest says 7"),
        (lambda m: m["shards"][1].update(planned_xxh3="0" * 32), "its rows are not those of the data"),
        (lambda m: m["shards"][1].update(quarantined=[]), "its rows are not those of the data"),
        (lambda m: m["shards"][1].update(xxh3="0" * 32), "its hash is not the one that was committed"),
    ],
)
def test_verify_compares_shards_with_the_manifest(damaged, change, message):
    edited(damaged, change)
    problems = Store.open(damaged).verify()
    assert [problem.file for problem in problems] == ["shard-00001.safetensors"]
    assert message in str(problems[0])
    with pytest.raises(StorageError, match=message):
        Store.open(damaged, verify=True)


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError, match="out"):
        StoreWriter(tmp_path / "out", SPEC, KEYS)
    with pytest.raises(StorageError, match="out"):
        Store.open(tmp_path / "out")


def test_a_store_without_rows(tmp_path):
    StoreWriter(tmp_path, SPEC, []).finish()
    store = Store.open(tmp_path, verify=True)
    assert len(store) == 0
    assert store.keys == []
    assert store.summary.labels.shape == (0,)


def test_a_shard_of_quarantined_rows_alone(tmp_path):
    writer = StoreWriter(tmp_path, SPEC, KEYS[:2])
    writer.write_shard(writer.missing_shards()[0], [], dict.fromkeys(KEYS[:2], "NaN"))
    writer.finish()
    store = Store.open(tmp_path, verify=True)
    assert len(store) == 0
    assert [row.key for row in store.quarantined] == KEYS[:2]


def test_a_row_that_cannot_be_stored_stops_before_anything_is_written(tmp_path):
    writer = StoreWriter(tmp_path, SPEC, KEYS[:3])
    wrong = rows(0, 3)
    wrong[1] = dataclasses.replace(wrong[1], cross_entropy=float("nan"))
    with pytest.raises(StorageError, match=f"row {KEYS[1]}: its cross-entropy is nan"):
        writer.write_shard(writer.missing_shards()[0], wrong)
    assert sorted(listing(tmp_path)) == ["manifest.json"]


def test_specs_are_checked():
    with pytest.raises(ValueError, match="keep_mass"):
        StoreSpec(model="m", vocabulary=10, top_k=1, keep_mass=2.0)


def test_the_storage_package_needs_no_torch():
    code = (
        "import sys, fusekit.capture.writer; assert 'pyarrow' not in sys.modules;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "[]"
