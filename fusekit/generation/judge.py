"""Who wrote the best answer: judges score the answers to a question, and vote."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from fusekit.capturing.load import load_model, load_tokenizer, longest_input
from fusekit.capturing.models import Checkpoint
from fusekit.generation.respond import Question
from fusekit.generation.settings import GenerationError, Judge

Scores = Mapping[str, float]
"""Of the answers to one question, by the models that wrote them: higher is better. Empty: the judge does not vote."""
Scorer = Callable[[Sequence[Question], Sequence[Mapping[str, str]]], list[dict[str, float]]]
"""(questions, answers to each by model) -> scores of each."""


def votes_of(scores: Scores) -> list[str]:
    """The models that a judge votes for: that of the highest score; several where their scores are equal."""
    best = max(scores.values(), default=None)
    return [name for name, score in scores.items() if score == best]


def winner_of(scores: Sequence[Scores]) -> str | None:
    """The model of most votes; a tie goes to the one that the first judge scores highest, then the second, ...

    scores: of each judge, in order; of equal answers the model listed first wins. None where no judge votes.
    arXiv 2408.04998; what a tie means is not published.
    """
    votes = Counter(name for of_judge in scores for name in votes_of(of_judge))
    tied = [name for name in votes if votes[name] == max(votes.values())]
    listed = list(dict.fromkeys(name for of_judge in scores for name in of_judge))
    tied.sort(key=listed.index)
    return max(tied, key=lambda name: [s.get(name, -math.inf) for s in scores if s], default=None)


def exact_match(questions: Sequence[Question], answers: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
    """1 for an answer that the data give, 0 for others; no vote where all answers are wrong."""
    found = []
    for question, written in zip(questions, answers, strict=True):
        right = {reference.strip() for reference in question.references}
        scores = {name: float(text.strip() in right) for name, text in written.items()}
        found.append(scores if any(scores.values()) else {})
    return found


def called(place: str) -> Scorer:
    """The scores of a Python function ``module:function``, which is imported.

    It gets the messages (dicts of role and content), the answers by model and the list of answers in the data, and
    returns a number for each model: higher is better. Raises GenerationError where it cannot be imported.
    """
    module, _, name = place.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise GenerationError(f"the judge {place} cannot be imported: {error}") from error

    def score(questions: Sequence[Question], answers: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
        found = []
        for question, written in zip(questions, answers, strict=True):
            messages = [message._asdict() for message in question.messages]
            found.append(_checked(place, function(messages, dict(written), list(question.references)), written))
        return found

    return score


def rewarded(checkpoint: Checkpoint, device: torch.device, batch_size: int) -> Scorer:
    """The rewards of a sequence classification model of one output, loaded here.

    It reads conversations under its own chat template, or, without one, the last question and the answer as a pair.
    Answers that are too long for it lose their beginning.

    Raises:
        CaptureError: it cannot be loaded, or has no trained head.
        GenerationError: it has more than one output; a reward is NaN or infinite.
    """
    from transformers import AutoModelForSequenceClassification

    name, tokenizer = checkpoint.choice.model, load_tokenizer(checkpoint)
    model = load_model(checkpoint, device, AutoModelForSequenceClassification)
    if model.config.num_labels != 1:
        raise GenerationError(
            f"the judge {name} has {model.config.num_labels} outputs; a reward model has one: name another model, or "
            "make a number of them in a function (python)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # it finds the last token by it
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    limit = longest_input(checkpoint)

    def encoded(question: Question, text: str) -> dict[str, Any]:
        cut: dict[str, Any] = {"truncation": limit is not None, "max_length": limit}
        if tokenizer.chat_template:
            messages = [*(m._asdict() for m in question.messages), {"role": "assistant", "content": text}]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
            return dict(tokenizer(rendered, add_special_tokens=False, **cut))
        return dict(tokenizer(question.messages[-1].content, text, **cut))

    @torch.inference_mode()
    def score(questions: Sequence[Question], answers: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
        asked = [(q, model_, text) for q, of in enumerate(answers) for model_, text in of.items()]
        inputs = [encoded(questions[q], text) for q, _, text in asked]
        order = sorted(range(len(asked)), key=lambda i: len(inputs[i]["input_ids"]))
        found: list[dict[str, float]] = [dict.fromkeys(of, 0.0) for of in answers]
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            padded = tokenizer.pad([inputs[i] for i in batch], return_tensors="pt").to(model.device)
            rewards = model(**padded).logits[:, 0].float().tolist()
            for i, reward in zip(batch, rewards, strict=True):
                found[asked[i][0]][asked[i][1]] = reward
        return [_checked(name, scores, of) for scores, of in zip(found, answers, strict=True)]

    return score


def scorer_of(judge: Judge, checkpoint: Checkpoint | None, device: torch.device, batch_size: int) -> Scorer:
    """How a judge scores. checkpoint: of a reward model."""
    if checkpoint is not None:
        return rewarded(checkpoint, device, batch_size)
    return called(judge.python) if judge.python is not None else exact_match


def _checked(judge: str, scores: Any, answers: Mapping[str, str]) -> dict[str, float]:
    if not isinstance(scores, Mapping) or set(scores) != set(answers):
        raise GenerationError(f"the judge {judge} returned {scores!r:.80}: it scores {', '.join(answers)}")
    found = {name: scores[name] for name in answers}
    wrong = [name for name, value in found.items() if not isinstance(value, (int, float)) or not math.isfinite(value)]
    if wrong:
        raise GenerationError(f"the judge {judge} gave {wrong[0]} the score {found[wrong[0]]!r}: it has to be finite")
    return {name: float(value) for name, value in found.items()}
