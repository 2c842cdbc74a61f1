"""Examples from files, Python and the hub: their forms, marks and fields, and errors that name file and line."""

import itertools
import json
import os
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusekit.data.prepare import prepare
from fusekit.data.reading import DataCounts, read_rows, rows_of
from fusekit.errors import DataError, FusekitError
from fusekit.types import Cut, Message, Row
from tests.capture.models import model
from tests.helpers import refused
from tests.merging.hub_server import Hub

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = (Message("user", "q"), Message("assistant", "a"))
SYSTEM, ABOUT = Message("system", "S"), Message("user", "q\n\nc")
THOUGHT = Message("assistant", "<think>\nhm\n</think>\n\na")
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    return path


def read(record, counts=None):
    (row,) = rows_of([record], counts)
    return row


FORMS = [
    ({"messages": [U, A]}, CHAT),
    ({"id": "1", "conversations": SHAREGPT}, CHAT),
    ({"conversations": [U, A]}, CHAT),
    ({"messages": [{"role": "developer", "content": "S"}, U, A]}, (SYSTEM, *CHAT)),
    ({"instruction": "q", "input": "", "output": "a", "text": "Below is"}, CHAT),
    ({"instruction": "q", "input": "c", "output": "a"}, (ABOUT, CHAT[1])),
    ({"instruction": "q", "context": "c", "response": "a"}, (ABOUT, CHAT[1])),
    ({"prompt": "q", "response": "a", "question": "in other words"}, CHAT),
    ({"question": "q", "answer": "a", "response": "of another model"}, CHAT),
    ({"question": "q", "response": "a"}, CHAT),
    ({"prompt": "q", "completion": "a"}, CHAT),
    ({"text": "q"}, (Message("text", "q"),)),
    ({"fragment": "q"}, (Message("fragment", "q"),)),
    # What belongs to the conversation beside its messages.
    ({"messages": [U, A], "system": "S"}, (SYSTEM, *CHAT)),
    ({"messages": [{"role": "system", "content": "S"}, U, A], "system": "S"}, (SYSTEM, *CHAT)),
    ({"system_prompt": "S", "question": "q", "response": "a"}, (SYSTEM, *CHAT)),
    ({"messages": [U, A], "tools": [], "history": None, "system": ""}, CHAT),
    ({"messages": [U, A | {"reasoning_content": "hm\n"}]}, (CHAT[0], THOUGHT)),
    ({"conversations": [SHAREGPT[0], SHAREGPT[1] | {"thinking": "hm"}]}, (CHAT[0], THOUGHT)),
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_every_form_in_every_kind_of_file(tmp_path, ending):
    if ending == ".parquet":
        for number, (record, _) in enumerate(FORMS):
            kept = {key: value for key, value in record.items() if value not in ([], None)}
            write(tmp_path / f"{number:02}.parquet", [kept])
    else:
        write(tmp_path / f"data{ending}", [record for record, _ in FORMS])
    assert [row.messages for row in read_rows(tmp_path)] == [messages for _, messages in FORMS]


def test_the_key_is_stable():
    assert Row(CHAT).key == Row(CHAT, dataset="other").key == read({"messages": [U, A]}).key
    pair = (Message("user", "What?"), Message("assistant", "That ✓."))
    assert Row(pair).key == "41bece8a02d293b741391a40053a510c"
    assert len({Row(CHAT).key, Row(CHAT[::-1]).key, Row(CHAT, context=(1,)).key}) == 3


def test_files_folders_data_sets_and_limits(tmp_path, monkeypatch):
    (row,) = read_rows(write(tmp_path / "a.jsonl", [{"text": "one\r\ntwo", "dataset": "mine"}]))
    assert (row.messages, row.dataset) == ((("text", "one\r\ntwo"),), "mine")
    write(tmp_path / "c.parquet", [{"text": "b"}, {"text": ""}])
    (tmp_path / "d.txt").write_bytes("\ufeffé\r\n\ufeffx".encode())
    assert [row.messages[0].content for row in read_rows(tmp_path)] == ["one\r\ntwo", "b", "", "é\r\n\ufeffx"]
    assert [row.dataset for row in read_rows([tmp_path / "c.parquet", tmp_path], limit=4)] == ["c", "c", "mine", "c"]
    assert len(list(read_rows(tmp_path, limit=10**30))) == 4
    assert [row.dataset for row in rows_of([str(tmp_path / "d.txt"), Row(CHAT, "x")])] == ["d", "x"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(list(rows_of("~/a.jsonl"))) == 1


def test_json_lines_may_end_in_json_and_begin_with_a_mark(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(json.dumps({"messages": [U, A]}) for _ in range(2)).encode())
    assert [row.messages for row in read_rows(file)] == [CHAT] * 2
    for indent in (None, 1):
        file.write_text(json.dumps({"data": [{"messages": [U, A]}]}, indent=indent))
        assert [row.messages for row in read_rows(file)] == [CHAT]


def test_a_row_comes_back_from_its_record_and_from_the_folder_of_a_run(tmp_path):
    rows = [Row(CHAT, "d", Cut(1, 1), (0,)), Row((Message("text", "a"), Message("fragment", "b")), "")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row.to_record()) for row in rows))
    (tmp_path / "manifest.json").write_text('{"stage": "data"}')
    (tmp_path / "counts.json").write_text("{}")
    assert list(read_rows(tmp_path)) == rows
    for damaged in (rows[0].to_record() | {"key": "0" * 32}, {"key": 1, "dataset": "", "messages": [[1, 2]], "cut": 3}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="line 1"):
            list(read_rows(tmp_path))


