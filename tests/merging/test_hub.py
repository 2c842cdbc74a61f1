"""Fault 25, and hub ids: the real client against a hub on loopback, offline and online."""

import contextlib
import io
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from fusekit.hub import SMALL_FILES, Snapshot
from fusekit.merging import merge
from tests.helpers import family, merge_recipe, same_tensors, tensors_of, tiny_llama
from tests.merging.conftest import QUIET
from tests.merging.hub_server import Hub, Repository, client
from tests.processes import run as run_function


@dataclass
class Result:
    status: int
    output: str
    seconds: float


def call_all(cwd: Path, commands: list[list[str]], environment: dict[str, str], found: Path) -> None:
    """Call ``fusekit ARGS`` one after the other as a process that was started with this environment. For a child."""
    from fusekit.cli import main

    client(environment)
    os.chdir(cwd)
    results = []
    for args in commands:
        text, started, status = io.StringIO(), time.monotonic(), 0
        sys.argv = ["fusekit", *args]
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                main()
            except SystemExit as stop:
                status = stop.code or 0
        results.append([status, text.getvalue(), time.monotonic() - started])
    found.write_text(json.dumps(results))


def run(cwd: Path, commands: list[list[str]], command: str = "merge", **environment: str) -> list[Result]:
    """Run ``fusekit COMMAND ARGS`` for each of the commands."""
    found = cwd / "results.json"
    done = run_function(call_all, cwd, [[command, *args] for args in commands], environment, found, timeout=240)
    assert done.exitcode == 0, done.output
    return [Result(*result) for result in json.loads(found.read_text())]


def recipe(folder: Path, name: str, base: str, targets: list[str]) -> str:
    content = merge_recipe(base, targets, "task_arithmetic", parameters={"weight": 0.5})
    (folder / name).write_text(yaml.safe_dump(content))
    return name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A hub with a family of models, some of them troublesome, and an empty client cache."""
    root = tmp_path_factory.mktemp("hub")
    base, targets = family(root / "served", targets=2)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    other = tiny_llama(root / "served/other", seed=7, intermediate_size=40)
    with Hub() as hub:
        hub.repositories = {
            "org/base": Repository(base),
            "org/one": Repository(targets[0]),
            "org/two": Repository(targets[1]),
            "org/other": Repository(other),
            "org/gated": Repository(targets[1], gated=True),
            "org/slow": Repository(targets[1], delay=6.0),
        }
        yield root, hub


@pytest.fixture(scope="module")
def online(world):
    """The results of every online case by name, from one process."""
    root, hub = world
    targets = {
        "other": ["org/one", "org/other"],
        "gated": ["org/one", "org/gated"],
        "revision": ["org/one@no-such-branch"],
        "good": ["org/one", f"org/two@{hub.repositories['org/two'].commit()}"],
        "again": ["org/one", "org/two"],
        "slow": ["org/slow"],
    }
    commands = [[recipe(root, f"{name}.yml", "org/base", models), name] for name, models in targets.items()]
    results = run(root, commands, HF_ENDPOINT=hub.url, HF_HOME=str(root / "cache"))
    return dict(zip(targets, results, strict=True))


def test_a_merge_from_the_hub(world, online, monkeypatch):
    root, hub = world
    good = online["good"]
    assert good.status == 0, good.output
    assert "downloading" in good.output
    assert "of org/one" in good.output
    assert "\r" not in good.output, "a progress bar where there is no terminal"
    monkeypatch.chdir(root)
    merge(recipe(root, "local.yml", "served/base", ["served/target1", "served/target2"]), "local", settings=QUIET)
    same_tensors(tensors_of(root / "good"), tensors_of(root / "local"))
    card = (root / "good/README.md").read_text()
    assert "[org/base](https://huggingface.co/org/base)" in card
    assert "- org/one" in card
    assert f"org/one (commit {hub.repositories['org/one'].commit()})" in card
    assert str(root) not in card, "a path of this machine in a public card"
    assert (root / "good/chat_template.jinja").is_file(), "mergekit itself does not fetch it"
    # Each weight file came once in full, after a look at its header.
    sent = hub.bytes_sent_of("org/one/resolve")
    weights = [request for request in sent if "model.safetensors" in request]
    assert sum("bytes=0-100000" in request for request in weights) >= 1
    assert sum("bytes=" not in request for request in weights) == 1


def test_what_is_cached_is_not_downloaded_again(online):
    again = online["again"]
    assert again.status == 0, again.output
    assert "download" not in again.output


def test_weights_are_of_the_commit_that_was_planned(tmp_path, monkeypatch):
    """A branch may move while weights are fetched; the small files tell the cache which commit it meant."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **how: asked.append(how["revision"]))
    snapshot = Snapshot("org/one", "main", "c0ffee", tmp_path, {}, online=True, cache=tmp_path)
    snapshot.fetch([*SMALL_FILES, "*.py"])
    snapshot.fetch(["model.safetensors"])
    assert asked == ["main", "c0ffee"]


def test_models_that_do_not_fit_are_refused_before_their_weights_are_fetched(world, online):
    _, hub = world
    other = online["other"]
    assert other.status == 1
    assert "org/other" in other.output
    assert "[40, 16]" in other.output
    full = [request for request in hub.bytes_sent_of("org/other/resolve") if "safetensors" in request]
    assert full
    assert all("bytes=" in request for request in full)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("gated", ["org/gated is gated", "accept its licence at http", "hf auth login", "no token is set", "line 6"]),
        ("revision", ["org/one", "no-such-branch", "line 5"]),
        ("slow", ["org/slow is not in the cache", "does not answer", "check the network"]),
    ],
)
def test_named_errors_with_a_hint(world, online, case, parts):
    root, _ = world
    result = online[case]
    assert result.status == 1
    for part in parts:
        assert part in result.output, result.output
    assert "Traceback" not in result.output
    assert not (root / case).exists()
    assert result.seconds < 10


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "unreachable"])
def test_without_a_network_the_cache_is_used_and_the_rest_fails_fast(world, online, how):
    root, hub = world
    environment = {"HF_HOME": str(root / "cache"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    if how == "unreachable":
        environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}  # nothing listens there
    asked = len(hub.requests)
    cached = [recipe(root, "cached.yml", "org/base", ["org/one"]), f"cached-{how}"]
    partly = [recipe(root, "partly.yml", "org/base", ["org/one", "org/other"]), f"partly-{how}"]
    absent = [recipe(root, "absent.yml", "org/base", ["org/absent"]), f"absent-{how}"]
    good, half, none = run(root, [cached, partly, absent], **environment)
    assert good.status == 0, good.output
    assert "the hub cannot be reached, the cached commit" in good.output
    assert len(hub.requests) == asked
    assert half.status == none.status == 1
    assert "org/other" in half.output
    assert "not in the cache, and the hub cannot be reached" in half.output
    assert "org/absent is not in the cache" in none.output
    assert ("HF_HUB_OFFLINE is set" if how == "HF_HUB_OFFLINE" else "check the network") in none.output
    assert max(half.seconds, none.seconds) < 10
