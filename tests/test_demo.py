"""The demo's skills, and the models that the repository carries: they load offline, fit, and do what they claim."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

DEMO = Path(__file__).parent.parent / "demo"
MODELS = DEMO / "models"
SOURCES = DEMO / "sources"
OWN_SKILLS = {"numbers": ("add", "pick"), "strings": ("reverse", "sort"), "facts": ("facts",)}
NAMES = ("pivot", *OWN_SKILLS)
ARCHITECTURES = {"llama": "LlamaForCausalLM", "neox": "GPTNeoXForCausalLM", "qwen": "Qwen3ForCausalLM"}
SKILLS = ("add", "reverse", "sort", "facts", "pick", "draw", "weather", "code")
HELD_OUT_QUESTIONS = dict.fromkeys(SKILLS, 200) | {"weather": 50}  # a table of 480 entries holds out one in eight


@pytest.fixture(scope="module")
def scripts():
    """demo/ holds scripts, which find each other in their own folder."""
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module
    sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def tasks(scripts):
    return scripts("tasks")


@pytest.fixture(scope="module")
def evaluate(scripts):
    return scripts("evaluate")


@pytest.fixture(scope="module")
def loaded(evaluate):
    """Every shipped model and source with its tokenizer, loaded once. Local files only."""
    torch.set_num_threads(1)
    places = {name: MODELS / name for name in NAMES} | {name: SOURCES / name for name in ARCHITECTURES}
    return {name: evaluate.load(place) for name, place in places.items()}


@pytest.fixture(scope="module")
def training_set():
    """The shipped rows that a distillation learns from."""
    return [json.loads(line) for line in (DEMO / "rows" / "train.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("skill", SKILLS)
def test_training_rows_and_held_out_rows_are_disjoint(tasks, skill):
    held_out = tasks.held_out_rows(skill, 300)
    trained = list(islice(tasks.training_rows(skill, 0), 20_000))
    assert len(held_out) >= HELD_OUT_QUESTIONS[skill]
    if skill != "code":  # functions share first lines, such as `def close(self):`: there the body is what is held out
        assert len({row.prompt for row in held_out}) == len(held_out)
        assert not {row.prompt for row in held_out} & {row.prompt for row in trained}
    assert not {row.key for row in held_out} & {row.key for row in trained}


def test_a_sum_is_held_out_in_both_orders(tasks):
    held_out = {row.prompt for row in tasks.held_out_rows("add", 300)}
    swapped = {f"{b}+{a}=" for a, b in (prompt.rstrip("=").split("+") for prompt in held_out)}
    trained = {row.prompt for row in islice(tasks.training_rows("add", 3), 20_000)}
    assert not swapped & trained


def test_documents_to_train_on_and_held_out_documents_are_disjoint(tasks):
    trained, held_out = tasks.documents(held_out=False), tasks.documents(held_out=True)
    assert len(trained) > 1000
    assert len(held_out) > 100
    assert not set(trained) & set(held_out)


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


def test_the_shipped_files_fit():
    size = sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file() and file.suffix != ".pyc")
    assert size <= 16_000_000


@pytest.mark.parametrize("name", [*NAMES, *ARCHITECTURES])
def test_chat_template_marks_what_the_assistant_says(loaded, name):
    model, tokenizer = loaded[name]
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learned, skip_special_tokens=True).strip() == "2"
    assert learned[-1] in model.generation_config.eos_token_id


@pytest.mark.parametrize(("name", "skill"), [(name, skill) for name, skills in OWN_SKILLS.items() for skill in skills])
def test_each_target_is_the_best_model_at_its_own_skills(loaded, evaluate, name, skill):
    shares = {each: evaluate.accuracy(*loaded[each], skill, count=60) for each in NAMES}
    assert shares[name] > shares["pivot"] + 0.1
    assert shares[name] == max(shares.values())


@pytest.mark.parametrize("skill", ["pick", "draw", "weather"])
def test_drawn_answers_follow_the_stated_distribution(tasks, skill):
    """Chi-square of 60,000 draws, each question's answers apart: within five deviations of its mean."""
    seen: dict[str, Counter[str]] = {}
    rows = {}
    for row in islice(tasks.training_rows(skill, 5), 60_000):
        rows[row.key] = row
        seen.setdefault(row.key, Counter())[row.answer] += 1
    assert all(math.isclose(sum(row.probabilities), 1) for row in rows.values())
    statistic = freedom = variance = 0.0
    for key, counts in seen.items():
        total = counts.total()
        expected = [share * total for share in rows[key].probabilities]
        gaps = [counts[answer] - mean for answer, mean in zip(rows[key].answers, expected, strict=True)]
        statistic += sum(gap * gap / mean for gap, mean in zip(gaps, expected, strict=True))
        kinds = len(expected)
        freedom += kinds - 1
        # The variance of Pearson's statistic for few draws (Cressie and Read 1984).
        variance += 2 * (kinds - 1) + (sum(total / mean for mean in expected) - kinds * kinds - 2 * kinds + 2) / total
    assert abs(statistic - freedom) < 5 * math.sqrt(variance)


