"""Teachers behind HTTP servers: vLLM's ``/v1/completions`` with ``prompt_logprobs`` and SGLang's ``/generate``.

The wire forms are those of vLLM 0.32 and SGLang 0.5.23.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from fusekit.errors import CaptureError
from fusekit.settings import EngineSettings, Selection
from fusekit.types import BoolArray, CapturedRow, FloatArray, IntArray, TokenizedRow, TopK

MOST_MASS = 1 + 1e-3
"""Above it the listed probabilities of a label are no distribution; float32 sums stay within 1e-6."""

MOST_PADDING = 1e-3
"""Probability that ids without a token may hold at one label: an engine cannot mask them."""


class Scorer(Protocol):
    """Scores examples, as :class:`fusekit.capturing.teacher.Teacher` does."""

    def score_batches(
        self, rows: Sequence[TokenizedRow], datasets: Sequence[str] | None = None
    ) -> Iterator[list[tuple[int, CapturedRow | str]]]:
        """(index into ``rows``, what was captured or why it is quarantined), each index once, in any order."""
        ...


class Reply(NamedTuple):
    """What an engine says about n labels: int64 [n, m] ids in any order, perhaps twice, -1 for none; float64 natural
    logarithms at temperature 1, of those and [n] of the labels.
    """

    ids: IntArray
    logprobs: FloatArray
    actual: FloatArray


NO_LABELS = Reply(np.zeros((0, 1), np.int64), np.zeros((0, 1)), np.zeros(0))
"""About an example without labels, which no engine is asked for."""


def prompt_of(row: TokenizedRow) -> list[int]:
    """The tokens up to the last label, whose log-probability an engine reports with its prompt's."""
    return row.ids[: int(row.label_positions[-1]) + 1].tolist() if row.labels.any() else []


def captured(
    row: TokenizedRow, dataset: str, reply: Reply, selection: Selection, is_token: BoolArray
) -> CapturedRow | str:
    """The captured row, or why the engine gives no distribution for it. is_token: of every id of the vocabulary.

    The remaining mass is 1 minus the listed ones in float64, where float32 log-probabilities leave an error of about
    1e-6; it is never negative, and 0 where every token is listed. Ids that are no tokens count towards it.

    Raises CaptureError where ids that are no tokens, or are outside the vocabulary, hold more than MOST_PADDING.
    """
    n, k, tokens = len(reply.actual), selection.k, int(is_token.sum())
    reply = Reply(reply.ids, np.minimum(reply.logprobs, 0.0), np.minimum(reply.actual, 0.0))
    ids, logprobs = _ordered(reply)
    if np.isnan(logprobs).any() or not np.isfinite(reply.actual).all():
        return "NaN or infinite log-probabilities"
    mass = np.exp(logprobs)
    if n and (most := float(mass.sum(1).max())) > MOST_MASS:
        return f"the listed probabilities of a label add up to {most:.4f}"
    outside = ids >= len(is_token)
    padding = (ids >= 0) & (outside | ~is_token[np.where(outside, 0, ids)])
    if n and (most := float(np.where(padding, mass, 0.0).sum(1).max())) > MOST_PADDING:
        worst = int(ids[padding][np.argmax(mass[padding])])
        raise CaptureError(
            f"example {row.key}: {most:.4f} of the probability of a label is on ids that are not tokens of the "
            f"tokenizer (id {worst}; it has {tokens} tokens), more than {MOST_PADDING:g}. An engine cannot mask them: "
            "capture this model with the engine transformers, or check that the tokenizer belongs to it"
        )
    logprobs = np.where(padding, -np.inf, logprobs)
    ids, logprobs = _ordered(Reply(np.where(padding, -1, ids), logprobs, reply.actual))
    ids, logprobs = ids[:, :k], logprobs[:, :k]
    mass = np.exp(logprobs)
    if selection.keep_mass < 1:
        logprobs = np.where(mass.cumsum(1) - mass < selection.keep_mass, logprobs, -np.inf)
    ids = np.where(logprobs > -np.inf, ids, -1)
    tail = np.where((ids >= 0).sum(1) == tokens, 0.0, np.maximum(0.0, 1 - np.exp(logprobs).sum(1)))
    wide = [(0, 0), (0, k - ids.shape[1])]
    rows = TopK(np.pad(ids, wide, constant_values=-1), np.pad(logprobs, wide, constant_values=-np.inf), tail)
    return CapturedRow(row, dataset, rows, reply.actual, -float(reply.actual.sum()))


def _ordered(reply: Reply) -> tuple[IntArray, FloatArray]:
    """ids and log-probabilities [n, m] by falling log-probability and rising id, each id once, gaps at the end."""
    ids, logprobs = reply.ids, np.where(reply.ids < 0, -np.inf, reply.logprobs)
    order = np.lexsort((-logprobs, ids))
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    again = np.zeros(ids.shape, bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    ids, logprobs = np.where(again, -1, ids), np.where(again, -np.inf, logprobs)
    order = np.lexsort((ids, -logprobs))
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)


