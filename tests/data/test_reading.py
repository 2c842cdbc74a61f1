"""Files and hub ids: every form, errors that name file and line, and fuzz."""

import itertools
import json
import os
import subprocess
import sys
import time
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusekit.data.reading import read_rows
from fusekit.errors import DataError, FusekitError
from fusekit.types import Message, Row
from tests.merging.hub_server import Hub

PAIR = (Message("user", "What?"), Message("assistant", "That ✓."))
RECORDS = {
    "messages": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That ✓."}]},
    "sharegpt": {
        "id": "1",
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That ✓."}],
    },
    "sharegpt by name": {
        "conversations": [{"from": "user", "value": "What?"}, {"from": "assistant", "value": "That ✓."}]
    },
    "roles": {"conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That ✓."}]},
    "alpaca": {"instruction": "What?", "input": "", "output": "That ✓.", "text": "Below is"},
    "prompt": {"prompt": "What?", "response": "That ✓."},
    "question": {"question": "What?", "answer": "That ✓."},
}


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", sorted(RECORDS))
def test_forms(tmp_path, form, ending):
    rows = list(read_rows(write(tmp_path / f"data{ending}", [RECORDS[form]] * 3)))
    assert [row.messages for row in rows] == [PAIR] * 3
    assert {row.dataset for row in rows} == {"data"}
    assert len({row.key for row in rows}) == 1


def test_text_that_is_cut_off_says_so(tmp_path):
    rows = read_rows(write(tmp_path / "d.jsonl", [{"fragment": "goes on "}, {"text": "the end"}, {"fragment": ""}]))
    assert [row.messages for row in rows] == [(("fragment", "goes on "),), (("text", "the end"),), (("fragment", ""),)]
    with pytest.raises(DataError, match="'fragment', 'text'"):
        next(read_rows(write(tmp_path / "e.jsonl", [{"fragment": "a", "text": "b"}])))


def test_the_key_is_stable():
    assert Row(PAIR).key == Row(PAIR, dataset="other").key == "41bece8a02d293b741391a40053a510c"
    assert Row((PAIR[1], PAIR[0])).key != Row(PAIR).key


def test_inputs_datasets_and_text(tmp_path):
    records = [{"instruction": "Add.", "input": "1 2", "output": "3", "dataset": "sums"}]
    (row,) = read_rows(write(tmp_path / "a.jsonl", records))
    assert row.messages == (("user", "Add.\n\n1 2"), ("assistant", "3"))
    assert row.dataset == "sums"
    rows = read_rows(write(tmp_path / "c.parquet", [{"text": "one\r\ntwo"}, {"text": ""}]))
    assert [row.messages for row in rows] == [(("text", "one\r\ntwo"),), (("text", ""),)]
    (tmp_path / "d.txt").write_bytes("é\r\n\ufeffx".encode())
    assert next(read_rows(tmp_path / "d.txt")).messages == (("text", "é\r\n\ufeffx"),)
    assert len(list(read_rows(tmp_path))) == len(list(read_rows([tmp_path / "c.parquet", tmp_path], limit=4))) == 4
    assert len(list(read_rows(tmp_path, limit=2))) == 2
    assert len(list(read_rows(tmp_path, limit=10**30))) == len(list(read_rows(tmp_path)))


def test_json_lines_may_end_in_json_and_begin_with_a_mark(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(json.dumps(RECORDS["messages"]) for _ in range(2)).encode())
    assert [row.messages for row in read_rows(file)] == [PAIR] * 2
    for indent in (None, 1):
        file.write_text(json.dumps({"data": [RECORDS["messages"]]}, indent=indent))
        assert [row.messages for row in read_rows(file)] == [PAIR]


