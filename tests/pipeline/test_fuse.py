"""``mergekit-fuse``: mergekit's options for a run, each with its meaning or refused."""

from __future__ import annotations

import shutil
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from mergekit.options import MergeOptions

from fusekit.cli.fuse import OF_THE_RUN, REFUSED, fuse
from fusekit.errors import FusekitError, MergeError, RecipeError
from tests.pipeline.worlds import stamps

ROOT = Path(__file__).parents[2]


def fused(recipe: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(fuse, [str(recipe), str(out), *options])


def test_it_has_all_options_of_mergekit_and_no_name_of_its_scripts():
    names = {parameter.name for parameter in fuse.params}
    assert set(MergeOptions.model_fields) <= names
    assert not set(REFUSED) & set(OF_THE_RUN)
    assert {*REFUSED, *OF_THE_RUN} <= set(MergeOptions.model_fields)
    owned = {entry.name for entry in entry_points(group="console_scripts") if entry.value.startswith("mergekit.")}
    assert "mergekit-yaml" in owned
    assert fuse.name == "mergekit-fuse"
    assert fuse.name not in owned
    assert 'mergekit-fuse = "fusekit.cli.fuse:main"' in (ROOT / "pyproject.toml").read_text()


def test_its_options_reach_the_merge(finished):
    path, out = finished
    shutil.rmtree(out / "merged")
    before = stamps(out / "targets")
    options = ("--until", "merge", "--out-shard-size", "500K", "--quiet", "--no-write-model-card")
    result = fused(path, out, *options)
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    assert result.output == ""
    assert (out / "merged" / "model.safetensors.index.json").is_file()
    assert not (out / "merged" / "README.md").exists()
    assert stamps(out / "targets") == before
    again = fused(path, out, *options)
    assert again.exit_code == 0, again.exception


@pytest.mark.parametrize("option", [["--lora-merge-cache", "x"], ["--allow-crimes"], ["--no-safe-serialization"]])
def test_an_option_that_can_mean_nothing_is_refused(option, first, tmp_path):
    result = fused(first[0] / "recipe.yml", tmp_path / "out", *option)
    assert isinstance(result.exception, FusekitError)
    assert "safetensors" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "option", [["--cuda"], ["--gpu-rich"], ["--multi-gpu"], ["--device", "cuda:1"], ["--device", "foo"]]
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_done(option, first, tmp_path):
    result = fused(first[0] / "recipe.yml", tmp_path / "out", *option)
    assert isinstance(result.exception, MergeError)
    assert not (tmp_path / "out").exists()


def test_trust_for_all_models_is_said_aloud_and_stands_in_the_recipe(first, tmp_path):
    options = ("--trust-remote-code", "--quiet", "--until", "data")
    result = fused(first[0] / "recipe.yml", tmp_path / "out", *options)
    assert result.exit_code == 0, result.exception
    assert result.output.startswith("warning: --trust-remote-code: Python code that comes with any of these models may")
    assert "models/pivot, " in result.output
    assert "sources/llama" in result.output
    assert (tmp_path / "out" / "recipe.resolved.yml").read_text().count("trust_remote_code: true") == 2


def test_the_cache_is_that_of_every_model_of_the_run(first, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from fusekit import hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE)
    asked: list[str] = []
    monkeypatch.setattr(hub, "explain", lambda *_: asked.append(constants.HF_HUB_CACHE) or RecipeError("asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache"
    options = ("--set", "pivot.model=org/name", "--transformers-cache", str(cache))
    fused(first[0] / "recipe.yml", tmp_path / "out", *options)
    assert asked == [str(cache.resolve())]
