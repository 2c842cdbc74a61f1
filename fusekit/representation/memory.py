"""Memory that ran out: recognised whoever says so, and given back before the next try."""

from __future__ import annotations

import gc
from typing import Any

import torch

# What allocators say that raise a plain RuntimeError.
_PHRASES = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on other systems
    "out of memory",  # CUDA, MPS, XPU
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",  # its workspace does not fit
    "could not create a primitive",  # oneDNN
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of an accelerator or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _PHRASES)


def release(device: torch.device) -> None:
    """Give cached memory back to the device. Call it outside of the ``except`` block, whose traceback holds tensors."""
    gc.collect()
    backend: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(backend, "empty_cache"):
        backend.empty_cache()
