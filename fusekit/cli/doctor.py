"""`fusekit doctor`: what is installed, what the devices are, and whether mergekit sees fusekit and if not why."""

from __future__ import annotations

import click


@click.command()
def doctor() -> None:
    """Explain this installation in plain words. Exit status 1 if stock mergekit does not see fusekit's methods."""
    from fusekit.environment import autoload, devices, versions

    click.echo("Versions")
    for name, version in versions().items():
        click.echo(f"  {name:<16} {version}")
    click.echo("\nDevices")
    for line in devices():
        click.echo(f"  {line}")
    click.echo("\nStock mergekit (mergekit-yaml, mergekit-multi, mergekit-pytorch)")
    state = autoload()
    for line in state.lines:
        click.echo(f"  {line}")
    if not state.works:
        click.get_current_context().exit(1)
