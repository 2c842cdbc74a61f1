"""A teacher in vLLM, in this process: ``vllm.LLM`` with ``prompt_logprobs``."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fusekit.capturing.engine import plan_batches
from fusekit.capturing.engines.replies import Reply, Vocabulary, captured, prompt_of
from fusekit.capturing.models import Checkpoint
from fusekit.capturing.settings import Selection
from fusekit.errors import CaptureError
from fusekit.types import CapturedRow, TokenizedRow

LOGITS_BYTES = 1 << 30
"""Of float32 logits of one step of the engine, which are outside its own memory profile: bounds the step's tokens."""

FEWEST_TOKENS = 256
"""Of a step."""

HEAD_DTYPE = "float32"

_DEATHS = 3


def version() -> str:
    """Of the vLLM that is installed. Raises CaptureError where there is none."""
    try:
        import vllm
    except ImportError as error:
        raise CaptureError(
            f"the engine vllm is not installed ({error}): install it in an environment with fusekit (docs/how-to/"
            "engines.md), or name a server by its URL"
        ) from error
    return str(vllm.__version__)


def batch_invariant() -> bool:
    """Whether vLLM is asked for sums that do not depend on the batch."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")


class Vllm:
    """A model in vLLM that scores examples.

    Its engine runs in a process of its own. When that dies, a new one is started with half the tokens of a step.

    Args:
        checkpoint: the model, on disk.
        selection: what is kept of each distribution; its temperature is 1.
        vocabulary: the tokenizer's.
        longest: most tokens of an example.
        batch_tokens: most tokens that are handed to the engine at a time.
        notify: called with a line when the engine is started again.

    Raises:
        CaptureError: vLLM is not installed, or cannot load the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        selection: Selection,
        vocabulary: Vocabulary,
        *,
        longest: int,
        batch_tokens: int,
        notify: Callable[[str], None] = lambda _line: None,
    ) -> None:
        version()
        self.checkpoint, self.selection, self.vocabulary, self.notify = checkpoint, selection, vocabulary, notify
        self.longest, self.batch_tokens = longest, max(batch_tokens, longest)
        self.step_tokens = max(FEWEST_TOKENS, min(batch_tokens, LOGITS_BYTES // (4 * vocabulary.size)))
        self._llm: Any = None
        self._start()

    def score_batches(
        self, rows: Sequence[TokenizedRow], datasets: Sequence[str] | None = None
    ) -> Iterator[list[tuple[int, CapturedRow | str]]]:
        """As :meth:`fusekit.capturing.engine.Teacher.score_batches`.

        Raises CaptureError when the engine keeps dying.
        """
        names = datasets or [""] * len(rows)
        prompts = [prompt_of(row) for row in rows]
        nothing = Reply(np.zeros((0, 1), np.int64), np.zeros((0, 1)), np.zeros(0))
        unlabelled = [(i, nothing) for i, prompt in enumerate(prompts) if not prompt]
        # The longest first, as transformers' batches are: memory runs out at the start if it does.
        batches = plan_batches([len(prompt) for prompt in prompts], self.batch_tokens)
        for batch in [None, *batches]:
            replies = (
                unlabelled if batch is None else list(zip(batch, self._score([rows[i] for i in batch]), strict=True))
            )
            yield [(i, captured(rows[i], names[i], one, self.selection, self.vocabulary)) for i, one in replies]

    def _score(self, rows: list[TokenizedRow]) -> list[Reply]:
        from vllm import SamplingParams

        how = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=self.selection.k, flat_logprobs=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt_of(row)} for row in rows]
        for death in range(1, _DEATHS + 1):
            try:
                outputs = self._llm.generate(prompts, how, use_tqdm=False)
                return [_reply(one.prompt_logprobs, row) for one, row in zip(outputs, rows, strict=True)]
            except Exception as error:
                if not _is_dead(self._llm):
                    raise
                if death == _DEATHS:
                    raise CaptureError(
                        f"vLLM's engine died {death} times at {len(rows)} examples of at most "
                        f"{max(map(len, rows))} tokens, the last time with {self.step_tokens} tokens in a step: see "
                        "its log above. What is captured stays; give it less (--batch-tokens, --engine-options "
                        "'{\"gpu_memory_utilization\": 0.7}') and run the same command again"
                    ) from error
            self.step_tokens = max(FEWEST_TOKENS, self.step_tokens // 2)
            self.notify(f"vLLM's engine died; a new one is started with {self.step_tokens} tokens in a step")
            self._start()
        raise AssertionError("unreachable")

    def _start(self) -> None:
        from vllm import LLM

        self._llm = None
        gc.collect()
        choice = self.checkpoint.choice
        arguments = {
            "model": str(self.checkpoint.folder),
            "tokenizer": str(self.checkpoint.folder),
            "dtype": choice.dtype,
            "trust_remote_code": choice.trust_remote_code,
            "max_logprobs": self.selection.k,
            "logprobs_mode": "raw_logprobs",
            "hf_overrides": {"head_dtype": HEAD_DTYPE},
            "max_model_len": self.longest + 1,
            "max_num_batched_tokens": self.step_tokens,
            "max_num_seqs": min(self.step_tokens, 256),
            "enable_chunked_prefill": True,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": 0.85,
            "enforce_eager": True,  # graphs are for decoding
            **(choice.engine.options or {}),
        }
        try:
            self._llm = LLM(**arguments)
        except Exception as error:  # vLLM's own, of many kinds, from another process
            raise CaptureError(
                f"vLLM cannot load {choice.model}: {type(error).__name__}: {' '.join(str(error).split())}. Its log "
                "above may say more; its arguments are set with engine.options (--engine-options)"
            ) from error
        threading.Thread(target=_watch, args=(weakref.ref(self._llm),), daemon=True).start()


def _client(llm: Any) -> Any:
    """vLLM's connection to its engine's process; without ``resources`` where the engine runs in this process."""
    return getattr(getattr(llm, "llm_engine", None), "engine_core", None)


def _is_dead(llm: Any) -> bool:
    return bool(getattr(getattr(_client(llm), "resources", None), "engine_dead", False))


def _watch(reference: weakref.ref[Any]) -> None:
    """Wake ``LLM.generate`` when the engine's process was killed: vLLM notes it, but goes on waiting for an answer."""
    from vllm.v1.engine.exceptions import EngineDeadError

    while (llm := reference()) is not None and hasattr(_client(llm), "outputs_queue"):
        if _is_dead(llm):
            _client(llm).outputs_queue.put_nowait(EngineDeadError())
            return
        del llm
        time.sleep(1)


def _reply(flat: Any, row: TokenizedRow) -> Reply:
    """vLLM's FlatLogprobs of a prompt: at each position the actual token first, then the most probable ones."""
    positions = row.label_positions
    starts, stops = np.array(flat.start_indices)[positions], np.array(flat.end_indices)[positions]
    width = int((stops - starts).max())
    at = starts[:, None] + np.arange(width)
    there = at < stops[:, None]
    at = np.where(there, at, 0)
    ids, logprobs = np.array(flat.token_ids, np.int64)[at], np.array(flat.logprobs, np.float64)[at]
    assert (ids[:, 0] == row.ids[positions]).all(), "vLLM lists the actual token first"
    return Reply(np.where(there, ids, -1), np.where(there, logprobs, -np.inf), logprobs[:, 0])
