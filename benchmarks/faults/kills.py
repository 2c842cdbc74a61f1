"""Kill a fusion run at random moments, start it again, and compare what it made with a run that nobody disturbed.

    python -m benchmarks.faults.kills --work /tmp/kills                # ten kills of recipes/demo-pairwise.yml
    python -m benchmarks.faults.kills --work /tmp/kills --jobs 2       # two at a time, with one thread each

1. The recipe is run once, undisturbed, and its time taken.
2. For every kill the same command is started in an empty folder and its whole process group gets SIGKILL at a moment
   drawn uniformly from that time. Then it is started again, to its end. All that it made has to be equal to what the
   undisturbed run made, apart from times and the names of machine and folder.
3. A source is added to the recipe of the undisturbed run. It has to make the new source's own artifacts and the merge
   anew, and leave everything else alone: same files, same bytes, not written again.

The result is a JSON file: machine, versions, seed, and per kill the second, what the run was doing, what the second
start found and kept, how long it took, and the differences. Exit status 1 when there is any.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import machine, parser_of

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("fusekit", "torch", "transformers", "mergekit", "safetensors", "tokenizers")
REMADE = (
    "recipe.resolved.yml",
    "merge.yml",
    "merged/",
    "evaluation/merged/",
    "results.json",
    "report.html",
    "models.json",
    "logs/",
)
"""What a source added later changes of what was there."""

Say = Callable[[str], None]
Differences = Callable[[Path, Path], Sequence[str]]


@dataclass
class Started:
    """A running ``fusekit run`` in a process group of its own. lines: (second, text) of what it has said."""

    process: subprocess.Popen[str]
    began: float
    lines: list[tuple[float, str]] = field(default_factory=list)

    @classmethod
    def of(cls, command: Sequence[str], threads: int | None) -> Started:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started = cls(process, time.monotonic())
        threading.Thread(target=started._listen, daemon=True).start()
        return started

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text := line.split("\r")[-1].strip():
                self.lines.append((round(time.monotonic() - self.began, 1), text))

    def end(self) -> float:
        """Wait for it; its seconds. Raises RuntimeError with what it said when it fails."""
        if self.process.wait():
            said = "\n".join(text for _, text in self.lines[-20:])
            raise RuntimeError(f"exit status {self.process.returncode}:\n{said}")
        return round(time.monotonic() - self.began, 1)

    def kill_at(self, second: float) -> bool:
        """SIGKILL all of it at a second of its run; False when it had ended before."""
        try:
            self.process.wait(max(0.0, self.began + second - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait() == -signal.SIGKILL
        return False


def command(recipe: Path, out: Path, changes: Sequence[str]) -> list[str]:
    """What a user would type."""
    options = [option for change in changes for option in ("--set", change)]
    return [sys.executable, "-m", "fusekit.cli", "run", str(recipe), str(out), *options]


def files(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every artifact: a file that was written again has others."""
    return {
        path.relative_to(out).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(out.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(out).parts)
    }


def kept(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, int]:
    """How many files of each artifact were reused as they were."""
    counts: dict[str, int] = {}
    for name, stamp in before.items():
        if after.get(name) == stamp:
            artifact = "/".join(name.split("/")[:-1][:2]) or name
            counts[artifact] = counts.get(artifact, 0) + 1
    return counts


