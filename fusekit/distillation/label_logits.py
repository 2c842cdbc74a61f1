"""Logits of the labels alone, of any architecture, from inside the model's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fusekit.errors import DistillationError


class LabelLogits:
    """Has a model compute the logits of chosen positions only.

    A hook on the output embedding picks the hidden states before they are multiplied. It runs within the model's own
    forward pass, so it works under DDP, FSDP and adapters, for every model whose logits come from calling the module
    that ``get_output_embeddings`` names; for others the logits are picked afterwards.

    Args:
        model: a causal language model, before it is wrapped.
    """

    def __init__(self, model: Any) -> None:
        self._places: torch.Tensor | None = None
        self._picked = False
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._handle = head.register_forward_pre_hook(self._pick) if head is not None else None

    def _pick(self, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._places is None or self._picked or not args:
            return None
        hidden = args[0]
        self._picked = True
        return (hidden.reshape(-1, hidden.shape[-1])[self._places].unsqueeze(0), *args[1:])

    @contextmanager
    def at(self, places: torch.Tensor) -> Iterator[None]:
        """Within it a forward pass gives logits [1, n, V] of ``places`` (int64 [n], of the flattened [B * T])."""
        self._places, self._picked = places, False
        try:
            yield
        finally:
            self._places = None

    def of(self, logits: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the forward pass gave, and which rows of it are the places': None for all of them, in order.

        Raises:
            DistillationError: the logits are of another shape than a language model's.
        """
        if self._picked and logits.shape[:-1] == (1, len(places)):
            return logits, None
        if self._picked or logits.ndim != 3:
            raise DistillationError(
                f"the model gave logits of shape {tuple(logits.shape)}, not [batch, tokens, vocabulary]: it is not a "
                "causal language model that fusekit can train"
            )
        return logits, places

    def remove(self) -> None:
        """Take the hook off the model."""
        if self._handle is not None:
            self._handle.remove()
