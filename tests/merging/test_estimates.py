"""Fault 4: what does not fit is refused with the numbers, before a model is read."""

import re
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from mergekit.options import MergeOptions

from fusekit.errors import MergeError
from fusekit.hub import cgroup_limits
from fusekit.merging import Settings, check, merge
from tests.helpers import family
from tests.merging.conftest import MERGE, listing, traces
from tests.processes import fusekit

QUIET = Settings(say=lambda _: None)


def test_disk_that_does_not_suffice(write_recipe, mounted):
    point = mounted("size=512k")
    with pytest.raises(MergeError) as caught:
        merge(write_recipe(), point / "out", settings=QUIET)
    message = str(caught.value)
    assert "does not fit" in message
    assert re.search(r"disk, for the result: about 1.1 MB needed, 52\d.\d kB free", message)
    assert str(point) in message
    assert "--ignore-estimates" in message
    assert [name for name in listing(point) if not name.endswith(".lock")] == []
    # Enough for these tiny models, whatever the estimate allows for cards and indices.
    merge(write_recipe(), point / "out", settings=Settings(ignore_estimates=True, say=lambda _: None))
    assert (point / "out/config.json").is_file()


def limit_address_space(extra: int) -> None:
    import psutil

    limit = psutil.Process().memory_info().vms + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_address_space_that_does_not_suffice(workshop, write_recipe):
    """Models of 26 MB each, and 20 MB to go."""
    family(workshop / "large", targets=2, vocab_size=100_000, hidden_size=32)
    models = [{"model": f"large/target{i}"} for i in (1, 2)]
    write_recipe(base_model="large/base", models=models)
    refused = fusekit(workshop, *MERGE, before=partial(limit_address_space, 20_000_000))
    assert refused.exitcode == 1, refused.output
    assert "does not fit" in refused.output
    assert "memory: about" in refused.output
    assert "left of the address space limit (ulimit -v)" in refused.output
    assert "merging:" not in refused.output, "it began to read"

    forced = fusekit(workshop, *MERGE, "--ignore-estimates", before=partial(limit_address_space, 20_000_000))
    assert forced.exitcode == 1, forced.output
    assert "Traceback" not in forced.output
    assert "out" not in listing(workshop)
    assert traces(workshop) == []

    fits = fusekit(workshop, *MERGE, before=partial(limit_address_space, 600_000_000))
    assert fits.exitcode == 0, fits.output


def test_numbers_come_from_the_headers(write_recipe, workshop):
    lines = []
    merge(write_recipe(out_dtype="float64"), "out", MergeOptions(), Settings(say=lines.append))
    tensors = 64 * 16 * 2 + 2 * (16 + 16 * 16 + 8 * 16 * 2 + 16 * 16 + 16 + 3 * 24 * 16) + 16
    assert f"{3 * tensors * 4 / 1000:.1f} kB to read, {tensors * 8 / 1000:.1f} kB to write" in lines[0]
    weights = (workshop / "out/model.safetensors").stat().st_size
    assert weights - tensors * 8 < 4096


def test_half_the_shard_size_halves_what_waits_to_be_written(write_recipe, workshop):
    family(workshop / "wide", targets=1, hidden_size=64, num_hidden_layers=8, dtype=torch.float32)
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

    assert cgroup_limits(tmp_path, {"": "/a/b"}) == []
    write("a/b", memory__max="max\n", memory__current="100\n")
    assert cgroup_limits(tmp_path, {"": "/a/b"}) == []
    write("a", memory__max="1000\n", memory__current="700\n", memory__stat="anon 5\ninactive_file 200\n")
    assert [limit.available for limit in cgroup_limits(tmp_path, {"": "/a/b"})] == [500]
    # Inside a container the path of the host is not there, the limit stands at the root of the mount.
    write(".", memory__max="400\n", memory__current="300\n")
    assert [limit.available for limit in cgroup_limits(tmp_path, {"": "/docker/xyz"})] == [100]
    write("memory/c", memory__limit_in_bytes="50\n", memory__usage_in_bytes="20\n")
    assert [limit.available for limit in cgroup_limits(tmp_path, {"memory": "/c"})] == [30]
    write("memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="20\n")
    assert [limit.available for limit in cgroup_limits(tmp_path, {"memory": "/c", "": "/a"})] == [30]