@pytest.mark.parametrize(
    ("record", "context"),
    [
        *(({"messages": [U, A | {mark: 0}, U, A]}, (1,)) for mark in ("weight", "loss_mask")),
        *(({"messages": [U, A | {mark: False}, U, A]}, (1,)) for mark in ("train", "training", "loss")),
        *(({"messages": [U, A | {mark: value}]}, ()) for mark in ("weight", "loss") for value in (1, True, None)),
        ({"messages": [U | {"train": False}, A, U, A | {"train": True}]}, (0,)),
        ({"messages": [U, A | {"weight": 0, "train": True}]}, (1,)),
        ({"conversations": [SHAREGPT[0], SHAREGPT[1] | {"weight": 0}]}, (1,)),
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
    ("record", "named"),
    [
        *(
            ({"messages": [U, A | fields]}, ["message 1", *named])
            for fields, named in [
                ({"weight": 0.5}, ["weight 0.5"]),
                ({"loss_mask": [0, 1]}, ["loss_mask [0, 1]"]),
                ({"tool_calls": [{"name": "f"}], "content": None}, ["tool_calls"]),
                ({"function_call": {"name": "f"}}, ["function_call"]),
                ({"train_detail": [{"begin_offset": 0}]}, ["train_detail"]),
                ({"reasoning_content": "a", "thinking": "b"}, ["reasoning_content", "thinking"]),
                ({"thinking": "a", "content": "<think>b</think>c"}, ["thinking"]),
            ]
        ),
        ({"messages": [U | {"train": True}, A]}, ["message 0", "train True"]),
        ({"messages": [U, A], "loss_mask": [1, 1]}, ["message 0"]),
        ({"messages": [U, A], "loss_mask": [1]}, ["1 marks for 2 messages"]),
        ({"messages": [U | {"reasoning": "hm"}, A]}, ["reasoning"]),
        ({"messages": [U, A], "tools": '[{"type": "function"}]'}, ["'tools'"]),
        ({"instruction": "q", "output": "a", "history": [["a", "b"]]}, ["'history'"]),
        ({"messages": [{"role": "system", "content": "T"}, U, A], "system": "S"}, ["'system'"]),
        ({"messages": [U, A], "system": "S", "system_prompt": "T"}, ["'system_prompt'"]),
        ({"instruction": "q", "response": "a", "context": ["c"]}, ["'context'", "list"]),
    ],
)
def test_what_cannot_be_honoured_is_refused(record, named):
    with refused(DataError, "example 1", *named):
        read(record)


def test_fields_that_are_not_used_are_counted():
    records = [
        {"messages": [U | {"name": "x"}, A], "id": 1, "weight": 0.3, "empty": []},
        {"messages": [U, A], "id": 2, "system": "S"},
        {"instruction": "q", "output": "a", "context": "c", "text": "t"},
        {"prompt": [U], "completion": [A], "context": "c"},
        {"question": [U | {"name": "x"}], "answer": [A]},
    ]
    counts = DataCounts()
    assert len(list(rows_of(records, counts))) == 5
    assert counts.unused == {"id": 2, "messages.name": 1, "question.name": 1, "weight": 1, "context": 2, "text": 1}
    assert "id (2)" in counts.lines[1]


BAD = [
    ('{"messages": [', ["line 1", "JSON"]),
    ("[1]", ["line 1", "list", "messages"]),
    ('{"foo": 1, "bar": 2}', ["line 1", "'foo', 'bar'", "messages"]),
    ('{"messages": null}', ["line 1", "'messages'"]),
    ('{"fragment": "a", "text": "b"}', ["'fragment', 'text'"]),
    ('{"text": "a", "answer": "b"}', ["'text', 'answer'"]),
    ('{"messages": "x"}', ["'messages'", "str"]),
    ('{"messages": ["x"]}', ["message 0", "str"]),
    ('{"messages": [{"role": "tool", "content": "x"}]}', ["message 0", "'tool'", "human"]),
    ('{"messages": [{"content": "a"}]}', ["message 0", "role"]),
    ('{"messages": [{"role": "user"}]}', ["message 0", "'content'", "missing"]),
    ('{"text": "\\ud800"}', ["'text'", "surrogate", "character 0"]),
    ('{"text": "a", "dataset": "b\\ud800"}', ["'dataset'", "surrogate"]),
    ('{"text": "\xff"}', ["line 1", "utf-8"]),
]


def test_unusable_examples_are_counted_and_listed_where_the_settings_say_skip(tmp_path):
    file = tmp_path / "a.jsonl"
    good = json.dumps({"messages": [U, A]})
    lines = [*(line for line, _ in BAD), good]
    file.write_bytes("\n".join(lines).encode("latin-1"))
    counts = DataCounts("skip")
    prepared = prepare(read_rows(file, counts=counts), [model("qwen")], 100, counts=counts)
    assert [row.messages for row in prepared.rows] == [CHAT]
    assert (counts.seen, counts.kept, counts.reasons) == (len(lines), 1, {"unusable": len(BAD)})
    for number, (said, (_, named)) in enumerate(zip(counts.keys["unusable"], BAD, strict=True), 1):
        assert said.startswith(f"{file}, line {number}")
        assert all(name in said.replace(f"line {number}", "line 1") for name in named), said
    assert counts.keys["unusable"][0] in counts.lines[1]
    with pytest.raises(DataError, match="line 1"):
        list(read_rows(file))


def test_nothing_but_unusable_examples_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("nope\n" * 3)
    counts = DataCounts("skip")
    with pytest.raises(DataError, match=r"3 unusable.*line 1"):
        prepare(read_rows(tmp_path, counts=counts), [model("qwen")], 100, counts=counts)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.csv", b"a,b", ["'.csv'", ".jsonl, .json, .parquet, .txt"]),
        ("a.txt", b"a\nb\n\xff", ["utf-8"]),
        ("a.parquet", b"PAR1", ["row 0", "Parquet"]),
        ("a.json", b"[" * 100_000, ["recursion"]),
        ("a.json", b'[\n{"text": "a"},\n nope]', ["line 3"]),
        ("a.json", b"1", ["one JSON value"]),
        ("a.jsonl", None, ["does not exist"]),
        ("folder", None, ["does not exist"]),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(DataError, name, *named):
        list(read_rows(str(tmp_path / name)))


def test_what_holds_no_examples_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"\.jsonl"):
        list(read_rows(tmp_path))
    for wrong in (7, {"train": []}):
        with pytest.raises(DataError, match=type(wrong).__name__):
            list(rows_of(wrong))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_large_files_are_read_row_by_row(tmp_path, ending):
    file = write(tmp_path / f"a{ending}", [{"text": "x" * 20_000 + str(n)} for n in range(1500)])
    tracemalloc.start()
    rows = read_rows(file)
    assert [len(row.messages[0].content) for row in itertools.islice(rows, 3)] == [20_001] * 3
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".txt"])
def test_damaged_files_raise_nothing_but_our_own(tmp_path, ending, data):
    source = tmp_path / f"whole{'.jsonl' if ending == '.txt' else ending}"
    if not source.exists():
        write(source, [{"messages": [U, A]}] * 2)
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    file = tmp_path / f"damaged{ending}"
    file.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        for row in read_rows(file):
            assert isinstance(row.key, str)
    except FusekitError as error:
        if "damaged" not in str(error):
            raise


ASK = """
import sys
from fusekit.errors import DataError
from fusekit.data.reading import read_rows
for streaming in (False, True):
    try:
        print(len(list(read_rows(sys.argv[1], streaming=streaming))))
    except DataError as error:
        print("DataError:", error)
"""


def ask(tmp_path, **environment):
    """What is said of a data set, as a whole and as a stream."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", ASK, "org/data"],
        env={**base, "HF_HOME": str(tmp_path), "HF_HUB_ETAG_TIMEOUT": "2", "CI": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return result.stdout.splitlines()


def test_offline_and_unreachable_hubs_fail_fast_with_a_hint(tmp_path):
    with Hub() as hub:
        for environment, hint in (
            ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
            ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "check the network, a proxy, or HF_ENDPOINT"),
            ({"HF_ENDPOINT": hub.url}, "hf auth login"),  # which it does not have
        ):
            for said in ask(tmp_path, **environment):
                assert said.startswith("DataError: org/data is not a file or folder here")
                assert hint in said
