"""A causal language model's forward in two halves: hidden states of a batch, then logits of chosen positions alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

ULPS = 64
"""A head over fewer rows adds up its products in another order: so many last places of the largest logit."""

PADDING_BOUND, HALF_PADDING_BOUND = 0.02, 0.5
"""Nats by which padding may change the log-probabilities of an example, in float32 and in 16 bits: rounding."""


class OtherForwardError(Exception):
    """A model's forward is not a decoder followed by a head."""


class SplitForward:
    """The two halves of a model whose ``forward`` calls one decoder and reads ``last_hidden_state`` of its output.

    For the first half the decoder hands on no position at all, so that the head computes nothing (for a single one it
    would read all of its weights); for the second the decoder is replaced by chosen hidden states, and a linear head by
    a product with some of its rows. What the model does before and after its head (scales, caps) stays the model's.

    Args:
        model: a transformers causal language model.
        float32_head: whether :meth:`blocks` multiplies the weights with float32 sums and output whatever their dtype.
    """

    def __init__(self, model: Any, float32_head: bool = True) -> None:
        self.model, self.float32_head = model, float32_head
        self.decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.head = _linear_head(model)
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

    def blocks(self, hidden: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
        """The logits of hidden states [n, H], for ``width`` ids at a time: float32 [n, width], gone with the next."""
        assert self.head is not None
        product = _Product(self.head, len(hidden), width, self.float32_head)
        hidden = product.prepared(hidden)
        for start in range(0, len(self.head.weight), width):
            product.start = start
            with _replaced_forward(self.head, product):
                logits = self.logits(hidden)
            yield product.wide(logits)

    def _output(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self._output_class is tuple else self._output_class(last_hidden_state=hidden)


class _Product:
    """Some rows of a linear head's weights times hidden states, into memory that is used again for the next rows."""

    def __init__(self, head: torch.nn.Linear, n: int, width: int, float32: bool) -> None:
        self.weight, self.bias, self.n, self.width, self.start = head.weight, head.bias, n, width, 0
        half = self.weight.dtype != torch.float32
        self.float32 = float32 and half
        self._cuda = self.weight.device.type == "cuda"
        self._out = self._space(n, torch.float32)
        self._narrow = self._space(n, self.weight.dtype) if half and not float32 else None
        # A CPU multiplies with float32 output what is float32; products of bfloat16 are as exact and as fast.
        self._rows = self._space(self.weight.shape[1], torch.float32) if self.float32 and not self._cuda else None

    def _space(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        width = min(self.width, len(self.weight))
        return torch.empty(rows * width, dtype=dtype, device=self.weight.device)

    def prepared(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.to(self.weight.device)
        return hidden.float() if self._rows is not None else hidden

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.weight[self.start : self.start + self.width]
        x = hidden.reshape(self.n, -1)
        out = self._out[: self.n * len(weight)].view(self.n, -1)
        if self._rows is not None:
            rows = self._rows[: weight.numel()].view(weight.shape).copy_(weight)
            with _bfloat16_products(self.weight.dtype == torch.bfloat16):
                torch.mm(x.float(), rows.T, out=out)
        elif self.float32:
            out = torch.mm(x.to(weight.dtype), weight.T, out_dtype=torch.float32)
        elif self._narrow is not None:
            out = torch.mm(x, weight.T, out=self._narrow[: out.numel()].view(out.shape))
        else:
            torch.mm(x, weight.T, out=out)
        if self.bias is not None:
            out += self.bias[self.start : self.start + len(weight)]
        return out[None]

    def wide(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.dtype == torch.float32:
            return logits
        return self._out[: logits.numel()].view(logits.shape).copy_(logits)


def _linear_head(model: Any) -> torch.nn.Linear | None:
    """The model's head if it is a plain linear layer whose weights are here as floating-point numbers."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A forward of its own is that of a hook, which brings weights that are kept elsewhere.
    if type(head) is not torch.nn.Linear or "forward" in head.__dict__ or head.weight.device.type == "meta":
        return None
    return head if head.weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else None


@contextmanager
def _bfloat16_products(wanted: bool) -> Iterator[None]:
    """Let a CPU round the factors of float32 products to bfloat16, which changes none that was bfloat16 before."""
    settings: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - torch sets it when it is imported
    before = settings.fp32_precision
    if wanted:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def plain_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] by one call of the model. ids, mask: int64 [B, T], padding on the right."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def split_forward(model: Any, ids: torch.Tensor, float32_head: bool = True) -> tuple[SplitForward | None, str]:
    """The split forward of a model if it gives the logits of the plain one on a sample, else None and why not.

    Its head is None if the model computes other logits from blocks of it. ids: int64 [B, T], a small batch without
    padding; its last row is tried as if padded.
    """
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] // 2 :] = 0
    plain = plain_logits(model, ids, mask)[mask.bool()]
    try:
        split = SplitForward(model, float32_head)
        if split.decoder is model:
            return None, f"{type(model).__name__} has no decoder of its own"
        hidden = split.hidden(ids, mask)[mask.bool()]
        if split.head is not None and not _in_blocks(split, hidden, plain):
            split.head = None
        if split.head is not None or _agree(plain, split.logits(hidden)):
            return split, ""
    except (OtherForwardError, AttributeError, TypeError, IndexError, KeyError, ValueError) as error:
        return None, " ".join(str(error).split())
    return None, f"{type(model).__name__} computes other logits from its hidden states than in one forward"


def _in_blocks(split: SplitForward, hidden: torch.Tensor, plain: torch.Tensor) -> bool:
    try:
        width = -(-plain.shape[1] // 3)
        return _agree(plain, torch.cat([block.clone() for block in split.blocks(hidden, width)], 1))
    except (RuntimeError, TypeError, IndexError, ValueError):  # it does more with its logits than with single ones
        return False


def _agree(plain: torch.Tensor, found: torch.Tensor) -> bool:
    precision = ULPS * max(torch.finfo(plain.dtype).eps, torch.finfo(found.dtype).eps)
    plain, found = plain.float(), found.float()
    scale = float(torch.nan_to_num(plain, nan=0.0, posinf=0.0, neginf=0.0).abs().max())
    return plain.shape == found.shape and torch.allclose(
        plain, found, rtol=precision, atol=precision * scale, equal_nan=True
    )


def padding_error(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """By how much the log-probabilities of a short example change when it is padded, and by how much they may, in nats.

    A model that ignores the attention mask, and is not causal, reads the padding. The largest difference among the ten
    most probable ids of each position. ids: int64 [2, T], without padding.
    """
    length, mask = max(1, ids.shape[1] // 3), torch.ones_like(ids)
    mask[1, length:] = 0
    alone = plain_logits(model, ids[1:, :length], mask[1:, :length])
    bound = PADDING_BOUND if alone.dtype == torch.float32 else HALF_PADDING_BOUND
    beside = plain_logits(model, ids, mask)[1:, :length].float().log_softmax(2)
    best, at = alone.float().log_softmax(2).topk(min(10, alone.shape[2]), dim=2)
    difference = torch.nan_to_num(beside.gather(2, at) - best, nan=0.0, posinf=0.0, neginf=0.0)
    return float(difference.abs().max()), bound


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
