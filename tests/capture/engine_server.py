"""A loopback server that answers from a transformers model in the wire forms of vLLM 0.32 and SGLang 0.5.23."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusekit.capturing.models import ModelChoice, find_checkpoint, load_model

MAX_LOGPROBS = 20


class EngineServer(ThreadingHTTPServer):
    """``with EngineServer(model, kind) as server`` serves at ``server.url``.

    Attributes:
        faults: what happens to the next requests for scores: ``500``, ``503``, ``drop``, ``cut`` or ``hang``.
        scored: requests that were answered.
        swap: (after how many requests, model) another model under the same name.
    """

    daemon_threads = True

    def __init__(self, model: Path | str, kind: str = "vllm", port: int = 0, delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.kind, self.name, self.delay = kind, Path(model).name, delay
        self.model = load(model)
        self.faults: deque[str] = deque()
        self.scored = 0
        self.swap: tuple[int, Any] | None = None
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> EngineServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: clients go away on purpose."""

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """float32 [T, V]: row i is of token i, from the tokens before it; row 0 is nothing."""
        with self.lock, torch.inference_mode():
            if self.swap is not None and self.scored >= self.swap[0]:
                self.model = self.swap[1]
            self.scored += 1
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        shifted = torch.log_softmax(logits, -1).numpy()
        return np.concatenate([np.zeros_like(shifted[:1]), shifted[:-1]])


def load(model: Path | str) -> Any:
    return load_model(find_checkpoint(ModelChoice(str(model), dtype="float32")), torch.device("cpu"))


class Handler(BaseHTTPRequestHandler):
    server: EngineServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        answers: dict[str, Any] = {"/v1/models": {"data": [{"id": self.server.name, "root": self.server.name}]}}
        if self.server.kind == "vllm":
            answers["/version"] = {"version": "0.32.0"}
        else:
            about = {"version": "0.5.23", "dtype": "float32", "enable_fp32_lm_head": True}
            answers["/server_info"] = {"model_path": self.server.name, **about}
        found = self.path in answers
        self.say(200 if found else 404, answers.get(self.path, {"detail": "Not Found"}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            fault = self.server.faults.popleft() if self.server.faults else ""
        time.sleep(self.server.delay)
        if fault.isdecimal():
            self.say(int(fault), {"error": {"message": "out of order"}})
        elif fault == "drop":
            self.close_connection = True
        elif fault == "hang":
            time.sleep(3)
        else:
            answer = self.vllm(body) if self.server.kind == "vllm" else self.sglang(body)
            self.say(*answer, cut=fault == "cut")

    def vllm(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, k = body["prompt"], body["prompt_logprobs"]
        if self.path != "/v1/completions" or body["model"] != self.server.name or body["max_tokens"] != 1:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if k > MAX_LOGPROBS:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {MAX_LOGPROBS}"
            return 400, {"error": {"message": said, "type": "BadRequestError", "code": 400}}
        positions: list[Any] = [None]
        for id_, row in list(zip(ids, self.server.logprobs(ids), strict=True))[1:]:
            order = np.argsort(-row, kind="stable")[:k].tolist()
            said = {i: (max(float(row[i]), -9999.0), int((row > row[i]).sum()) + 1) for i in [id_, *order]}
            positions.append({str(i): dict(zip(("logprob", "rank"), one, strict=True)) for i, one in said.items()})
        return 200, {"id": "cmpl-1", "choices": [{"index": 0, "text": "", "prompt_logprobs": positions}]}

    def sglang(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert (self.path, body["logprob_start_len"], body["sampling_params"]["max_new_tokens"]) == ("/generate", 0, 0)
        assert body["return_logprob"] is body["return_flat_raw_top_logprobs_b64"] is True
        ids, k = body["input_ids"], body["top_logprobs_num"]
        rows = self.server.logprobs(ids)[1:]
        order = np.argsort(-rows, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(rows, order, 1)
        tokens = [[None, ids[0], None]] + [[float(row[i]), i, None] for row, i in zip(rows, ids[1:], strict=True)]
        return 200, {
            "text": "",
            "meta_info": {
                "prompt_tokens": len(ids),
                "input_token_logprobs": tokens,
                "input_top_logprobs_shape": list(values.shape),
                "input_top_logprobs_null_prefix": 1,
                "input_top_logprobs_val_flat_b64": base64.b64encode(values.astype(np.float32).tobytes()).decode(),
                "input_top_logprobs_idx_flat_b64": base64.b64encode(order.astype(np.int32).tobytes()).decode(),
                "input_top_logprobs_val_flat_b64_dtype": "float32",
                "input_top_logprobs_idx_flat_b64_dtype": "int32",
            },
        }

    def say(self, status: int, answer: Any, cut: bool = False) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)


def serve(model: str, kind: str, port: int, delay: float) -> None:
    """Serve until this process is killed."""
    with EngineServer(model, kind, port, delay) as server:
        print(server.url, flush=True)
        threading.Event().wait()
