"""Rows as models read them: labels, own and foreign templates, rewriting templates, links, cuts."""

import functools
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fusekit.data.prepare import prepare
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError, FusekitError
from fusekit.types import Cut, Message, Part, Row
from tests.alignment.tokenizers import byte_fallback, load
from tests.capture.models import extended, model, tokenizer_for
from tests.data.spans import assert_links, assert_spans, row, spelled

TURNS = [
    ("system", "Be brief."),
    ("user", "Hello there"),
    ("assistant", "Hi, 你好 🤖"),
    ("user", "q?"),
    ("assistant", "Fine."),
]
NAMES = ["openchat-3.5", "mistral", "llama-3", "gemma", "qwen", "phi-3", "vicuna", "demo"]


def learned(tokens, reader):
    """By message."""
    numbers = np.unique(tokens.message[tokens.labels]).tolist()
    return [spelled(tokens, reader, tokens.labels & (tokens.message == n)) for n in numbers]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("name", ["qwen", "llama-3", "gemma", "phi-3", "vicuna", "mistral", "demo"])
def test_a_marked_answer_is_context_and_has_no_label(name, train_on):
    turns = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "4"))
    a, b = (model(name, train_on).tokenize(one) for one in (Row(turns), Row(turns, context=(1,))))
    assert np.array_equal(a.ids, b.ids)
    assert a.labels[a.message == 1].any()
    assert np.array_equal(b.labels, a.labels & (a.message != 1))


@functools.cache
def unmarked(name):
    template = model(name).template
    source = re.sub(r"{%-? (end)?generation -?%}", "", template.source)
    assert source != template.source
    return RowTokenizer(model(name).tokenizer, replace(template, source=source))


@pytest.mark.parametrize("name", [*NAMES, "chatml", "internlm2", "llama-3.1", "solar", "yi"])
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:3], [*TURNS, ("user", "and?")], [("user", " a "), ("assistant", "")]])
def test_labels_are_the_same_without_generation_blocks(name, turns):
    a, b = model(name).tokenize(row(turns)), unmarked(name).tokenize(row(turns))
    for field in ("ids", "message", "part", "ends", "lows", "labels"):
        assert np.array_equal(getattr(a, field), getattr(b, field)), field


@pytest.mark.parametrize("name", NAMES)
def test_the_last_end_is_learnt_or_all_but_the_first_token(name):
    tokens, whole = model(name).tokenize(row(TURNS)), model(name, "all").tokenize(row(TURNS))
    last = np.flatnonzero(tokens.part == Part.END)[-1]
    assert tokens.labels[last]
    assert tokens.message[last] == len(TURNS) - 1
    assert np.array_equal(tokens.ids, whole.ids)
    assert np.flatnonzero(~whole.labels).tolist() == [0]


def test_the_first_token_is_no_label():
    bare = ChatTemplate("bare", "{% for m in messages %}{{ m.content }}{% endfor %}")
    tokens = RowTokenizer(tokenizer_for("qwen"), bare).tokenize(row([("assistant", "Hi there")]))
    assert tokens.labels.tolist() == [False] + [True] * (len(tokens) - 1)


def test_an_eos_that_is_also_the_padding_is_learnt():
    tokenizer = extended("mistral", [], scheme="always")
    tokenizer.pad_token = tokenizer.eos_token
    tokens = RowTokenizer(tokenizer, ChatTemplate.named("mistral")).tokenize(row(TURNS))
    assert np.array_equal(tokens.labels, model("mistral").tokenize(row(TURNS)).labels)
    assert tokens.ids[-1] == tokenizer.pad_token_id
    assert tokens.labels[-1]


@pytest.mark.parametrize("source", NAMES[1:])
def test_links_between_two_models(source):
    assert_links(TURNS, model("openchat-3.5"), model(source))
    assert_links(
        [("user", ""), ("assistant", ""), ("user", " \n"), ("assistant", "  a\n")], model("openchat-3.5"), model(source)
    )


@settings(max_examples=25, deadline=None)
@given(contents=st.lists(st.text(max_size=25), min_size=2, max_size=2))
@example(contents=["", "\xa00"])
@example(contents=["", "\x850"])
@pytest.mark.parametrize("pair", [("openchat-3.5", "qwen"), ("llama-3", "gemma"), ("qwen", "phi-3")])
def test_links_over_random_contents(pair, contents):
    try:
        assert_links([("user", contents[0]), ("assistant", contents[1])], model(pair[0]), model(pair[1]))
    except FusekitError as error:
        if not any(word in str(error) for word in ("normaliser", "cannot be kept", "surrogate")):
            raise


@pytest.mark.parametrize(
    ("template", "reader", "end", "trims"),
    [
        ("openchat-3.5", "qwen", "<|im_end|>", False),
        ("qwen", "mistral", "</s>", False),
        ("llama-3", "demo", "<|end|>", True),
        ("gemma", "llama-3", "<|eot_id|>", True),
    ],
)
def test_control_strings_of_a_foreign_template_become_the_models_own(template, reader, end, trims):
    foreign = RowTokenizer(model(reader).tokenizer, ChatTemplate.named(template))
    assert_spans(TURNS[1:], foreign, end, trims=trims)
    assert foreign.ends_turns
    assert_links(TURNS[1:], model(template), foreign)


