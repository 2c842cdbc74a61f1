"""What is known before anything is read: ``fusekit merge --check``, its function, and estimates of disk and memory."""

import json
import resource
import shutil
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from mergekit.options import MergeOptions

from fusekit.cli import cli
from fusekit.devices import cgroup_limits
from fusekit.errors import MergeError
from fusekit.merging import Settings, check, merge
from tests.helpers import edit_tensors, family, refused
from tests.merging.conftest import MERGE, Q_PROJ, QUIET, UNESTIMATED, listing, traces
from tests.processes import fusekit


def run(*arguments):
    return CliRunner().invoke(cli, ["merge", *map(str, arguments)], standalone_mode=False)


def test_a_check_says_what_a_merge_would_do_and_writes_nothing(recipe, workshop):
    before = listing(workshop)
    found = check(recipe, "out")
    assert (found.base, found.models, found.tensors) == ("base", ["target1", "target2"], 21)
    assert found.can_run
    assert [line.split()[0].strip(",:") for line in found.needs] == ["disk", "memory"]
    assert listing(workshop) == before
    merged = merge(recipe, "out", settings=QUIET)
    assert (merged.method, merged.base, merged.models) == (found.method, found.base, found.models)
    weights = (workshop / "out/model.safetensors").stat().st_size
    assert found.nbytes <= weights <= found.nbytes + 10_000
    assert found.read_bytes == 3 * found.nbytes
    assert len(check(recipe, "out").problems) == 1, "the output is not empty now"
    assert check(recipe).can_run


def test_all_problems_are_found_at_once(write_recipe, workshop):
    (workshop / "out").mkdir()
    (workshop / "out/precious.txt").write_text("mine")
    (workshop / "target2/model.safetensors").unlink()
    recipe = write_recipe(parameters={"wieght": 0.5}, models=[{"model": "./gone"}, {"model": "target2"}])
    before = listing(workshop)
    found = check(recipe, "out", MergeOptions(device="cuda:99"))
    for part in ("wieght", "./gone", "target2 has no weights", "precious.txt", "cuda:99"):
        assert len([line for line in found.problems if part in line]) == 1, (part, found.problems)
    assert listing(workshop) == before


def test_problems_of_tensors_and_of_the_machine(recipe, workshop, monkeypatch):
    edit_tensors(workshop / "target1", lambda tensors: tensors.pop(Q_PROJ))
    assert [Q_PROJ in line for line in check(recipe).problems] == [True]
    shutil.copytree(workshop / "target2", workshop / "target1", dirs_exist_ok=True)
    monkeypatch.setattr("fusekit.devices.free_bytes", lambda _: 100)
    assert ["100 bytes free" in line for line in check(recipe).problems] == [True]
    assert check(recipe, settings=Settings(ignore_estimates=True)).can_run


def test_the_command_exits_with_1_and_prints_json(recipe, workshop):
    good = run(recipe, "--check", "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["models"] == ["target1", "target2"]
    (workshop / "target1/model.safetensors").unlink()
    bad = run(recipe, "out", "--check")
    assert isinstance(bad.exception, SystemExit) or bad.exit_code == 1
    assert "target1 has no weights" in bad.stdout
    shutil.copytree(workshop / "target2", workshop / "target1", dirs_exist_ok=True)
    done = run(recipe, "out", "--json", "--quiet")
    assert done.exception is None, done.output
    facts = json.loads(done.stdout)
    assert (facts["base"], facts["tensors"], facts["path"]) == ("base", 21, str(workshop / "out"))
    assert run(recipe, "out", "--quiet", "--overwrite").output == ""


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([""], ["empty name"]),
        (["a" * 300], ["File name too long"]),
        (["/proc/out"], ["no file can be made in /proc"]),
        (["out", "-j", "-1"], ["-1"]),
        (["out", "--out-shard-size", "-1"], ["'-1' is not a size"]),
        (["out", "--device", "cuda:99"], ["cuda:99"]),
        (["out", "--no-safe-serialization"], ["safetensors only"]),
        (["out", "--lora-merge-dtype", "float16"], ["--lora-merge-dtype"]),
        ([], ["OUT"]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(recipe, workshop, arguments, parts):
    before = listing(workshop)
    failed = run(recipe, *arguments)
    message = str(failed.exception) + getattr(failed.exception, "message", "")
    assert all(part in message for part in parts), message
    assert listing(workshop) == before


# ---------------------------------------------------------------- estimates


def test_disk_that_does_not_suffice(recipe, mounted):
    point = mounted("size=512k")
    numbers = "disk, for the result: about 1.1 MB needed, 52"
    with refused(MergeError, "does not fit", str(point), numbers, " kB free", "--ignore-estimates"):
        merge(recipe, point / "out", settings=QUIET)
    assert [name for name in listing(point) if not name.endswith(".lock")] == []
    # Enough for these tiny models, whatever the estimate allows for cards and indices.
    merge(recipe, point / "out", settings=UNESTIMATED)
    assert (point / "out/config.json").is_file()


def limit_address_space(extra: int) -> None:
    import psutil

    limit = psutil.Process().memory_info().vms + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_address_space_that_does_not_suffice(workshop, write_recipe):
    """Models of 15 MB each, and 20 MB to go."""
    family(workshop / "large", targets=2, vocab_size=60_000, hidden_size=32)
    write_recipe(base_model="large/base", models=[{"model": f"large/target{i}"} for i in (1, 2)])
    refused = fusekit(workshop, *MERGE, before=partial(limit_address_space, 20_000_000))
    assert refused.exitcode == 1, refused.output
    for part in ("does not fit", "memory: about", "left of the address space limit (ulimit -v)"):
        assert part in refused.output
    assert "merging:" not in refused.output, "it began to read"

    forced = fusekit(workshop, *MERGE, "--ignore-estimates", before=partial(limit_address_space, 20_000_000))
    assert forced.exitcode == 1, forced.output
    assert "Traceback" not in forced.output
    assert "out" not in listing(workshop)
    assert traces(workshop) == []

    fits = fusekit(workshop, *MERGE, before=partial(limit_address_space, 600_000_000))
    assert fits.exitcode == 0, fits.output


def test_half_the_shard_size_halves_what_waits_to_be_written(write_recipe, workshop):
    family(workshop / "wide", targets=1, hidden_size=64, num_hidden_layers=8)
    recipe = write_recipe(base_model="wide/base", models=[{"model": "wide/target1"}])

    def memory(shard: int) -> float:
        found = check(recipe, "out", MergeOptions(out_shard_size=shard))
        line = next(line for line in found.needs if line.startswith("memory"))
        return float(line.split("about ")[1].split(" kB")[0])

    assert memory(300_000) - memory(150_000) == pytest.approx(150, abs=0.2)


def test_cgroup_limits(tmp_path: Path):
    def write(folder: str, **files: str) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name.replace("__", ".")).write_text(text)

    def available(path: str) -> list[int]:
        return [limit.available for limit in cgroup_limits(tmp_path, path)]

    assert available("/a/b") == []
    write("a/b", memory__max="max\n", memory__current="100\n", memory__stat="anon 5\n")
    assert available("/a/b") == []
    write("a", memory__max="1000\n", memory__current="700\n", memory__stat="anon 5\ninactive_file 200\n")
    assert available("/a/b") == [500]
    # Inside a container the path of the host is not there, the limit stands at the root of the mount.
    write(".", memory__max="400\n", memory__current="300\n", memory__stat="anon 5\n")
    assert available("/docker/xyz") == [100]
