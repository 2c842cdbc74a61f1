"""Marks and fields of examples: honoured, refused or counted; nothing is dropped unseen."""

import json

import numpy as np
import pytest

from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import DataCounts, read_rows, rows_of
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.types import Cut, Message, Row
from tests.alignment.tokenizers import load
from tests.capture.models import model

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = (Message("user", "q"), Message("assistant", "a"))
SYSTEM = Message("system", "S")


def read(record, counts=None):
    (row,) = rows_of([record], counts)
    return row


@pytest.mark.parametrize(
    ("record", "context"),
    [
        *(({"messages": [U, A | {mark: 0}, U, A]}, (1,)) for mark in ("weight", "loss_mask")),
        *(({"messages": [U, A | {mark: False}, U, A]}, (1,)) for mark in ("train", "training", "loss")),
        *(({"messages": [U, A | {mark: value}]}, ()) for mark in ("weight", "loss") for value in (1, True, None)),
        ({"messages": [U | {"train": False}, A, U, A | {"train": True}]}, (0,)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]}, (1,)),
        ({"messages": [U, A, U, A], "loss_mask": [0, 0, 0, 1]}, (0, 1, 2)),
        ({"messages": [U, A, U, A], "loss_mask": [0, 0, 0, 1], "system": "S"}, (1, 2, 3)),
        ({"messages": [U, A], "weight": 0}, (0, 1)),
        ({"messages": [U, A], "train": False, "loss": True}, (0, 1)),
        ({"instruction": "q", "output": "a", "loss": False}, (0, 1)),
        ({"prompt": [U, A, U], "completion": [A]}, (0, 1, 2)),
        ({"text": "a", "weight": 0}, (0,)),
        ({"messages": [U, A], "weight": 0.3, "loss": 1.7, "train": "a"}, ()),  # measures of the example
    ],
)
def test_marks_say_which_messages_are_context(record, context):
    assert read(record).context == context


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"weight": 0.5}, ["weight 0.5"]),
        ({"loss_mask": [0, 1]}, ["loss_mask [0, 1]"]),
        ({"weight": 0, "train": True}, ["weight 0", "train True"]),
        ({"tool_calls": [{"name": "f"}], "content": ""}, ["tool_calls"]),
        ({"tool_calls": [{"name": "f"}], "content": None}, ["tool_calls"]),
        ({"function_call": {"name": "f"}}, ["function_call"]),
        ({"train_detail": [{"begin_offset": 0}]}, ["train_detail"]),
        ({"reasoning_content": "a", "thinking": "b"}, ["reasoning_content", "thinking"]),
        ({"thinking": "a", "content": "<think>b</think>c"}, ["thinking"]),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, named):
    with pytest.raises(DataError, match="example 1, message 1") as error:
        read({"messages": [U, A | fields]})
    assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": [U | {"train": True}, A]}, "message 0"),
        ({"messages": [U, A], "loss_mask": [1, 1]}, "message 0"),
        ({"messages": [U, A], "loss_mask": [1]}, "1 marks for 2 messages"),
        ({"messages": [U | {"reasoning": "hm"}, A]}, "reasoning"),
        ({"messages": [U, A], "tools": [{"type": "function"}]}, "'tools'"),
        ({"messages": [U, A], "tools": '[{"type": "function"}]'}, "'tools'"),
        ({"messages": [U, A], "history": [["a", "b"]]}, "'history'"),
        ({"messages": [{"role": "system", "content": "T"}, U, A], "system": "S"}, "'system'"),
        ({"messages": [U, A], "system": 7}, "'system' is an int"),
        ({"messages": [{"content": "a"}]}, "message 0 has no 'role'"),
        ({"messages": [U | {"role": None}]}, "message 0 has no 'role'"),
        ({"instruction": "q", "output": "a", "history": [["a"]]}, "'history'"),
        ({"instruction": "q", "output": "a", "history": [["a", 1]]}, "'answer'"),
        ({"instruction": "q", "response": "a", "context": ["c"]}, "'context'"),
        ({"messages": [U, A], "system": "S", "system_prompt": "T"}, "'system_prompt'"),
    ],
)
def test_examples_that_would_be_read_as_others_are_refused(record, named):
    with pytest.raises(DataError) as error:
        read(record)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [U, A], "system": "S"}, (SYSTEM, *CHAT)),
        ({"messages": [{"role": "system", "content": "S"}, U, A], "system": "S"}, (SYSTEM, *CHAT)),
        ({"instruction": "q", "output": "a", "system": "S"}, (SYSTEM, *CHAT)),
        ({"prompt": "q", "response": "a", "system": "S"}, (SYSTEM, *CHAT)),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, (("user", "x"), ("assistant", "y"), *CHAT)),
        ({"messages": [U, A], "tools": [], "history": None, "system": ""}, CHAT),
        ({"messages": [{"role": "developer", "content": "S"}, U, A]}, (SYSTEM, *CHAT)),
        ({"system_prompt": "S", "question": "q", "response": "a"}, (SYSTEM, *CHAT)),
        ({"question": "q", "answer": "a", "response": "of another model"}, CHAT),
        ({"prompt": "q", "response": "a", "question": "in other words"}, CHAT),
        ({"instruction": "q", "context": "c", "response": "a"}, (("user", "q\n\nc"), CHAT[1])),
        ({"instruction": "q", "context": "", "response": "a"}, CHAT),
        ({"messages": [U, A], "tools": "[]"}, CHAT),
        ({"messages": [U, A | {"tool_calls": [], "reasoning_content": None}]}, CHAT),
        *(
            ({"messages": [U, A | {field: " hm\n"}]}, (CHAT[0], ("assistant", "<think>\nhm\n</think>\n\na")))
            for field in ("reasoning_content", "reasoning", "thinking")
        ),
    ],
)
def test_fields_that_belong_to_the_conversation_are_in_it(record, messages):
    assert read(record).messages == messages


