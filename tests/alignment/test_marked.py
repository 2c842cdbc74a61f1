"""Ends in a text with special tokens at known places."""

import numpy as np
import pytest

from fusekit.alignment.ends import Mark, marked_ends
from fusekit.alignment.surfaces import vocabulary_surfaces
from tests.capture.models import extended, tokenizer_for

TEXT = "<A>Hello  wörld 🤖 <B>  the quick<A><B>fox\n"


@pytest.mark.parametrize("base", ["mistral", "qwen", "unigram", "bert", "legacy_llama", "lowercase", "deepseek"])
def test_every_stretch_has_the_ends_of_its_own(base):
    tokenizer = extended(base, ["<A>", "<B>"])
    surfaces = vocabulary_surfaces(tokenizer)
    ids, spans = surfaces.view.encode_with_offsets(TEXT)
    of = {tokenizer.convert_tokens_to_ids(name): name for name in ("<A>", "<B>")}
    at = [i for i, id_ in enumerate(ids) if id_ in of]
    starts = [0, TEXT.index("<B>"), TEXT.rindex("<A>"), TEXT.rindex("<B>")]
    marks = [Mark(start, start + 3, ids[i]) for start, i in zip(starts, at, strict=True)]
    found = marked_ends(ids, at, TEXT, marks, surfaces, offsets=lambda: spans)
    assert found.ids.tolist() == ids
    assert (np.diff(found.ends) >= 0).all()
    for i, mark in zip(at, marks, strict=True):
        assert found.lows[i] == len(TEXT[: mark.stop].encode())
        assert found.ends[i] >= found.lows[i]
    if not surfaces.drops_space:
        assert found.ends[-1] == len(TEXT.encode())
    if found.exact and base in ("qwen", "deepseek", "mistral"):
        data = TEXT.encode()
        for i, (start, end) in enumerate(zip([0, *found.ends[:-1]], found.ends, strict=True)):
            assert data[start:end] == surfaces.of[ids[i]][len(surfaces.of[ids[i]]) - (end - start) :]


def test_special_tokens_that_swallow_space():
    tokenizer = tokenizer_for("phi-3")
    surfaces = vocabulary_surfaces(tokenizer)
    text = "<|user|>\n  hello<|end|>\n"
    ids, spans = surfaces.view.encode_with_offsets(text)
    at = [0, len(ids) - 1]
    marks = [Mark(0, 8, ids[0]), Mark(16, 23, ids[-1])]
    found = marked_ends(ids, at, text, marks, surfaces, offsets=lambda: spans)
    assert (found.lows[0], found.ends[0]) == (8, 11)
    assert (found.lows[-1], found.ends[-1]) == (23, 24)