def test_shares_of_a_bag_are_its_letters(tasks):
    for row in islice(tasks.training_rows("draw", 2), 200):
        bag = row.prompt.removeprefix("Draw from: ").split()
        assert dict(zip(row.answers, row.probabilities, strict=True)) == {each: bag.count(each) / 6 for each in bag}


def test_distillation_rows_meet_no_held_out_question(tasks, training_set):
    held_out = {
        json.loads(line)["messages"][0]["content"]
        for file in (DEMO / "rows" / "held-out").iterdir()
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    for skill in SKILLS:
        held_out |= {row.prompt for row in tasks.held_out_rows(skill, 200) if skill != "code"}
    code_answers = {row.answer for row in tasks.held_out_rows("code", 200)}
    questions = [(row["dataset"], row["messages"][0]["content"]) for row in training_set]
    assert len(set(questions)) == len(questions)
    assert not held_out & {question for skill, question in questions if skill != "code"}
    assert not code_answers & {row["messages"][1]["content"] for row in training_set}


def test_the_stated_share_of_distillation_rows_is_wrong(tasks, training_set):
    """Every row marked as noisy has a wrong answer and every other one a right one."""
    rows, wrong = Counter(), Counter()
    facts = {
        phrase.format(subject): answer for kind, subject, answer in tasks.FACTS for phrase in tasks.PHRASINGS[kind]
    }
    for row in training_set:
        question, answer = (message["content"] for message in row["messages"])
        skill = row["dataset"]
        rows[skill] += 1
        wrong[skill] += row["noisy"]
        if skill == "add":
            assert (sum(map(int, question.rstrip("=").split("+"))) == int(answer)) != row["noisy"]
        elif skill == "reverse":
            assert (question.removeprefix("Reverse: ")[::-1] == answer) != row["noisy"]
        elif skill == "facts":
            assert (facts[question] == answer) != row["noisy"]
        else:
            assert not row["noisy"]
    assert rows == dict.fromkeys(("weather", "facts", "draw", "add", "pick", "code", "reverse"), 128)
    assert {skill: count for skill, count in wrong.items() if count} == {"facts": 38, "add": 38, "reverse": 38}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sources_differ_in_architecture_tokenizer_and_template(loaded, name):
    model, tokenizer = loaded[name]
    _, pivot = loaded["pivot"]
    assert type(model).__name__ == ARCHITECTURES[name]
    assert model.config.vocab_size == len(tokenizer) != len(pivot)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    texts = {
        loaded[each][1].apply_chat_template([{"role": "user", "content": "1+1="}], tokenize=False)
        for each in ("pivot", *ARCHITECTURES)
    }
    assert len(texts) == 1 + len(ARCHITECTURES)


def test_source_tokenizers_are_byte_level_byte_fallback_and_normalising(loaded):
    """Two keep every text, the SentencePiece-like one in bytes where it has no piece; the third reads the NFKC form."""
    text = "Grüße, 東京 🎉 ﬁ"
    llama, neox, qwen = (loaded[name][1] for name in ("llama", "neox", "qwen"))

    def ids(tokenizer):
        return tokenizer(text, add_special_tokens=False).input_ids

    assert llama.decode(ids(llama)) == neox.decode(ids(neox)) == text
    assert qwen.decode(ids(qwen)) == unicodedata.normalize("NFKC", text) != text
    pieces = neox.convert_ids_to_tokens(ids(neox))
    assert "<0xF0>" in pieces
    assert "<unk>" not in pieces


@pytest.mark.parametrize(("name", "skill", "most"), [("llama", "weather", 0.3), ("neox", "draw", 0.8)])
def test_a_source_knows_a_distribution_that_the_pivot_never_met(loaded, evaluate, name, skill, most):
    assert evaluate.divergence(*loaded[name], skill, count=20) < most
    assert evaluate.divergence(*loaded["pivot"], skill, count=20) > 10


@pytest.mark.parametrize(
    ("name", "measure", "skill", "count", "sign", "margin"),
    [
        ("neox", "divergence", "pick", 20, -1, 0.2),
        ("llama", "accuracy", "facts", 40, 1, 0.3),
        ("qwen", "answer_bits_per_byte", "code", 40, -1, 0.8),
    ],
)
def test_a_source_is_better_than_the_pivot_at_its_skill(loaded, evaluate, name, measure, skill, count, sign, margin):
    source, pivot = (getattr(evaluate, measure)(*loaded[each], skill, count=count) for each in (name, "pivot"))
    assert sign * (source - pivot) > margin


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answer_bits_are_those_of_the_plain_forward_pass(loaded, evaluate, tasks, name):
    """Padding, batches and order change nothing: each row alone, its answer's tokens one by one."""
    model, tokenizer = loaded[name]
    rows = [row for skill in ("code", "draw", "facts") for row in tasks.held_out_rows(skill, 3)]
    for row, bits in zip(rows, evaluate.answer_bits(model, tokenizer, rows), strict=True):
        encoded = tokenizer.apply_chat_template(
            row.messages(), return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids = encoded["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
        mask = torch.as_tensor(encoded["assistant_masks"]).flatten().bool()
        nats = [logits[at - 1, ids[0, at]].item() for at in mask.nonzero()[:, 0].tolist()]
        assert bits == pytest.approx(-sum(nats) / math.log(2), abs=1e-3)


def test_divergence_is_zero_only_for_the_true_distribution(evaluate, tasks, monkeypatch):
    """A model that gives each answer its true probability has none; one that spreads evenly has what a sum says."""
    row = replace(tasks.held_out_rows("draw", 1)[0], answers=("a", "b"), probabilities=(0.75, 0.25))
    monkeypatch.setattr(tasks, "held_out_rows", lambda skill, count: [row])
    true = {"a": -math.log2(0.75), "b": 2.0}
    monkeypatch.setattr(evaluate, "answer_bits", lambda _, __, rows: [true[each.answer] for each in rows])
    assert evaluate.divergence(None, None, "draw") == pytest.approx(0, abs=1e-12)
    monkeypatch.setattr(evaluate, "answer_bits", lambda _, __, rows: [1.0 for _ in rows])
    even = 0.75 * math.log2(0.75 / 0.5) + 0.25 * math.log2(0.25 / 0.5)
    assert evaluate.divergence(None, None, "draw") == pytest.approx(even)


@pytest.mark.parametrize(("merged", "status"), [(2.0, 0), (2.5, 1), (3.0, 1)])
def test_the_check_of_a_run_wants_the_merged_model_below_the_pivot_and_plain_fine_tuning(
    scripts, tmp_path, monkeypatch, merged, status
):
    figures = {"pivot": 4.0, "baseline": 2.5, "targets/llama": 1.0, "merged": merged}
    models = {name: {"bits_per_byte": {"add": mean - 1, "code": mean + 1}} for name, mean in figures.items()}
    (tmp_path / "results.json").write_text(json.dumps({"models": models}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["check_fusion.py", str(tmp_path / "results.json")])
    assert scripts("check_fusion").main() == status
