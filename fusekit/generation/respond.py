"""Answers of one model to the questions of a data set, in batches, and the judges that vote for the best of several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from fusekit.capturing.models import Checkpoint, device_of, load_model, load_tokenizer, longest_input
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import GenerationError
from fusekit.settings import Judge, RespondSettings
from fusekit.types import Cut, Message, Part, Row

_STAND_IN = "x"


class Prompt(NamedTuple):
    """A prompt as one model reads it.

    ids: token ids. lead: white space that its template writes between the prompt and an answer, left for the model to
    write. ends: token ids that end an answer under its template.
    """

    ids: list[int]
    lead: bytes = b""
    ends: frozenset[int] = frozenset()


def prompt_of(reader: RowTokenizer, messages: Sequence[Message]) -> Prompt:
    """The prompt of a conversation that an assistant is to continue. Raises DataError: no template, or it refuses."""
    row = reader.tokenize(Row((*messages, Message("assistant", _STAND_IN))))
    answer = row.message == len(messages)
    ends = frozenset(int(id_) for id_ in row.ids[answer & (row.part == Part.END)])
    start = int(np.flatnonzero(answer & row.labels)[0])
    stop = int(np.flatnonzero(answer & (row.part == Part.CONTENT) & (row.ends > 0))[0]) + 1
    surfaces = reader.encoder.surfaces.of
    lead = b"".join(surfaces[id_] for id_ in row.ids[start:stop].tolist()).removesuffix(_STAND_IN.encode())
    # What is no white space (an empty thought, say) is the model's to write.
    return Prompt(row.ids[:start].tolist(), b"" if lead.strip() else lead, ends)


def eos_ids(model: Any) -> list[int]:
    """The ids that the model's configuration of generation stops at."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return [found] if isinstance(found, int) else list(found or [])


def limits_of(model: Any, tokenizer: Any) -> tuple[int, set[int]]:
    """How many tokens a model reads at most, and the ids that end what it writes, under any template."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    eos = getattr(tokenizer, "eos_token_id", None)
    return int(most or 1 << 40), {*eos_ids(model), *([int(eos)] if eos is not None else [])}


@contextmanager
def plain_generation(model: Any, ends: Sequence[int] = ()) -> Iterator[None]:
    """Let a model generate without its own settings, which ``generate`` applies where a call does not override them.

    A repetition penalty changes greedy decoding too, and ``max_new_tokens`` wins over a longer ``max_length``.
    ends: ids to stop at in addition to the model's own eos.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    stops = sorted({*eos_ids(model), *ends})
    model.generation_config = GenerationConfig(eos_token_id=stops or None, pad_token_id=stops[0] if stops else None)
    try:
        yield
    finally:
        model.generation_config = own


