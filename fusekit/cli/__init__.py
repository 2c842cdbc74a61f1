"""The `fusekit` command. Commands are imported when they are called: `fusekit ls` does not wait for torch."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys

import click
from click.shell_completion import CompletionItem

from fusekit import __version__
from fusekit.errors import FusekitError

# command -> (module, attribute, one line of help shown without importing the module)
COMMANDS = {
    "capture": ("fusekit.cli.capture", "capture", "Capture what a model says about examples into a store."),
    "clean": ("fusekit.cli.run", "clean", "Remove what a run no longer needs, or what stages made."),
    "cp": ("fusekit.cli.recipe", "cp", "Copy a shipped recipe to a file."),
    "distill": ("fusekit.cli.distill", "distill", "Train a pivot on what other models know."),
    "doctor": ("fusekit.cli.doctor", "doctor", "Show versions, devices, and whether mergekit sees fusekit."),
    "evaluate": ("fusekit.cli.evaluate", "evaluate", "Score models on held-out examples, side by side."),
    "generate": ("fusekit.cli.generate", "generate", "Let several models write each answer together."),
    "inspect": ("fusekit.cli.inspect", "inspect", "Look at the alignment of two tokenizers, or at a store."),
    "ls": ("fusekit.cli.recipe", "ls", "List the shipped recipes."),
    "merge": ("fusekit.cli.merge", "merge", "Run a mergekit recipe safely: checked, estimated, published in one step."),
    "new": ("fusekit.cli.recipe", "new", "Write a minimal fusion recipe to start from."),
    "plan": ("fusekit.cli.recipe", "plan", "Show what a recipe would take: tokens, disk, memory."),
    "report": ("fusekit.cli.run", "report", "Make the report of a run again, finished or not."),
    "run": ("fusekit.cli.run", "run", "Run a fusion recipe: from sources to a merged, evaluated model."),
    "schema": ("fusekit.cli.recipe", "schema", "Print the JSON schema of fusion recipes, for editors."),
    "validate": ("fusekit.cli.recipe", "validate", "Check a recipe: every mistake at once."),
    "verify": ("fusekit.cli.run", "verify", "Compare artifacts on disk with what was committed."),
}


class LazyGroup(click.Group):
    """A click group whose commands live in modules that are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        found = [CompletionItem(name, help=COMMANDS[name][2]) for name in names]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fusekit")
def cli() -> None:
    """Fuse the knowledge of several language models into one."""


def main() -> None:
    """Entry point of the `fusekit` script: a FusekitError, or a full disk under
    what is printed, becomes one message on stderr and exit status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        cli()
    except FusekitError as error:
        click.echo(f"fusekit: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        click.echo(f"fusekit: {error.strerror} for a file or the standard output: write elsewhere", err=True)
        if sys.stdout is sys.__stdout__:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again at its end
        sys.exit(1)
