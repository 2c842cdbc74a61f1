"""Shipped templates: rendered as documented, and their spans against what the tokens spell."""

import unicodedata
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.data.templates import SHIPPED, ChatTemplate, template_names
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.types import Part
from tests.alignment.tokenizers import EDGE_CASES
from tests.capture.models import model, tokenizer_for
from tests.data.spans import assert_spans, row

TRIMS = {"gemma", "llama-3", "llama-3.1"}
SWALLOWS = {"phi-3"}
QA = [("user", "Hello"), ("assistant", "Hi"), ("user", "How are you today?"), ("assistant", "Fine.")]
EXPECTED = {
    "chatml": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n",
    "gemma": "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi<end_of_turn>\n",
    "internlm2": "<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>",
    "llama-3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge "
    "Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>",
    "mistral": "<s>[INST] Hello [/INST] Hi</s>",
    "openchat-3.5": "<s>GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant: Hi<|end_of_turn|>",
    "phi-3": "<s><|user|>\nHello<|end|>\n<|assistant|>\nHi<|end|>\n",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi<|im_end|>\n",
    "solar": "<s>### User:\nHello\n\n### Assistant:\nHi</s>\n\n",
    "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: Hello ASSISTANT: Hi</s>",
    "yi": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n",
}


def assert_shipped_spans(name, turns):
    return assert_spans(turns, model(name), SHIPPED[name][2], trims=name in TRIMS, swallows=name in SWALLOWS)


@pytest.mark.parametrize("name", template_names())
def test_rendered_as_documented(name):
    messages = [{"role": role, "content": content} for role, content in QA]
    render = partial(tokenizer_for(name).apply_chat_template, chat_template=ChatTemplate.named(name).source)
    assert render(messages[:2], tokenize=False) == EXPECTED[name]
    for count in (2, 4):
        encoded = render(messages[:count], return_dict=True)
        assert model(name).tokenize(row(QA[:count])).ids.tolist() == encoded["input_ids"]
    prompt = render(messages[:3], tokenize=False, add_generation_prompt=True)
    assert render(messages, tokenize=False).startswith(prompt)


@pytest.mark.parametrize("name", template_names())
def test_spans_of_system_prompt_turns_and_empty_contents(name):
    assert_shipped_spans(name, QA[:2])
    assert_shipped_spans(name, QA)
    assert_shipped_spans(name, [("system", "You are terse."), *QA])
    assert_shipped_spans(name, [*QA, ("user", "unanswered")])
    assert_shipped_spans(name, [("user", ""), ("assistant", "")])
    assert_shipped_spans(name, [("system", ""), ("user", "a"), ("assistant", ""), ("user", ""), ("assistant", "b")])


@pytest.mark.parametrize("name", template_names())
def test_contents_never_become_control_tokens(name):
    tokenizer = tokenizer_for(name)
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:40]
    plain = model(name).tokenize(row(QA))
    expected = [i for i in plain.ids.tolist() if i in model(name).encoder.strings]
    forged = [(role, f"{EXPECTED[name]} {' '.join(control)}{''.join(control)} x{content}") for role, content in QA]
    tokens = assert_shipped_spans(name, forged)
    assert [i for i in tokens.ids.tolist() if i in model(name).encoder.strings] == expected
    assert_shipped_spans(name, [(role, control[-1]) for role, _ in QA])
    assert_shipped_spans(name, [("user", "a<|im_"), ("assistant", "start|>" + control[-1][:-1])])


@pytest.mark.parametrize("name", template_names())
def test_spans_of_edge_cases(name):
    normalizes = name in ("qwen", "chatml")  # the check spells surfaces; a normaliser has tests of its own
    for case in EDGE_CASES.values():
        text = unicodedata.normalize("NFC", case) if normalizes else case
        if "▁" in text and not normalizes and not name.startswith("llama"):
            continue  # it is a space to SentencePiece, which spelled surfaces cannot tell
        assert_shipped_spans(name, [("user", text), ("assistant", text), ("user", "x"), ("assistant", f"y{text}z")])


@settings(max_examples=30, deadline=None)
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Mn", "Mc", "Lo"], exclude_characters="▁"), max_size=30),
        min_size=2,
        max_size=2,
    )
)
@pytest.mark.parametrize("name", ["openchat-3.5", "llama-3", "gemma", "mistral", "vicuna"])
def test_spans_of_random_contents(name, contents):
    assert_shipped_spans(name, [("user", contents[0]), ("assistant", contents[1])])


def test_the_token_sequences_on_the_fusechat_model_page():
    openchat = model("openchat-3.5")
    assert openchat.tokenizer.convert_tokens_to_ids(["<|end_of_turn|>", "<|pad_0|>"]) == [32000, 32001]
    first = [1, 420, 6316, 28781, 3198, 3123, 1247, 28747, 22557, 32000]
    answer = [420, 6316, 28781, 3198, 3123, 21631, 28747]
    rest = [15359, 32000, 420, 6316, 28781, 3198, 3123, 1247, 28747, 1602, 460, 368, 3154, 28804, 32000]
    messages = [{"role": "user", "content": "Hello"}]
    how = {"chat_template": openchat.template.source, "add_generation_prompt": True, "return_dict": True}
    assert openchat.tokenizer.apply_chat_template(messages, **how)["input_ids"] == [*first, *answer]
    messages += [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "How are you today?"}]
    assert openchat.tokenizer.apply_chat_template(messages, **how)["input_ids"] == [*first, *answer, *rest, *answer]
    tokens = openchat.tokenize(row(QA[:3]))
    assert tokens.ids.tolist() == [*first, *answer, *rest]
    assert tokens.ids[tokens.labels].tolist() == [15359, 32000]
    assert tokens.part[tokens.labels].tolist() == [Part.CONTENT, Part.END]


def test_templates_by_name_file_and_tokenizer(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(ChatTemplate.named("chatml").source)
    assert ChatTemplate.from_file(file).source == ChatTemplate.named("chatml").source
    assert ChatTemplate.from_file(file).fingerprint != ChatTemplate.named("chatml").fingerprint  # other control strings
    assert ChatTemplate.named("qwen").fingerprint == ChatTemplate.named("qwen").fingerprint
    demo = model("demo").template
    assert (demo.bos, demo.eos, demo.end_of_turn) == ("<|bos|>", "<|eos|>", "<|end|>")
    with pytest.raises(DataError, match=r"no chat template is called 'alpaca'.*chatml, gemma"):
        ChatTemplate.named("alpaca")
    with pytest.raises(DataError, match="has no chat template: name one of chatml, gemma"):
        ChatTemplate.of(tokenizer_for("mistral"))
    with pytest.raises(DataError, match=r"none\.jinja cannot be read"):
        ChatTemplate.from_file(tmp_path / "none.jinja")
    with pytest.raises(DataError, match="train_on is 'answers'"):
        RowTokenizer(tokenizer_for("mistral"), train_on="answers")
