"""Work that one of several processes does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def is_main() -> bool:
    """Whether this process is the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def shared() -> bool:
    """Whether there are several processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def on_main(work: Callable[[], Result]) -> Result:
    """Run ``work`` in the first process; every process gets its result, or its exception.

    Without a launcher there is one process. The result and the exception must be picklable.
    """
    if not shared():
        return work()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:  # the others would wait forever
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: Result = box[0]
    return result
