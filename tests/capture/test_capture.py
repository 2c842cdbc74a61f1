"""Capture of the demo models, end to end: what the store holds is what one plain forward per row says."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fusekit.capturing import teacher as batches
from fusekit.capturing.capture import Capture
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_model, parameters
from fusekit.capturing.store import Store, manifest_of
from fusekit.cli import cli
from fusekit.disk import output_lock
from fusekit.errors import CaptureError, StorageError
from fusekit.settings import CaptureSettings
from tests import reference
from tests.capture.conftest import ALONE, DEMO, demo_rows
from tests.capture.reference import error_bound
from tests.capture.rows import by_id
from tests.capture.store_processes import listing
from tests.capture.test_teacher import FLOAT32_BOUND
from tests.helpers import edit_config, edit_tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return demo_rows(tmp_path_factory.mktemp("data"))


def demo(name="numbers", **choice):
    return find_checkpoint(ModelChoice(str(DEMO / name), **({"dtype": "float32"} | choice)))


def edited(folder, change, **config):
    """The demo model with other weights, and other fields of its configuration."""
    shutil.copytree(DEMO / "numbers", folder)
    edit_config(folder, **config)
    edit_tensors(folder, change)
    return find_checkpoint(ModelChoice(str(folder), dtype="float32"))


def settings(k=8, **changes):
    return CaptureSettings(**({"top_k": k, "rows_per_shard": 8, "batch_tokens": 256} | changes))


def run(data, out, how=None, checkpoint=None, **options):
    rows, tokenizer = data
    return Capture(checkpoint or demo(), tokenizer, rows, out, how or settings(), quiet=True, **options).run(ALONE)


@pytest.mark.parametrize(("name", "mass", "temperature"), [("pivot", 1.0, 1.0), ("numbers", 0.9, 2.0)])
def test_the_store_of_a_demo_model_is_what_plain_forwards_say(data, tmp_path, name, mass, temperature):
    rows, tokenizer = data
    checkpoint = demo(name)
    how = settings(keep_mass=mass, temperature=temperature)
    store = run(data, tmp_path / "out", how, checkpoint)
    model = load_model(checkpoint, torch.device("cpu"))
    assert store.keys == [row.key for row in rows]
    for row, found in zip(rows, store, strict=True):
        expected = tokenizer.tokenize(row)
        for field in ("ids", "message", "part", "ends", "lows", "labels"):
            assert np.array_equal(getattr(found.tokens, field), getattr(expected, field)), field
        assert found.dataset == row.dataset
        compare(found, model, how.selection, store.spec.max_error)


def compare(found, model, selection, max_error):
    total, kept = 0.0, by_id(*found.rows[:2])
    for j, label in enumerate(found.tokens.label_positions.tolist()):
        ids, logprobs, tail, actual, at_one = reference.teacher_row(model, found.tokens.ids.tolist(), label, selection)
        assert kept[j].keys() == set(ids)
        pairs = [(kept[j][i], p) for i, p in zip(ids, logprobs, strict=True)]
        for stored, exact in [*pairs, (math.log(found.rows.tail[j]), math.log(tail)), (found.actual[j], actual)]:
            assert abs(stored - exact) <= error_bound(exact, max_error) + FLOAT32_BOUND
        total -= at_one
    assert found.cross_entropy == pytest.approx(total, abs=FLOAT32_BOUND * len(found.actual))


def test_changed_inputs_are_refused_with_the_difference_until_overwrite(data, tmp_path):
    rows, tokenizer = data
    out = tmp_path / "out"
    run(data, out)
    before = listing(out)
    fewer = (rows[:-1], tokenizer)
    everything = (rows, type(tokenizer)(tokenizer.tokenizer, train_on="all"))
    other = edited(tmp_path / "model", lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    for change, expected in [
        (lambda: run(data, out, settings(9)), "top_k: 8, now 9"),
        (lambda: run(fewer, out), "data: '"),
        (lambda: run(everything, out), "train_on: 'assistant', now 'all'"),
        (lambda: run(data, out, checkpoint=demo(dtype="bfloat16")), "dtype: 'float32', now 'bfloat16'"),
        (lambda: run(data, out, checkpoint=other), "model_fingerprint: 'xxh3 "),
        (lambda: run(data, out, settings(max_error=0.0)), "max_error: "),
    ]:
        with pytest.raises(StorageError, match=expected):
            change()
        assert listing(out) == before
    assert run(data, out, settings(9), overwrite=True).spec.top_k == 9


def test_rows_per_shard_are_chosen_once_and_kept_by_the_store(data, tmp_path, monkeypatch):
    out, automatic = tmp_path / "out", settings(rows_per_shard=None)
    tokens = sum(len(data[1].tokenize(row)) for row in data[0]) / len(data[0])
    monkeypatch.setattr(batches, "CPU_BATCH_TOKENS", 1)
    monkeypatch.setattr(batches, "CPU_FLOPS", 2 * parameters(demo()) * 10 * tokens / batches.SHARD_SECONDS)
    assert run(data, out, automatic).spec.rows_per_shard == 8  # 10 rows, as a power of two
    assert manifest_of(out).bounds[:3] == [0, 8, 16]
    before = listing(out)
    (out / "shard-00001.parquet").unlink()
    monkeypatch.setattr(batches, "CPU_FLOPS", 1e30)  # as on another kind of device
    run(data, out, automatic)
    assert listing(out) == before
    with pytest.raises(StorageError, match="rows_per_shard: 8, now 4"):
        run(data, out, settings(rows_per_shard=4))
    assert run(data, out, automatic, overwrite=True).spec.rows_per_shard == 1024


def test_a_second_run_on_one_store_names_the_first(data, tmp_path):
    with output_lock(tmp_path / "out"), pytest.raises(StorageError, match="already being written by process"):
        run(data, tmp_path / "out")


def test_rows_with_nan_are_recorded_in_the_store_and_too_many_stop_it(data, tmp_path):
    rows, tokenizer = data
    holders = {}
    for row in rows:
        for id_ in set(tokenizer.tokenize(row).ids.tolist()):
            holders.setdefault(id_, []).append(row.key)
    rare = next(id_ for id_, keys in sorted(holders.items()) if len(keys) == 1)
    common = next(id_ for id_, keys in sorted(holders.items()) if 3 <= len(keys) <= 6)

    def poisoned(id_):
        """A model whose embedding of one token is NaN, and whose head, tied before, is sound."""

        def poison(tensors):
            embedding = tensors["model.embed_tokens.weight"]
            tensors["lm_head.weight"] = embedding.clone()
            embedding[id_].fill_(torch.nan)

        return edited(tmp_path / f"model{id_}", poison, tie_word_embeddings=False)

    store = run(data, tmp_path / "one", checkpoint=poisoned(rare))
    assert {row.key for row in store.quarantined} == set(holders[rare])
    assert "NaN or infinite logits at label 0" in store.quarantined[0].reason
    assert store.complete
    assert len(store) == len(rows) - 1
    broken = poisoned(common)
    for _ in range(2):  # running it again is no way around the limit, raising it is
        with pytest.raises(CaptureError, match=r"examples without a distribution, more than the 1 of 20 that may"):
            run(data, tmp_path / "many", checkpoint=broken)
    store = run(data, tmp_path / "many", settings(max_quarantined=1.0), checkpoint=broken)
    assert store.complete
    assert len(store) + len(store.quarantined) == len(rows)


def test_a_run_that_could_not_load_its_model_leaves_nothing_to_be_compared_with(data, tmp_path):
    lacking = edited(tmp_path / "model", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CaptureError, match=r"lacks 1 tensor, which would be random: model\.norm\.weight"):
        run(data, tmp_path / "out", checkpoint=lacking)
    assert run(data, tmp_path / "out", settings(9)).spec.top_k == 9


def test_a_store_larger_than_the_free_disk_is_refused_with_the_numbers(data, mounted):
    small = mounted("size=4k")
    with pytest.raises(
        CaptureError, match=r"disk, for 20 captured examples, at most: about .* needed, .* free on the disk of"
    ):
        run(data, small / "out")
    assert list(small.iterdir()) == [small / ".out.fusekit.lock"] or list(small.iterdir()) == []


def test_what_does_not_fit_is_refused_unless_all_is_there(data, tmp_path, monkeypatch):
    out, new, huge = tmp_path / "out", tmp_path / "new", settings(batch_tokens=10**10)
    run(data, out)
    before = listing(out)
    with monkeypatch.context() as patch:
        patch.setattr("fusekit.capturing.engines.load_model", None)
        patch.setattr("fusekit.capturing.models.Checkpoint.fetch", None)  # weights that are gone are not missed
        assert len(run(data, out, huge)) == 20
        assert listing(out) == before
        (out / "shard-00001.parquet").unlink()
        for place in (out, new):
            with pytest.raises(CaptureError, match=r"memory of .* needed, .* free on this machine"):
                run(data, place, huge)
    assert not (new / "manifest.json").exists()
    run(data, out)
    assert listing(out) == before


def invoke(*args, status=0):
    done = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert done.exit_code == status, done.output
    return done


def test_the_commands_on_one_store(rows_file, tmp_path):
    out = tmp_path / "stores" / "numbers"
    made = invoke(
        "capture", DEMO / "numbers", rows_file, out, "--max-length", 64, "--rows-per-shard", 8, "--json",
        "--with", DEMO / "pivot",
    )  # fmt: skip
    figures = json.loads(made.stdout)
    assert figures["total"]["rows"] == 20
    assert set(figures["datasets"]) == {"add", "reverse"}
    assert figures["data"]["kept"] == 20
    assert "20 of 20 examples kept" in made.stderr
    assert "20 examples in 3 shards, all as committed" in invoke("verify", tmp_path).output
    page, first = invoke("inspect", "store", out, "--rows", 1).output, Store.open(out)[0]
    assert f"{figures['datasets']['add']['bits_per_byte']:.4f}" in page
    assert f"example {first.tokens.key}" in page
    assert "<|assistant|>" in page
    assert f"{np.exp(first.actual[0]):.3f}   " in page
    shard = out / "shard-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    damaged = invoke("verify", tmp_path, status=1).output
    assert str(shard) in damaged
    (tmp_path / "nothing").mkdir()
    assert "nothing under" in invoke("verify", tmp_path / "nothing", status=1).output
