"""Faults 2 and 7: a merge that dies at any moment leaves nothing loadable at the final path."""

import os
import signal
import time
from functools import partial

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.merging.conftest import MERGE, listing, traces
from tests.merging.test_outputs import stop_while_reading
from tests.processes import fusekit, is_stopped, kill_at, start, stop_self, strace_works, under_strace, wait_until


def weights(workshop):
    """The weights at the final path if a model stands there; it must be whole then."""
    out = workshop / "out"
    if not out.exists():
        return None
    assert AutoConfig.from_pretrained(out).model_type == "llama"
    assert (out / "tokenizer.json").is_file()
    assert (out / "README.md").is_file()
    assert len(load_file(out / "model.safetensors")) == 21
    return (out / "model.safetensors").read_bytes()


def finish(workshop, *options):
    """The same command again: it sweeps, succeeds, and leaves nothing beside the model."""
    again = fusekit(workshop, *MERGE, *options)
    assert again.exitcode == 0, again.output
    assert [name for name in traces(workshop) if name != ".out2.staging-0"] == []
    return weights(workshop)


def events(workshop, counter, *options):
    done = fusekit(workshop, *MERGE, *options, before=partial(kill_at, 0, str(counter)))
    assert done.exitcode == 0, done.output
    return int(counter.read_text())


def test_sigkill_at_every_stage_of_a_first_merge(recipe, workshop, tmp_path):
    total = events(workshop, tmp_path / "count")
    expected = weights(workshop)
    published = 0
    # The last events are the ones around the rename: all of them; of the earlier ones, some.
    moments = sorted({*range(3, total - 8, max(1, total // 5)), *range(total - 8, total + 1)})
    (workshop / ".out2.staging-0").mkdir()  # a neighbour's, who may be alive: it must not be swept
    for moment in moments:
        if (workshop / "out").exists():
            (workshop / "out").rename(tmp_path / f"old{moment}")
        died = fusekit(workshop, *MERGE, before=partial(kill_at, moment, ""))
        assert died.exitcode == -signal.SIGKILL, (moment, died)
        found = weights(workshop)
        assert found in (None, expected)
        published += found is not None
        assert finish(workshop, *(["--overwrite"] if found else [])) == expected
    assert (workshop / ".out2.staging-0").exists()
    assert 0 < published < len(moments)


def test_sigkill_around_the_exchange_keeps_the_old_model_or_the_new(write_recipe, workshop, tmp_path):
    write_recipe()
    assert fusekit(workshop, *MERGE).exitcode == 0
    old = weights(workshop)
    write_recipe(parameters={"weight": 0.9})
    total = events(workshop, tmp_path / "count", "--overwrite")
    new = weights(workshop)
    assert old != new
    seen = set()
    for moment in range(total - 12, total + 1, 2):
        write_recipe()
        assert finish(workshop, "--overwrite") == old
        write_recipe(parameters={"weight": 0.9})
        died = fusekit(workshop, *MERGE, "--overwrite", before=partial(kill_at, moment, ""))
        assert died.exitcode == -signal.SIGKILL, (moment, died)
        found = weights(workshop)
        assert found in (old, new)
        seen.add(found == new)
    assert seen == {False, True}
    assert finish(workshop, "--overwrite") == new


def test_sigkill_while_reading_leaves_only_staging_which_the_next_run_sweeps(recipe, workshop):
    child = start(workshop, *MERGE, before=stop_while_reading)
    wait_until(lambda: any("staging" in name for name in traces(workshop)))
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait().exitcode == -signal.SIGKILL
    assert "out" not in listing(workshop)
    left = [name for name in traces(workshop) if "staging" in name]
    again = fusekit(workshop, *MERGE)
    assert again.exitcode == 0
    assert f"removed what an interrupted merge left behind: {workshop / left[0]}" in again.output
    assert traces(workshop) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_clean_up_and_say_what_to_do(recipe, workshop, number, status):
    child = start(workshop, *MERGE, before=stop_while_reading)
    wait_until(lambda: is_stopped(child.pid))
    os.kill(child.pid, number)
    os.kill(child.pid, signal.SIGCONT)
    finished = child.wait()
    assert finished.exitcode == status, finished.output
    assert "nothing was published to out" in finished.output
    assert "Traceback" not in finished.output
    assert traces(workshop) == []
    assert "out" not in listing(workshop)


@pytest.mark.skipif(not strace_works(), reason="strace is not here or may not trace")
@pytest.mark.parametrize("call", ["rename", "renameat2"])
def test_sigkill_inside_the_kernel_call_that_publishes(recipe, workshop, call):
    if call == "renameat2":
        assert fusekit(workshop, *MERGE).exitcode == 0
    options = ["--overwrite"] if call == "renameat2" else []
    before = weights(workshop)
    # rename: the holder file is renamed first, the model last.
    when = 1 if call == "renameat2" else 2
    died, trace = under_strace(start(workshop, *MERGE, *options, before=stop_self), f"{call}:signal=KILL:when={when}")
    assert died.exitcode == -signal.SIGKILL, died
    assert "killed by SIGKILL" in trace
    found = weights(workshop)
    assert found is not None or before is None
    finish(workshop, *(["--overwrite"] if found else []))


def test_children_can_be_stopped(workshop, recipe):
    """What the tests above rely on."""
    child = start(workshop, *MERGE, before=stop_self)
    wait_until(lambda: is_stopped(child.pid))
    time.sleep(0.05)
    assert "out" not in listing(workshop)
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait().exitcode == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_after_the_publication_does_not_deny_it(recipe, workshop, monkeypatch, overwrite):
    from click.testing import CliRunner

    from fusekit import artifacts as publish
    from fusekit.cli.merge import merge

    monkeypatch.chdir(workshop)
    arguments = ["recipe.yml", "out", "--quiet"]
    if overwrite:
        assert CliRunner().invoke(merge, arguments).exit_code == 0
        arguments.append("--overwrite")
    sync = publish._sync

    def interrupted(folder):
        sync(folder)
        if folder == workshop.resolve():  # the last thing before the former model is deleted
            raise KeyboardInterrupt

    monkeypatch.setattr(publish, "_sync", interrupted)
    done = CliRunner().invoke(merge, arguments)
    assert done.exit_code == 130
    assert "the merged model is published to out, whole" in done.output
    assert weights(workshop)
