"""``fusekit report``: the page of a run, and the card of its merged model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from fusekit.errors import StorageError


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--no-card", is_flag=True, help="Leave the card of the merged model as it is.")
@click.option("--quiet", is_flag=True, help="Print errors and warnings only.")
def report(out: Path, *, no_card: bool = False, quiet: bool = False) -> None:
    """Write report.html of the run in the folder OUT, and the model card (README.md) of its merged model.

    OUT may be unfinished: the report says what is missing. While a run is writing OUT, the report shows what is there
    so far and the card is not changed.
    """
    from fusekit.disk import output_lock
    from fusekit.report.card import write_report
    from fusekit.report.facts import Facts

    out = out.resolve()
    Facts(out)  # refuses any other folder before it is locked
    with ExitStack() as held:
        try:
            held.enter_context(output_lock(out))
        except StorageError as error:
            click.echo(f"fusekit: {error} The report shows what is there so far; the card is not changed.", err=True)
            no_card = True
        for line in write_report(out, with_card=not no_card):
            if not quiet or line.startswith("warning"):
                click.echo(line, err=line.startswith("warning"))
    if not quiet:
        click.echo(f"report: {out / 'report.html'}")
