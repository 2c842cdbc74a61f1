"""Faults 12 and 25: what is not loaded, and the error that says what to do."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from fusekit.capturing.models import (
    ModelChoice,
    find_checkpoint,
    load_model,
    load_tokenizer,
    loading_mistakes,
    longest_input,
    valid_ids,
)
from fusekit.errors import CaptureError
from tests.capture.conftest import DEMO, write_rows
from tests.helpers import edit_config, refused, tiny_llama
from tests.merging.hub_server import Hub, Repository
from tests.merging.test_hub import run as run_at_hub

CPU = torch.device("cpu")
OWN_CODE = {"AutoModelForCausalLM": "code.Model"}


@pytest.fixture
def model(tmp_path):
    return tiny_llama(tmp_path / "model")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_pickled_weights_are_refused_unless_allowed_and_run_nothing_even_then(model, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(CaptureError, match=r"pickled \(.*pytorch_model\.bin\).*--allow-pickle"):
        find_checkpoint(ModelChoice(str(model)))
    allowed = ModelChoice(str(model), allow_pickle=True)
    assert load_model(find_checkpoint(allowed), CPU).config.vocab_size == 64
    torch.save({**weights, "x": Bomb(str(tmp_path / "exploded"))}, model / "pytorch_model.bin")
    with pytest.raises(CaptureError, match="cannot be loaded"):
        load_model(find_checkpoint(allowed), CPU)
    assert not (tmp_path / "exploded").exists()


def test_code_of_a_model_runs_only_when_allowed_for_it(model, tmp_path):
    edit_config(model, model_type="homemade", auto_map={"AutoConfig": "code.Config", **OWN_CODE})
    (model / "code.py").write_text(
        "import os\n"
        f"os.makedirs({str(tmp_path / 'ran')!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'homemade'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    with pytest.raises(CaptureError, match=r"Python code of its own.*--trust-remote-code"):
        find_checkpoint(ModelChoice(str(model)))
    assert not (tmp_path / "ran").exists()
    loaded = load_model(find_checkpoint(ModelChoice(str(model), trust_remote_code=True)), CPU)
    assert type(loaded).__name__ == "Model"
    assert (tmp_path / "ran").exists()


def test_a_known_architecture_is_loaded_without_the_code_that_comes_with_it(model, tmp_path):
    edit_config(model, auto_map=OWN_CODE)
    (model / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    assert type(load_model(find_checkpoint(ModelChoice(str(model))), CPU)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda m: (m / "config.json").unlink(), r"has no config\.json"),
        (lambda m: (m / "model.safetensors").unlink(), "has no weights"),
        (lambda m: (m / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'), "not a weight file in"),
        (lambda m: (m / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'), r"b\.safetensors is not there"),
    ],
)
def test_folders_that_lack_something_are_named_with_it(model, break_it, expected):
    break_it(model)
    with pytest.raises(CaptureError, match=expected):
        find_checkpoint(ModelChoice(str(model)))


def test_weights_that_are_cut_off_are_named(model):
    os.truncate(model / "model.safetensors", 9000)
    with pytest.raises(CaptureError, match=r"safetensors is damaged: 9000 bytes, .* describes \d+"):
        load_model(find_checkpoint(ModelChoice(str(model))), CPU)


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("./nowhere", None, "there is no folder ./nowhere"),
        ("a/b/c", None, "there is no folder a/b/c"),
        (__file__, None, "is a file"),
        (str(DEMO / "numbers"), "main", "the revision 'main' has no meaning"),
    ],
)
def test_names_that_are_no_model_fail_without_a_network(name, revision, expected):
    with pytest.raises(CaptureError, match=expected):
        find_checkpoint(ModelChoice(name, revision=revision))


def test_a_home_folder_is_a_name_of_models(monkeypatch, model):
    monkeypatch.setenv("HOME", str(model.parent))
    assert find_checkpoint(ModelChoice(f"~/{model.name}")).folder == model.resolve()


def test_an_adapter_alone_is_refused_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with refused(CaptureError, "adapter of some/base", f"some/base+{tmp_path}"):
        find_checkpoint(ModelChoice(str(tmp_path)))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("attn_implementation", "foo", "foo"),
        ("device_map", "foo", "foo"),
        ("device_map", {"model": "cuda:99"}, "cuda:99"),
        ("quantization", {"quant_method": "foo"}, "foo"),
    ],
)
def test_what_a_model_cannot_be_loaded_with_is_known_before(field, value, named):
    sound = ModelChoice("model", attn_implementation="sdpa", device_map="auto")
    assert list(loading_mistakes(sound)) == []
    ((found, says),) = loading_mistakes(replace(sound, **{field: value}))
    assert found == field
    assert named in says


def test_a_fingerprint_changes_with_any_weight_and_not_with_the_place(model, tmp_path):
    one = find_checkpoint(ModelChoice(str(model))).fingerprint()
    shutil.copytree(model, tmp_path / "copy")
    copy = find_checkpoint(ModelChoice(str(tmp_path / "copy")))
    assert copy.fingerprint() == one
    content = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(content)
    assert copy.fingerprint() != one


def test_ids_that_are_tokens_and_the_longest_input(model):
    checkpoint = find_checkpoint(ModelChoice(str(model)))
    assert valid_ids(load_tokenizer(checkpoint)).tolist() == list(range(32))
    assert longest_input(checkpoint) == 64


def test_hub_models_are_pinned_to_a_commit_and_gated_or_unknown_ones_fail_fast(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 4)
    shutil.copytree(DEMO / "numbers", tmp_path / "numbers")
    sound = Repository(tmp_path / "numbers")
    wrong = {
        ("demo/gated", "gated"): "demo/gated is gated: accept its licence at",
        ("demo/misspelled", "none"): "demo/misspelled is not a local folder and not a model on",
        ("demo/numbers", "other", "--revision", "nope"): "revision/nope",
    }
    calls = [("demo/numbers", "out"), *wrong]
    commands = [[model, "rows.jsonl", *rest, "--max-length", "64", "--quiet"] for model, *rest in calls]
    with Hub({"demo/numbers": sound, "demo/gated": Repository(tmp_path / "numbers", gated=True)}) as hub:
        fine, *others = run_at_hub(tmp_path, commands, "capture", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "cache"))
        commit = sound.commit()
    assert fine.status == 0, fine.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["inputs"]["model_fingerprint"] == f"commit {commit}"
    for result, expected in zip(others, wrong.values(), strict=True):
        assert result.status == 1
        assert expected in result.output
        assert "Traceback" not in result.output
        assert result.seconds < 20
    assert not (tmp_path / "gated").exists()