def test_fields_that_are_not_used_are_counted():
    counts = DataCounts()
    records = [
        {"messages": [U | {"name": "Ann"}, A | {"name": "Bob"}], "id": 3, "dataset": "d", "note": ""},
        {"messages": [U, A], "id": 4, "weight": 0.3},
    ]
    list(rows_of(records, counts))
    assert counts.unused == {"id": 2, "messages.name": 1, "weight": 1}
    assert "id (2)" in counts.lines[1]
    list(rows_of([{"instruction": "q", "output": "a", "context": "c", "text": "t"}], counts := DataCounts()))
    assert counts.unused == {"context": 1, "text": 1}
    list(rows_of([{"prompt": [U], "completion": [A], "context": "c"}], counts := DataCounts()))
    assert counts.unused == {"context": 1}


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("name", ["qwen", "llama-3", "gemma", "phi-3", "vicuna", "mistral", "demo"])
def test_a_marked_answer_is_context_and_has_no_label(name, train_on):
    turns = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "4"))
    plain, marked = Row(turns), Row(turns, context=(1,))
    a, b = (model(name, train_on).tokenize(row) for row in (plain, marked))
    assert np.array_equal(a.ids, b.ids)
    assert a.labels[a.message == 1].any()
    assert np.array_equal(b.labels, a.labels & (a.message != 1))
    assert plain.key != marked.key


def test_an_example_without_a_supervised_message_is_counted():
    rows = [Row(CHAT, context=(0, 1)), Row(CHAT)]
    prepared = prepare(rows, [model("qwen")], 100)
    assert [row.context for row in prepared.rows] == [()]
    assert prepared.counts.reasons == {"no_label": 1}
    with pytest.raises(DataError, match="marked as context"):
        list(pack_text([Row((Message("text", "a"),), context=(0,))], [RowTokenizer(load("qwen"))], 16))


LINES = [
    json.dumps({"messages": [U, A]}),
    '{"messages": [',
    json.dumps({"messages": [U, A | {"weight": 0.5}]}),
    json.dumps({"messages": [{"content": "a"}]}),
    json.dumps({"text": "a"}),
    json.dumps({"messages": [U, A | {"content": "b"}]}),
]


def test_unusable_examples_are_counted_and_listed_where_the_settings_say_skip(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes("\n".join(LINES).encode() + b'\n{"text": "\xff"}\n')
    counts = DataCounts("skip")
    prepared = prepare(read_rows(file, counts=counts), [model("qwen")], 100, counts=counts)
    assert (len(prepared.rows), counts.seen, counts.kept, counts.reasons) == (2, 7, 2, {"unusable": 5})
    places = [line.split(": ")[0] for line in counts.keys["unusable"]]
    assert [place.partition(", message")[0] for place in places] == [f"{file}, line {n}" for n in (2, 3, 4, 5, 7)]
    assert "weight 0.5" in counts.lines[2]
    with pytest.raises(DataError, match="line 2"):
        list(read_rows(file))


@pytest.mark.parametrize(("ending", "number"), [(".json", "example 1"), (".parquet", "row 1"), (".jsonl", "line 1")])
def test_a_first_example_that_is_unusable_does_not_decide_the_form(tmp_path, ending, number):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / f"a{ending}"
    records = [{"messages": None}, {"messages": [U, A]}]
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        file.write_text(json.dumps(records) if ending == ".json" else "\n".join(map(json.dumps, records)))
    counts = DataCounts("skip")
    assert [row.messages for row in read_rows(file, counts=counts)] == [CHAT]
    assert number in counts.keys["unusable"][0]


def test_nothing_but_unusable_examples_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("nope\n" * 3)
    counts = DataCounts("skip")
    with pytest.raises(DataError, match=r"3 unusable.*line 1"):
        prepare(read_rows(tmp_path, counts=counts), [model("qwen")], 100, counts=counts)


def test_a_row_comes_back_from_its_record(tmp_path):
    rows = [Row(CHAT, "d", Cut(1, 1), (0,)), Row((Message("text", "a"), Message("fragment", "b")), "")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row.to_record()) for row in rows))
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    (tmp_path / "manifest.json").write_text('{"stage": "data"}')
    (tmp_path / "counts.json").write_text("{}")
    assert list(read_rows(tmp_path)) == rows
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0].to_record() | {"key": "0" * 32}))
    with pytest.raises(DataError, match="line 1"):
        list(read_rows(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"key": 1, "dataset": "", "messages": [[1, 2]], "cut": 3}')
    with pytest.raises(DataError, match="line 1"):
        list(read_rows(tmp_path))


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(LINES[0])
    assert [row.messages for row in rows_of("~/a.jsonl")] == [CHAT]
