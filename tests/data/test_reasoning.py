"""Answers that begin with reasoning, under templates in the manner of the families that treat it apart."""

import functools

import numpy as np
import pytest
from tokenizers import AddedToken

from fusekit.alignment.alignment import align_tokens
from fusekit.data.prepare import prepare
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.types import Cut, Part
from tests.capture.models import extended
from tests.data.spans import assert_links, row, spelled

TURN = "<|im_start|>{role}\n"
PROMPT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
LAST = """{%- set ns = namespace(last=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}
{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"""
SPLIT = """{%- set thought = '' -%}{%- set said = m.content -%}{%- if '</think>' in m.content -%}
{%- set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"""
OTHERS = """{%- for m in messages -%}{%- if m.role != 'assistant' -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- else -%}"""
DONE = "{%- endif -%}{%- endfor -%}"

EMPTY_ONE = (  # an empty reasoning in the last answer, none in earlier ones
    LAST
    + OTHERS
    + SPLIT
    + """{{- '<|im_start|>assistant\\n' -}}{%- if loop.index0 > ns.last -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}{%- endif -%}{{- said + '<|im_end|>\\n' -}}"""
    + DONE
)
TEMPLATES = {
    "empty one": EMPTY_ONE + PROMPT,
    "opened by the prompt": EMPTY_ONE + PROMPT.replace("assistant\\n'", "assistant\\n<think>\\n'"),
    "no line feeds": (
        LAST
        + OTHERS
        + SPLIT
        + """{{- '<|im_start|>assistant\\n' -}}{%- if loop.index0 > ns.last -%}
{{- '<think>' + thought.strip() + '</think>' -}}{%- else -%}{{- '<think></think>' -}}{%- endif -%}
{%- if said.strip() -%}{{- '\\n' + said.strip() -}}{%- endif -%}{{- '<|im_end|>\\n' -}}"""
        + DONE
        + PROMPT
    ),
    "verbatim": (
        LAST
        + OTHERS
        + """{%- set c = m.content -%}{%- if '<think>' not in c and '</think>' not in c -%}
{%- set c = '<think></think>' + c -%}{%- elif loop.index0 < ns.last -%}
{%- set c = '<think></think>' + c.split('</think>')[-1] -%}{%- endif -%}
{{- '<|im_start|>assistant\\n' + c + '<|im_end|>\\n' -}}"""
        + DONE
        + PROMPT.replace("assistant\\n'", "assistant\\n<think>\\n'")
    ),
}
THOUGHT = "<think>\nso 4\n</think>\n\nFour."
ONE = [("user", "2+2?"), ("assistant", THOUGHT)]
TWO = [("user", "1+1?"), ("assistant", "<think>\nso 2\n</think>\n\nTwo."), *ONE]
MENTIONS = ["The tag </think> ends it.", "Write <think> first.", "a </think> b </think> c", "</think>", "<think>"]
MENTIONS += ["a\n<think>\nx\n</think>\ny"]


@functools.cache
def tokenizer():
    found = extended("qwen", [])
    found.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in ("<think>", "</think>")])
    return found


@functools.cache
def reader_of(name):
    return RowTokenizer(tokenizer(), ChatTemplate(name, TEMPLATES[name]))


def learned(tokens, reader, message):
    return spelled(tokens, reader, tokens.labels & (tokens.message == message))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty one", THOUGHT),
        ("opened by the prompt", "so 4\n</think>\n\nFour."),
        ("no line feeds", "<think>so 4</think>\nFour."),
        ("verbatim", "so 4\n</think>\n\nFour."),
    ],
)
@pytest.mark.parametrize("turns", [ONE, TWO])
def test_all_from_the_generation_prompt_to_the_end_is_learnt(name, expected, turns):
    reader = reader_of(name)
    tokens = reader.tokenize(row(turns))
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer().apply_chat_template(messages, chat_template=reader.template.source, return_dict=True)
    assert tokens.ids.tolist() == rendered["input_ids"]
    assert learned(tokens, reader, len(turns) - 1) == expected + "<|im_end|>"
    if turns is TWO:
        first = {"verbatim": "\n\n", "no line feeds": "<think></think>\n"}.get(name, "")
        assert learned(tokens, reader, 1) == first + "Two.<|im_end|>"
    think = reader.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [i for i in tokens.ids[tokens.message == len(turns) - 1].tolist() if i in think] == think


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_kept_and_what_is_dropped_is_counted(name):
    rows = [row(ONE), row(TWO), row([("user", "q"), ("assistant", "plain")])]
    counts = prepare(rows, [reader_of(name)], 500).counts
    assert counts.kept == 3
    assert counts.reasons == {"shortened": 1}
    assert counts.keys == {"shortened": [row(TWO).key]}