@dataclass(frozen=True)
class Check:
    """What is run, where, and what its artifacts are compared with."""

    recipe: Path
    changes: Sequence[str]
    work: Path
    threads: int | None
    say: Say

    def start(self, out: Path, recipe: Path | None = None) -> Started:
        """Start the run, or that of another recipe."""
        return Started.of(command(recipe or self.recipe, out, self.changes), self.threads)

    @property
    def whole(self) -> Path:
        """What nobody disturbed."""
        return self.work / "whole"

    def kill_once(self, name: str, rng: random.Random, duration: float) -> dict[str, Any]:
        """Kill a run at a moment, start it again, compare. A moment after its end is drawn again, and counted."""
        out, missed = self.work / name, 0
        while True:
            shutil.rmtree(out, ignore_errors=True)
            moment, run = rng.uniform(0, duration), self.start(out)
            if run.kill_at(moment):
                break
            missed += 1
        before = files(out) if out.exists() else {}
        again = self.start(out)
        seconds = again.end()
        different = compare(self.whole, out)
        record = {
            "killed_at_second": round(moment, 1),
            "last_said": run.lines[-1][1] if run.lines else "nothing yet",
            "files_there": len(before),
            "files_reused": kept(before, files(out)),
            "went_on": [text for _, text in again.lines if "goes on from" in text or "not used" in text],
            "seconds_of_the_rerun": seconds,
            "drawn_again": missed,
            "differences": len(different),
            "different": different[:20],
        }
        self.say(
            f"{name}: killed at {moment:.1f} s ({record['last_said'][:60]}), "
            f"{seconds} s more, {len(different)} differences"
        )
        if not different:
            shutil.rmtree(out)
        return record

    def add_source(self, name: str, model: str) -> dict[str, Any]:
        """Add a source to the recipe of the undisturbed run: only what is its own is made, and the merge anew."""
        recipe = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        recipe["sources"].append({"name": name, "model": model, "load": {"dtype": "float32"}})
        more = self.work / "with-another-source.yml"
        more.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        before = files(self.whole)
        run = self.start(self.whole, more)
        seconds = run.end()
        after = files(self.whole)
        touched = [path for path in before if before[path] != after.get(path) and not path.startswith(REMADE)]
        new = sorted({"/".join(path.split("/")[:3]) for path in after.keys() - before.keys()})
        foreign = [path for path in new if not path.startswith(REMADE) and name not in path.split("/")]
        targets = yaml.safe_load((self.whole / "merge.yml").read_text(encoding="utf-8"))["models"]
        wrong = [f"{path}: was made again" for path in touched] + [
            f"{path}: is not the new source's" for path in foreign
        ]
        if before["merged/model.safetensors"] == after["merged/model.safetensors"]:
            wrong.append("merged/model.safetensors: was not made again")
        if len(targets) != len(recipe["sources"]):
            wrong.append(f"merge.yml: has {len(targets)} targets of {len(recipe['sources'])} sources")
        self.say(f"{name} added: {seconds} s, {len(wrong)} differences")
        return {
            "source": model,
            "seconds": seconds,
            "files_reused": kept(before, after),
            "made_anew": sorted(path for path in before if before[path] != after.get(path)),
            "differences": len(wrong),
            "different": wrong[:20],
        }


def compare(whole: Path, out: Path) -> list[str]:
    """What is different between the artifacts of two runs, apart from times, hosts and where they are."""
    from tests.pipeline.worlds import differences

    return list(differences(whole, out))


def check(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """All three parts; the result that is written."""
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise SystemExit(f"{work} is not empty: name an empty folder")
    threads = 1 if options.jobs > 1 else None
    checked = Check(options.recipe.resolve(), options.set, work, threads, say)
    run = checked.start(checked.whole)
    duration = run.end()
    say(f"undisturbed: {duration} s")

    def kill(number: int) -> dict[str, Any]:
        return checked.kill_once(f"kill{number}", random.Random(f"{options.seed}-{number}"), duration)

    with ThreadPoolExecutor(options.jobs) as pool:
        kills = list(pool.map(kill, range(options.kills)))
    added = checked.add_source(options.source_name, options.source) if options.source else None
    return {
        "command": shlex.join(
            ["python", "-m", "benchmarks.faults.kills", "--work", "WORK", *_without_places(options.said)]
        ),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "recipe": str(options.recipe),
        "seed": options.seed,
        "seconds_undisturbed": duration,
        "said_undisturbed": [f"{second}: {text}" for second, text in run.lines],
        "differences": sum(kill["differences"] for kill in kills) + (added["differences"] if added else 0),
        "kills": kills,
        "source_added": added,
    }


def _without_places(arguments: Sequence[str]) -> list[str]:
    """Without the folders of this machine."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [word for before, word in pairs if not {before, word} & {"--work", "--out"}]


def _version(package: str) -> str:
    if package == "fusekit":
        import fusekit

        return fusekit.__version__
    return importlib.metadata.version(package)


def main(arguments: Sequence[str]) -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--recipe", type=Path, default=REPOSITORY / "recipes" / "demo-pairwise.yml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="as for fusekit run")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with several each has one thread")
    parser.add_argument("--source", default="demo/models/facts", help="the model that is added; empty: none")
    parser.add_argument("--source-name", default="added")
    parser.add_argument("--out", type=Path, help="the result; default: standard output")
    options = parser.parse_args(arguments)
    options.said = list(arguments)
    result = check(options, lambda line: print(line, file=sys.stderr, flush=True))
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    text = text.replace(str(options.work.resolve()), "WORK").replace(str(options.work), "WORK")
    text = text.replace(f"{REPOSITORY}/", "")
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 1 if result["differences"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
