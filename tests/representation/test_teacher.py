"""The teacher's forward against one plain forward per row and a full softmax."""

import math

import numpy as np
import pytest
import torch

from fusekit.errors import CaptureError
from fusekit.representation.batches import plan_batches
from fusekit.representation.teacher import Teacher
from fusekit.representation.topk import Selection
from tests import reference
from tests.representation.models import ARCHITECTURES, VOCABULARY, random_model, random_rows, row_of

LENGTHS = [5, 17, 2, 30, 17, 9, 30, 3]

FLOAT32_BOUND = 2e-4
"""Nats between the batched and the plain float32 forward of a model of two layers."""


def assert_equal(model, rows, scored, selection, bound, valid=None):
    assert [row.tokens for row in scored.rows] == list(rows)
    for found in scored.rows:
        total = 0.0
        for j, label in enumerate(found.tokens.label_positions.tolist()):
            ids, logprobs, tail, actual, at_one = reference.teacher_row(
                model, found.tokens.ids.tolist(), label, selection.k, selection.temperature, valid
            )
            assert found.rows.ids[j].tolist() == ids + [-1] * (selection.k - len(ids))
            np.testing.assert_allclose(found.rows.logprobs[j, : len(ids)], logprobs, atol=bound, rtol=0)
            assert found.rows.tail[j] == pytest.approx(tail, rel=bound, abs=1e-12)
            assert found.actual[j] == pytest.approx(actual, abs=bound)
            total -= at_one
        assert found.cross_entropy == pytest.approx(total, abs=bound * len(found.actual))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_of_every_architecture_are_those_of_one_plain_forward_per_row(architecture):
    model, rows, said = random_model(architecture), random_rows(LENGTHS), []
    selection = Selection(7)
    teacher = Teacher(model, selection=selection, batch_tokens=64, notify=said.append, chunk_bytes=20 * 4 * VOCABULARY)
    assert_equal(model, rows, teacher.score(rows), selection, FLOAT32_BOUND)
    assert said == []  # the head ran on the positions of labels alone
