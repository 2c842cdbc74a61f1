"""Replies in batches against replies one by one, whatever a model's settings and tokenizer lack or add."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import CaptureError
from fusekit.evaluation import exact_match
from fusekit.evaluation.metrics import Question, _text, eos_ids, plain_generation, replies, turn_ends
from fusekit.types import Message, Row

DEMO = Path(__file__).parents[2] / "demo"
QUESTIONS = ["57+68=", "11+12=", "Reverse: k b x q", "Sort: k b x q", "Capital of Peru?", "90+9="]


@pytest.fixture(scope="module", params=["models/numbers", "sources/neox"])
def loaded(request):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = DEMO / request.param
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def prompts(tokenizer) -> list[list[int]]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]


def slow_reply(model, tokenizer, prompt: list[int], longest: int, ends: list[int]) -> str:
    """One token after the other, each the most probable, without any cache."""
    ids = list(prompt)
    for _ in range(longest):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    kept = [id_ for id_ in ids[len(prompt) :] if id_ not in ends]
    return tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@torch.inference_mode()
def test_batches_give_what_a_loop_over_tokens_gives(loaded):
    model, tokenizer = loaded
    ends = turn_ends(RowTokenizer(tokenizer))
    asked = [Question(ids, 4 + i, ends) for i, ids in enumerate(prompts(tokenizer))]
    expected = [slow_reply(model, tokenizer, q.prompt, q.longest, sorted({*ends, *eos_ids(model)})) for q in asked]
    assert len(set(expected)) > 3
    for batch_tokens in (100_000, 60, 1):  # all at once, a few, one by one
        found = replies(model, RowTokenizer(tokenizer), asked, batch_tokens)
        # A reply has the space of its first token, which SentencePiece's decoder takes away at the start of a text.
        assert [reply.lstrip(" ") for reply in found] == [reply.lstrip(" ") for reply in expected]


def test_a_models_settings_of_generation_change_nothing(loaded):
    model, tokenizer = loaded
    reads = RowTokenizer(tokenizer)
    asked = [Question(ids, 12, turn_ends(reads)) for ids in prompts(tokenizer)]
    plain = replies(model, reads, asked, 16384)
    own = copy.deepcopy(model.generation_config)
    try:
        model.generation_config.update(
            do_sample=True, temperature=5.0, top_k=0, repetition_penalty=4.0, no_repeat_ngram_size=1, min_new_tokens=11
        )
        model.generation_config.update(max_new_tokens=1, num_beams=3, num_return_sequences=2)
        spoilt = copy.deepcopy(model.generation_config)
        assert replies(model, reads, asked, 16384) == plain
        assert model.generation_config.to_dict() == spoilt.to_dict()  # and is left as it was
        model.generation_config.eos_token_id = None  # the template's own end of turn is enough
        assert replies(model, reads, asked, 16384) == plain
    finally:
        model.generation_config = own


@pytest.mark.parametrize("pad", [None, "eos"])
def test_a_tokenizer_without_a_pad_token_or_with_eos_for_it(loaded, pad):
    model, tokenizer = loaded
    reads = RowTokenizer(tokenizer)
    asked = [Question(ids, 12, turn_ends(reads)) for ids in prompts(tokenizer)]
    plain = replies(model, reads, asked, 16384)
    other = copy.deepcopy(tokenizer)
    other.pad_token = None if pad is None else other.eos_token
    assert replies(model, RowTokenizer(other), asked, 16384) == plain


def test_a_batch_that_does_not_fit_is_halved_and_a_question_that_does_not_is_named(loaded, monkeypatch):
    model, tokenizer = loaded
    reads = RowTokenizer(tokenizer)
    asked = [Question(ids, 6, turn_ends(reads)) for ids in prompts(tokenizer)]
    plain, run, sizes = replies(model, reads, asked, 16384), model.generate, []

    def full(fits: int):
        def generate(**options):
            sizes.append(len(options["input_ids"]))
            if sizes[-1] > fits:
                torch.empty(1 << 60)  # what an allocator says of more than there is
            return run(**options)

        return generate

    monkeypatch.setattr(model, "generate", full(3))
    assert replies(model, reads, asked, 16384) == plain
    assert max(sizes) == len(asked)
    monkeypatch.setattr(model, "generate", full(0))
    with pytest.raises(CaptureError, match="into memory"):
        replies(model, reads, asked[:1], 16384)


def test_settings_are_put_back_after_an_error(loaded):
    model, _ = loaded
    own = model.generation_config

    def fails() -> None:
        with plain_generation(model, [7]):
            assert 7 in model.generation_config.eos_token_id
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert model.generation_config is own


def test_a_template_that_ends_turns_with_text(loaded, tmp_path):
    """The model writes the end out and goes on: what comes after it is no part of the answer."""
    model, tokenizer = loaded
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    reads = RowTokenizer(tokenizer, ChatTemplate.from_file(file))
    assert turn_ends(reads) == []
    assert reads.turn_end_text == "\n"

    class Writes(torch.nn.Module):
        """Answers with fixed tokens, as a model of that template would."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.generation_config, self.weight = model.generation_config, torch.nn.Parameter(torch.zeros(1))
            self.ids = tokenizer(text, add_special_tokens=False)["input_ids"]

        def generate(self, input_ids, max_new_tokens, **_):
            tail = torch.tensor([self.ids[:max_new_tokens]]).expand(len(input_ids), -1)
            return torch.cat([input_ids, tail], dim=1)

    rows = [Row((Message("user", "Capital of Peru?"), Message("assistant", "Lima")), "facts")]
    assert exact_match(Writes("Lima\nuser: b"), reads, rows)["facts"].value == 1.0
    assert exact_match(Writes("Limas\nuser"), reads, rows)["facts"].value == 0.0
    assert np.isclose(exact_match(Writes("Lima or so\n"), reads, rows)["facts"].value, 0.0)


@pytest.mark.parametrize("special", [False, True])
def test_replies_are_decoded_through_the_surfaces(special):
    """A byte-level decoder takes an added letter for one of its own, which stands for another byte."""
    from tests.alignment.tokenizers import cl100k

    tokenizer = cl100k()
    tokenizer.add_tokens(["õ", "ł"], special_tokens=special)
    reads = RowTokenizer(tokenizer, ChatTemplate.named("chatml"))
    ids = tokenizer("põhi", add_special_tokens=False)["input_ids"]
    assert "\ufffd" in tokenizer.decode(ids)
    end = tokenizer.eos_token_id
    assert _text(reads, [*ids, end, *ids], [end]) == ("phi" if special else "põhi")
    assert _text(reads, [*ids[:1], 10**6], [end]) == "p"  # an id that only pads the model's matrix
    assert _text(reads, tokenizer("a , b 🤖")["input_ids"], [end]) == "a , b 🤖"
