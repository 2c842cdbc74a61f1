"""One thread per test process: pytest runs as many as there are cores, and threads beyond that wait for each other.

``--full`` also runs what takes minutes: checks that go through every case of what the default run goes through in part.
"""

import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also go through every case of the exhaustive checks")
    parser.addoption("--engines", action="store_true", help="also start the real vLLM, which has to be installed")
    parser.addoption("--ray", action="store_true", help="also start a local Ray, which has to be installed")


_CHOSEN = {
    "full": "goes through every case: --full",
    "engines": "starts the real vLLM: --engines",
    "ray": "starts a local Ray: --ray",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for marker, reason in _CHOSEN.items():
            if item.get_closest_marker(marker) and not config.getoption(f"--{marker}"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to go through every case of a check, and not through some of each kind."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Keep what is imported out of garbage collection: each training and each model collects, a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with the given options; skips where this user may not mount."""
    points = []

    def mount(options: str) -> Path:
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", point], capture_output=True, check=False)
        if made.returncode:
            pytest.skip("mounting needs root")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", point], check=True)
