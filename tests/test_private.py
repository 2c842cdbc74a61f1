"""The names of mergekit and transformers that fusekit uses beyond their public interfaces: a move fails by name."""

from __future__ import annotations

import inspect
import pydoc
import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import transformers

from fusekit import mergekit_private


@pytest.mark.parametrize("name", mergekit_private.USED)
def test_the_name_is_where_it_was(name):
    package = name.partition(".")[0]
    assert pydoc.locate(name) is not None, f"{package} {version(package)} has no {name}"


def test_signatures_and_kinds_of_mergekit():
    from mergekit.card import is_hf
    from mergekit.graph import Executor
    from mergekit.io.tasks import GatherTensors, LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    assert list(inspect.signature(_model_out_config).parameters) == ["config", "arch_info", "trust_remote_code"]
    assert list(inspect.signature(is_hf).parameters) == ["path"]
    assert isinstance(LoaderCache.loaders, dict)
    assert {"method_name", "base_model", "model_order", "output_weight", "gather_tensors"} <= set(
        ExecuteMergeMethodTask.model_fields
    )
    assert "weight_info" in GatherTensors.model_fields
    assert "universe" in inspect.getsource(Executor.__init__)
    assert {"chatml", "llama3"} <= set(mergekit_private.chat_templates())


def test_the_norm_is_known_before_the_optimizer_steps():
    assert list(inspect.signature(transformers.Trainer._get_grad_norm).parameters) == ["self", "model", "grad_norm"]
    source = inspect.getsource(import_module("transformers.trainer"))
    norm, step = "self._get_grad_norm(model, grad_norm=grad_norm)", "self.optimizer.step()"
    assert 0 < source.index(norm) < source.index(step), transformers.__version__


def test_nothing_else_reaches_for_what_the_trainer_keeps_to_itself():
    own = {name for name in vars(transformers.Trainer) if name.startswith("_") and not name.startswith("__")}
    for path in (Path(mergekit_private.__file__).parent / "distillation").glob("*.py"):
        defined = re.findall(r"(?:super\(\)\.|    def |trainer\.|self\.)(_\w+)", path.read_text())
        assert not own & set(defined) - {"_get_grad_norm"}, path.name
