"""The scripts of docs/how-to/several-machines.md: a Slurm array run as processes, and Ray Data on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fusekit.capturing.store import Store
from tests.capture.conftest import DEMO, write_rows
from tests.processes import ENVIRONMENT

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def test_the_script_of_the_slurm_array(tmp_path):
    """Slurm's part is to start the script with SLURM_ARRAY_TASK_ID set; task 0 is lost at first."""
    write_rows(tmp_path / "rows.jsonl", 20)
    (tmp_path / "bin").mkdir()
    launcher = tmp_path / "bin" / "fusekit"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m fusekit.cli "$@" --rows-per-shard 3\n')
    launcher.chmod(0o755)
    environment = ENVIRONMENT | {
        "PATH": f"{launcher.parent}:{os.environ['PATH']}",
        "WORLD": "2",
        "SLURM_PROCID": "0",  # as in each task of an array
        "SLURM_NTASKS": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = ["bash", str(EXAMPLES / "slurm_capture.sh"), str(DEMO / "numbers"), "rows.jsonl", "out"]
    for task, complete in (("1", False), ("0", True)):
        done = subprocess.run(
            script,
            cwd=tmp_path,
            env=environment | {"SLURM_ARRAY_TASK_ID": task},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert Store.open(tmp_path / "out", incomplete=True).complete is complete
    assert len(Store.open(tmp_path / "out", verify=True)) == 20


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_ray_with_two_workers_of_which_one_is_killed(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 60)
    arguments = [str(DEMO / "numbers"), str(tmp_path / "rows.jsonl"), str(tmp_path / "out")]
    options = ["--workers", "2", "--cpus", "0.5", "--shares", "20", "--rows-per-shard", "3", "--max-length", "64"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "ray_capture.py"), *arguments, *options],
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        killed = None
        while process.poll() is None and killed is None:
            time.sleep(0.02)
            if not (tmp_path / "out" / "shard-00002.json").exists():
                continue
            workers = [one for one in psutil.process_iter(["name", "cmdline"]) if "MapBatches(Shares)" in str(one.info)]
            if workers:
                workers[0].kill()
                killed = workers[0].pid
        status = process.wait(400)
    said = (tmp_path / "log").read_text()
    assert killed is not None, said[-3000:]
    assert status == 0, said[-3000:]
    assert "60 examples" in said
    assert len(Store.open(tmp_path / "out", verify=True)) == 60
