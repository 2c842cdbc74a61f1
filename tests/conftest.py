"""One thread per test process: pytest runs as many as there are cores, and threads beyond that wait for each other.

``--full`` also runs what takes minutes: checks that go through every case of what the default run goes through in part.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also go through every case of the exhaustive checks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="goes through every case: --full"))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to go through every case of a check, and not through some of each kind."""
    return bool(request.config.getoption("--full"))
