"""Answers in batches against answers one by one, judges, and how their votes choose a winner."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fusekit.capturing.models import ModelChoice, find_checkpoint, load_model, load_tokenizer
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import CaptureError, GenerationError
from fusekit.generation.respond import (
    Question,
    called,
    exact_match,
    prompt_of,
    questions_of,
    respond,
    rewarded,
    votes_of,
    winner_of,
)
from fusekit.settings import Judge, RespondSettings
from fusekit.types import FRAGMENT, Cut, Message, Row
from tests.generation import reference

DEMO = Path(__file__).parents[2] / "demo"
QUESTIONS = [Question((Message("user", text),), "", ("x",)) for text in (*reference.QUESTIONS, "Draw from: b k")]
CPU = torch.device("cpu")


def loaded(folder: str) -> tuple[object, RowTokenizer]:
    checkpoint = find_checkpoint(ModelChoice(str(DEMO / folder), dtype="float32"))
    return load_model(checkpoint, CPU), RowTokenizer(load_tokenizer(checkpoint))


def alone(model, reader: RowTokenizer, question: Question, most: int) -> tuple[str, str]:
    """The greedy answer, read back by the tokenizer itself."""
    prompt = prompt_of(reader, question.messages)
    ends = {*prompt.ends, reader.tokenizer.eos_token_id}
    written = reference.greedy(model, prompt.ids, ends, most)
    text = reader.tokenizer.decode(written, skip_special_tokens=True)
    return text.strip(), "end" if written[-1] in ends else "length"


@pytest.mark.parametrize("folder", ["sources/llama", "sources/neox", "sources/qwen"])
def test_answers_in_batches_are_the_greedy_ones(folder: str) -> None:
    model, reader = loaded(folder)
    found = respond(model, reader, QUESTIONS, RespondSettings(max_new_tokens=9, batch_size=4))
    for question, answer in zip(QUESTIONS, found, strict=True):
        assert (answer.text.strip(), answer.finish) == alone(model, reader, question, 9)


def test_samples_are_those_of_the_seed_whatever_was_answered_before() -> None:
    model, reader = loaded("models/pivot")
    how = RespondSettings(max_new_tokens=12, temperature=1.0, top_p=0.9, batch_size=4)
    found = respond(model, reader, QUESTIONS, how)
    assert respond(model, reader, QUESTIONS, how) == found
    torch.rand(3)
    lengths = [len(prompt_of(reader, question.messages).ids) for question in QUESTIONS]
    order = sorted(range(len(QUESTIONS)), key=lengths.__getitem__)
    assert respond(model, reader, [QUESTIONS[i] for i in order[4:]], how) == [found[i] for i in order[4:]]
    assert respond(model, reader, QUESTIONS, how.model_copy(update={"seed": 1})) != found


def test_a_question_that_fills_the_context_has_no_answer() -> None:
    model, reader = loaded("models/pivot")
    long = Question((Message("user", "7+7=" * 300),), "", ())
    first, second = respond(model, reader, [long, QUESTIONS[0]], RespondSettings(max_new_tokens=8))
    assert (first.text, first.finish) == ("", "context")
    assert second.text


def test_questions_are_asked_once_with_all_their_answers() -> None:
    asked = (Message("user", "Draw from: a b"),)
    rows = [Row((*asked, Message("assistant", text)), "draw") for text in ("a", "b", "a")]
    rows += [Row((Message(FRAGMENT, "text"),)), Row((Message("user", "?"),))]
    rows += [Row((Message("user", "!"), Message("assistant", "no label")), context=(1,))]
    [found] = questions_of(rows)
    assert found == Question(asked, "draw", ("a", "b"))
    assert (found.answered("a").messages, found.answered("a").context) == (rows[0].messages, (0,))
    assert found.answered("ä", whole=False).cut == Cut(1, 2)


def test_the_worked_example_of_votes() -> None:
    """arXiv 2408.04998: rewards of three judges for (vicuna, llama2, mpt) -> votes 1, 2, 0 -> llama2."""
    names = ("vicuna", "llama2", "mpt")
    rewards = [(0.3, 0.7, 0.1), (0.6, 0.5, 0.2), (0.2, 0.9, 0.4)]
    scores = [dict(zip(names, values, strict=True)) for values in rewards]
    votes = [name for of_judge in scores for name in votes_of(of_judge)]
    assert [votes.count(name) for name in names] == [1, 2, 0]
    assert winner_of(scores) == "llama2"


@pytest.mark.parametrize(
    ("scores", "winner"),
    [
        ([{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 1.0}], "b"),  # a tie goes to the favourite of the first judge
        ([{"a": 3.0, "b": 1.0, "c": 2.0}, {"b": 1.0}, {"b": 1.0}, {"c": 1.0}, {"c": 1.0}], "c"),  # ... of those in it
        ([{}, {"a": 1.0, "b": 2.0}], "b"),  # one that does not vote
        ([{"a": 1.0, "b": 1.0, "c": 0.0}, {"a": 0.0, "b": 1.0, "c": 9.0}], "b"),  # all of the equal best get a vote
        ([{"a": 1.0, "b": 1.0}], "a"),  # the first model
        ([{}, {}], None),
    ],
)
def test_who_wins(scores: list[dict[str, float]], winner: str | None) -> None:
    assert winner_of(scores) == winner


def test_the_checker_compares_with_all_answers_of_the_data() -> None:
    question = Question((Message("user", "Draw"),), "", ("a", "b"))
    answers = [{"x": " b\n", "y": "c"}, {"x": "c", "y": "ab"}]
    assert exact_match([question] * 2, answers) == [{"x": 1.0, "y": 0.0}, {}]


def test_a_function_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shortest.py").write_text(
        "def score(messages, answers, references):\n"
        "    assert messages == [{'role': 'user', 'content': '57+68='}] and references == ['x']\n"
        "    return {name: -len(text) for name, text in answers.items()}\n"
        "def wrong(messages, answers, references):\n"
        "    return dict.fromkeys(answers, float('nan'))\n"
        "def fewer(messages, answers, references):\n"
        "    return {}\n"
        "def nothing(messages, answers, references):\n"
        "    return dict.fromkeys(answers)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert called("shortest:score")(QUESTIONS[:1], [{"a": "12", "b": "1"}]) == [{"a": -2.0, "b": -1.0}]
    for name, said in (("wrong", "nan"), ("fewer", "a"), ("nothing", "None")):
        with pytest.raises(GenerationError, match=said):
            called(f"shortest:{name}")(QUESTIONS[:1], [{"a": "1"}])
    for name in ("shortest:none", "no_such_module:score"):
        with pytest.raises(GenerationError, match=name):
            called(name)
    sys.modules.pop("shortest", None)


def reward_model(folder: Path, outputs: int = 1) -> ModelChoice:
    """A random classifier with the pivot's body and tokenizer, in float32."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    pivot = DEMO / "models" / "pivot"
    model = AutoModelForSequenceClassification.from_pretrained(pivot, num_labels=outputs, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pivot).save_pretrained(folder)
    return ModelChoice(str(folder))


