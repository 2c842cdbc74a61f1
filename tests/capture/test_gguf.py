"""GGUF files as models: what their headers say, what is loaded of them, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from fusekit import artifacts as artifact
from fusekit.alignment.alignment import align
from fusekit.capturing.models import ModelChoice, dequantise, find_checkpoint, load_model, load_tokenizer, loaded_bytes
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import CaptureError, FusekitError, StorageError
from fusekit.gguf import split
from fusekit.merging import models as merging
from tests.capture.conftest import DEMO
from tests.gguf_files import write_gguf
from tests.helpers import refused
from tests.merging.hub_server import Hub, Repository, client
from tests.processes import run

CPU = torch.device("cpu")
PIVOT = DEMO / "pivot"
PARAMETERS = 951_424  # 768*128 + 4*(4*128*128 + 3*128*384 + 2*128) + 128


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The demo's pivot as GGUF, by the type of its matrices."""
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: write_gguf(PIVOT, folder / f"pivot.{kind}.gguf", kind) for kind in ("F32", "F16", "BF16", "Q8_0")}


def logits(choice: ModelChoice) -> torch.Tensor:
    model = load_model(find_checkpoint(choice), CPU)
    ids = torch.arange(7, 71).reshape(2, 32)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


# The demo's weights are bfloat16: F32 and BF16 hold them exactly, F16 where they are not tiny.
@pytest.mark.parametrize(("kind", "least", "most"), [("F32", 0, 1e-5), ("F16", 0, 1e-4), ("Q8_0", 1e-3, 0.3)])
def test_a_gguf_file_predicts_what_its_model_does(files, kind, least, most):
    found, expected = (logits(ModelChoice(str(path), dtype="float32")) for path in (files[kind], PIVOT))
    assert least <= (found - expected).abs().max().item() <= most


def test_a_gguf_file_reads_text_as_its_model_does(files):
    theirs, ours = (load_tokenizer(find_checkpoint(ModelChoice(str(path)))) for path in (PIVOT, files["F32"]))
    text = "12+34=46, naïve 中文 \n\n x" * 3
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()  # no <|endoftext|>, for which the model has no row
    assert ours.name_or_path == str(files["F32"])
    found = align(text, theirs, ours)
    assert found.pivot.ends.tolist() == found.source.ends.tolist()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")]
)
def test_sizes_and_dtypes_come_from_the_header(files, kind, dtype):
    checkpoint, real = find_checkpoint(ModelChoice(str(files[kind]))), getattr(torch, dtype)
    header, config = checkpoint.gguf, checkpoint.config
    assert (header.parameters, header.architecture, header.format) == (PARAMETERS, "llama", kind)
    assert (config["dtype"], config["architectures"]) == (dtype, ["LlamaForCausalLM"])
    assert loaded_bytes(checkpoint) == checkpoint.weight_bytes == PARAMETERS * real.itemsize
    assert loaded_bytes(find_checkpoint(ModelChoice(str(files[kind]), dtype="bfloat16"))) == PARAMETERS * 2
    model = load_model(checkpoint, CPU)
    assert (model.dtype, model.num_parameters()) == (real, PARAMETERS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.gguf", (".", "x.gguf")),
        ("owner/x.gguf", ("owner", "x.gguf")),
        ("owner/name/x.gguf", ("owner/name", "x.gguf")),
        ("owner/name/deep/x.gguf", ("owner/name", "deep/x.gguf")),
        ("here/sub/x.gguf", ("here/sub", "x.gguf")),
        ("folder.gguf", None),
    ],
)
def test_names_of_gguf_files(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "folder.gguf").mkdir()
    assert split(name) == expected


def test_a_folder_of_gguf_files_names_them_and_how_to_choose(files):
    folder = files["F32"].parent
    names = [file.name for file in files.values()]
    with refused(CaptureError, *names, f"{folder}/pivot.BF16.gguf", "gguf_file: pivot.BF16.gguf"):
        find_checkpoint(ModelChoice(str(folder)))
    with refused(CaptureError, *names, f"no file other.gguf in {folder}"):
        find_checkpoint(ModelChoice(f"{folder}/other.gguf"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-1], "is cut off: .* bytes"),
        (lambda data: b"GGML" + data[4:], "not a GGUF file"),
        (lambda data: data[:4] + b"\x01" + data[5:], "version is 1"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "damaged"),
        (lambda data: re.sub(rb"(?s)(ggml\.tokens.{16}).{8}", rb"\1" + b"\xff" * 8, data, count=1), "damaged"),
    ],
)
def test_a_damaged_file_is_refused_and_named(files, tmp_path, change, says):
    path = tmp_path / "broken.gguf"
    path.write_bytes(change(files["Q8_0"].read_bytes()))
    with pytest.raises(CaptureError, match=f"{path}.*{says}"):
        find_checkpoint(ModelChoice(str(path)))


@pytest.mark.parametrize(
    ("written", "how", "named"),
    [
        ({"architecture": "rwkv7"}, {}, ["x.gguf", "'rwkv7'"]),
        ({"split__count": 3}, {}, ["one of the 3 parts", "llama-gguf-split --merge"]),
        ({}, {"quantization": {"quant_method": "bitsandbytes"}}, ["'bitsandbytes'"]),
        ({}, {"revision": "main"}, ["local folder", "'main'"]),
    ],
)
def test_what_transformers_cannot_load_is_refused(tmp_path, written, how, named):
    file = write_gguf(PIVOT, tmp_path / "x.gguf", **written)
    with refused(CaptureError, *named):
        find_checkpoint(ModelChoice(str(file), **how))