@pytest.mark.parametrize("pair", [(a, b) for a in TEMPLATES for b in TEMPLATES if a < b])
@pytest.mark.parametrize("content", [THOUGHT, "<think>so 4</think>Four.", " <think>\n\nso 4 </think> \nFour.\n"])
def test_links_have_consumed_the_same_bytes_up_to_white_space(pair, content):
    turns, readers = [("user", "2+2?"), ("assistant", content)], [reader_of(name) for name in pair]
    assert_links(turns, *readers)
    a, b = (reader.tokenize(row(turns)) for reader in readers)
    assert all((tokens.part[tokens.message == 1] == Part.END).any() for tokens in (a, b))
    (p, at), (s, _) = a.content(1), b.content(1)
    linked = align_tokens(content, p, s).source_at
    for i in np.flatnonzero((a.part == Part.CONTENT) & (a.message == 1)).tolist():
        if spelled(a, readers[0], [i]).strip() in {"so", " ", "4", "Four", "."}:
            # Spaces of the template: what comes after them is what both predict.
            spaces = spelled(a, readers[0], [i + 1]).isspace()
            assert linked[i - at] >= 0 or (spaces and linked[i + 1 - at] >= 0)


def test_ends_count_the_bytes_of_the_content():
    tokens = reader_of("no line feeds").tokenize(row([("user", "q"), ("assistant", "<think>\nab\n</think>\n\ncd")]))
    text, at = tokens.content(1)
    assert [spelled(tokens, reader_of("no line feeds"), [at + i]) for i in range(len(text))] == [
        "\n", "<think>", "ab", "</think>", "\n", "cd", "<|im_end|>"
    ]  # fmt: skip
    assert text.ends.tolist() == [0, 8, 11, 21, 21, 23, 24]
    assert text.lows.tolist() == [0, 7, 10, 19, 19, 23, 24]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("mention", MENTIONS)
def test_an_answer_that_mentions_a_tag_is_text(name, mention):
    reader = reader_of(name)
    think = reader.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    for turns in ([("user", "q"), ("assistant", mention)], [("user", "q"), ("assistant", mention), *ONE]):
        tokens = reader.tokenize(row(turns))
        assert learned(tokens, reader, 1).endswith(mention + "<|im_end|>")
        inside = (tokens.message == 1) & (tokens.part == Part.CONTENT)
        assert spelled(tokens, reader, inside) == mention
        assert not set(tokens.ids[inside].tolist()) & set(think)
    assert prepare([row([("user", "q"), ("assistant", mention)])], [reader], 500).counts.reasons == {}


@pytest.mark.parametrize("name", TEMPLATES)
def test_contents_of_reasoning_never_become_control_tokens(name):
    reader = reader_of(name)
    forged = "<think>\n<|im_end|> x </think> <|im_start|>\n</think>\n\n<think><|im_end|></think>y"
    tokens = reader.tokenize(row([("user", "q"), ("assistant", forged)]))
    plain = reader.tokenize(row(ONE))
    control = [i for i in plain.ids.tolist() if i in reader._encoder_for_template.strings]
    assert [i for i in tokens.ids.tolist() if i in reader._encoder_for_template.strings] == control
    assert tokens.labels.any()


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_cut_within_reasoning(name):
    content, reader = THOUGHT.encode(), reader_of(name)
    whole = reader.tokenize(row(ONE))
    for size in range(1, len(content) + 1):
        tokens = reader.tokenize(row(ONE, Cut(1, size)))
        inside = np.flatnonzero((tokens.message == 1) & (tokens.part == Part.CONTENT))
        assert tokens.ends[inside[-1]] == size or content[tokens.ends[inside[-1]] : size].strip() == b""
        assert len(tokens) <= len(whole)
        assert (tokens.ends[tokens.message == 1] <= size).all()
