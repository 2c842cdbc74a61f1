"""`fusekit doctor`: what is installed, what the devices are, and whether mergekit sees fusekit and if not why."""

from __future__ import annotations

import click

from fusekit.cli.common import print_json


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: versions, devices, sees_fusekit, other_fusekit.")
def doctor(as_json: bool) -> None:
    """Explain this installation in plain words.

    Exit status 1 if stock mergekit does not see fusekit's methods, or if another project called fusekit is installed.
    """
    from fusekit.environment import autoload, devices, other_fusekit, versions

    works, explanation = autoload()
    clash = other_fusekit()
    if as_json:
        found = {"versions": versions(), "devices": devices(), "sees_fusekit": works, "other_fusekit": clash}
        print_json(found)
    else:
        for title, lines in (
            ("Versions", [f"{name:<16} {version}" for name, version in versions().items()]),
            ("Devices", devices()),
            ("Stock mergekit (mergekit-yaml, mergekit-multi, mergekit-pytorch)", explanation),
            ("Another fusekit", clash),
        ):
            if lines:
                click.echo("\n".join([title, *(f"  {line}" for line in lines), ""]))
    if clash or not works:
        click.get_current_context().exit(1)
