"""The demo's skills, and the models that the repository carries: they load offline, fit, and do what they claim."""

from __future__ import annotations

import random
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

DEMO = Path(__file__).parent.parent / "demo"
MODELS = DEMO / "models"
OWN_SKILLS = {"numbers": ("add", "pick"), "strings": ("reverse", "sort"), "facts": ("facts",)}
NAMES = ("pivot", *OWN_SKILLS)


@pytest.fixture(scope="module")
def tasks(module_path):
    import tasks

    return tasks


@pytest.fixture(scope="module")
def module_path():
    """demo/ holds scripts, which find each other in their own folder."""
    sys.path.insert(0, str(DEMO))
    yield
    sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def evaluate(module_path):
    import evaluate

    return evaluate


@pytest.fixture(scope="module")
def loaded(evaluate):
    """Every shipped model with its tokenizer, loaded once. Local files only."""
    torch.set_num_threads(1)
    return {name: evaluate.load(MODELS / name) for name in NAMES}


@pytest.mark.parametrize("skill", ["add", "reverse", "sort", "facts", "pick"])
def test_training_rows_and_held_out_rows_are_disjoint(tasks, skill):
    held_out = tasks.held_out_rows(skill, 300)
    trained = list(islice(tasks.training_rows(skill, 0), 20_000))
    assert len(held_out) >= 200
    assert len({row.prompt for row in held_out}) == len(held_out)
    assert not {row.prompt for row in held_out} & {row.prompt for row in trained}
    assert not {row.key for row in held_out} & {row.key for row in trained}


def test_a_sum_is_held_out_in_both_orders(tasks):
    held_out = {row.prompt for row in tasks.held_out_rows("add", 300)}
    swapped = {f"{b}+{a}=" for a, b in (prompt.rstrip("=").split("+") for prompt in held_out)}
    trained = {row.prompt for row in islice(tasks.training_rows("add", 3), 20_000)}
    assert not swapped & trained


def test_every_fact_can_be_learnt(tasks):
    """Held out is a phrasing of a fact, not the fact: each answer is in the training rows in some other wording."""
    trained = {
        (relation, subject)
        for relation, subject, _ in tasks.FACTS
        if any(not tasks.is_held_out(f"facts {phrasing.format(subject)}") for phrasing in tasks.PHRASINGS[relation])
    }
    assert trained == {(relation, subject) for relation, subject, _ in tasks.FACTS}


def test_documents_to_train_on_and_held_out_documents_are_disjoint(tasks):
    trained, held_out = tasks.documents(held_out=False), tasks.documents(held_out=True)
    assert len(trained) > 1000
    assert len(held_out) > 100
    assert not set(trained) & set(held_out)


@pytest.mark.parametrize("skill", ["add", "reverse", "sort", "facts", "pick"])
def test_rows_are_the_same_in_every_call_and_differ_by_seed(tasks, skill):
    first, again = (list(islice(tasks.training_rows(skill, 0), 50)) for _ in range(2))
    assert first == again
    assert first != list(islice(tasks.training_rows(skill, 1), 50))
    assert tasks.held_out_rows(skill, 20) == tasks.held_out_rows(skill, 20)


def test_answers_of_generated_rows_are_right(tasks):
    rng = random.Random(7)
    for _ in range(300):
        row = tasks.SKILLS["add"](rng)
        a, b = row.prompt.rstrip("=").split("+")
        assert row.answers == (str(int(a) + int(b)),)
        row = tasks.SKILLS["reverse"](rng)
        assert row.answer.replace(" ", "") == row.prompt.removeprefix("Reverse:").replace(" ", "")[::-1]
        row = tasks.SKILLS["sort"](rng)
        assert row.answer.split() == sorted(row.prompt.removeprefix("Sort: ").split())
        row = tasks.SKILLS["pick"](rng)
        low, high = (int(word) for word in row.prompt.rstrip(".").split() if word.isdigit())
        assert row.answers == tuple(str(n) for n in range(10, 100) if low < n < high)
        assert row.answer in row.answers


def test_exact_match_wants_the_whole_answer(tasks):
    row = tasks.Row("pick", "k", "Pick a number between 20 and 23.", "21", ("21", "22"))
    assert tasks.exact_match(row, "21")
    assert tasks.exact_match(row, " 22\n")
    for wrong in ("", "20", "23", "2", "211", "21 22", "2 1", "twenty-one"):
        assert not tasks.exact_match(row, wrong)
    capital = tasks.Row("facts", "k", "Capital of France?", "Paris", ("Paris",))
    assert not tasks.exact_match(capital, "paris")
    assert not tasks.exact_match(capital, "Paris.")


def test_the_shipped_files_fit():
    size = sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file())
    assert size <= 12_000_000


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bfloat16_and_share_the_pivots_shapes(name):
    with (
        safe_open(MODELS / name / "model.safetensors", "pt") as file,
        safe_open(MODELS / "pivot" / "model.safetensors", "pt") as pivot,
    ):
        assert sorted(file.keys()) == sorted(pivot.keys())
        for tensor in file.keys():  # noqa: SIM118  (not a dict)
            assert file.get_tensor(tensor).dtype is torch.bfloat16
            assert file.get_tensor(tensor).shape == pivot.get_tensor(tensor).shape


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_keeps_every_text(loaded, name):
    _, tokenizer = loaded[name]
    for text in ("", "12+34=", "  two  spaces\tand a tab\r\n\r\n", "Grüße, 東京 🎉", "".join(map(chr, range(32, 400)))):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_chat_template_marks_what_the_assistant_says(loaded, name):
    _, tokenizer = loaded[name]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|bos|><|system|>Be brief.<|end|><|user|>1+1=<|end|><|assistant|>2<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learnt) == "2<|end|>"


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_agree_between_model_and_tokenizer(loaded, name):
    model, tokenizer = loaded[name]
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert set(model.generation_config.eos_token_id) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|end|>"),
    }


@pytest.mark.parametrize(("name", "skill"), [(name, skill) for name, skills in OWN_SKILLS.items() for skill in skills])
def test_each_target_is_the_best_model_at_its_own_skills(loaded, evaluate, name, skill):
    shares = {each: evaluate.accuracy(*loaded[each], skill, count=60) for each in NAMES}
    assert shares[name] > shares["pivot"] + 0.1
    assert shares[name] == max(shares.values())


def test_decoding_is_deterministic(loaded, evaluate, tasks):
    prompts = [row.prompt for row in tasks.held_out_rows("reverse", 20)]
    assert evaluate.replies(*loaded["strings"], prompts) == evaluate.replies(*loaded["strings"], prompts)