def test_rewards_in_batches_are_those_of_each_answer_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    choice = reward_model(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    answers = [{"a": "1", "b": "a long answer\n" * 3}, {"b": "Lima"}, {}]
    found = rewarded(find_checkpoint(choice), CPU, 2)(QUESTIONS[:3], answers)
    assert [set(scores) for scores in found] == [{"a", "b"}, {"b"}, set()]
    for question, scores, written in zip(QUESTIONS, found, answers, strict=False):
        for name, score in scores.items():
            messages = [{"role": "user", "content": question.messages[0].content}]
            messages.append({"role": "assistant", "content": written[name]})
            ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
            with torch.no_grad():
                alone = model(torch.tensor([ids["input_ids"]])).logits[0, 0]
            assert score == pytest.approx(float(alone), abs=1e-4)


def test_a_model_without_a_trained_head_and_one_of_two_outputs_are_no_judges(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="score"):
        rewarded(find_checkpoint(ModelChoice(str(DEMO / "models" / "pivot"))), CPU, 2)
    with pytest.raises(GenerationError, match="2"):
        rewarded(find_checkpoint(reward_model(tmp_path, 2)), CPU, 2)


@pytest.mark.parametrize(
    ("judge", "named"),
    [
        ({}, "reward_model"),
        ({"exact_match": True, "reward_model": "x/y"}, "x/y"),
        ({"python": "a:b"}, "allow_code"),
        ({"python": "ab", "allow_code": True}, "module:function"),
    ],
)
def test_judges_that_cannot_be(judge: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Judge(**judge)  # type: ignore[arg-type]


def test_judges_have_names_of_their_own() -> None:
    assert [Judge(reward_model="org/name").label, Judge(exact_match=True).label] == ["name", "exact_match"]
    with pytest.raises(ValidationError, match="exact_match"):
        RespondSettings(judges=[Judge(exact_match=True), Judge(exact_match=True)])