def test_a_foreign_template_from_a_file_takes_the_control_strings_of_its_tokenizer(tmp_path):
    file = tmp_path / "pivot.jinja"
    file.write_text(ChatTemplate.named("openchat-3.5").source)
    qwen = tokenizer_for("qwen")
    foreign = RowTokenizer(qwen, ChatTemplate.from_file(file), foreign=tokenizer_for("openchat-3.5"))
    named = RowTokenizer(qwen, ChatTemplate.named("openchat-3.5"))
    assert np.array_equal(foreign.tokenize(row(TURNS)).ids, named.tokenize(row(TURNS)).ids)


def test_a_model_without_an_end_of_turn_has_no_end_to_link():
    tokenizer = extended("cl100k", [])
    tokenizer.eos_token = None
    foreign = RowTokenizer(tokenizer, ChatTemplate.named("openchat-3.5"))
    tokens = foreign.tokenize(row(TURNS))
    assert not foreign.ends_turns
    assert not (tokens.part == Part.END).any()
    assert learned(tokens, foreign) == [f" {t[1]}<|end_of_turn|>" for t in TURNS if t[0] == "assistant"]
    counts = prepare([row(TURNS)], [foreign], 500).counts
    assert counts.reasons == {"unended": 1}
    assert counts.keys == {"unended": [row(TURNS).key]}


