"""What cannot be handled exactly is refused with the tokenizer's name and the reason; importing stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from fusekit.alignment import vocabulary_surfaces
from fusekit.alignment.alignment import align
from fusekit.alignment.ends import tokenize
from fusekit.errors import AlignmentError
from tests.alignment.tokenizers import load


def test_importing_loads_neither_torch_nor_transformers():
    code = (
        "import sys, fusekit.alignment; print([m for m in ('torch', 'transformers', 'mergekit') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def named(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.name_or_path = "some/model"
    return tokenizer


def word_level() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))


def suffixed() -> Tokenizer:
    backend = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder()
    return backend


def ctc() -> Tokenizer:
    backend = word_level()
    backend.decoder = decoders.CTC()
    return backend


def squeezing() -> Tokenizer:
    backend = Tokenizer.from_str(load("lowercase").backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("aa", "b")
    return backend


@pytest.mark.parametrize(
    ("make", "reason"),
    [(suffixed, "end-of-word suffix '</w>'"), (ctc, "decoder CTC")],
)
def test_vocabularies_without_fixed_bytes(make, reason):
    with pytest.raises(AlignmentError) as error:
        vocabulary_surfaces(named(make()))
    assert "some/model" in str(error.value)
    assert reason in str(error.value)


def test_a_text_that_a_normaliser_changes_beyond_undoing():
    tokenizer = named(squeezing())
    assert tokenize("abc", tokenizer).ends[-1] == 3
    with pytest.raises(AlignmentError) as error:
        tokenize("xaay", tokenizer)
    assert "some/model" in str(error.value)
    assert "Replace" in str(error.value)


def test_python_components():
    class Custom:
        def pre_tokenize(self, text):
            return None

    backend = word_level()
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Custom())
    with pytest.raises(AlignmentError, match="custom Python code"):
        vocabulary_surfaces(backend)


def test_slow_tokenizers_are_rebuilt_where_that_is_exact():
    text = "Grüße 🤖"
    tokenizer = ByT5Tokenizer()
    alignment = align(text, tokenizer, load("qwen"))
    assert alignment.pivot_ends.tolist() == list(range(1, len(text.encode()) + 1))
    assert (alignment.source_at >= 0).sum() == len(alignment.source_ids)


def test_slow_tokenizers_that_cannot_be_rebuilt():
    with pytest.raises(AlignmentError) as error:
        vocabulary_surfaces(CanineTokenizer())
    assert "CanineTokenizer" in str(error.value)
    assert "slow" in str(error.value)


def test_words_without_pieces():
    """A word-level vocabulary over white space: words and unknowns end where their text ends."""
    backend = word_level()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = tokenize("a  zz b ", backend)
    assert tokens.ids.tolist() == [0, 2, 1]
    assert (tokens.lows.tolist(), tokens.ends.tolist()) == ([1, 5, 7], [3, 6, 8])
