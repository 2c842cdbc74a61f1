"""Which rows go through a model together: the same rows in the same order always make the same batches."""

from __future__ import annotations

from collections.abc import Sequence


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
