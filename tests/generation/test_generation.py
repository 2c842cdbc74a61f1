"""Every mode against a reference that reads everything anew, and what must hold for any models and texts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusekit.capturing.models import ModelChoice
from fusekit.generation import GenerationError, GenerationSettings, generate
from fusekit.generation.ensemble import MODES, mean_perplexity
from fusekit.generation.reader import Cursor, Reader, load_readers, unfinished
from fusekit.generation.respond import Prompt
from fusekit.types import Message
from tests.generation import reference
from tests.generation.reference import QUESTIONS
from tests.helpers import refused

DEMO = Path(__file__).parents[2] / "demo"
FOLDERS = ("models/pivot", "sources/llama", "sources/neox", "sources/qwen")
EVERY_MODE = [("unite", {}), ("safe", {"threshold": 1.0}), ("cool", {}), ("cool", {"segment": "aligned"})]
every_mode = pytest.mark.parametrize(("mode", "more"), EVERY_MODE, ids=["unite", "safe", "shortest", "aligned"])


@pytest.fixture(scope="module")
def readers() -> dict[str, Reader]:
    """float32: two ways to the same bfloat16 logits round differently."""
    found = load_readers([ModelChoice(str(DEMO / folder), dtype="float32") for folder in FOLDERS])
    return {reader.name: reader for reader in found}


def chosen(readers, names: str) -> list[Reader]:
    return [readers[name] for name in names.split()]


def slow(readers, names: str, question: str) -> list[reference.Model]:
    leads = {"neox": " "}
    return [
        reference.Model(r.name, r.model, r.tokenizer, question, leads.get(r.name, "")) for r in chosen(readers, names)
    ]


@pytest.mark.parametrize("names", ["pivot llama neox qwen", "neox qwen"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_unite_is_the_reference(readers, names, question):
    [found] = generate(chosen(readers, names), question, mode="unite", max_new_tokens=16, top_k=5)
    text, scores = reference.unite(slow(readers, names, question), 16, 5)
    assert found.text == text
    assert [segment.score for segment in found.segments] == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("names", ["pivot llama neox qwen", "neox llama"])
@pytest.mark.parametrize("threshold", [0.6, 1.0])
def test_safe_is_the_reference(readers, names, threshold):
    taken = 0
    for question in QUESTIONS:
        [found] = generate(
            chosen(readers, names), question, mode="safe", max_new_tokens=16, top_k=5, threshold=threshold
        )
        text, scores, fused = reference.safe(slow(readers, names, question), 16, 5, threshold)
        assert found.text == text
        assert np.prod([segment.score for segment in found.segments]) == pytest.approx(np.prod(scores), rel=1e-3)
        assert sum(len(segment.scores) > 1 for segment in found.segments) in (fused, fused - 1)  # the last may end it
        taken += fused
    assert taken > 1


@pytest.mark.parametrize("question", QUESTIONS)
def test_cool_is_the_reference(readers, question):
    names = "pivot llama neox qwen"
    [found] = generate(chosen(readers, names), question, mode="cool", max_new_tokens=24, max_segment=8)
    text, segments = reference.cool(slow(readers, names, question), len(found.segments), 8)
    assert found.text == text
    assert [(segment.text, segment.model) for segment in found.segments] == [(s, m) for s, m, _ in segments]
    assert [segment.score for segment in found.segments] == pytest.approx([score for *_, score in segments], rel=1e-3)


def test_the_arithmetic_mean_of_perplexities_chooses():
    """Candidates "the", "a red", "The answer"; rows are scorers. By mean nats "The answer" would win."""
    table = np.log([[2.4596, 2.2255, 3.1582], [3.0042, 1.8221, 1.4918], [3.6693, 2.4596, 2.0138]])
    scores = [mean_perplexity([[nats] for nats in column])[0] for column in table.T]
    assert scores == pytest.approx([3.0444, 2.1691, 2.2213], abs=1e-4)
    assert int(np.argmin(scores)) == 1
    assert int(np.argmin(table.mean(axis=0))) == 2
    assert mean_perplexity([[1.0, 3.0]])[1] == pytest.approx([np.exp(2.0)])


def test_safe_without_doubt_is_the_first_model_alone(readers):
    [found] = generate(chosen(readers, "qwen neox"), "def close(self):", mode="safe", threshold=0.0, max_new_tokens=40)
    assert found.text == alone(slow(readers, "qwen", "def close(self):")[0], 40)
    assert {segment.model for segment in found.segments} == {"qwen"}


def alone(m: reference.Model, most: int) -> str:
    """What transformers has a model write."""
    ids = torch.tensor([m.prompt])
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    written = m.model.generate(ids, max_new_tokens=most, **settings)[0, ids.shape[1] :].tolist()
    return b"".join(m.surfaces.of[i] for i in written if i not in m.ends).decode().removeprefix(m.lead)


def test_rerank_keeps_the_answer_of_lowest_perplexity(readers):
    """Of the fused answer and those that each model writes alone, by the scores of a reader of the whole."""
    names = "pivot llama neox qwen"
    for question in QUESTIONS[:3]:
        [fused] = generate(chosen(readers, names), question, mode="cool", max_new_tokens=12)
        [found] = generate(chosen(readers, names), question, mode="cool", max_new_tokens=12, rerank=True)
        models = slow(readers, names, question)

        def score(text, models=models):
            return np.mean([np.exp(np.mean(reference.nats(m, m.tokens(m.lead + text), 0))) for m in models])

        assert score(found.text) == pytest.approx(
            min(score(text) for text in [fused.text, *(alone(m, 12) for m in models)]), rel=1e-3
        )


@every_mode
def test_the_same_answers_every_time(readers, mode, more):
    models = chosen(readers, "pivot neox qwen")
    first = generate(models, QUESTIONS[:3], mode=mode, max_new_tokens=8, **more)
    assert generate(models, QUESTIONS[:3], mode=mode, max_new_tokens=8, **more) == first
    assert generate(models, QUESTIONS[2], mode=mode, max_new_tokens=8, **more) == [first[2]]


@pytest.mark.parametrize("mode", ["unite", "safe"])
def test_a_seed_decides_what_is_sampled(readers, mode):
    def sampled(seed, prompts=QUESTIONS[:3], first=0):
        models = chosen(readers, "pivot neox")
        options = {"temperature": 1.5, "seed": seed, "threshold": 1.0, "max_new_tokens": 8}
        return [a.text for a in generate(models, prompts, mode=mode, first=first, **options)]

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert sampled(0, QUESTIONS[1:3], first=1) == sampled(0)[1:]


class Scripted(torch.nn.Module):
    """Reads with a real model and its cache, but writes one text, token by token, whatever it is asked."""

    def __init__(self, reader: Reader, prompt: list[int], text: str) -> None:
        super().__init__()
        self.reader, self.start, self.text, self.read = reader, len(prompt), text.encode(), list[int]()
        self.config, self.generation_config, self.name_or_path = reader.model.config, reader.model.generation_config, ""
        self.ids, self.ends = reader.tokens(self.text)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int) -> Any:
        self.read[past_key_values.get_seq_length() :] = input_ids[0].tolist()
        logits = torch.zeros_like(self.reader.model(input_ids, past_key_values=past_key_values).logits)
        first = len(self.read) - len(logits[0])
        for at in range(len(logits[0])):
            written = b"".join(self.reader.surfaces.of[i] for i in self.read[self.start : first + at + 1])
            if self.text.startswith(written) and first + at + 1 >= self.start:
                logits[0, at, self.after(len(written))] = 4.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def after(self, size: int) -> int:
        """The token behind the first bytes of the text."""
        if size == len(self.text):
            return min(self.reader.ends)
        if size in (0, *self.ends):
            return next(id_ for id_, end in zip(self.ids, self.ends, strict=True) if end > size)
        return (self.reader.pieces(self.text[size : size + 12]) or [])[0]


def scripted(readers: list[Reader], text: str) -> tuple[list[Reader], list[Cursor]]:
    """Models that write ``text`` after a prompt, and cursors of theirs."""
    prompts = [reader.prompt([Message("user", "?")], raw=True) for reader in readers]
    models = [
        Reader(Scripted(reader, prompt.ids, text), reader.tokenizer, reader.name)
        for reader, prompt in zip(readers, prompts, strict=True)
    ]
    return models, [Cursor(model, prompt) for model, prompt in zip(models, prompts, strict=True)]


@every_mode
@pytest.mark.parametrize("text", ["🙂 naïve 👩‍👩‍👧!", "東京 ภาษาไทย é", "a\u0301b\r\n\tx  "])
@pytest.mark.parametrize("names", ["pivot neox", "neox llama"])
def test_characters_are_never_split(readers, mode, more, text, names):
    """Byte-level pieces of an emoji beside byte fallback: the models agree on the text, but on none of its tokens."""
    models, _ = scripted(chosen(readers, names), text)
    assert any(len(models[1].tokens(c.encode())[0]) > 1 for c in text)
    [found] = generate(models, "?", mode=mode, raw=True, max_new_tokens=64, **more)
    assert found.text == text
    assert "".join(segment.text for segment in found.segments) == text
    assert found.finish == "end"


@pytest.mark.parametrize("mode", ["unite", "safe"])
@pytest.mark.parametrize("names", ["pivot neox qwen", "neox pivot"])
def test_what_is_sampled_at_random_is_text(readers, mode, names):
    for cut in (5, 40):
        [found] = generate(
            chosen(readers, names), "é", mode=mode, temperature=50.0, threshold=1.0, top_k=500, max_new_tokens=cut
        )
        assert "\ufffd" not in found.text
        assert found.text.encode().decode() == found.text
    assert not found.text.isascii()


def test_a_begun_character_has_a_length():
    assert [unfinished(data) for data in (b"a", b"\xf0\x9f", "é".encode(), b"a\xc3", b"\xc3a", b"\x80")] == [
        0, 2, 0, 1, None, None,
    ]  # fmt: skip


@every_mode
def test_no_model_reads_the_text_again_and_again(readers, mode, more):
    """Tokens forwarded: the prompt, the answer, and what is re-read around each segment; and the tokens that a window
    of the text gives are those of all of it.
    """
    text = (Path(__file__).parents[2] / "LICENSE").read_text()[:240]
    _, cursors = scripted(chosen(readers, "qwen neox llama"), text)
    settings = GenerationSettings(mode=mode, max_new_tokens=1000, raw=True, **more)
    written, segments = "", 0
    for segment in MODES[mode](cursors, settings, np.random.default_rng(0)):
        written, segments = written + segment.text, segments + 1
        for cursor in cursors[mode == "safe" :]:  # the main model of safe keeps what it wrote
            cursor.follow(written.encode())
            if len(written) % 20 == 0:
                assert (cursor.ids, cursor.ends) == cursor.reader.tokens(written.encode())
    assert written == text
    for cursor in cursors:
        answer, prompt = len(cursor.ids), len(cursor) - len(cursor.ids)
        assert answer > 100
        again = {"unite": 1, "safe": 1, "cool": 2}[mode]  # of each segment a retokenised end; of cool a draft, a score
        assert prompt + answer - 1 <= cursor.forwarded <= prompt + 2 * answer + again * segments


def tiny(kind: str) -> Any:
    import transformers as t

    shape = {"vocab_size": 768, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    config = {
        "full": lambda: t.LlamaConfig(**shape, **heads),
        "sliding": lambda: t.Gemma3TextConfig(
            **shape, **heads, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
        "recurrent": lambda: t.MambaConfig(**shape, state_size=4),
        "hybrid": lambda: t.Lfm2Config(**shape, **heads, layer_types=["conv", "full_attention"]),
        "state": lambda: t.Qwen3NextConfig(
            **shape, **heads, layer_types=["linear_attention", "full_attention"], num_experts=0,
            linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            mlp_only_layers=[0, 1],
        ),
    }[kind]()  # fmt: skip
    return t.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["full", "sliding", "recurrent", "hybrid", "state"])
def test_a_text_that_changes_is_read_as_if_it_were_new(readers, kind):
    """Drafts, steps back and other ends: the rows are those of the whole text, also where no cache can be cropped."""
    model, pivot = tiny(kind), readers["pivot"]
    cursor = Cursor(Reader(model, pivot.tokenizer, "tiny"), Prompt(pivot.tokens(b"a prompt of some tokens")[0], b""))

    def assert_as_if_new():
        with torch.inference_mode():
            rows = model(torch.tensor([cursor._prompt + cursor.ids])).logits[0].log_softmax(-1)
        torch.testing.assert_close(cursor._read(len(cursor), len(cursor))[0], rows[-1], atol=1e-5, rtol=1e-4)
        start = len(cursor._prompt)
        expected = [-float(rows[start + i - 1][id_]) for i, id_ in enumerate(cursor.ids)]
        assert cursor.nll(0) == pytest.approx(expected, rel=1e-4)

    for text in (b"the first words of it", b"the first words of iteration 12", b"the", b"the second, much longer text"):
        cursor.rewind(0)
        cursor.follow(text)
        assert_as_if_new()
    before = cursor.ids[:], cursor.ends[:]
    for id_ in cursor.reader.tokens(b" and more")[0]:
        cursor.push(id_)
        assert_as_if_new()
    cursor.ids, cursor.ends = before
    assert_as_if_new()


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("named", "how"),
    [
        (["two", "pivot"], {"models": ["demo/models/pivot"]}),
        (["two", "demo"], {"models": "demo/models/pivot"}),
        (["mode", "vote", "unite"], {"mode": "vote"}),
        (["threshold", "1.5"], {"threshold": 1.5}),
        (["tempo"], {"tempo": 1}),
        (["rerank", "safe"], {"rerank": True}),
        (["temperature", "0.7"], {"mode": "cool", "temperature": 0.7}),
        (["empty"], {"prompts": ""}),
        (["no prompt"], {"prompts": []}),
        (["empty"], {"prompts": ["x", [{"role": "user", "content": ""}]]}),
        (["assistant"], {"prompts": [USER, {"role": "assistant", "content": "b"}]}),
        (["2 messages"], {"prompts": [{"role": "system", "content": "a"}, USER], "raw": True}),
        (["role"], {"prompts": [{"content": "a"}]}),
        (["512", "pivot"], {"prompts": "1+" * 400}),
    ],
)
def test_what_cannot_be_generated_is_refused(readers, named, how):
    with refused(GenerationError, *named):
        generate(**({"models": chosen(readers, "pivot llama"), "prompts": "x"} | how))


def test_a_model_without_a_template_continues_raw_text(readers):
    import copy

    bare = copy.copy(readers["llama"].tokenizer)
    bare.chat_template = None
    models = [readers["pivot"], (readers["llama"].model, bare)]
    with pytest.raises(GenerationError, match="raw"):
        generate(models, "x")
    [found] = generate(models, "def close(self):", raw=True, max_new_tokens=4)
    assert found.finish == "length"


def test_a_context_that_is_full_ends_the_answer(readers, monkeypatch):
    models = chosen(readers, "qwen pivot")
    monkeypatch.setattr(models[1], "limit", 36)
    for mode, more in EVERY_MODE:
        prompt = "    def close(self):\n        return"
        [found] = generate(models, prompt, mode=mode, raw=True, max_new_tokens=100, max_segment=8, **more)
        assert found.finish in ("context", "end")
        assert len(models[1].tokens(found.text.encode())[0]) < 36
