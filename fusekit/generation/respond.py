"""Answers of one model to the questions of a data set, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import xxhash

from fusekit.data.tokenize import RowTokenizer
from fusekit.generation.prompts import limits_of, prompt_of
from fusekit.generation.settings import RespondSettings
from fusekit.types import Cut, Message, Row


class Question(NamedTuple):
    """What a model answers.

    Attributes:
        messages: a conversation up to where the assistant answers.
        dataset: the source of data that it is from.
        references: the answers that the data give; a data set may have a question more than once.
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
    references: dict[tuple[Message, ...], dict[str, None]] = {}
    datasets: dict[tuple[Message, ...], str] = {}
    for row in rows:
        *asked, last = row.messages
        if asked and last.role == "assistant" and len(asked) not in row.context:
            references.setdefault(tuple(asked), {})[last.content] = None
            datasets.setdefault(tuple(asked), row.dataset)
    return [Question(asked, datasets[asked], tuple(found)) for asked, found in references.items()]


@torch.inference_mode()
def respond(model: Any, reader: RowTokenizer, questions: Sequence[Question], settings: RespondSettings) -> list[Answer]:
    """A model's answers, in order.

    The same questions, settings and machine give the same answers, whatever was answered before: every batch has a seed
    of its own.

    Args:
        model: a causal language model of transformers, on its device.
        reader: its tokenizer with the chat template of the run.
        questions: answered in batches of similar length.
        settings: how they are sampled.

    Raises:
        DataError: the template refuses a question.
    """
    prompts = [prompt_of(reader, question.messages) for question in questions]
    limit, ends = limits_of(model, reader.tokenizer)
    answers = [Answer("", "context")] * len(prompts)
    order = sorted((i for i in range(len(prompts)) if len(prompts[i].ids) < limit), key=lambda i: len(prompts[i].ids))
    ends |= {id_ for prompt in prompts for id_ in prompt.ends}
    sampled = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.temperature else {}
    for start in range(0, len(order), settings.batch_size):
        batch = order[start : start + settings.batch_size]
        longest = len(prompts[batch[-1]].ids)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, longest - len(prompts[i].ids) :] = torch.tensor(prompts[i].ids)
            mask[row, longest - len(prompts[i].ids) :] = 1
        key = "\n".join(Row(questions[i].messages).key for i in batch)
        torch.manual_seed(xxhash.xxh3_64_intdigest(f"{settings.seed}\n{key}".encode()) >> 1)
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=min(settings.max_new_tokens, limit - longest),
            do_sample=settings.temperature > 0,
            num_beams=1,
            top_k=0,
            repetition_penalty=1.0,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            **sampled,
        )[:, longest:].tolist()
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