@torch.inference_mode()
def continued(
    model: Any, prompts: Sequence[Sequence[int]], most: int, ends: Collection[int], **sampling: Any
) -> list[list[int]]:
    """The tokens that a model writes behind each prompt of a batch, whatever its own settings of generation say.

    most: tokens. ends: ids at which it stops; what follows one is padding. sampling: as for ``generate``; none: greedy.
    """
    width, device = max(map(len, prompts)), device_of(model)
    # The padding before a prompt is masked, so any token will do.
    ids = torch.tensor([[ids[0]] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    with plain_generation(model):
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=bool(sampling),
            num_beams=1,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            **sampling,
        )
    found: list[list[int]] = written[:, width:].tolist()
    return found


class Question(NamedTuple):
    """What a model answers.

    messages: a conversation up to where the assistant answers. dataset: the source of data that it is from. references:
    the answers that the data give; a data set may have a question more than once.
    """

    messages: tuple[Message, ...]
    dataset: str
    references: tuple[str, ...]

    def answered(self, text: str, *, whole: bool = True) -> Row:
        """The conversation with an answer, which alone is learned. whole: whether its end is to be learned too."""
        cut = None if whole else Cut(len(self.messages), len(text.encode()))
        return Row((*self.messages, Message("assistant", text)), self.dataset, cut, tuple(range(len(self.messages))))


class Answer(NamedTuple):
    """What a model answers. finish: ``end`` of turn, ``length``, or ``context``: it can read no more."""

    text: str
    finish: str


def questions_of(rows: Iterable[Row]) -> list[Question]:
    """The questions of conversations that end with an answer to be learned, each once, in order."""
    found: dict[tuple[Message, ...], tuple[str, dict[str, None]]] = {}  # one may have very many answers
    for row in rows:
        *asked, last = row.messages
        if asked and last.role == "assistant" and len(asked) not in row.context:
            _, references = found.setdefault(tuple(asked), (row.dataset, {}))
            references[last.content] = None
    return [Question(asked, dataset, tuple(references)) for asked, (dataset, references) in found.items()]


def respond(model: Any, reader: RowTokenizer, questions: Sequence[Question], settings: RespondSettings) -> list[Answer]:
    """A model's answers, in order. Raises DataError: the template refuses a question.

    The same questions, settings and machine give the same answers, whatever was answered before: every batch has a seed
    of its own. model: on its device. reader: its tokenizer with the chat template of the run.
    """
    prompts = [prompt_of(reader, question.messages) for question in questions]
    limit, ends = limits_of(model, reader.tokenizer)
    ends = ends.union(*(prompt.ends for prompt in prompts))
    answers = [Answer("", "context")] * len(prompts)
    order = sorted((i for i in range(len(prompts)) if len(prompts[i].ids) < limit), key=lambda i: len(prompts[i].ids))
    heat = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature else {}
    for start in range(0, len(order), settings.batch_size):
        batch = order[start : start + settings.batch_size]
        key = "\n".join(Row(questions[i].messages).key for i in batch)
        torch.manual_seed(xxhash.xxh3_64_intdigest(f"{settings.seed}\n{key}".encode()) >> 1)
        most = min(settings.max_new_tokens, limit - len(prompts[batch[-1]].ids))
        written = continued(model, [prompts[i].ids for i in batch], most, ends, **heat)
        for i, tokens in zip(batch, written, strict=True):
            answers[i] = _answer(reader, tokens, ends, prompts[i].lead)
    return answers


def _answer(reader: RowTokenizer, tokens: Sequence[int], ends: set[int], lead: bytes) -> Answer:
    stop = next((at for at, id_ in enumerate(tokens) if id_ in ends), None)
    surfaces = reader.encoder.surfaces
    if surfaces.drops_space:
        text = reader.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
    else:
        text = surfaces.decode(tokens[:stop]).removeprefix(lead.decode())
    end = reader.turn_end_text
    if end.strip() and end in text:  # a template that ends turns with text
        return Answer(text.partition(end)[0], "end")
    # An unfinished answer may stop within a character.
    return Answer(text, "end") if stop is not None else Answer(text.rstrip("\N{REPLACEMENT CHARACTER}"), "length")


# ---------------------------------------------------------------- judges


Scores = Mapping[str, float]
"""Scores of the answers to one question by their models: higher is better. Empty: the judge does not vote."""
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
    """The scores of a Python function ``module:function``. Raises GenerationError where it cannot be imported.

    It gets the messages (dicts of role and content), the answers by model and the list of answers in the data, and
    returns a number for each model: higher is better.
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
    Answers that are too long for it lose their beginning. Raises CaptureError where it cannot be loaded or has no
    trained head, GenerationError where it has more than one output.
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
    try:
        found = {name: float(scores[name]) for name in answers}
    except (TypeError, ValueError) as error:
        raise GenerationError(f"the judge {judge} returned {scores!r:.80}: {error}") from error
    if wrong := [name for name, value in found.items() if not math.isfinite(value)]:
        raise GenerationError(f"the judge {judge} gave {wrong[0]} the score {found[wrong[0]]}: it has to be finite")
    return found