LOUD = """{%- for m in messages -%}
{%- set c = m.content | upper if m.role == 'assistant' else m.content -%}
{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def test_a_template_that_rewrites_a_content_loses_the_links_of_that_message_alone():
    reader = RowTokenizer(tokenizer_for("qwen"), ChatTemplate("loud", LOUD))
    tokens = reader.tokenize(row(TURNS))
    assert [n for n in range(5) if (tokens.part[tokens.message == n] == Part.CONTENT).any()] == [0, 1, 3]
    assert not (tokens.part[tokens.message == 4] == Part.END).any()
    assert learned(tokens, reader) == ["HI, 你好 🤖<|im_end|>", "FINE.<|im_end|>"]
    assert len(tokens.content(2)[0]) == 0
    assert prepare([row(TURNS)], [reader], 500).counts.reasons == {"unlinked": 1, "unended": 1}
    with pytest.raises(DataError, match=r"is cut in message 2, whose content .* rewrites"):
        reader.tokenize(row(TURNS, Cut(2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_cut_rows_end_at_the_same_byte(name):
    content = TURNS[2][1].encode()
    for size in [n for n in range(1, len(content) + 1) if n == len(content) or content[n] & 0xC0 != 0x80]:
        tokens = model(name).tokenize(row(TURNS, Cut(2, size)))
        inside = np.flatnonzero((tokens.message == 2) & (tokens.part == Part.CONTENT))
        assert tokens.ends[-1] == size
        assert inside[-1] == len(tokens) - 1
        assert tokens.labels[inside].all()
        assert 2 not in tokens.message[tokens.part == Part.END]
    begun = model(name).tokenize(row(TURNS, Cut(3, 0)))
    assert begun.message[-1] == 2
    assert begun.part[-1] == Part.END
    whole = model(name).tokenize(row(TURNS))
    assert np.array_equal(begun.ids, whole.ids[: len(begun)])


@pytest.mark.parametrize("cut", [Cut(5, 0), Cut(2, 5), Cut(2, 99), Cut(-1, 0)])
def test_a_cut_has_to_be_at_a_character(cut):
    with pytest.raises(DataError, match="is cut"):
        model("qwen").tokenize(row(TURNS, cut))


@pytest.mark.parametrize("name", ["openchat-3.5", "qwen", "demo"])
def test_a_model_travels_to_another_process(name):
    forged = row([*TURNS[:4], ("assistant", "<|im_end|></s><|end_of_turn|><|eot_id|>")])
    before = model(name).tokenize(forged)
    other = pickle.loads(pickle.dumps(model(name)))
    assert np.array_equal(other.tokenize(forged).ids, before.ids)
    assert other.fingerprint == model(name).fingerprint
    assert other.fingerprint != model(name, "all").fingerprint


def test_refusals_name_template_model_row_and_way_out():
    source = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}"
    reader = RowTokenizer(tokenizer_for("mistral"), ChatTemplate("strict", source))
    with pytest.raises(DataError, match=r"strict for mistral.*[0-9a-f]{32}.* system, .*System role not supported"):
        reader.tokenize(row(TURNS))
    with pytest.raises(DataError, match="mixes plain text"):
        model("qwen").tokenize(Row((Message("user", "a"), Message("text", "b"))))


@pytest.mark.parametrize("name", ["mistral", "llama3", "qwen", "deepseek", "unigram", "bert"])
def test_plain_text_is_read_as_the_tokenizer_reads_it(name):
    tokenizer = load(name)
    reader = RowTokenizer(tokenizer)
    one, two = "The quick brown fox. ", "</s><s> dogs"
    if name in ("unigram", "bert"):
        two = "the dog"
    tokens = reader.tokenize(Row((Message("text", one), Message("text", two), Message("fragment", " over the"))))
    surfaces = reader.encoder.surfaces
    first = tokenizer(one, add_special_tokens=False)["input_ids"]
    bos = len(reader._bos)
    assert tokens.ids[: bos + len(first)].tolist() == [*reader._bos, *first]
    ends = np.flatnonzero(tokens.part == Part.END)
    assert tokens.ids[ends].tolist() == [surfaces.roles["eos"]] * 2
    assert ends[0] == bos + len(first)
    assert tokens.message[ends].tolist() == [0, 1]
    assert tokens.labels[max(bos, 1) :].all()
    assert not tokens.labels[: max(bos, 1)].any()
    for number, content in enumerate([one, two, " over the"]):
        text, _ = tokens.content(number)
        size = len(content.encode())
        assert text.ends[-1] == size + (number < 2)


def test_a_document_needs_an_eos():
    tokenizer = extended("cl100k", [])
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"has no eos token.*set tokenizer\.eos_token"):
        RowTokenizer(tokenizer).tokenize(Row((Message("text", "a"),)))


@functools.cache
def mistral(adds_bos):
    """A tokenizer that may put bos before every text, as Gemma's and Llama's do."""
    tokenizer = extended("mistral", [])
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == adds_bos
    return tokenizer


# The template's bos begins every turn, as that of a small model whose bos is <|im_start|>.
TURNS_BEGIN_WITH_BOS = ChatTemplate(
    "turns", ChatTemplate.named("chatml").source, "<|im_start|>", "<|im_end|>", "<|im_end|>"
)
BOS_AT_EVERY_QUESTION = ChatTemplate(
    "questions",
    "{% for m in messages %}{% if m.role == 'user' %}<bos>[{{ m.content }}]{% else %}{{ m.content }}<eos>{% endif %}"
    "{% endfor %}",
    "<bos>",
    "<eos>",
    "<eos>",
)


@pytest.mark.parametrize(
    "template",
    [*(ChatTemplate.named(name) for name in ("chatml", "qwen", "mistral", "gemma", "llama-3", "vicuna")),
     TURNS_BEGIN_WITH_BOS, BOS_AT_EVERY_QUESTION],
    ids=lambda template: template.name,
)  # fmt: skip
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_bos_stands_once_in_front_whatever_the_template(template, train_on):
    reader, bare = (RowTokenizer(mistral(adds_bos), template, train_on) for adds_bos in (True, False))
    bos = reader.tokenizer.bos_token_id
    tokens, without = reader.tokenize(row(TURNS[1:])), bare.tokenize(row(TURNS[1:]))
    assert tokens.ids[0] == bos
    assert (tokens.ids == bos).sum() == 1
    shift = len(tokens) - len(without)
    assert shift == (without.ids[0] != bos)
    for field in ("ids", "message", "part", "ends", "lows", "labels"):
        a, b = getattr(tokens, field)[1:], getattr(without, field)[1 - shift :]
        same = a == b
        assert same[1:].all() if shift and field == "labels" and train_on == "all" else same.all(), field
    assert not tokens.labels[0]
    assert tokens.label_bytes == without.label_bytes
    cut = reader.tokenize(row(TURNS[1:], Cut(1, 2)))
    assert cut.ids[0] == bos
    assert_links(TURNS[1:], model("openchat-3.5"), reader)


def test_what_the_tokenizer_says_of_bos_counts_where_its_encoding_says_nothing():
    tokenizer = extended("mistral", [])
    tokenizer.__dict__["_add_bos_token"] = True
    assert tokenizer.add_bos_token
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    reader = RowTokenizer(tokenizer, ChatTemplate.named("chatml"))
    for text in (row(TURNS), Row((Message("text", "a b"), Message("text", "c")))):
        tokens = reader.tokenize(text)
        assert tokens.ids[0] == tokenizer.bos_token_id
        assert (tokens.ids == tokenizer.bos_token_id).sum() == 1
        assert not tokens.labels[0]


@pytest.mark.parametrize("special", [True, False])
def test_bytes_that_are_added_tokens_are_text_in_contents(special):
    backend = byte_fallback(added=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    reader = RowTokenizer(tokenizer, ChatTemplate.named("mistral"))
    assert not [s for s in reader.encoder.strings.values() if s.startswith("<0x")]
    for content, ends in (
        ("naïve,", [2, 3, 4, 5, 6, 7, 8]),
        ("na<0xC3>ï", [2, 8, 9, 10, 11]),  # the first byte token is the text's own, by name
        ("</s>ïn", [1, 2, 3, 4, 5, 6, 7, 8]),
    ):
        turns = [("user", "q"), ("assistant", content)]
        text, _ = reader.tokenize(row(turns)).content(1)
        assert text.ends[-len(ends) :].tolist() == ends
        assert prepare([row(turns)], [reader], 500).counts.reasons == {}
        assert_links(turns, reader, model("qwen"))
