"""Scores of models against the plain way to compute them."""

from __future__ import annotations

import doctest
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from fusekit.capturing.engine import Teacher
from fusekit.capturing.models import ModelChoice
from fusekit.cli import cli
from fusekit.data.prepare import pack_text
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.evaluation import bits_per_byte, evaluate, exact_match, metrics
from fusekit.evaluation import table as results
from fusekit.evaluation.metrics import ends_counted, evaluate_model
from fusekit.evaluation.table import table
from fusekit.types import Cut, Message, Row
from tests import reference

DEMO = Path(__file__).parents[2] / "demo" / "models"


@pytest.fixture(scope="module")
def pivot():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = DEMO / "numbers"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, RowTokenizer(AutoTokenizer.from_pretrained(folder))


def row(question: str, answer: str, dataset: str = "add") -> Row:
    return Row((Message("user", question), Message("assistant", answer)), dataset)


def test_bits_per_byte_equals_a_plain_forward(pivot):
    model, tokenizer = pivot
    rows = [row("57+68=", "125"), row("Capital of Peru?", "Lima", "facts"), row("11+12=", "23")]
    scores = bits_per_byte(model, tokenizer, rows)
    expected = {"add": [0.0, 0, 0], "facts": [0.0, 0, 0]}
    for one in rows:
        tokens = tokenizer.tokenize(one)
        logprobs = model(torch.tensor(tokens.ids)[None]).logits[0].detach().double().log_softmax(-1)
        for at in tokens.label_positions.tolist():
            expected[one.dataset][0] -= float(logprobs[at - 1, tokens.ids[at]])
        expected[one.dataset][1] += len(one.messages[1].content.encode())
        expected[one.dataset][2] += 1
    for name, (nats, size, count) in expected.items():
        assert scores[name].rows == count
        assert scores[name].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def slow_bits_per_byte(model, tokenizer, conversations: list[list[tuple[str, str]]]) -> float:
    """By the template and the tokenizer's own offsets: every answer with its end of turn, over the answers' bytes."""
    nats, size = 0.0, 0
    for conversation in conversations:
        messages = [{"role": role, "content": content} for role, content in conversation]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
                stop = len(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False))
                spans = encoded["offset_mapping"]
                inside = [at for at, (a, b) in enumerate(spans) if start <= a and b <= stop and b > a]
                nats -= sum(float(logprobs[at - 1, ids[at]]) for at in inside)
                size += len(message["content"].encode())
    return nats / math.log(2) / size


CONVERSATIONS = [
    [("user", "57+68="), ("assistant", "125"), ("user", "Capital of Peru?"), ("assistant", "Lima"), ("user", "Why?")],
    [("system", "Be kind."), ("user", "Reverse: é k"), ("assistant", "k é"), ("user", "11+12="), ("assistant", "23")],
    [("user", "Say nothing."), ("assistant", ""), ("user", "25+25="), ("assistant", "50")],
]


@torch.inference_mode()
def test_bits_per_byte_of_several_turns_and_an_empty_answer(pivot):
    model, tokenizer = pivot
    rows = [Row(tuple(Message(*message) for message in one), "mixed") for one in CONVERSATIONS]
    expected = slow_bits_per_byte(model, tokenizer.tokenizer, CONVERSATIONS)
    for batch_tokens in (16384, 10):
        found = bits_per_byte(model, tokenizer, rows, batch_tokens=batch_tokens)["mixed"]
        assert found == (pytest.approx(expected, rel=1e-5), 3)


@torch.inference_mode()
def test_with_train_on_all_every_token_counts_and_an_answer_is_still_asked_for_after_its_header(pivot):
    model, tokenizer = pivot
    everything = RowTokenizer(tokenizer.tokenizer, train_on="all")
    one = row("57+68=", "125")
    tokens = everything.tokenize(one)
    logprobs = model(torch.tensor(tokens.ids)[None]).logits[0].double().log_softmax(-1)
    nats = -sum(float(logprobs[at - 1, tokens.ids[at]]) for at in range(1, len(tokens)))
    found = bits_per_byte(model, everything, [one])["add"]
    assert found.value == pytest.approx(nats / math.log(2) / len("57+68=125"), rel=1e-5)
    assert exact_match(model, everything, [one]) == exact_match(model, tokenizer, [one]) == {"add": (1.0, 1)}


