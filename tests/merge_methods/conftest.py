"""Chunks and threads for one test."""

from collections.abc import Callable, Iterator

import pytest
import torch

from fusekit.merge_methods import fusion_vectors


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Sets how many elements a chunk has and how many threads torch has."""

    def set_both(elements: int, threads: int) -> None:
        monkeypatch.setattr(fusion_vectors, "CPU_CHUNK", elements)
        torch.set_num_threads(threads)

    before = torch.get_num_threads()
    yield set_both
    torch.set_num_threads(before)
