"""Which rows go through a model together: the same rows in the same order always make the same batches and shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusekit.capture.manifest import ROWS_PER_SHARD

BATCH_TOKENS = 16384
CPU_BATCH_TOKENS = 2048
"""Of a forward pass on an accelerator, and on a CPU, where a larger batch takes more memory and no less time."""

SHARD_SECONDS = 120.0
"""Of work, about, that an interruption may cost."""

FLOPS, CPU_FLOPS = 1e14, 5e10
"""Operations a second that are assumed of an accelerator, and of a CPU: a shard has to be the same on every machine."""


def batch_tokens_on(device: str) -> int:
    """Most tokens of a batch of forward passes, padding included. device: its type, as ``cuda``."""
    return CPU_BATCH_TOKENS if device == "cpu" else BATCH_TOKENS


def rows_per_shard(parameters: int, row_tokens: float, device: str) -> int:
    """Rows of a shard: :data:`SHARD_SECONDS` of work, or a batch where that is more, as a power of two.

    Args:
        parameters: of the model; a token takes two operations for each.
        row_tokens: of a row, on average.
        device: its type, as ``cuda``.

    Returns:
        From 1 to :data:`fusekit.capture.manifest.ROWS_PER_SHARD`; the same wherever the arguments are.
    """
    rate = CPU_FLOPS if device == "cpu" else FLOPS
    tokens = max(SHARD_SECONDS * rate / (2 * max(parameters, 1)), batch_tokens_on(device))
    return min(1 << int(math.log2(max(tokens / max(row_tokens, 1), 1))), ROWS_PER_SHARD)


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Batches of rows of similar length.

    Args:
        lengths: tokens of each row; rows of length 0 are in no batch.
        batch_tokens: most tokens of a batch, padding included; a longer row is a batch of its own.

    Returns:
        Indices into ``lengths``, the longest rows first, so that memory runs out at the start if it does; rows of equal
        length in their order.
    """
    batches: list[list[int]] = []
    for index in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i)):
        # The first row of a batch is its longest.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
