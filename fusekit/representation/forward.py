"""A causal language model's forward in two halves: hidden states of a batch, then logits of chosen positions.

The logits of a whole batch over a large vocabulary are the largest tensor of a forward, and most of them are not asked
for. Both halves are the model's own ``forward``; what it does after its head (soft-capping, scaling) is in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# A head over fewer rows adds up its products in another order: so many units in the last place of the largest logit.
ULPS = 64


class OtherForwardError(Exception):
    """A model's forward is not a decoder followed by a head."""


class SplitForward:
    """The two halves of a model whose ``forward`` calls one decoder and reads ``last_hidden_state`` of its output.

    For the first half the decoder hands on no position at all, so that the head computes nothing (for a single one it
    would read all of its weights); for the second the decoder is replaced by chosen hidden states.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self._output_class: type[Any] = tuple

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, T, H] of a batch. ids, mask: int64 [B, T], mask 0 for padding, which is on the right.

        Raises OtherForwardError when the model's forward does not pass through its decoder once.
        """
        kept: list[torch.Tensor] = []
        run = self.decoder.forward

        def keep_all(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            self._output_class = type(output)
            kept.append(output[0])
            return self._output(output[0][:1, :0])

        with _replaced_forward(self.decoder, keep_all):
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        if len(kept) != 1 or kept[0].shape[:2] != ids.shape:
            raise OtherForwardError(f"{type(self.model).__name__} does not pass through its decoder once")
        return kept[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of hidden states [n, H], in the model's own dtype. Follows a call of :meth:`hidden`."""
        # The decoder looks at no ids here: the model's forward only passes them on.
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        with _replaced_forward(self.decoder, lambda *_args, **_kwargs: self._output(hidden[None])):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0]

    def _output(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self._output_class is tuple else self._output_class(last_hidden_state=hidden)


def plain_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] by one call of the model. ids, mask: int64 [B, T], padding on the right."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def split_forward(model: Any, ids: torch.Tensor) -> tuple[SplitForward | None, str]:
    """The split forward of a model if it gives the logits of the plain one on a sample, else None and why not.

    ids: int64 [B, T], a small batch without padding; its last row is tried as if padded.
    """
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] // 2 :] = 0
    plain = plain_logits(model, ids, mask)[mask.bool()].float()
    try:
        split = SplitForward(model)
        if split.decoder is model:
            return None, f"{type(model).__name__} has no decoder of its own"
        found = split.logits(split.hidden(ids, mask)[mask.bool()])
    except (OtherForwardError, AttributeError, TypeError, IndexError, KeyError, ValueError) as error:
        return None, " ".join(str(error).split())
    found, precision = found.float(), ULPS * torch.finfo(found.dtype).eps
    scale = torch.nan_to_num(plain, nan=0.0, posinf=0.0, neginf=0.0).abs().max()
    if plain.shape != found.shape or not torch.allclose(
        plain, found, rtol=precision, atol=precision * float(scale), equal_nan=True
    ):
        return None, f"{type(model).__name__} computes other logits from its hidden states than in one forward"
    return split, ""


@contextmanager
def _replaced_forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let ``module.forward`` be ``function`` while the body runs; hooks and device placement stay as they are."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
