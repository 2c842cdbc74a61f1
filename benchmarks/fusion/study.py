"""Fusion as the papers do it and as fusekit does, side by side on the demo's models, over several seeds.

    python -m benchmarks.fusion.study --work /tmp/fusion-study            # at the top of a checkout

What is there is not made again: a run that was stopped, at any moment, goes on when it is started again. The figures
go to benchmarks/results/fusion-study.csv after every unit, and the tables to the README beside this file.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks.fusion import scores, tables
from benchmarks.fusion.arms import ARMS, RECIPE
from benchmarks.fusion.rows import MOST

README = Path(__file__).parent / "README.md"
FIGURES = Path(__file__).parents[1] / "results" / "fusion-study.csv"


_KEPT = ExitStack()


def _begin() -> None:
    """In a process of its own, before its first unit."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.fusion.memory import examples_in_memory

    disable_progress_bar()
    torch.set_num_threads(1)
    _KEPT.enter_context(examples_in_memory())


def _unit(arguments: tuple[Path, Path, int, int, float], arm: str, seed: int, until: float) -> str:
    """In a process of its own. Returns what to tell: how long it took, or what went wrong."""
    if time.time() > until:
        return "not begun: the time is up"
    from benchmarks.fusion.work import Study, unit

    started = time.monotonic()
    try:
        unit(Study(*arguments), arm, seed, lambda line: click.echo(f"  {line}", err=True))
    except Exception:  # the others go on, and what went wrong is told
        return f"failed\n{traceback.format_exc()}"
    return f"{time.monotonic() - started:.0f} s"


def _write(figures: Path, readme: Path, found: list[scores.Figure]) -> None:
    scores.write(figures, found)
    _write_tables(readme, found)


def _write_tables(readme: Path, found: list[scores.Figure]) -> None:
    text = readme.read_text(encoding="utf-8")
    readme.write_text(tables.put_between_marks(text, tables.tables(found)), encoding="utf-8")


def _run(
    arguments: tuple[Path, Path, int, int, float], units: list[tuple[str, int]], jobs: int, until: float, after: object
) -> bool:
    """Every unit, ``jobs`` at once. after: called when one is done. Returns whether all are."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes started below read it
    whole = True
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin) as pool:
        running = {pool.submit(_unit, arguments, arm, seed, until): (arm, seed) for arm, seed in units}
        for done in as_completed(running):
            arm, seed = running[done]
            told = done.result()
            click.echo(f"{arm}, seed {seed}: {told}", err=True)
            whole &= told.endswith(" s")
            after()  # type: ignore[operator]
    return whole


@click.command(help=__doc__)
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="Folder for everything that is made.")
@click.option("--rows", default=288, show_default=True, type=click.IntRange(8, MOST), help="To train on, per skill.")
@click.option("--questions", default=200, show_default=True, help="Held out, per skill.")
@click.option("--epochs", default=2.0, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="0, 1, ... up to so many.")
@click.option("--jobs", default=2, show_default=True, help="Processes, of one thread each.")
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(ARMS)), help="Only this one; can be repeated.")
@click.option("--minutes", default=1e6, help="Begin no unit after so many.", show_default="no limit")
@click.option("--recipe", default=RECIPE, show_default=False, type=click.Path(exists=True, path_type=Path))
@click.option("--figures", default=FIGURES, show_default=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--readme", default=README, show_default=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--tables", "only_tables", is_flag=True, help="Only write the tables anew, from the figures.")
def main(
    work: Path | None,
    rows: int,
    questions: int,
    epochs: float,
    seeds: int,
    jobs: int,
    arms: tuple[str, ...],
    minutes: float,
    recipe: Path,
    figures: Path,
    readme: Path,
    only_tables: bool,
) -> None:
    if only_tables:
        _write_tables(readme, scores.read(figures))
        return
    if work is None:
        raise click.UsageError("--work is missing: a folder for what is made")
    from benchmarks.fusion.work import Study, prepare

    until = time.time() + 60 * minutes
    arguments = (work.resolve(), recipe.resolve(), rows, questions, epochs)
    study = Study(*arguments)
    prepare(study, lambda line: click.echo(line, err=True))
    units = [(arm, seed) for seed in range(seeds) for arm in arms or tuple(ARMS)]
    units.sort(key=lambda each: ARMS[each[0]].tier)
    whole = _run(arguments, units, jobs, until, lambda: _write(figures, readme, scores.kept(study.scores)))
    if not whole:
        raise click.ClickException("not every unit is done: the same command goes on")


if __name__ == "__main__":
    main()
