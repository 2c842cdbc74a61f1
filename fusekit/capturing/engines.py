"""What runs the forward passes of a capture: transformers or vLLM in this process, or HTTP servers.

Examples, templates, cuts, shards, manifests and resumption are the same for all of them. Any but transformers is
checked against it on a few examples first.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from fusekit.capturing.models import Checkpoint, load_model, longest_input, parameters, stored_dtype, valid_ids
from fusekit.capturing.server import NO_LABELS, Identity, Reply, Scorer, Servers, captured, prompt_of
from fusekit.capturing.store import Setting, Store
from fusekit.capturing.teacher import Teacher, batch_tokens_on, head_dtype, plan_batches
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import release
from fusekit.errors import CaptureError
from fusekit.settings import CaptureSettings, Selection
from fusekit.types import BoolArray, CapturedRow, Row, TokenizedRow

CHECKED = 4
"""Examples that are scored by both."""

TOLERANCE, ROUNDED_TOLERANCE = 0.01, 0.5
"""Nats, in float32 and in a dtype that rounds; vLLM's sums in bfloat16 depend on the batch by up to about 0.3."""

LOGITS_BYTES = 1 << 30
"""Bytes of float32 logits of one step, which vLLM's memory profile leaves out: they bound the step's tokens."""

FEWEST_TOKENS = 256
"""Fewest tokens of a step."""

HEAD_DTYPE = "float32"

_FACTS = "model {}, engine {}, top_k {}, temperature {:g}"

_DEATHS = 3


