"""Starting an engine for a capture: what it cannot do is refused, and it is checked against transformers first."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fusekit.capturing.engine import Teacher, batch_tokens_on
from fusekit.capturing.engines.check import CHECKED, ROUNDED_TOLERANCE, TOLERANCE, check
from fusekit.capturing.engines.replies import Scorer, Vocabulary
from fusekit.capturing.engines.server import Identity, Servers
from fusekit.capturing.engines.vllm import HEAD_DTYPE, Vllm, batch_invariant, version
from fusekit.capturing.estimate import stored_dtype
from fusekit.capturing.load import load_model, longest_input, valid_ids
from fusekit.capturing.manifest import Setting
from fusekit.capturing.models import Checkpoint
from fusekit.capturing.settings import CaptureSettings
from fusekit.capturing.store import Store
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import CaptureError
from fusekit.resources import release
from fusekit.types import CapturedRow, Row

DETAILS = ("engine_version", "engine_head_dtype", "engine_batch_invariant")


class Opening:
    """An engine that is not transformers, before it is started.

    Raises CaptureError where the engine cannot capture what is asked for.
    """

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
        self._vocabulary = Vocabulary(self._valid, vocabulary)
        dtype = checkpoint.choice.dtype if checkpoint.choice.dtype != "auto" else stored_dtype(checkpoint)
        usual = TOLERANCE if dtype.removeprefix("torch.") == "float32" else ROUNDED_TOLERANCE
        self.tolerance = self.engine.tolerance or usual
        self._refuse()

    def _refuse(self) -> None:
        choice, kind = self.checkpoint.choice, self.engine.kind
        if self.settings.temperature != 1:
            raise CaptureError(
                f"temperature is {self.settings.temperature:g}, but the engine {kind} reports log-probabilities "
                "at temperature 1: leave it out, or capture with the engine transformers"
            )
        if self.checkpoint.gguf is not None:
            raise CaptureError(
                f"{choice.model} is a GGUF file, and the engine is {kind}: GGUF files are captured with transformers"
            )
        ignored = [name for name in ("quantization", "device_map", "attn_implementation") if getattr(choice, name)]
        if ignored:
            raise CaptureError(
                f"{ignored[0]} is {getattr(choice, ignored[0])!r}, which tells transformers how to load "
                f"{choice.model}, but the engine is {kind}: leave it out"
                + (" and set engine.options (--engine-options)" if kind == "vllm" else " and set it in the server")
            )

    def _servers(self) -> Servers:
        return Servers(self.engine, self.settings.selection, self._vocabulary, self.tolerance, self.notify)

    def details(self) -> dict[str, Setting]:
        """For the store's manifest; None for what a server does not tell."""
        if self.engine.kind == "vllm":
            known = Identity("vllm", version(), str(self.checkpoint.folder), HEAD_DTYPE, batch_invariant())
        else:
            known = self._servers().identity
        names = (f"{known.kind} {known.version}", known.head_dtype, known.batch_invariant)
        found: dict[str, Setting] = dict(zip(DETAILS, names, strict=True))
        return found | (
            {"engine_options": json.dumps(self.engine.options, sort_keys=True)} if self.engine.options else {}
        )

    def start(self, rows: Sequence[Row], device: torch.device) -> Scorer:
        """The engine, once it has agreed with transformers on some of the rows, or on those of the probe.

        device: where transformers runs the model for that.

        Raises CaptureError: they differ, the probe is of another model, or the engine does not start.
        """
        tolerance, selection = self.tolerance, self.settings.selection
        if self.engine.probe is not None:
            probe = self._probe(self.engine.probe)
            reference = [probe[i] for i in range(min(CHECKED, len(probe)))]
            tolerance += probe.spec.max_error
        else:
            reference = self._reference(rows, device)
        engine: Scorer
        if self.engine.kind == "vllm":
            longest = max(len(self.tokenizer.tokenize(row)) for row in rows)
            longest = max([longest, *(len(row.tokens) for row in reference)])
            batch_tokens = self.settings.batch_tokens or batch_tokens_on(device.type)
            engine = Vllm(
                self.checkpoint,
                selection,
                self._vocabulary,
                longest=longest,
                batch_tokens=batch_tokens,
                notify=self.notify,
            )
        else:
            engine = self._servers()
        what = f"{self.engine.kind} {' '.join(self.engine.url)}".strip()
        found = check(engine, reference, tolerance, f"{self.checkpoint.choice.model} in {what}")
        self.notify(f"{what} and transformers on {len(reference)} examples: {found}")
        return engine

    def _reference(self, rows: Sequence[Row], device: torch.device) -> list[CapturedRow]:
        choice = self.checkpoint.choice
        picked = np.unique(np.linspace(0, len(rows) - 1, min(CHECKED, len(rows))).astype(np.int64)).tolist()
        teacher = Teacher(
            load_model(self.checkpoint, device),
            self._valid,
            self.settings.selection,
            batch_tokens=self.settings.batch_tokens,
            name=choice.model,
            notify=self.notify,
            longest=longest_input(self.checkpoint),
        )
        scored = teacher.score([self.tokenizer.tokenize(rows[i]) for i in picked]).rows
        del teacher
        release(device)
        return scored

    def _probe(self, path: str) -> Store:
        store, ours = Store.open(Path(path)), self.checkpoint.fingerprint()
        kind = store.spec.details.get("engine", "transformers")
        if store.spec.model_fingerprint != ours or kind != "transformers":
            raise CaptureError(
                f"the probe {path} is of {store.spec.model} ({store.spec.model_fingerprint}) by {kind}, but "
                f"{self.checkpoint.choice.model} ({ours}) has to be checked against transformers: capture some "
                "examples of it with the engine transformers where it fits"
            )
        if (store.spec.top_k, store.spec.temperature) != (self.settings.top_k, 1.0):
            raise CaptureError(
                f"the probe {path} has top_k {store.spec.top_k} and temperature {store.spec.temperature:g}, but this "
                f"capture has {self.settings.top_k} and 1: capture the probe with the same"
            )
        return store