TEXTS = ["Lima is the capital of Peru. 57+68=125, 11+12=23", "Reverse: abc", "sort 3 1 2"]


@pytest.mark.parametrize("folder", ["models/numbers", "sources/qwen", "sources/neox"])
def test_text_that_was_cut_has_no_end_and_of_whole_text_it_counts_only_if_asked_for(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = DEMO.parent / folder
    own = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = RowTokenizer(own)
    content = reference.text_bits_per_byte(model, own, TEXTS, ends=False)
    with_ends = reference.text_bits_per_byte(model, own, TEXTS, ends=True)
    whole = [Row((Message("text", text),), "t") for text in TEXTS]
    pieces = [Row((Message("fragment", text),), "t") for text in TEXTS]
    longer = [Row((Message("text", text + " and so on"),), "t", Cut(0, len(text))) for text in TEXTS]
    packed = list(pack_text(pieces, [tokenizer], 200))
    assert with_ends > content + 1e-3
    for rows in (whole, pieces, longer, packed):
        assert bits_per_byte(model, tokenizer, rows)["t"].value == pytest.approx(content, rel=1e-6)
        expected = with_ends if rows is whole else content
        found = bits_per_byte(model, tokenizer, rows, text_ends=True)
        assert found["t"].value == pytest.approx(expected, rel=1e-6)
    # What is captured of a row is learned: the end of a whole text, and none where it was cut.
    for rows, expected in ((whole, with_ends), (pieces, content), (longer, content), (packed, content)):
        captured = Teacher(model).score([tokenizer.tokenize(row) for row in rows]).rows
        sizes = [row.tokens.label_bytes for row in captured]
        assert sum(row.bits_per_byte * size for row, size in zip(captured, sizes, strict=True)) == pytest.approx(
            expected * sum(sizes), rel=1e-6
        )


def test_which_ends_count_is_said_by_source_of_data():
    rows = [row("57+68=", "125"), Row((Message("text", "a"),), "wiki"), row("a", "b", "mixed")]
    rows.append(Row((Message("fragment", "a"),), "mixed"))
    ends = ends_counted(rows)
    assert ends == {"add": True, "mixed": True, "wiki": False}
    scores = {"model": {"bits_per_byte": dict.fromkeys(ends, 1.0), "exact_match": {"add": 1.0}}}
    said = table({"models": scores, "ends_counted": ends})
    assert said.count("(add, mixed)") == said.count("(wiki)") == 1
    assert said.startswith(table({"models": scores}))


def test_rows_of_nothing_but_empty_answers_have_no_bits_per_byte_but_a_match(pivot):
    model, tokenizer = pivot
    with pytest.raises(DataError, match="'add'"):
        bits_per_byte(model, tokenizer, [row("57+68=", "")])
    assert exact_match(model, tokenizer, [row("57+68=", "")])["add"].value == 0.0  # it answers


def test_rows_longer_than_the_model_was_made_for_are_refused_before_its_weights_are_read(pivot, tmp_path):
    model, tokenizer = pivot
    long = row("12+34=" * 200, "46", "long")
    for metric in (bits_per_byte, exact_match):
        with pytest.raises(DataError) as error:
            metric(model, tokenizer, [row("57+68=", "125"), long], longest=512)
        assert all(part in str(error.value) for part in ("1 of 2", "512", "'long'", "'12+34=12+34="))
    # A reply that would leave the context is stopped at its end.
    tokens = len(tokenizer.tokenize(row("57+68=", "125")))
    assert exact_match(model, tokenizer, [row("57+68=", "125")], longest=tokens)["add"].value == 1.0
    folder = shutil.copytree(DEMO / "numbers", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(DataError, match="512"):
        evaluate_model(ModelChoice(str(folder)), [long])


def test_exact_match_equals_row_by_row_generation(pivot):
    model, tokenizer = pivot
    questions = ["57+68=", "11+12=", "90+9=", "25+25=", "Reverse: k b x q", "Sort: k b x q", "Capital of Peru?"]
    plain = []
    for question in questions:
        ids = tokenizer.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, do_sample=False, max_new_tokens=40)[0, ids["input_ids"].shape[1] :]
        plain.append(tokenizer.tokenizer.decode(out, skip_special_tokens=True).strip())
    # Every reply is right when it is taken for the answer, in one batch and in many.
    rows = [row(question, reply) for question, reply in zip(questions, plain, strict=True)]
    for batch_tokens in (16384, 40):
        assert exact_match(model, tokenizer, rows, batch_tokens=batch_tokens)["add"] == (1.0, len(rows))
    wrong = [row(question, reply + "0") for question, reply in zip(questions, plain, strict=True)]
    assert exact_match(model, tokenizer, wrong)["add"].value == 0.0
    # A prefix of the reply is not the reply.
    shorter = [row(question, reply[:-1]) for question, reply in zip(questions, plain, strict=True) if len(reply) > 1]
    assert exact_match(model, tokenizer, shorter)["add"].value == 0.0


def test_scores_are_by_source_of_data(pivot):
    model, tokenizer = pivot
    rows = [row("57+68=", "125"), row("11+12=", "24", "wrong"), row("25+25=", "50")]
    assert exact_match(model, tokenizer, rows) == {"add": (1.0, 2), "wrong": (0.0, 1)}


def test_rows_without_an_answer_are_refused(pivot):
    model, tokenizer = pivot
    with pytest.raises(DataError, match="'user'"):
        exact_match(model, tokenizer, [Row((Message("assistant", "a"), Message("user", "b")))])


def test_command(tmp_path):
    data = tmp_path / "held_out.jsonl"
    records = [
        {"dataset": name, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for name, q, a in [("add", "57+68=", "125"), ("add", "25+25=", "50"), ("wrong", "11+12=", "24")]
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "scores.json"
    both = ["--metrics", "bits_per_byte", "--metrics", "exact_match", "--json", str(out)]
    models = [str(DEMO / "numbers"), str(DEMO / "pivot")]
    result = CliRunner().invoke(cli, ["evaluate", *models, "--data", str(data), *both])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["ends_counted"] == {"add": True, "wrong": True}
    scores = json.loads(out.read_text())["models"]
    assert scores[str(DEMO / "numbers")]["exact_match"] == {"add": 1.0, "wrong": 0.0}
    assert scores[str(DEMO / "numbers")]["bits_per_byte"]["add"] < scores[str(DEMO / "pivot")]["bits_per_byte"]["add"]
    assert "| add | wrong | mean |" in result.output
    assert f"| {DEMO / 'numbers'} | 100.0 | 0.0 | 50.0 |" in result.output
    result = CliRunner().invoke(cli, ["evaluate", str(tmp_path / "none"), "--data", str(data)])
    assert result.exit_code != 0


def test_what_cannot_work_is_said_before_a_model_is_loaded(tmp_path):
    def said(*options: str) -> str:
        result = CliRunner().invoke(cli, ["evaluate", str(DEMO / "numbers"), "--data", "none.jsonl", *options])
        assert result.exit_code != 0
        return f"{result.output}{result.exception}"

    nowhere = str(tmp_path / "nowhere" / "scores.json")
    assert nowhere in said("--json", nowhere)
    assert "banana" in said("--dtype", "banana")
    assert "JSON" in said("--device-map", "{bad")
    assert "none.jsonl" in said("--allow-pickle")


def test_evaluate_from_python_is_what_the_command_writes(tmp_path):
    data = tmp_path / "sums.jsonl"
    turns = [{"role": "user", "content": "57+68="}, {"role": "assistant", "content": "125"}]
    data.write_text(json.dumps({"messages": turns}))
    model = str(DEMO / "numbers")
    found = evaluate(Path(model), data, metrics=["exact_match", "bits_per_byte"], load={"dtype": "float32"})
    assert found[model]["exact_match"] == {"sums": 1.0}
    alone = evaluate_model(ModelChoice(model, dtype="float32"), [row("57+68=", "125", "sums")])
    assert found[model]["bits_per_byte"] == {"sums": pytest.approx(alone["bits_per_byte"]["sums"].value)}
    with pytest.raises(DataError):
        evaluate(model)
    with pytest.raises(ValidationError, match="metrics"):
        evaluate(model, data, metrics=["accuracy"])


def test_the_examples_in_docstrings_run(tmp_path, monkeypatch):
    (tmp_path / "demo").symlink_to(DEMO.parent)
    monkeypatch.chdir(tmp_path)
    for module in (metrics, results):
        assert doctest.testmod(module).failed == 0
