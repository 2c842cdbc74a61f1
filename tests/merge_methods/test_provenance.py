"""Records of merge coefficients: who gets them, what they say, and what happens when they cannot be written."""

import json
import threading

import pytest
import torch
from mergekit.merge_methods import merge_tensors

from fusekit.merge_methods import record_coefficients, sce

BASE, FIRST, SECOND = torch.zeros(4), torch.full((4,), 2e-4), torch.full((4,), 6e-4)


def merge(method="fusechat_sce", name="w", **parameters):
    return merge_tensors(
        [BASE, FIRST, SECOND], method, ids=["base", "a", "b"], base_index=0, name=name, parameters=parameters
    )


def test_a_record_says_what_the_function_returns():
    with record_coefficients() as record:
        assert not record.tensors
        merge(select_topk=0.5)
        merge("varm", name="v")
    expected = sce(BASE, [FIRST, SECOND], select_topk=0.5, count_erased=True)
    tensor = record.as_dict()["tensors"]["w"]
    assert tensor["coefficients"] == {"a": pytest.approx(0.1), "b": pytest.approx(0.9)}
    assert tensor["coefficients"]["a"] == expected.coefficients[0]
    assert (tensor["selected"], tensor["erased"]) == (0.5, {"a": 0.0, "b": 0.0})
    assert tensor["parameters"] == {"select_topk": 0.5, "variant": "paper"}
    assert "unit" not in tensor
    assert json.loads(record.to_json()) == record.as_dict()


def test_records_nest_and_end_and_see_other_threads():
    with record_coefficients() as outer:
        with record_coefficients() as inner:
            thread = threading.Thread(target=merge)
            thread.start()
            thread.join()
        merge(name="later")
    merge(name="unrecorded")
    assert set(inner.tensors) == {"w"}
    assert set(outer.tensors) == {"w", "later"}


def test_a_models_name_cannot_break_the_table():
    with record_coefficients() as record:
        ids = ["base", "a|b", "<img src=x onerror=alert(1)>"]
        merge_tensors([BASE, FIRST, SECOND], "fusechat_sce", ids=ids, base_index=0, name="w")
    rows = [line for line in record.markdown().splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {6}
    assert "<img" not in record.markdown()


def test_markdown_has_a_row_per_model():
    with record_coefficients() as record:
        merge()
    text = record.markdown()
    assert "| a | 0.1000 | 0.1000 | 0.1000 | 0.0% |" in text
    assert "| b | 0.9000 |" in text
    assert "Selected: 100.0% of the elements" in text