GOOD = json.dumps(RECORDS["messages"])
BAD = [
    (f'{GOOD}\n{{"messages": [\n{GOOD}\n', r"a\.jsonl, line 2: invalid JSON: "),
    (f"{GOOD}\n{GOOD}\n{{'a': 1}}\n", r"a\.jsonl, line 3: invalid JSON: .*\(column 2\)"),
    (f"{GOOD}\n[1]\n", r"a\.jsonl, line 2: an example is a list, not an object"),
    ('{"foo": 1, "bar": 2}', r"a\.jsonl, line 1: the keys are 'foo', 'bar'; accepted are messages \(a list of"),
    ("{}", r"line 1: the keys are none; accepted"),
    ('{"prompt": "a", "response": "b", "question": "c", "answer": "d"}', "fit several forms"),
    ('{"messages": "x"}', r"line 1: 'messages' is text, not a list"),
    ('{"messages": ["x"]}', r"line 1, message 0 is text, not an object with 'role' and 'content'"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', r"line 1, message 0 has role 'tool': known are system, human"),
    ('{"messages": [{"role": "user", "content": null}]}', r"message 0: 'content' is null, not text"),
    ('{"messages": [{"role": "user"}]}', r"message 0: 'content' is missing, not text"),
    ('{"text": "\\ud800"}', "half of a surrogate pair at character 0"),
    ('{"text": "a", "dataset": "b\\ud800"}', "'dataset' has half of a surrogate pair at character 1"),
    ('{"system": "\\ud800", "conversations": []}', "'system' has half of a surrogate pair at character 0"),
    (f'{GOOD}\n{{"text": "x"}}\n', r"line 2: 'messages' is missing, which the file's first example has"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_errors_name_file_and_line(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b", r"a\.csv ends in '\.csv': files of examples end in \.jsonl, \.json, \.parquet, \.txt"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl, line 2: invalid UTF-8 at byte 10"),
        ("a.txt", b"a\nb\n\xff", r"a\.txt, line 3: invalid UTF-8"),
        ("a.parquet", b"PAR1", r"a\.parquet, after row 0: not readable as Parquet"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[\n{"text": "a"},\n nope]', r"a\.json, line 3: invalid JSON"),
        ("a.jsonl", b'[\n{"text": "a"}\n]', r"a\.jsonl, line 1: invalid JSON: .* has to end in \.json"),
        ("config.json", b"{", r"config\.json, line 1: invalid JSON"),  # damaged, so not taken for a model's
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for place in {tmp_path / name} if name == "a.csv" else {tmp_path / name, tmp_path}:
        with pytest.raises(DataError, match=message):
            list(read_rows(place))


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist"):
        read_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"nothing\.parquet does not exist"):
        read_rows("nothing.parquet")
    with pytest.raises(DataError, match="a folder without a file"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="limit is -1"):
        read_rows(tmp_path, limit=-1)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_large_files_are_read_row_by_row(tmp_path, ending):
    file = write(tmp_path / f"a{ending}", [{"text": "x" * 20_000 + str(n)} for n in range(1500)])
    if ending == ".jsonl":
        assert file.stat().st_size > 30e6
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
        write(source, [RECORDS["messages"], RECORDS["messages"]])
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
for name in sys.argv[1:]:
    for streaming in (False, True):
        try:
            print(len(list(read_rows(name, streaming=streaming))))
        except DataError as error:
            print("DataError:", error)
"""


def ask(tmp_path, *names, **environment):
    """What is said of the data sets, each as a whole and as a stream."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env={**base, "HF_HOME": str(tmp_path), "HF_HUB_ETAG_TIMEOUT": "2", "CI": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 100
    return result.stdout.splitlines()


def test_offline_and_unreachable_hubs_fail_fast_with_a_hint(tmp_path):
    for said in ask(tmp_path, "org/data", HF_HUB_OFFLINE="1"):
        assert "DataError: org/data is not in the cache" in said
        assert "HF_HUB_OFFLINE is set: unset it once, or fetch its files" in said
    for said in ask(tmp_path, "org/data", HF_ENDPOINT="http://127.0.0.1:9"):
        assert "http://127.0.0.1:9 does not answer" in said
        assert "check the network, a proxy, or HF_ENDPOINT" in said


def test_a_data_set_that_the_hub_does_not_have(tmp_path):
    with Hub() as hub:
        missing, _, wrong, _ = ask(tmp_path, "org/nothing", "not a data set", HF_ENDPOINT=hub.url)
    assert "org/nothing is neither a file or folder nor a data set on http" in missing
    assert "check the spelling" in missing
    assert "neither a file or folder nor the id of a data set" in wrong


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"manifest.json": {"spec": {}, "shards": []}}, "a store of what a model said about examples"),
        ({"manifest.json": {"stage": "evaluate"}, "scores.json": {}}, "what the stage 'evaluate' of a run made"),
        ({"config.json": {"model_type": "llama"}, "tokenizer.json": {}}, "a model"),
        ({"adapter_config.json": {"r": 8}}, "an adapter of a model"),
        ({"recipe.resolved.yml": {}, "results.json": {}}, "the output of a run"),
    ],
)
def test_a_folder_of_something_else_is_named(tmp_path, files, what):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_rows(tmp_path)
    assert f"{tmp_path} is {what}, not examples of data: give files of examples (.jsonl, " in str(error.value)
