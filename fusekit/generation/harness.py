"""Several models that write together as one model of lm-eval, for tasks whose answers are written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from fusekit.errors import GenerationError
from fusekit.generation.ensemble import generate
from fusekit.generation.reader import load_readers

_CHAT = "\0chat\0"
"""Before messages as JSON: each model reads them under a template of its own."""


@register_model("fusekit")
class EnsembleLM(LM):
    """Models that write each answer together (:func:`fusekit.generation.generate`).

    lm-eval gives it texts to continue, or conversations with ``apply_chat_template=True``. Tasks that compare
    probabilities of given texts (multiple choice, perplexity) are refused: in ``safe`` and ``cool`` it depends on the
    place who writes, and ``unite`` has no distribution over the tokens that a given text is cut into.

    Args:
        models: ids or folders, the main one first; joined by ``+`` in a text (``pretrained`` of other models).
        settings: fields of :class:`~fusekit.generation.GenerationSettings`; what a task says of ``max_gen_toks``,
            ``temperature`` and ``until`` comes first.

    Example:
        >>> import lm_eval                                                              # doctest: +SKIP
        >>> model = EnsembleLM("demo/models/pivot+demo/sources/qwen", mode="unite")     # doctest: +SKIP
        >>> lm_eval.simple_evaluate(model, tasks=["gsm8k"], apply_chat_template=True)   # doctest: +SKIP
    """

    def __init__(self, models: str | Sequence[Any], batch_size: Any = 1, device: Any = None, **settings: Any) -> None:  # noqa: ARG002
        super().__init__()
        self.readers = load_readers(models.split("+") if isinstance(models, str) else models)
        self.settings = settings

    @property
    def tokenizer_name(self) -> str:
        """Names of the models, by which lm-eval keeps requests apart."""
        return "+".join(reader.name for reader in self.readers)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as they are. Raises GenerationError where an answer is begun for the models."""
        if not add_generation_prompt:
            raise GenerationError("a begun answer (gen_prefix) cannot be continued under several templates")
        return _CHAT + json.dumps(chat_history)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers to (text, settings of the task), in order; ``until`` is left out of them."""
        answers = []
        for number, request in enumerate(requests):
            text, asked = request.args
            chat, until = text.startswith(_CHAT), asked.get("until") or []
            how = {**self.settings, "raw": not chat, "stop": [until] if isinstance(until, str) else list(until)}
            if "max_gen_toks" in asked:
                how["max_new_tokens"] = asked["max_gen_toks"]
            if asked.get("do_sample") and asked.get("temperature"):
                how["temperature"] = asked["temperature"]
            prompt = json.loads(text.removeprefix(_CHAT)) if chat else text
            [answer] = generate(self.readers, [prompt], first=number, **how)
            answers.append(answer.text)
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: see the class."""
        raise GenerationError(
            f"{len(requests)} requests for the probability of a given text, which several models that write together "
            "do not have: choose tasks with output_type generate_until, or evaluate each model alone"
        )

    loglikelihood_rolling = loglikelihood
