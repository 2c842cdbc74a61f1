"""Scores of models against the plain way to compute them; replies in batches against replies one by one."""

from __future__ import annotations

import copy
import doctest
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fusekit.capturing.models import ModelChoice
from fusekit.capturing.teacher import Teacher
from fusekit.cli import cli
from fusekit.data import reading
from fusekit.data.prepare import pack_text
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.evaluation import bits_per_byte, evaluate, exact_match, metrics
from fusekit.evaluation import table as results
from fusekit.evaluation.metrics import Question, _text, evaluate_model, held_out_rows, replies
from fusekit.generation.respond import eos_ids, prompt_of
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from fusekit.settings import EvaluateSettings
from fusekit.types import Cut, Message, Row
from tests import reference
from tests.generation.reference import greedy
from tests.helpers import refused
from tests.pipeline.conftest import finished, first  # noqa: F401
from tests.pipeline.worlds import stamps

DEMO = Path(__file__).parents[2] / "demo"
NUMBERS, PIVOT = (str(DEMO / "models" / name) for name in ("numbers", "pivot"))


def load(folder: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / folder, dtype=torch.float32)
    return model, RowTokenizer(AutoTokenizer.from_pretrained(DEMO / folder))


@pytest.fixture(scope="module")
def pivot():
    return load("models/numbers")


@pytest.fixture(scope="module", params=["models/numbers", "sources/neox"])
def loaded(request):
    return load(request.param)


def row(question: str, answer: str, dataset: str = "add") -> Row:
    return Row((Message("user", question), Message("assistant", answer)), dataset)


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
    rows = [Row(tuple(Message(*message) for message in one), "xxy"[i]) for i, one in enumerate(CONVERSATIONS)]
    expected = [slow_bits_per_byte(model, tokenizer.tokenizer, some) for some in (CONVERSATIONS[:2], CONVERSATIONS[2:])]
    for batch_tokens in (16384, 10):
        found = bits_per_byte(model, tokenizer, rows, batch_tokens=batch_tokens)
        assert found == {"x": pytest.approx(expected[0], rel=1e-5), "y": pytest.approx(expected[1], rel=1e-5)}


@torch.inference_mode()
def test_with_train_on_all_every_token_counts_and_an_answer_is_still_asked_for_after_its_header(pivot):
    model, tokenizer = pivot
    everything = RowTokenizer(tokenizer.tokenizer, train_on="all")
    one = row("57+68=", "125")
    tokens = everything.tokenize(one)
    logprobs = model(torch.tensor(tokens.ids)[None]).logits[0].double().log_softmax(-1)
    nats = -sum(float(logprobs[at - 1, tokens.ids[at]]) for at in range(1, len(tokens)))
    found = bits_per_byte(model, everything, [one])["add"]
    assert found == pytest.approx(nats / math.log(2) / len("57+68=125"), rel=1e-5)
    assert exact_match(model, everything, [one]) == exact_match(model, tokenizer, [one]) == {"add": 1.0}


TEXTS = ["Lima is the capital of Peru. 57+68=125, 11+12=23", "Reverse: abc", "sort 3 1 2"]


@pytest.mark.parametrize("folder", ["models/numbers", "sources/qwen", "sources/neox"])
def test_the_end_of_plain_text_does_not_count_and_that_of_whole_text_is_learned(folder):
    model, tokenizer = load(folder)
    content, with_ends = (
        reference.text_bits_per_byte(model, tokenizer.tokenizer, TEXTS, ends=ends) for ends in (False, True)
    )
    whole = [Row((Message("text", text),), "t") for text in TEXTS]
    pieces = [Row((Message("fragment", text),), "t") for text in TEXTS]
    longer = [Row((Message("text", text + " and so on"),), "t", Cut(0, len(text))) for text in TEXTS]
    packed = list(pack_text(pieces, [tokenizer], 200))
    assert with_ends > content + 1e-3
    for rows, learned in ((whole, with_ends), (pieces, content), (longer, content), (packed, content)):
        assert bits_per_byte(model, tokenizer, rows)["t"] == pytest.approx(content, rel=1e-6)
        # What is captured of a row is learned: the end of a whole text, and none where it was cut.
        captured = Teacher(model).score([tokenizer.tokenize(row) for row in rows]).rows
        bits = sum(row.cross_entropy for row in captured) / math.log(2)
        assert bits == pytest.approx(learned * sum(row.tokens.label_bytes for row in captured), rel=1e-6)


def test_rows_of_nothing_but_empty_answers_have_no_bits_per_byte_but_a_match(pivot):
    with refused(DataError, "'add'"):
        bits_per_byte(*pivot, [row("57+68=", "")])
    assert exact_match(*pivot, [row("57+68=", "")])["add"] == 0.0  # it answers