CONCURRENCY = 16
"""Requests that wait for one server at a time, whose answers are all that is kept in memory."""

API_KEY = "FUSEKIT_ENGINE_API_KEY"
"""Environment variable with the key of servers that want one."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds before a failed request is repeated; doubled from one to the other."""

_NO_MASS = -9999.0
"""What vLLM writes for -inf, which JSON does not have."""


class _FailedError(Exception):
    """A request that may succeed when it is repeated."""


class Identity(NamedTuple):
    """What a server says of itself. kind: ``vllm`` or ``sglang``. head_dtype, batch_invariant: None if it does not."""

    kind: str
    version: str
    model: str
    head_dtype: str | None = None
    batch_invariant: bool | None = None


@dataclass
class _Server:
    url: str
    flying: int = 0
    failures: int = 0
    rests_until: float = 0.0


class Servers:
    """Servers of one model that score examples, each request by the least busy one.

    settings: where they are, and how long to wait for them. tolerance: most nats between two answers of one model.

    Raises CaptureError: no answer, no known server, servers of different kinds, versions or models.
    """

    def __init__(
        self,
        settings: EngineSettings,
        selection: Selection,
        is_token: BoolArray,
        tolerance: float,
        notify: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.settings, self.selection, self._is_token, self.notify = settings, selection, is_token, notify
        self.tolerance = tolerance
        self._probe: tuple[TokenizedRow, Reply] | None = None
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._servers = [_Server(url.rstrip("/")) for url in settings.url]
        identities = [self._identity_once_it_answers(server.url) for server in self._servers]
        self.identity = identities[0]
        for server, identity in zip(self._servers, identities, strict=True):
            self._refuse_another(server.url, identity)

    def score_batches(
        self, rows: Sequence[TokenizedRow], datasets: Sequence[str] | None = None
    ) -> Iterator[list[tuple[int, CapturedRow | str]]]:
        """As :meth:`fusekit.capturing.teacher.Teacher.score_batches`, example by example.

        Raises CaptureError: a server refuses a request, another model answers (at the end each is asked, so that
        nothing is kept of one that was replaced), or all fail for longer than ``settings.patience`` seconds.
        """
        names = datasets or [""] * len(rows)
        waiting, most = iter(range(len(rows))), CONCURRENCY * len(self._servers)
        pool = ThreadPoolExecutor(most)
        try:
            flying: deque[tuple[int, Future[Reply]]] = deque()
            while True:
                flying.extend((i, pool.submit(self._score, rows[i])) for i in islice(waiting, most - len(flying)))
                if not flying:
                    break
                index, reply = flying.popleft()
                yield [(index, captured(rows[index], names[index], reply.result(), self.selection, self._is_token))]
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()
        for server in self._servers:
            with suppress(_FailedError):  # it is verified after the next shard
                self._verify(server.url)

    def _verify(self, url: str) -> None:
        """Ask a server who it is, and for one example again. Raises CaptureError where another model answers."""
        self._refuse_another(url, self._ask_identity(url))
        if self._probe is None:
            return
        row, before = self._probe
        now = self._request(url, row)
        apart = float(np.abs(np.maximum(now.actual, -1e4) - np.maximum(before.actual, -1e4)).max())
        if not apart <= self.tolerance:
            raise CaptureError(
                f"{url} gives the labels of example {row.key} other log-probabilities than at the start, by up "
                f"to {apart:.3g} nats (the tolerance is {self.tolerance:g}): another model answers. What is captured "
                "stays; start the same model again"
            )

    def _refuse_another(self, url: str, identity: Identity) -> None:
        if identity != self.identity:
            raise CaptureError(
                f"{url} is {identity.kind} {identity.version} with the model {identity.model}, but the first "
                f"server was {self.identity.kind} {self.identity.version} with {self.identity.model}: one store is "
                "captured from one model and engine. What is captured stays; start the same server again"
            )

    def _score(self, row: TokenizedRow) -> Reply:
        if not row.labels.any():
            return NO_LABELS
        first_failure = 0.0
        while True:
            server = self._least_busy()
            try:
                found = self._request(server.url, row)
                server.failures, server.rests_until = 0, 0.0
                self._probe = self._probe or (row, found)
                return found
            except _FailedError as error:
                now = time.monotonic()
                first_failure = first_failure or now
                with self._lock:
                    if now >= server.rests_until:  # many requests fail at once
                        if not server.failures:
                            self.notify(f"{server.url} failed, the request is repeated: {error}")
                        server.rests_until = now + min(FIRST_PAUSE * 2 ** min(server.failures, 9), LONGEST_PAUSE)
                        server.failures += 1
                if now - first_failure > self.settings.patience or self._stopped.is_set():
                    raise CaptureError(
                        f"{server.url} failed for {now - first_failure:.0f} seconds (engine.patience is "
                        f"{self.settings.patience:g}) at example {row.key}: {error}. What is captured stays: "
                        "start the server and run the same command again"
                    ) from error
            finally:
                with self._lock:
                    server.flying -= 1

    def _least_busy(self) -> _Server:
        """The server with the fewest requests of those that do not rest; if all rest, once the first is back."""
        now = time.monotonic()
        with self._lock:
            server = min(self._servers, key=lambda one: (max(one.rests_until - now, 0.0), one.flying))
            server.flying += 1
        if server.rests_until > now:
            self._stopped.wait(server.rests_until - now)
        return server

    def _identity_once_it_answers(self, url: str) -> Identity:
        deadline = time.monotonic() + self.settings.patience
        pause = FIRST_PAUSE
        while True:
            try:
                return self._ask_identity(url)
            except _FailedError as error:
                if time.monotonic() + pause > deadline:
                    raise CaptureError(
                        f"{url} does not answer: {error}. Start a server of vLLM or SGLang there (docs/how-to/"
                        "engines.md); what is captured stays"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _ask_identity(self, url: str) -> Identity:
        try:
            info = self._ask(url, "/server_info", None, "server info")
            return Identity(
                "sglang",
                str(info.get("version", "of unknown version")),
                str(info["model_path"]),
                "float32" if info.get("enable_fp32_lm_head") else info.get("dtype"),
                bool(info.get("enable_deterministic_inference")),
            )
        except (CaptureError, KeyError, TypeError, AttributeError):
            pass  # not SGLang's
        try:
            version = self._ask(url, "/version", None, "its version")["version"]
            models = self._ask(url, "/v1/models", None, "its models")["data"]
            base = [model["id"] for model in models if not model.get("parent")]  # an adapter names its model
            return Identity("vllm", str(version), str(base[0]))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise CaptureError(f"{url} answers, but neither as vLLM nor as SGLang does") from error

    def _request(self, url: str, row: TokenizedRow) -> Reply:
        prompt, k, what = prompt_of(row), self.selection.k, f"example {row.key} of {len(row)} tokens"
        try:
            if self.identity.kind == "vllm":
                body = {"model": self.identity.model, "prompt": prompt, "prompt_logprobs": k}
                body |= {"max_tokens": 1, "temperature": 0}
                return _vllm_reply(self._ask(url, "/v1/completions", body, what), row)
            body = {
                "input_ids": prompt,
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": k,
                "return_flat_raw_top_logprobs": True,
                "return_flat_raw_top_logprobs_b64": True,
            }
            return _sglang_reply(self._ask(url, "/generate", body, what), row)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise _FailedError(
                f"not the log-probabilities of every label in the answer ({type(error).__name__}: {error}); SGLang has "
                "flat ones in base64 from 0.5.23 on"
            ) from error

    def _ask(self, url: str, path: str, body: dict[str, Any] | None, where: str) -> Any:
        """A server's JSON answer. Raises _FailedError, and CaptureError for what no repetition changes."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.settings.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode("utf-8", "replace").split())
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _FailedError(f"status {error.code}: {said}") from error
            raise CaptureError(
                f"{url}{path} refuses {where} with status {error.code}: {said}. A vLLM server lists at most "
                f"--max-logprobs tokens of a label (20 unless it is started with another number; top_k is "
                f"{self.selection.k}) and reads at most --max-model-len tokens; a server with a key wants it in "
                f"{API_KEY}"
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _FailedError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _vllm_reply(answer: Any, row: TokenizedRow) -> Reply:
    positions = row.label_positions.tolist()
    listed = [answer["choices"][0]["prompt_logprobs"][at] for at in positions]
    parsed = [{int(id_): float(entry["logprob"]) for id_, entry in one.items()} for one in listed]
    actual = [one[label] for one, label in zip(parsed, row.ids[positions].tolist(), strict=True)]
    width = max(map(len, parsed))
    ids, logprobs = np.full((len(parsed), width), -1, np.int64), np.full((len(parsed), width), -np.inf)
    for at, one in enumerate(parsed):
        ids[at, : len(one)], logprobs[at, : len(one)] = list(one), list(one.values())
    return Reply(ids, _with_infinities(logprobs), _with_infinities(np.array(actual)))


def _sglang_reply(answer: Any, row: TokenizedRow) -> Reply:
    info, positions = answer["meta_info"], row.label_positions

    def rows(name: str, dtype: type[np.generic]) -> Any:
        flat = np.frombuffer(base64.b64decode(info[f"input_top_logprobs_{name}_flat_b64"]), dtype)
        return flat.reshape(info["input_top_logprobs_shape"])[positions - info["input_top_logprobs_null_prefix"]]

    tokens = [info["input_token_logprobs"][at] for at in positions.tolist()]
    if [token[1] for token in tokens] != row.ids[positions].tolist():
        raise ValueError("it has other tokens than were sent")
    actual = np.array([token[0] for token in tokens], np.float64)
    logprobs = _with_infinities(rows("val", np.float32).astype(np.float64))
    return Reply(rows("idx", np.int32).astype(np.int64), logprobs, _with_infinities(actual))


def _with_infinities(logprobs: Any) -> Any:
    return np.where(logprobs <= _NO_MASS, -np.inf, logprobs)