class Opening:
    """An engine before it is started. Raises CaptureError where it cannot capture what is asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: RowTokenizer,
        settings: CaptureSettings,
        vocabulary: int,
        notify: Callable[[str], None],
    ) -> None:
        self.checkpoint, self.tokenizer, self.settings, self.notify = checkpoint, tokenizer, settings, notify
        self.engine = checkpoint.choice.engine
        self._valid = valid_ids(tokenizer.tokenizer)
        self._is_token = np.isin(np.arange(vocabulary), self._valid)
        dtype = checkpoint.choice.dtype if checkpoint.choice.dtype != "auto" else stored_dtype(checkpoint)
        usual = TOLERANCE if dtype.removeprefix("torch.") == "float32" else ROUNDED_TOLERANCE
        self.tolerance = self.engine.tolerance or usual
        if self.engine.kind != "transformers":
            self._refuse()

    def _refuse(self) -> None:
        choice, kind = self.checkpoint.choice, self.engine.kind
        if self.settings.temperature != 1:
            raise CaptureError(
                f"temperature is {self.settings.temperature:g}, but the engine {kind} reports log-probabilities "
                "at temperature 1: leave it out, or capture with the engine transformers"
            )
        fields = ("quantization", "device_map", "attn_implementation")
        file = choice.model if self.checkpoint.gguf is not None else None
        for name, value in [*((name, getattr(choice, name)) for name in fields), ("model", file)]:
            if value:
                raise CaptureError(
                    f"{name} is {value!r}, which transformers alone can load, but the engine is {kind}: leave it out "
                    "(engine.options, --engine-options, are those of vLLM), or capture with transformers"
                )

    def details(self) -> dict[str, Setting]:
        """What the store's manifest says of the engine; None for what a server does not tell."""
        if self.engine.kind == "transformers":
            return {}
        if self.engine.kind == "vllm":
            invariant = os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")
            known = Identity("vllm", vllm_version(), str(self.checkpoint.folder), HEAD_DTYPE, invariant)
        else:
            known = self._servers.identity
        found: dict[str, Setting] = {
            "engine_version": f"{known.kind} {known.version}",
            "engine_head_dtype": known.head_dtype,
            "engine_batch_invariant": known.batch_invariant,
        }
        if self.engine.options:
            found["engine_options"] = json.dumps(self.engine.options, sort_keys=True)
        return found

    def start(self, rows: Sequence[Row], device: torch.device) -> Scorer:
        """The engine, once it has agreed with transformers on some of the rows, or on those of the probe.

        device: where transformers runs the model.

        Raises CaptureError: they differ, the probe is of another model, or the engine does not start.
        """
        if self.engine.kind == "transformers":
            head = head_dtype(self.settings, self.checkpoint.config, parameters(self.checkpoint))
            return self._teacher(device, float32_head=head == "float32")
        tolerance, selection = self.tolerance, self.settings.selection
        if self.engine.probe is not None:
            probe = self._probe(self.engine.probe)
            reference = [probe[i] for i in range(min(CHECKED, len(probe)))]
            tolerance += probe.spec.max_error
        else:
            teacher = self._teacher(device)
            reference = teacher.score([self.tokenizer.tokenize(row) for row in spread(rows, CHECKED)]).rows
            del teacher
            release(device)
        engine: Scorer
        if self.engine.kind == "vllm":
            longest = max(len(self.tokenizer.tokenize(row)) for row in rows)
            engine = Vllm(
                self.checkpoint,
                selection,
                self._is_token,
                longest=max([longest, *(len(row.tokens) for row in reference)]),
                batch_tokens=self.settings.batch_tokens or batch_tokens_on(device.type),
                notify=self.notify,
            )
        else:
            engine = self._servers
        what = f"{self.engine.kind} {' '.join(self.engine.url)}".strip()
        found = check(engine, reference, tolerance, f"{self.checkpoint.choice.model} in {what}")
        self.notify(f"{what} and transformers on {len(reference)} examples: {found}")
        return engine

    @cached_property
    def _servers(self) -> Servers:
        return Servers(self.engine, self.settings.selection, self._is_token, self.tolerance, self.notify)

    def _teacher(self, device: torch.device, float32_head: bool = True) -> Teacher:
        return Teacher(
            load_model(self.checkpoint, device),
            self._valid,
            self.settings.selection,
            batch_tokens=self.settings.batch_tokens,
            name=self.checkpoint.choice.model,
            notify=self.notify,
            longest=longest_input(self.checkpoint),
            float32_head=float32_head,
        )

    def _probe(self, path: str) -> Store:
        store = Store.open(path)
        ours = (self.checkpoint.fingerprint(), "transformers", self.settings.top_k, 1.0)
        kind = store.spec.details.get("engine", "transformers")
        theirs = (store.spec.model_fingerprint, kind, store.spec.top_k, store.spec.temperature)
        if theirs != ours:
            raise CaptureError(
                f"the probe {path} has {_FACTS.format(*theirs)}, but {self.checkpoint.choice.model} has to be checked "
                f"against {_FACTS.format(*ours)}: capture some examples like that where the model fits"
            )
        return store


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """Rows from all places, at most so many."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)).tolist()]


class Difference(NamedTuple):
    """Differences of log-probabilities, in nats: the largest, the mean, and over how many values."""

    largest: float
    mean: float
    values: int

    def __str__(self) -> str:
        return f"largest difference {self.largest:.2g} nats, mean {self.mean:.2g}, of {self.values} log-probabilities"


def difference(reference: Sequence[CapturedRow], found: Sequence[CapturedRow]) -> Difference:
    """How far two captures of the same examples are apart, over the labels and all entries of ``reference``.

    An entry that ``found`` does not list counts with its distance to the least that is listed there: 0 for a tie.
    """
    values: list[float] = []
    for ours, theirs in zip(reference, found, strict=True):
        values += np.abs(ours.actual - theirs.actual).tolist()
        for ids, logprobs, other_ids, other in zip(
            ours.rows.ids, ours.rows.logprobs, theirs.rows.ids, theirs.rows.logprobs, strict=True
        ):
            listed = {int(i): float(p) for i, p in zip(other_ids, other, strict=True) if i >= 0}
            least = min(listed.values(), default=-np.inf)
            for i, p in zip(ids.tolist(), logprobs.tolist(), strict=True):
                if i >= 0:
                    values.append(abs(p - listed[i]) if i in listed else max(p - least, 0.0))
    return Difference(max(values, default=0.0), float(np.mean(values)) if values else 0.0, len(values))


def check(engine: Scorer, reference: Sequence[CapturedRow], tolerance: float, what: str) -> Difference:
    """Score the examples of ``reference``, which transformers captured, with an engine. what: its name for the error.

    Raises CaptureError: an example has no distribution, or a log-probability differs by more than ``tolerance`` nats.
    """
    scored = {i: row for batch in engine.score_batches([row.tokens for row in reference]) for i, row in batch}
    found: list[CapturedRow] = []
    for i, row in sorted(scored.items()):
        if isinstance(row, str):
            raise CaptureError(f"{what}: example {reference[i].tokens.key} has no distribution: {row}")
        found.append(row)
    result = difference(reference, found)
    if not result.largest <= tolerance:
        raise CaptureError(
            f"{what} does not say what transformers says on {len(reference)} examples: {result}, more than the "
            f"tolerance of {tolerance:g}. Is it the same model, in the same dtype and without quantization? If the "
            "difference is only rounding, raise engine.tolerance (--engine-tolerance)"
        )
    return result


def vllm_version() -> str:
    """The version of vLLM that is installed. Raises CaptureError where there is none."""
    try:
        import vllm
    except ImportError as error:
        raise CaptureError(
            f"the engine vllm is not installed ({error}): install it in an environment with fusekit (docs/how-to/"
            "engines.md), or name a server by its URL"
        ) from error
    return str(vllm.__version__)


class Vllm:
    """A model in vLLM that scores examples. When its process dies, one with half the tokens of a step is started.

    longest: most tokens of an example. batch_tokens: most tokens that are handed to the engine at a time.

    Raises CaptureError: vLLM is not installed, or cannot load the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        selection: Selection,
        is_token: BoolArray,
        *,
        longest: int,
        batch_tokens: int,
        notify: Callable[[str], None],
    ) -> None:
        vllm_version()
        self.checkpoint, self.selection, self._is_token, self.notify = checkpoint, selection, is_token, notify
        self.longest, self.batch_tokens = longest, max(batch_tokens, longest)
        self.step_tokens = max(FEWEST_TOKENS, min(batch_tokens, LOGITS_BYTES // (4 * len(is_token))))
        self._llm: Any = None
        self._start()

    def score_batches(
        self, rows: Sequence[TokenizedRow], datasets: Sequence[str] | None = None
    ) -> Iterator[list[tuple[int, CapturedRow | str]]]:
        """As :meth:`fusekit.capturing.teacher.Teacher.score_batches`. Raises CaptureError if the engine keeps dying."""
        names = datasets or [""] * len(rows)
        lengths = [len(prompt_of(row)) for row in rows]
        unlabelled = [i for i, length in enumerate(lengths) if not length]
        # The longest first, as transformers' batches are: memory runs out at the start if it does.
        for batch in [unlabelled, *plan_batches(lengths, self.batch_tokens)]:
            replies = [NO_LABELS] * len(batch) if batch is unlabelled else self._score([rows[i] for i in batch])
            yield [
                (i, captured(rows[i], names[i], reply, self.selection, self._is_token))
                for i, reply in zip(batch, replies, strict=True)
            ]

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
    """Wake ``LLM.generate`` when the engine's process was killed: vLLM notes it, but keeps waiting for an answer."""
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