def test_scaled_positions_are_said_to_be_left_out(tmp_path):
    scaled = write_gguf(PIVOT, tmp_path / "scaled.gguf", llama__rope__scaling__type="yarn")
    (line,) = find_checkpoint(ModelChoice(str(scaled))).notices
    assert re.search(r"scaled\.gguf.*yarn", line)
    plain = write_gguf(PIVOT, tmp_path / "plain.gguf", llama__rope__scaling__type="none")
    assert not find_checkpoint(ModelChoice(str(plain))).notices


@pytest.mark.parametrize("said", [Path("docs/how-to/gguf.md").read_text(), merging._NO_GGUF])
def test_what_is_advised_can_be_imported(said):
    found: dict[str, object] = {}
    exec(re.search(r"from [\w.]+ import dequantise", said)[0], found)
    assert found["dequantise"] is dequantise


def test_a_file_is_dequantised_once(files, tmp_path):
    folder, choice = tmp_path / "plain", ModelChoice(str(files["Q8_0"]))
    said: list[str] = []
    dequantise(choice, folder, say=said.append)
    dequantise(choice, folder, say=said.append)
    assert len(said) == 1
    known = artifact.read(folder)
    assert known.inputs == {"gguf": find_checkpoint(choice).fingerprint(), "dtype": "auto"}
    assert not artifact.problems(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert torch.equal(logits(ModelChoice(str(folder))), logits(choice))
    read = [RowTokenizer(load_tokenizer(find_checkpoint(ModelChoice(str(path))))) for path in (folder, choice.model)]
    assert read[0].fingerprint == read[1].fingerprint


def test_a_plain_checkpoint_stands_for_its_file(files, tmp_path):
    choice = ModelChoice(str(files["F16"]), dequantised=tmp_path / "plain")
    before = find_checkpoint(choice)
    assert before.gguf is not None
    dequantise(choice, tmp_path / "plain")
    after = find_checkpoint(choice)
    assert (after.folder, after.gguf) == (tmp_path / "plain", None)
    assert after.fingerprint() == before.fingerprint()
    assert after.weight_bytes == pytest.approx(before.weight_bytes, rel=0.01)


def test_a_plain_checkpoint_of_another_file_dtype_or_content_is_refused(files, tmp_path):
    folder = tmp_path / "plain"
    mine = tmp_path / "mine.gguf"
    shutil.copyfile(files["Q8_0"], mine)
    dequantise(str(mine), folder)
    for other in (ModelChoice(str(files["F16"])), ModelChoice(str(mine), dtype="bfloat16")):
        with pytest.raises(StorageError, match=r"(gguf|dtype): '.*', now '"):
            dequantise(other, folder)
    mine.unlink()
    dequantise(str(mine), folder)  # it has served
    with pytest.raises(CaptureError, match=r"no file mine2\.gguf"):
        dequantise(str(mine.with_name("mine2.gguf")), folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(StorageError, match=r"model\.safetensors: its content"):
        dequantise(str(mine), folder)
    with pytest.raises(CaptureError, match="not a GGUF file"):
        dequantise(str(PIVOT), tmp_path / "x")


def _find_on_the_hub(environment: dict[str, str]) -> None:
    """For a child: print three refusals, then what is found and loaded."""
    client(environment)
    name = "who/m-GGUF"
    for wrong, download in [(name, True), (f"{name}/x.gguf", True), (f"{name}/m.Q8_0.gguf", False)]:
        try:
            find_checkpoint(ModelChoice(wrong), download=download)
        except FusekitError as error:
            print(type(error).__name__, error)
    found = find_checkpoint(ModelChoice(f"{name}/m.Q8_0.gguf", dtype="float32"))
    print(found.fingerprint(), found.repository, found.commit, found.gguf.parameters)
    print(load_model(found, CPU).num_parameters(), len(load_tokenizer(found)))


def test_a_gguf_file_on_the_hub_is_fetched_and_named_by_its_commit(files, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    for kind in ("F16", "Q8_0"):
        shutil.copyfile(files[kind], folder / f"m.{kind}.gguf")
    repository = Repository(folder)
    with Hub({"who/m-GGUF": repository}) as hub:
        done = run(_find_on_the_hub, {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}, timeout=240)
        fetched, commit = hub.bytes_sent_of(".gguf"), repository.commit()
    lines = done.output.splitlines()
    assert len(lines) == 5, done.output
    assert "m.F16.gguf, m.Q8_0.gguf" in lines[0]
    assert "no file x.gguf in who/m-GGUF" in lines[1]
    assert lines[2].startswith("HubUnreachableError who/m-GGUF/m.Q8_0.gguf")
    assert lines[3:] == [f"commit {commit} m.Q8_0.gguf who/m-GGUF {commit} {PARAMETERS}", f"{PARAMETERS} 768"]
    assert fetched
    assert all("m.Q8_0.gguf" in request for request in fetched)