def test_rows_longer_than_the_model_was_made_for_are_refused_before_its_weights_are_read(pivot, tmp_path):
    model, tokenizer = pivot
    long = row("12+34=" * 200, "46", "long")
    for metric in (bits_per_byte, exact_match):
        with refused(DataError, "1 of 2", 512, "'long'", "'12+34=12+34="):
            metric(model, tokenizer, [row("57+68=", "125"), long], longest=512)
    # A reply that would leave the context is stopped at its end.
    tokens = len(tokenizer.tokenize(row("57+68=", "125")))
    assert exact_match(model, tokenizer, [row("57+68=", "125")], longest=tokens)["add"] == 1.0
    folder = shutil.copytree(NUMBERS, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"never read")
    with refused(DataError, 512):
        evaluate_model(ModelChoice(str(folder)), [long])


def test_exact_match_equals_row_by_row_generation(pivot):
    model, own, plain = pivot[0], pivot[1].tokenizer, []
    for question in QUESTIONS:
        turn, how = [{"role": "user", "content": question}], {"return_tensors": "pt", "return_dict": True}
        ids = own.apply_chat_template(turn, add_generation_prompt=True, **how)
        out = model.generate(**ids, do_sample=False, max_new_tokens=40)[0, ids["input_ids"].shape[1] :]
        plain.append(own.decode(out, skip_special_tokens=True).strip())
    right, longer, shorter = (
        [row(question, change(reply)) for question, reply in zip(QUESTIONS, plain, strict=True)]
        for change in (str, lambda reply: reply + "0", lambda reply: reply[:-1])
    )
    for batch_tokens in (16384, 40):
        assert exact_match(*pivot, right, batch_tokens=batch_tokens)["add"] == 1.0
    assert exact_match(*pivot, longer)["add"] == exact_match(*pivot, shorter)["add"] == 0.0


def test_rows_without_an_answer_are_refused(pivot):
    with refused(DataError, "assistant's answer"):
        exact_match(*pivot, [Row((Message("assistant", "a"), Message("user", "b")))])


QUESTIONS = ["57+68=", "11+12=", "Reverse: k b x q", "Sort: k b x q", "Capital of Peru?", "90+9=", "25+25="]


def asked(reads: RowTokenizer, *longest: int) -> list[Question]:
    """The questions, with the most tokens of each reply."""
    prompts = [prompt_of(reads, (Message("user", question),)) for question in QUESTIONS]
    return [Question(read.ids, longest[i % len(longest)], sorted(read.ends)) for i, read in enumerate(prompts)]


def slow_reply(model, reads: RowTokenizer, question: Question) -> str:
    ends = {*question.ends, *eos_ids(model)}
    kept = [id_ for id_ in greedy(model, list(question.prompt), ends, question.longest) if id_ not in ends]
    return reads.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@torch.inference_mode()
def test_batches_give_what_a_loop_over_tokens_gives(loaded):
    questions = asked(loaded[1], 1, 2, 3, 4, 5, 6)
    expected = [slow_reply(*loaded, question) for question in questions]
    assert len(set(expected)) > 3
    for batch_tokens in (100_000, 60, 1):  # all at once, a few, one by one
        found = replies(*loaded, questions, batch_tokens)
        # A reply has the space of its first token, which SentencePiece's decoder takes away at the start of a text.
        assert [reply.lstrip(" ") for reply in found] == [reply.lstrip(" ") for reply in expected]


def test_a_models_settings_of_generation_change_nothing(loaded):
    model, questions = loaded[0], asked(loaded[1], 8)
    plain = replies(*loaded, questions, 16384)
    own = copy.deepcopy(model.generation_config)
    try:
        model.generation_config.update(
            do_sample=True, temperature=5.0, top_k=0, repetition_penalty=4.0, no_repeat_ngram_size=1, min_new_tokens=7
        )
        model.generation_config.update(max_new_tokens=1, num_beams=3, num_return_sequences=2)
        spoilt = copy.deepcopy(model.generation_config)
        assert replies(*loaded, questions, 16384) == plain
        assert model.generation_config.to_dict() == spoilt.to_dict()  # and is left as it was
        model.generation_config.eos_token_id = None  # the template's own end of turn is enough
        assert replies(*loaded, questions, 16384) == plain
    finally:
        model.generation_config = own


def test_a_template_that_ends_turns_with_text(pivot, tmp_path):
    """The model writes the end out and goes on: what comes after it is no part of the answer."""
    model, own = pivot
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    reads = RowTokenizer(own.tokenizer, ChatTemplate.from_file(file))
    assert reads.turn_end_text == "\n"

    class Writes(torch.nn.Module):
        """Answers with fixed tokens, as a model of that template would."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.generation_config, self.weight = model.generation_config, torch.nn.Parameter(torch.zeros(1))
            self.ids = own.tokenizer(text, add_special_tokens=False)["input_ids"]

        def generate(self, input_ids, max_new_tokens, **_):
            tail = torch.tensor([self.ids[:max_new_tokens]]).expand(len(input_ids), -1)
            return torch.cat([input_ids, tail], dim=1)

    for said, right in (("Lima\nuser: b", 1.0), ("Limas\nuser", 0.0), ("Lima or so\n", 0.0)):
        assert exact_match(Writes(said), reads, [row("Capital of Peru?", "Lima")])["add"] == right


@pytest.mark.parametrize("special", [False, True])
def test_replies_are_decoded_through_the_surfaces(special):
    """A byte-level decoder takes an added letter for one of its own, which stands for another byte."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "sources" / "qwen")
    tokenizer.add_tokens(["õ", "ł"], special_tokens=special)
    reads = RowTokenizer(tokenizer)
    ids = tokenizer("põhi", add_special_tokens=False)["input_ids"]
    assert "\ufffd" in tokenizer.decode(ids)
    end = tokenizer.eos_token_id
    assert _text(reads, [*ids, end, *ids], [end]) == ("phi" if special else "põhi")
    assert _text(reads, [*ids[:1], 10**6], [end]) == "p"  # an id that only pads the model's matrix
    assert _text(reads, tokenizer("a , b 🤖")["input_ids"], [end]) == "a , b 🤖"


