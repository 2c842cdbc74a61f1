"""The names of mergekit that fusekit uses beyond its public interface: a move of one fails here, by name."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import version

import pytest

from fusekit import mergekit_private


@pytest.mark.parametrize("name", mergekit_private.USED)
def test_the_name_is_where_it_was(name):
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            assert hasattr(found, attribute), f"mergekit {version('mergekit')} has no {name}"
            found = getattr(found, attribute)
        return
    pytest.fail(f"mergekit {version('mergekit')} has no {name}")


def test_signatures_and_kinds():
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
