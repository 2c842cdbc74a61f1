"""The names of transformers that fusekit uses beyond its public interface: a move of one fails here, by name."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import transformers

from fusekit import transformers_private


@pytest.mark.parametrize("name", transformers_private.USED)
def test_the_name_is_where_it_was(name):
    module, owner, attribute = name.rsplit(".", 2)
    found = getattr(getattr(import_module(module), owner), attribute, None)
    assert found is not None, f"transformers {transformers.__version__} has no {name}"


def test_the_norm_is_known_before_the_optimizer_steps():
    assert list(inspect.signature(transformers.Trainer._get_grad_norm).parameters) == ["self", "model", "grad_norm"]
    source = inspect.getsource(import_module("transformers.trainer"))
    norm, step = "self._get_grad_norm(model, grad_norm=grad_norm)", "self.optimizer.step()"
    assert 0 < source.index(norm) < source.index(step), transformers.__version__


def test_no_other_file_reaches_for_what_the_trainer_keeps_to_itself():
    own = {name for name in vars(transformers.Trainer) if name.startswith("_") and not name.startswith("__")}
    for path in (Path(transformers_private.__file__).parent / "distillation").glob("*.py"):
        defined = re.findall(r"(?:super\(\)\.|    def |trainer\.|self\.)(_\w+)", path.read_text())
        assert not own & set(defined), path.name
