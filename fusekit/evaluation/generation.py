"""Greedy replies of a causal language model, in batches: equal to those it gives one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from fusekit.capturing.engine import plan_batches
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import CaptureError, DataError
from fusekit.resources import is_out_of_memory, release
from fusekit.types import Message, Part, Row


class Question(NamedTuple):
    """What a model is asked. prompt: token ids. longest: most tokens of its reply. ends: ids that end a turn."""

    prompt: list[int]
    longest: int
    ends: list[int]


def replies(model: Any, tokenizer: RowTokenizer, questions: Sequence[Question], batch_tokens: int) -> list[str]:
    """Greedy replies, up to the end of the turn, in the order of the questions.

    Nothing of the model's generation_config has a part in it but its eos: neither sampling nor a repetition penalty.

    Args:
        model: a transformers causal language model on its device(s).
        tokenizer: reads rows for it; its special tokens are left out of the replies.
        questions: what is asked.
        batch_tokens: most tokens of a batch, padding and replies included.

    Raises:
        CaptureError: one question does not fit into memory alone.
    """
    written = [""] * len(questions)
    waiting = plan_batches([len(q.prompt) + q.longest for q in questions], batch_tokens)[::-1]
    with plain_generation(model):
        while waiting:
            batch = waiting.pop()
            found = _try(model, tokenizer, [questions[i] for i in batch])
            if found is None:
                half = (len(batch) + 1) // 2
                waiting += [batch[half:], batch[:half]]
                continue
            for index, text in zip(batch, found, strict=True):
                written[index] = text
    return written


def eos_ids(model: Any) -> list[int]:
    """The ids that the model's configuration of generation stops at."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return [found] if isinstance(found, int) else list(found or [])


def turn_ends(tokenizer: RowTokenizer) -> list[int]:
    """The ids that end an assistant's turn under a tokenizer's template; none where text ends it."""
    try:
        row = tokenizer.tokenize(Row((Message("user", "a"), Message("assistant", "b"))))
    except DataError:
        return []
    return [int(id_) for id_ in np.unique(row.ids[(row.part == Part.END) & (row.message == 1)])]


@contextmanager
def plain_generation(model: Any, ends: Sequence[int] = ()) -> Iterator[None]:
    """Let a model generate without its own settings, of which ``generate`` takes whatever it is not told.

    A repetition penalty changes greedy decoding too, and ``max_new_tokens`` wins over a longer ``max_length``.
    ends: ids to stop at beside the model's own eos.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    stops = sorted({*eos_ids(model), *ends})
    model.generation_config = GenerationConfig(eos_token_id=stops or None, pad_token_id=stops[0] if stops else None)
    try:
        yield
    finally:
        model.generation_config = own


def _try(model: Any, tokenizer: RowTokenizer, questions: Sequence[Question]) -> list[str] | None:
    """Replies of a batch, None where memory ran out. Raises CaptureError for a single question."""
    failure = ""
    try:
        return _generate(model, tokenizer, questions)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = " ".join(str(error).split())
    release(_device(model))
    if len(questions) == 1:
        raise CaptureError(
            f"{tokenizer.name}: a prompt of {len(questions[0].prompt)} tokens and a reply of {questions[0].longest} do "
            f"not fit into memory even alone ({failure}): load the model smaller (dtype bfloat16, quantization) or "
            "over several devices (device_map auto)"
        )
    return None


@torch.inference_mode()
def _generate(model: Any, tokenizer: RowTokenizer, questions: Sequence[Question]) -> list[str]:
    width = max(len(question.prompt) for question in questions)
    ends = sorted({id_ for question in questions for id_ in question.ends} | set(eos_ids(model)))
    device = _device(model)
    # What stands before a prompt is masked: any token does.
    ids = torch.tensor([[q.prompt[0]] * (width - len(q.prompt)) + q.prompt for q in questions], device=device)
    mask = torch.tensor([[0] * (width - len(q.prompt)) + [1] * len(q.prompt) for q in questions], device=device)
    stop: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": ends[0]} if ends else {"pad_token_id": 0}
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(question.longest for question in questions),
        **stop,
    )[:, width:].tolist()
    # A batch writes on until its longest reply may end: what a shorter one would not have written alone is cut.
    return [_text(tokenizer, reply[: q.longest], ends) for reply, q in zip(written, questions, strict=True)]


def _device(model: Any) -> torch.device:
    """Where the input goes: with layers offloaded some parameters are on no device."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _text(tokenizer: RowTokenizer, reply: list[int], ends: Sequence[int]) -> str:
    stop = next((at for at, id_ in enumerate(reply) if id_ in ends), len(reply))
    return tokenizer.encoder.surfaces.decode(reply[:stop])