def record(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, object]]]:
    """What a data set on the hub holds, by split, and what was asked for."""
    held: dict[str, list[dict[str, object]]] = {"test": [record("1+1=", "2")], "asked": []}

    def records(repository: str, *, split: str, **asked: object):
        held["asked"].append({"split": split, **asked})
        return iter([(f"{repository}, row", row) for row in held[split]])

    monkeypatch.setattr(reading, "hub_records", records)
    return held


@pytest.mark.slow
def test_scores_on_rows_of_the_hub_are_made_anew_when_they_change(finished, hub) -> None:  # noqa: F811
    path, out = finished
    recipe = load_recipe(
        path, ["evaluate.path=org/set", "evaluate.revision=v1", "evaluate.name=sums", "evaluate.baseline=false"]
    )

    def scored() -> dict[str, int]:
        run(recipe, out, only="evaluate", say=lambda _: None)
        return stamps(out / "evaluation")

    before = scored()
    assert hub["asked"] == [{"split": "test", "revision": "v1", "name": "sums", "streaming": False}]
    assert scored() == before
    hub["test"] = [record("1+1=", "2"), record("2+2=", "4")]
    after = scored()
    assert all(after[f"{name}/scores.json"] != before[f"{name}/scores.json"] for name in ("pivot", "merged"))


def test_the_command_takes_folders_split_configuration_and_revision(hub, tmp_path: Path) -> None:
    for skill in ("add", "facts"):
        rows = [record(f"{skill} {number}", str(number)) for number in range(5)]
        (tmp_path / f"{skill}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes.md").write_text("no rows")
    limited = held_out_rows(EvaluateSettings(path=str(tmp_path), limit=2))  # of each file
    assert [(row.dataset, row.messages[1].content) for row in limited] == [
        ("add", "0"), ("add", "1"), ("facts", "0"), ("facts", "1")
    ]  # fmt: skip
    hub["validation"] = [record("1+1=", "2")]
    options = ["--split", "validation", "--name", "sums", "--revision", "v1", "--limit", "1", "--data", str(tmp_path)]
    result = CliRunner().invoke(cli, ["evaluate", PIVOT, "--data", "org/set", *options])
    assert result.exit_code == 0, result.output
    assert "| add | facts | org/set | mean |" in result.output
    assert hub["asked"] == [{"split": "validation", "revision": "v1", "name": "sums", "streaming": False}]


def test_command(tmp_path):
    data = tmp_path / "held_out.jsonl"
    asked = [("add", "57+68=", "125"), ("add", "25+25=", "50"), ("wrong", "11+12=", "24")]
    data.write_text("".join(json.dumps({"dataset": name, **record(q, a)}) + "\n" for name, q, a in asked))
    out = tmp_path / "scores.json"
    both = ["--metrics", "bits_per_byte", "--metrics", "exact_match", "--json", str(out)]
    models = [NUMBERS, PIVOT]
    result = CliRunner().invoke(cli, ["evaluate", *models, "--data", str(data), *both])
    assert result.exit_code == 0, result.output
    scores = json.loads(out.read_text())["models"]
    assert scores[NUMBERS]["exact_match"] == {"add": 1.0, "wrong": 0.0}
    assert scores[NUMBERS]["bits_per_byte"]["add"] < scores[PIVOT]["bits_per_byte"]["add"]
    assert "| add | wrong | mean |" in result.output
    assert f"| {NUMBERS} | 100.0 | 0.0 | 50.0 |" in result.output
    result = CliRunner().invoke(cli, ["evaluate", str(tmp_path / "none"), "--data", str(data)])
    assert result.exit_code != 0


def test_evaluate_from_python(tmp_path):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "57+68=", "completion": "125"}))
    found = evaluate(NUMBERS, tmp_path / "sums.jsonl", metrics=["exact_match", "bits_per_byte"])
    alone = evaluate_model(ModelChoice(NUMBERS), [row("57+68=", "125", "sums")])
    assert found == {NUMBERS: {"exact_match": {"sums": 1.0}, "bits_per_byte": alone["bits_per_byte"]}}
    for models, wrong in ((NUMBERS, {}), ([], {"data": tmp_path}), (NUMBERS, {"data": tmp_path, "metrics": ["acc"]})):
        with pytest.raises(DataError):
            evaluate(models, **wrong)


def test_the_examples_in_docstrings_run(tmp_path, monkeypatch):
    (tmp_path / "demo").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    for module in (metrics, results):
        assert doctest.testmod(module).failed == 0
